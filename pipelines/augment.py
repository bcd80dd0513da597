"""Augmentation of cropped and flipped images: operations, mixing and erasing, for every pipeline, on CPU and GPU.

rows = with_partners(views, order[:256])
images = ...                                  # the images of `rows`, cropped and flipped
images = augment(images, views, rows, 256)    # the first 256 of them, augmented

The images that an operation changes are selected on the CPU, where the table is, so that nothing waits for a GPU.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastofa.kernels import augment as kernels
from fastofa.views.rand_augment import OPS
from fastofa.views.table import Views, pixel_boxes

CACHE_PIXELS = 100_000  # pixels whose intermediate results fit into a CPU's cache


def with_partners(views: Views, rows: np.ndarray) -> np.ndarray:
    """The rows of a batch, followed by the partners that are not among them (none if the order keeps pairs together).

    int64 [B] -> int64 [M], M >= B.
    """
    if views.partner is None:
        return rows
    return np.concatenate([rows, np.setdiff1d(views.partner[rows], rows)])


def augment(images: Tensor, views: Views, rows: np.ndarray, count: int) -> Tensor:
    """Apply the table's operations, mixing and erasing: uint8 [M, 3, S, S] of `rows` [M] -> uint8 [count, 3, S, S].

    The order is that of the published code: its collate function mixes, then its loader erases on the device. `images`
    may be overwritten.
    """
    images = _apply_operations(images, views.take(rows), views.mean)
    images = _mix(images, views.take(rows), rows, count)
    return _erase(images, views.take(rows[:count]))


def _apply_operations(images: Tensor, table: Views, mean: Sequence[float]) -> Tensor:
    if table.ops is None or table.amounts is None:
        return images
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    for ops, amounts in zip(table.ops.T, table.amounts.T, strict=True):
        for op in np.unique(ops[ops > 0]):
            operation = kernels.OPERATIONS[OPS[op]]
            for part in _parts(np.flatnonzero(ops == op), images):
                _put(images, part, operation(_get(images, part), torch.from_numpy(amounts[part]), (red, green, blue)))
    return images


def _mix(images: Tensor, table: Views, rows: np.ndarray, count: int) -> Tensor:
    if table.partner is None or table.mix is None or table.mix_box is None:
        return images
    by_row = np.argsort(rows, kind="stable")
    partner = by_row[np.searchsorted(rows, table.partner[:count], sorter=by_row)]
    is_cut = table.mix_box[:count, 2] > 0
    blended, cut = np.flatnonzero((table.mix[:count] < 1) & ~is_cut), np.flatnonzero(is_cut)
    mixed = images[:count].clone(memory_format=torch.preserve_format)
    for which, kernel, parameters in (
        (blended, kernels.mixup, table.mix),
        (cut, kernels.cutmix, pixel_boxes(table.mix_box, images.shape[-1])),
    ):
        for part in _parts(which, images):
            own, other = _get(images, part), _get(images, partner[part])
            _put(mixed, part, kernel(own, other, torch.from_numpy(parameters[part])))
    return mixed


def _erase(images: Tensor, table: Views) -> Tensor:
    if table.erase is None or table.noise is None:
        return images
    boxes = pixel_boxes(table.erase, images.shape[-1])
    for part in _parts(np.flatnonzero(table.erase[:, 2]), images):
        box, key = torch.from_numpy(boxes[part]), torch.from_numpy(table.noise[part])
        _put(images, part, kernels.erase(_get(images, part), box, key, table.mean, table.std))
    return images


def _parts(which: np.ndarray, images: Tensor) -> Iterator[np.ndarray]:
    """Split indices of images: on a CPU into small parts, so that intermediate results stay in its cache."""
    at_once = max(1, CACHE_PIXELS // images.shape[-1] ** 2) if images.device.type == "cpu" else max(1, len(which))
    for first in range(0, len(which), at_once):
        yield which[first : first + at_once]


def _get(images: Tensor, which: np.ndarray) -> Tensor:
    """Select images of a channels-last batch. Copying contiguous memory is much faster than images[which]."""
    at = torch.from_numpy(which).to(images.device, non_blocking=True)
    return images.permute(0, 2, 3, 1).index_select(0, at).permute(0, 3, 1, 2)


def _put(images: Tensor, which: np.ndarray, values: Tensor) -> None:
    if images.device.type == "cpu":
        for i, value in zip(which.tolist(), values, strict=True):
            images[i].copy_(value)
    else:
        images.index_copy_(0, torch.from_numpy(which).to(images.device, non_blocking=True), values)


def shares(views: Views, rows: np.ndarray, size: int) -> np.ndarray:
    """float32 [B]: the weight of each row's own label; for cutmix, its fraction of the pixels at image size `size`."""
    assert views.mix is not None
    assert views.mix_box is not None
    top, left, bottom, right = pixel_boxes(views.mix_box[rows], size).T
    counted = 1 - (bottom - top) * (right - left) / (size * size)
    return np.where(views.mix_box[rows, 2] > 0, counted, views.mix[rows]).astype(np.float32)
