"""Augmentation of cropped and flipped images: operations, mixing and erasing, for every pipeline, on CPU and GPU.

rows = with_partners(views, order[:256])
images = ...                                  # the images of `rows`, cropped and flipped
images = augment(images, views, rows, 256)    # the first 256 of them, augmented
"""

import numpy as np
import torch
from torch import Tensor

from fastofa.kernels.augment_batch import Erasing, Mixing, apply_operations, mix_and_erase
from fastofa.views.table import Views, pixel_boxes


def with_partners(views: Views, rows: np.ndarray) -> np.ndarray:
    """The rows of a batch, followed by the partners that are not among them (none if the order keeps pairs together).

    int64 [B] -> int64 [M], M >= B.
    """
    if views.partner is None:
        return rows
    return np.concatenate([rows, np.setdiff1d(views.partner[rows], rows)])


def augment(images: Tensor, views: Views, rows: np.ndarray, count: int, impl: str | None = None) -> Tensor:
    """Apply the table's operations, mixing and erasing: uint8 [M, 3, S, S] of `rows` [M] -> uint8 [count, 3, S, S].

    The order is that of the published code: its collate function mixes, then its loader erases on the device. `images`
    may be overwritten. `impl` is as in `fastofa.kernels.augment_batch`.
    """
    table, size = views.take(rows), images.shape[-1]
    if table.ops is not None and table.amounts is not None:
        red, green, blue = (min(255, round(255 * value)) for value in table.mean)
        ops, amounts = torch.from_numpy(table.ops), torch.from_numpy(table.amounts)
        images = apply_operations(images, ops, amounts, (red, green, blue), impl)
    return mix_and_erase(images, count, _mixing(table, rows, count, size), _erasing(table, count, size), impl)


def _mixing(table: Views, rows: np.ndarray, count: int, size: int) -> Mixing | None:
    if table.partner is None or table.mix is None or table.mix_box is None:
        return None
    by_row = np.argsort(rows, kind="stable")
    partners = by_row[np.searchsorted(rows, table.partner[:count], sorter=by_row)]
    is_cut = table.mix_box[:count, 2] > 0
    shares = np.where(is_cut, np.float32(1), table.mix[:count])
    boxes = np.where(is_cut[:, None], pixel_boxes(table.mix_box[:count], size), 0)
    return Mixing(*map(torch.from_numpy, (partners, shares, boxes)))


def _erasing(table: Views, count: int, size: int) -> Erasing | None:
    if table.erase is None or table.noise is None:
        return None
    boxes = pixel_boxes(table.erase[:count], size)
    return Erasing(torch.from_numpy(boxes), torch.from_numpy(table.noise[:count]), table.mean, table.std)


def shares(views: Views, rows: np.ndarray, size: int) -> np.ndarray:
    """float32 [B]: the weight of each row's own label; for cutmix, its fraction of the pixels at image size `size`."""
    assert views.mix is not None
    assert views.mix_box is not None
    top, left, bottom, right = pixel_boxes(views.mix_box[rows], size).T
    counted = 1 - (bottom - top) * (right - left) / (size * size)
    return np.where(views.mix_box[rows, 2] > 0, counted, views.mix[rows]).astype(np.float32)
