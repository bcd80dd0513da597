"""Augmentation of cropped and flipped images: operations, mixing and erasing, for every pipeline, on CPU and GPU.

rows = with_partners(views, order[:256])
images = ...                                  # the images of `rows`, cropped and flipped
images = augment(images, views, rows, 256)    # the first 256 of them, augmented
"""

import functools

import numpy as np
import torch
from torch import Tensor

from fastofa.kernels.augment_batch import NAMES, Erasing, Mixing, apply_operations, mix_and_erase
from fastofa.kernels.choice import HAS_TRITON
from fastofa.system.progress import notice
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
    may be overwritten. `impl` is as in `fastofa.kernels.augment_batch`; None: Triton on a GPU, after a check.
    """
    table, size, impl = views.take(rows), images.shape[-1], impl or _implementation(images.device)
    if table.ops is not None and table.amounts is not None:
        red, green, blue = (min(255, round(255 * value)) for value in table.mean)
        ops, amounts = torch.from_numpy(table.ops), torch.from_numpy(table.amounts)
        images = apply_operations(images, ops, amounts, (red, green, blue), impl)
    return mix_and_erase(images, count, _mixing(table, rows, count, size), _erasing(table, count, size), impl)


@functools.cache
def _implementation(device: torch.device) -> str:
    return checked(device) if device.type == "cuda" and HAS_TRITON else "torch"


def checked(device: str | torch.device) -> str:
    """Return "triton" if it equals the twin on a batch with every operation; else report that and return "torch"."""
    count = len(NAMES)
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(256, size=(count, 3, 32, 32), dtype=np.uint8)).to(device)
    ops, amounts = torch.arange(count, dtype=torch.uint8)[:, None], torch.full((count, 1), 1.5)
    boxes, shares = torch.tensor([[4, 6, 20, 30]]).repeat(count, 1), torch.linspace(0, 1, count)
    boxes[::2] = 0
    shares[1::2] = 1
    mixing = Mixing(torch.arange(count).roll(1), shares, boxes)
    erasing = Erasing(boxes.flip(0), torch.arange(count, dtype=torch.int32), (0.5,) * 3, (0.2,) * 3)
    try:
        results = [
            mix_and_erase(apply_operations(images.clone(), ops, amounts, (9, 9, 9), impl), count, mixing, erasing, impl)
            for impl in ("triton", "torch")
        ]
        problem = "" if torch.equal(*results) else "its results differ from PyTorch's"
    except Exception as error:
        problem = f"{type(error).__name__} ({' '.join(str(error).split())[:120]})"
    if problem:
        notice(f"augmentation by Triton: {problem}; PyTorch's own kernels are used")
    return "torch" if problem else "triton"


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
