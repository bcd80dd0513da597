"""From cropped and flipped pictures to what the student sees: one function, for every pipeline and both devices.

rows = with_partners(views, order[:256])
images = ...                                  # the pictures of `rows`, cropped and flipped
images = augment(images, views, rows, 256)    # of the first 256 of them

Which pictures an operation changes is worked out on the CPU, where the table is, so nothing here waits for a GPU.
"""

import numpy as np
import torch
from torch import Tensor

from fastofa.kernels import augment as kernels
from fastofa.rand_augment import OPS
from fastofa.views import Views, pixel_boxes


def with_partners(views: Views, rows: np.ndarray) -> np.ndarray:
    """The rows of a batch, and after them those partners that are not among them (none, if the order keeps pairs)."""
    if views.partner is None:
        return rows
    return np.concatenate([rows, np.setdiff1d(views.partner[rows], rows)])


def augment(images: Tensor, views: Views, rows: np.ndarray, count: int) -> Tensor:
    """uint8 [M, 3, S, S] of the table's `rows` -> [count, 3, S, S]: operations, mixing with the partner, erasing.

    The order is the published code's, whose loader erases on the device after its collate function has mixed.
    """
    table = views.take(rows)
    if table.ops is not None and table.amounts is not None:
        fill = tuple(min(255, round(255 * value)) for value in views.mean)
        for ops, amounts in zip(table.ops.T, table.amounts.T, strict=True):
            for op in np.unique(ops[ops > 0]):
                which = np.flatnonzero(ops == op)
                operation, given = kernels.OPERATIONS[OPS[op]], torch.from_numpy(amounts[which])
                at = _indices(which, images)
                images.index_copy_(0, at, operation(images[at], given, fill))  # type: ignore[arg-type]
    images, table = _mixed(images, table, rows, count), views.take(rows[:count])
    if table.erase is not None and table.noise is not None:
        boxes = pixel_boxes(table.erase, images.shape[-1])
        which = np.flatnonzero(table.erase[:, 2])
        at, keys = _indices(which, images), torch.from_numpy(table.noise[which])
        images.index_copy_(
            0, at, kernels.erase(images[at], torch.from_numpy(boxes[which]), keys, views.mean, views.std)
        )
    return images


def _mixed(images: Tensor, table: Views, rows: np.ndarray, count: int) -> Tensor:
    if table.partner is None or table.mix is None or table.mix_box is None:
        return images
    by_id = np.argsort(rows, kind="stable")
    partner = by_id[np.searchsorted(rows, table.partner[:count], sorter=by_id)]
    is_cut = table.mix_box[:count, 2] > 0
    blended, cut = np.flatnonzero((table.mix[:count] < 1) & ~is_cut), np.flatnonzero(is_cut)
    mixed = images[:count].clone(memory_format=torch.preserve_format)
    for which, kernel, given in (
        (blended, kernels.mixup, table.mix),
        (cut, kernels.cutmix, pixel_boxes(table.mix_box, images.shape[-1])),
    ):
        at, other = _indices(which, images), _indices(partner[which], images)
        mixed.index_copy_(0, at, kernel(images[at], images[other], torch.from_numpy(given[which])))
    return mixed


def shares(views: Views, rows: np.ndarray, size: int) -> np.ndarray:
    """float32 [B]: each row's own share of its picture, of cutmix counted in the pixels of a picture of `size`."""
    assert views.mix is not None
    assert views.mix_box is not None
    top, left, bottom, right = pixel_boxes(views.mix_box[rows], size).T
    counted = 1 - (bottom - top) * (right - left) / (size * size)
    return np.where(views.mix_box[rows, 2] > 0, counted, views.mix[rows]).astype(np.float32)


def _indices(which: np.ndarray, images: Tensor) -> Tensor:
    return torch.from_numpy(which).to(images.device, non_blocking=True)
