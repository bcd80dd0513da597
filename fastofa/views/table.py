"""A view as a table: one row of augmentation parameters per image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fastofa.views.policy import ViewPolicy

UNIT = 65535  # boxes are stored as fractions of the whole image in 1/65535


@dataclass(frozen=True)
class Views:
    """One view of every image. Row i belongs to sample id i. Columns that the policy does not use are None."""

    crop: np.ndarray
    """uint16 [N, 4]: top, left, height, width in 1/65535 of the whole image."""
    flip: np.ndarray
    """bool [N]: flip horizontally."""
    bicubic: np.ndarray | None = None
    """bool [N]: resize the crop with a bicubic filter, otherwise with a bilinear one; None: bilinear for all."""
    ops: np.ndarray | None = None
    """uint8 [N, n]: operations in the order of application, indices into `rand_augment.OPS`; 0 for none."""
    amounts: np.ndarray | None = None
    """float32 [N, n]: the amount of each operation in its own unit (`rand_augment.amounts`)."""
    partner: np.ndarray | None = None
    """int32 [N]: the row with which this row is mixed, and vice versa; its own row for none."""
    mix: np.ndarray | None = None
    """float32 [N]: the weight of the row's own image in the mixture, equal for both partners; 1 for none."""
    mix_box: np.ndarray | None = None
    """uint16 [N, 4]: the box that cutmix takes from the partner, in 1/65535 of the cropped image; mixup: height 0."""
    erase: np.ndarray | None = None
    """uint16 [N, 4]: the box to erase, in 1/65535 of the cropped image; height 0 for none."""
    noise: np.ndarray | None = None
    """int32 [N]: the key of the erasing noise, which is a function of the key and the pixel's position."""
    mean: tuple[float, float, float] = ViewPolicy.mean
    """The policy's mean."""
    std: tuple[float, float, float] = ViewPolicy.std
    """The policy's standard deviation."""

    def __len__(self) -> int:
        return len(self.crop)

    @property
    def is_bicubic(self) -> np.ndarray:
        """bool [N]: whether each crop is resized with a bicubic filter."""
        return np.zeros(len(self), dtype=bool) if self.bicubic is None else self.bicubic

    def columns(self) -> dict[str, np.ndarray]:
        """The columns that are not None, by name; a cache stores them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in values.items() if isinstance(column, np.ndarray)}

    def take(self, rows: np.ndarray) -> "Views":
        """A table of these rows only; `partner` still refers to rows of the original table."""
        return Views(**{name: column[rows] for name, column in self.columns().items()}, mean=self.mean, std=self.std)

    def boxes(self, sizes: np.ndarray) -> np.ndarray:
        """The crops in whole pixels, int64 [N, 4], for images of `sizes` [N, 2] (height, width).

        Exact for the sizes with which the views were drawn (up to 65,535 pixels per side), and to a pixel for images
        that are stored smaller.
        """
        extent = np.asarray(sizes)[:, [0, 1, 0, 1]]
        boxes = np.rint(self.crop.astype(np.float64) * extent / UNIT).astype(np.int64)
        boxes[:, 2:] = boxes[:, 2:].clip(1, extent[:, 2:])
        boxes[:, :2] = np.minimum(boxes[:, :2], extent[:, :2] - boxes[:, 2:])
        return boxes


def fractions(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] in pixels of images of `sizes` [N, 2] -> uint16 [N, 4] in 1/65535 of the whole image."""
    fractions = np.rint(boxes * (UNIT / sizes[:, [0, 1, 0, 1]])).astype(np.uint16)
    fractions[:, 2:] = fractions[:, 2:].clip(1)  # a pixel of an image of more than 131,070 would round to 0
    return fractions


def pixel_boxes(boxes: np.ndarray, size: int) -> np.ndarray:
    """Boxes in 1/65535 of a square image of `size` pixels -> int64 [N, 4]: top, left, bottom, right in pixels."""
    boxes = boxes.astype(np.int64)
    return np.rint((boxes + np.pad(boxes[:, :2], ((0, 0), (2, 0)))) * (size / UNIT)).astype(np.int64)


def join_views(tables: Sequence[Views]) -> Views:
    """Several views of the same N samples as one table: row r * N + i is sample i in the r-th view."""
    if len(tables) == 1:
        return tables[0]
    parts = [table.columns() for table in tables]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "partner" in columns:
        columns["partner"] = columns["partner"] + np.repeat(
            np.arange(len(tables), dtype=np.int32) * len(tables[0]), len(tables[0])
        )
    return Views(**columns, mean=tables[0].mean, std=tables[0].std)


def samples_of(rows: np.ndarray, count: int) -> np.ndarray:
    """Sample ids, int64 like `rows`, of rows of a table from `join_views`, for views of `count` samples each."""
    return rows % count


def center_views(sizes: np.ndarray, fraction: float = 0.875, bicubic: bool = False) -> Views:
    """The evaluation view: the central square with a side of `fraction` of the image's shorter side, not flipped.

    It is resized with a bicubic filter, or with a bilinear one.
    """
    sizes = np.asarray(sizes)
    side = np.rint(sizes.min(axis=1) * fraction).astype(np.int64).clip(1)
    boxes = np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], axis=1)
    flip = np.zeros(len(sizes), dtype=bool)
    return Views(fractions(boxes, sizes), flip, np.ones(len(sizes), dtype=bool) if bicubic else None)
