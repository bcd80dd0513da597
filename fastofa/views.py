"""Randomness is data: a view is one augmentation of every image, drawn up front as a table with a row per image.

A table is a pure function of (policy, seed, view number, image sizes), so pixels are the same for any number of workers
or ranks, any batch size, and after resuming. A row depends on its own image only, not on the other rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastofa.errors import BadInput

UNIT = 65535  # crops are stored as fractions of the whole picture in 1/65535
TRIES = 10  # as in torchvision's RandomResizedCrop
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ViewPolicy:
    """What may be drawn; the defaults are the published ImageNet recipe's."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a share of the picture's, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, from and to (uniform in its logarithm)."""
    flip: float = 0.5
    """Probability of mirroring left to right."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high or (name == "scale" and high > 1):
                limit = " <= 1" if name == "scale" else ""
                raise BadInput(f"view policy: expected {name} with 0 < from <= to{limit}, got {low} {high}")
        if not 0 <= self.flip <= 1:
            raise BadInput(f"view policy: expected flip between 0 and 1, got {self.flip}")


@dataclass(frozen=True)
class Views:
    """One view of every image. Row i belongs to sample id i."""

    crop: np.ndarray
    """uint16 [N, 4]: top, left, height, width in 1/65535 of the whole picture."""
    flip: np.ndarray
    """bool [N]: mirror left to right."""

    def __len__(self) -> int:
        return len(self.crop)

    def boxes(self, sizes: np.ndarray) -> np.ndarray:
        """The crops in whole pixels, int64 [N, 4], for pictures of `sizes` [N, 2] (height, width).

        Exact for the sizes the views were drawn with (up to 65,535 pixels a side).
        """
        extent = np.asarray(sizes)[:, [0, 1, 0, 1]]
        boxes = np.rint(self.crop.astype(np.float64) * extent / UNIT).astype(np.int64)
        boxes[:, 2:] = boxes[:, 2:].clip(1, extent[:, 2:])
        boxes[:, :2] = np.minimum(boxes[:, :2], extent[:, :2] - boxes[:, 2:])
        return boxes


def _views(boxes: np.ndarray, flip: np.ndarray, sizes: np.ndarray) -> Views:
    crop = np.rint(boxes * (UNIT / sizes[:, [0, 1, 0, 1]])).astype(np.uint16)
    return Views(crop, flip)


def draw_views(policy: ViewPolicy, sizes: np.ndarray, seed: int, view: int) -> Views:
    """RandomResizedCrop (torchvision's algorithm: 10 tries, then the largest allowed centre crop) and flip.

    Args:
        policy: what may be drawn.
        sizes: int [N, 2], height and width of each picture in pixels.
        seed, view: choose the table; each (seed, view) has its own random stream.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    rng = np.random.Generator(np.random.Philox(key=[seed, view]))
    boxes = np.empty((len(sizes), 4), dtype=np.int64)
    flip = np.empty(len(sizes), dtype=bool)
    for first in range(0, len(sizes), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        draws = rng.random((len(sizes[rows]), 4 * TRIES + 1))
        boxes[rows] = _random_resized_crop(policy, sizes[rows], draws[:, 1:].reshape(-1, TRIES, 4))
        flip[rows] = draws[:, 0] < policy.flip
    return _views(boxes, flip, sizes)


def _random_resized_crop(policy: ViewPolicy, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """`draws` uniform [N, TRIES, 4] (area, aspect, top, left) -> boxes int64 [N, 4] in pixels."""
    boxes = np.empty((len(sizes), 4), dtype=np.int64)
    low, high = np.log(policy.ratio)
    left_over = np.arange(len(sizes))
    for attempt in range(TRIES):
        height, width = sizes[left_over].T
        area, aspect, down, across = draws[left_over, attempt].T
        area = height * width * (policy.scale[0] + area * (policy.scale[1] - policy.scale[0]))
        aspect = np.exp(low + aspect * (high - low))
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top = (down * (height - h + 1)).astype(np.int64)
        left = (across * (width - w + 1)).astype(np.int64)
        boxes[left_over[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        left_over = left_over[~fits]
        if not len(left_over):
            return boxes

    height, width = sizes[left_over].T
    narrow, wide = width / height < policy.ratio[0], width / height > policy.ratio[1]
    w = np.where(wide, np.rint(height * policy.ratio[1]), width).astype(np.int64)
    h = np.where(narrow, np.rint(width / policy.ratio[0]), height).astype(np.int64)
    boxes[left_over] = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    return boxes


def center_views(sizes: np.ndarray, fraction: float = 0.875) -> Views:
    """The evaluation view: the central square whose side is `fraction` of the picture's shorter side, no flip."""
    sizes = np.asarray(sizes)
    side = np.rint(sizes.min(axis=1) * fraction).astype(np.int64).clip(1)
    boxes = np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], axis=1)
    return _views(boxes, np.zeros(len(sizes), dtype=bool), sizes)


def epoch_order(size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Sample ids of one rank's share of an epoch, int64: every world_size-th of a permutation by (seed, epoch).

    The ranks' batches number b together hold the same samples as batch b of one rank with the whole batch size.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, (1 << 32) + epoch]))
    return rng.permutation(size)[rank::world_size]


def batches(views: Views, order: np.ndarray, start: int, batch_size: int) -> Iterator[np.ndarray]:
    """Sample ids of each batch from position `start` of the order on; refuses an order that leaves the table."""
    order = np.asarray(order, dtype=np.int64)
    if len(order) and not 0 <= order.min() <= order.max() < len(views):
        raise ValueError(f"order: expected sample ids 0..{len(views) - 1}, got {order.min()}..{order.max()}")
    if not 0 <= start <= len(order):
        raise ValueError(f"start: expected 0..{len(order)}, got {start}")
    for first in range(start, len(order), batch_size):
        yield order[first : first + batch_size]
