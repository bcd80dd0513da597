"""Randomness is data: a view is one augmentation of every image, drawn up front as a table with a row per image.

A table is a pure function of (policy, seed, view number, image sizes), so pixels are the same for any number of workers
or ranks, any batch size, and after resuming. A row depends on its own image only, not on the other rows; but for the
columns of mixing, where two images that are each other's partner share what is drawn.

What a view does to a picture, in the order of the published code: crop and resize, flip, RandAugment's operations,
mixing with the partner (mixup or cutmix), erasing. Each part has its own random stream: one does not move another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from fastofa import rand_augment
from fastofa.errors import BadInput

UNIT = 65535  # boxes are stored as fractions of the whole picture in 1/65535
TRIES = 10  # as in torchvision's RandomResizedCrop and timm's RandomErasing
ROWS_AT_ONCE = 1 << 16
WINDOW = 64  # pages of a file whose samples are shuffled together
ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's
# Random streams of a seed; views (and epochs) are numbered below 2^32.
CROP, ORDER, OPS, ERASE, PAIRS, MIX = range(6)


@dataclass(frozen=True)
class ViewPolicy:
    """What may be drawn; the defaults are the published ImageNet recipe's."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a share of the picture's, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, from and to (uniform in its logarithm)."""
    flip: float = 0.5
    """Probability of mirroring left to right."""
    auto_augment: str = ""
    """RandAugment in timm's notation (rand-m9-mstd0.5-inc1), on the cropped picture; empty for none."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none. Where cutmix is asked for too, each pair gets one of them."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta distribution; 0 for none."""
    erase: float = 0.0
    """Probability of random erasing with normal noise."""
    repeats: int = 1
    """Views that an epoch shows of a sample, of a share of the samples as much smaller (repeated augmentation)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Colour where an operation moves the picture away, and mean of the erasing noise; of pixels scaled to 0..1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the erasing noise."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high or (name == "scale" and high > 1):
                limit = " <= 1" if name == "scale" else ""
                raise BadInput(f"view policy: expected {name} with 0 < from <= to{limit}, got {low} {high}")
        if not 0 <= self.flip <= 1:
            raise BadInput(f"view policy: expected flip between 0 and 1, got {self.flip}")
        if not 0 <= self.erase <= 1:
            raise BadInput(f"view policy: expected erase between 0 and 1, got {self.erase}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"view policy: expected {name} of at least 0, got {getattr(self, name)}")
        if self.repeats < 1:
            raise BadInput(f"view policy: expected repeats of at least 1, got {self.repeats}")
        if not (all(0 <= value <= 1 for value in self.mean) and all(value > 0 for value in self.std)):
            raise BadInput(f"view policy: expected mean between 0 and 1, std above 0, got {self.mean} {self.std}")
        if self.auto_augment:
            rand_augment.parse(self.auto_augment)

    @property
    def mixes(self) -> bool:
        """Do its views pair the samples?"""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Views:
    """One view of every image. Row i belongs to sample id i. Columns that the policy does not use are None."""

    crop: np.ndarray
    """uint16 [N, 4]: top, left, height, width in 1/65535 of the whole picture."""
    flip: np.ndarray
    """bool [N]: mirror left to right."""
    ops: np.ndarray | None = None
    """uint8 [N, n]: operations one after the other, numbers of `rand_augment.OPS`; 0 for none."""
    amounts: np.ndarray | None = None
    """float32 [N, n]: of each operation, in its own unit (`rand_augment.amounts`)."""
    partner: np.ndarray | None = None
    """int32 [N]: the row it is mixed with, whose partner it is; its own for none."""
    mix: np.ndarray | None = None
    """float32 [N]: its own share of the mixture, the same for both; 1 for none."""
    mix_box: np.ndarray | None = None
    """uint16 [N, 4]: what cutmix takes from the partner, in 1/65535 of the cropped picture; height 0 for mixup."""
    erase: np.ndarray | None = None
    """uint16 [N, 4]: what is erased, in 1/65535 of the cropped picture; height 0 for nothing."""
    noise: np.ndarray | None = None
    """int32 [N]: what the erasing noise is a function of, with the place of the pixel."""
    mean: tuple[float, float, float] = ViewPolicy.mean
    """The policy's."""
    std: tuple[float, float, float] = ViewPolicy.std
    """The policy's."""

    def __len__(self) -> int:
        return len(self.crop)

    def columns(self) -> dict[str, np.ndarray]:
        """Those that there are, by name: what a cache stores."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in found.items() if isinstance(column, np.ndarray)}

    def take(self, rows: np.ndarray) -> "Views":
        """A table of these rows alone (whose partners are still numbered as before)."""
        return Views(**{name: column[rows] for name, column in self.columns().items()}, mean=self.mean, std=self.std)

    def boxes(self, sizes: np.ndarray) -> np.ndarray:
        """The crops in whole pixels, int64 [N, 4], for pictures of `sizes` [N, 2] (height, width).

        Exact for the sizes the views were drawn with (up to 65,535 pixels a side); to a pixel where pictures are stored
        smaller.
        """
        extent = np.asarray(sizes)[:, [0, 1, 0, 1]]
        boxes = np.rint(self.crop.astype(np.float64) * extent / UNIT).astype(np.int64)
        boxes[:, 2:] = boxes[:, 2:].clip(1, extent[:, 2:])
        boxes[:, :2] = np.minimum(boxes[:, :2], extent[:, :2] - boxes[:, 2:])
        return boxes


def _fractions(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    fractions = np.rint(boxes * (UNIT / sizes[:, [0, 1, 0, 1]])).astype(np.uint16)
    fractions[:, 2:] = fractions[:, 2:].clip(1)  # a pixel of a picture of more than 131,070
    return fractions


def pixel_boxes(boxes: np.ndarray, size: int) -> np.ndarray:
    """Boxes in 1/65535 of a square picture of `size` pixels -> int64 [N, 4]: top, left, bottom, right in pixels."""
    boxes = boxes.astype(np.int64)
    return np.rint((boxes + np.pad(boxes[:, :2], ((0, 0), (2, 0)))) * (size / UNIT)).astype(np.int64)


def draw_views(policy: ViewPolicy, sizes: np.ndarray, seed: int, view: int) -> Views:
    """One view of every image.

    Args:
        policy: what may be drawn.
        sizes: int [N, 2], height and width of each picture in pixels.
        seed, view: choose the table; each (seed, view) has its own random streams.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    crop, flip = _draw_crops(policy, sizes, seed, view)
    columns = {
        **(_draw_ops(policy, len(sizes), seed, view) if policy.auto_augment else {}),
        **(_draw_mixing(policy, len(sizes), seed, view) if policy.mixes else {}),
        **(_draw_erasing(policy, len(sizes), seed, view) if policy.erase else {}),
    }
    return Views(crop, flip, **columns, mean=policy.mean, std=policy.std)


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 32) + number]))


def _draws(rng: np.random.Generator, count: int, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Uniform numbers for every row, some rows at a time: always as many, so that a row does not depend on others."""
    for first in range(0, count, ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, count))
        yield rows, rng.random((rows.stop - first, columns))


def _draw_crops(policy: ViewPolicy, sizes: np.ndarray, seed: int, view: int) -> tuple[np.ndarray, np.ndarray]:
    """RandomResizedCrop (torchvision's algorithm: 10 tries, then the largest allowed centre crop) and flip."""
    boxes = np.empty((len(sizes), 4), dtype=np.int64)
    flip = np.empty(len(sizes), dtype=bool)
    for rows, draws in _draws(_random(seed, CROP, view), len(sizes), 4 * TRIES + 1):
        boxes[rows] = _random_resized_crop(policy, sizes[rows], draws[:, 1:].reshape(-1, TRIES, 4))
        flip[rows] = draws[:, 0] < policy.flip
    return _fractions(boxes, sizes), flip


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


def _draw_ops(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """RandAugment; see rand_augment.py."""
    parsed = rand_augment.parse(policy.auto_augment)
    ops = np.empty((count, parsed.layers), dtype=np.uint8)
    amounts = np.empty((count, parsed.layers), dtype=np.float32)
    for rows, draws in _draws(_random(seed, OPS, view), count, parsed.layers * rand_augment.COLUMNS):
        draws = draws.reshape(-1, parsed.layers, rand_augment.COLUMNS)
        ops[rows], amounts[rows] = rand_augment.choose(parsed, draws)
    return {"ops": ops, "amounts": amounts}


def _draw_mixing(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """A random perfect matching of the samples (one stays alone if their number is odd), and a mixture for each pair.

    timm's "pair" mode; the published recipes use its "batch" mode, where all pairs of a batch share one mixture: each
    mixture by itself is distributed the same. The views of one repeated augmentation have the same pairs (with other
    mixtures), since all copies of a sample, each with its partner, are to be in one batch.
    """
    firsts, seconds = _random(seed, PAIRS, view // policy.repeats).permutation(count)[: count // 2 * 2].reshape(2, -1)
    rng = _random(seed, MIX, view)
    cut, middle = rng.random(len(firsts)), rng.random((len(firsts), 2))
    is_cut = cut < (0.5 if policy.mixup and policy.cutmix else float(policy.cutmix > 0))
    mixup, cutmix = (rng.beta(a, a, len(firsts)) if a else np.ones(len(firsts)) for a in (policy.mixup, policy.cutmix))
    side = np.sqrt(1 - np.where(is_cut, cutmix, 1))[:, None]
    near, far = (np.rint((middle + half * side).clip(0, 1) * UNIT).astype(np.int64) for half in (-0.5, 0.5))
    box = np.concatenate([near, far - near], axis=1)
    box[(box[:, 2:] == 0).any(axis=1)] = 0
    share = np.where(is_cut, 1 - box[:, 2:].prod(axis=1) / UNIT**2, mixup)

    columns: dict[str, np.ndarray] = {
        "partner": np.arange(count, dtype=np.int32),
        "mix": np.ones(count, dtype=np.float32),
        "mix_box": np.zeros((count, 4), dtype=np.uint16),
    }
    for mine, other in ((firsts, seconds), (seconds, firsts)):
        columns["partner"][mine] = other
        columns["mix"][mine] = share
        columns["mix_box"][mine] = box
    return columns


def _draw_erasing(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """timm's RandomErasing: one box of the cropped picture, ten tries; and a key for the noise."""
    boxes = np.zeros((count, 4), dtype=np.uint16)
    noise = np.empty(count, dtype=np.int32)
    for rows, draws in _draws(_random(seed, ERASE, view), count, 2 * TRIES + 4):
        wanted, key, down, across = draws[:, :4].T
        area, aspect = draws[:, 4:].reshape(-1, TRIES, 2).transpose(2, 0, 1)
        area = ERASE_AREA[0] + area * (ERASE_AREA[1] - ERASE_AREA[0])
        low, high = np.log(ERASE_ASPECT)
        aspect = np.exp(low + aspect * (high - low))
        height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
        fits = (height < 1) & (width < 1)
        first = np.arange(len(draws)), fits.argmax(axis=1)
        height, width = height[first], width[first]
        box = np.stack([down * (1 - height), across * (1 - width), height, width], axis=1)
        boxes[rows] = np.rint(np.where(((wanted < policy.erase) & fits.any(axis=1))[:, None], box, 0) * UNIT)
        noise[rows] = (np.floor(key * 2.0**32) - 2.0**31).astype(np.int32)
    return {"erase": boxes, "noise": noise}


def join_views(tables: Sequence[Views]) -> Views:
    """Several views of the same N samples as one table: row r * N + i is sample i in the r-th of them."""
    if len(tables) == 1:
        return tables[0]
    parts = [table.columns() for table in tables]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "partner" in columns:
        columns["partner"] = columns["partner"] + np.repeat(
            np.arange(len(tables), dtype=np.int32) * len(tables[0]), len(tables[0])
        )
    return Views(**columns, mean=tables[0].mean, std=tables[0].std)


def center_views(sizes: np.ndarray, fraction: float = 0.875) -> Views:
    """The evaluation view: the central square whose side is `fraction` of the picture's shorter side, no flip."""
    sizes = np.asarray(sizes)
    side = np.rint(sizes.min(axis=1) * fraction).astype(np.int64).clip(1)
    boxes = np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], axis=1)
    return Views(_fractions(boxes, sizes), np.zeros(len(sizes), dtype=bool))


def pair_order(views: Views, places: np.ndarray | None = None) -> np.ndarray:
    """All rows, int64, each followed by its partner: what to go through a table by, where the order does not matter.

    Args:
        places: [N], where in a file the samples lie, to go through it from its beginning (or the firsts of pairs).
    """
    units = _units(len(views), views.partner)
    if places is not None:
        units = units[np.lexsort((places[units[:, 0]], units[:, -1] < 0))]
    return units.reshape(-1)[: len(views)]


def _units(size: int, partner: np.ndarray | None) -> np.ndarray:
    """What an order keeps together, int64 [M, 1 or 2]: samples, or pairs, and then who is alone, beside a -1."""
    ids = np.arange(size)
    if partner is None:
        return ids[:, None]
    alone, first = ids[partner[:size] == ids], ids[partner[:size] > ids]
    return np.concatenate([np.stack([first, partner[first]], axis=1), np.stack([alone, alone * 0 - 1], axis=1)])


def epoch_rows(policy: ViewPolicy, size: int) -> int:
    """Rows of an epoch of `size` samples, all ranks together."""
    unit = 2 if policy.mixes and policy.repeats > 1 else 1
    return size if policy.repeats == 1 else size // unit // policy.repeats * unit * policy.repeats


def epoch_order(
    size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    partner: np.ndarray | None = None,
    repeats: int = 1,
    pages: np.ndarray | None = None,
) -> np.ndarray:
    """Sample ids of one rank's share of an epoch, int64: every world_size-th of a permutation by (seed, epoch).

    The ranks' batches number b together hold the same samples as batch b of one rank with the whole batch size.

    Args:
        partner: of the epoch's views, if they mix: pairs are shuffled then and dealt to the ranks, so that any batch of
            an even size holds whole pairs.
        repeats: of the policy (repeated augmentation). The ids are then rows of `join_views` of as many views, the same
            views for `repeats` epochs in a row. Each of these takes another part of the samples, and all views of it
            next to each other; after them every row has been used once (but for a few that no part could hold).
        pages: int64 [size], the page of the file in which each sample lies, where the file is to be read page by page:
            the pages are shuffled and taken `WINDOW` at a time, and the samples of these are shuffled together. A pair
            goes by the page of the first of its two; the other may lie anywhere in the file, so that of views that mix
            only one half is read page by page.
    """
    rng = _random(seed, ORDER, epoch // repeats)
    if partner is None and repeats == 1 and pages is None:
        return rng.permutation(size)[rank::world_size]
    units = _units(size, partner)
    whole, alone = units[units[:, -1] >= 0], units[units[:, -1] < 0]
    shuffled = whole[rng.permutation(len(whole)) if pages is None else _page_by_page(rng, pages[whole[:, 0]])]
    if repeats == 1:
        mine = np.concatenate([shuffled, alone])[rank::world_size].reshape(-1)  # at the end it breaks no pair
        return mine[mine >= 0]
    part = len(whole) // repeats
    shown = shuffled[epoch % repeats * part :][:part]
    copies = shown[:, None, :] + size * np.arange(repeats)[None, :, None]
    return copies.reshape(-1, units.shape[1])[rank::world_size].reshape(-1)


def _page_by_page(rng: np.random.Generator, page: np.ndarray) -> np.ndarray:
    """A permutation, int64 [M], of what lies in these pages, [M]: random within `WINDOW` random pages at a time."""
    window = rng.permutation(page.max(initial=-1) + 1)[page] // WINDOW
    return np.lexsort((rng.random(len(page)), window))


def batches(views: Views, order: np.ndarray, start: int, batch_size: int) -> Iterator[np.ndarray]:
    """Sample ids of each batch from position `start` of the order on; refuses an order that leaves the table."""
    order = np.asarray(order, dtype=np.int64)
    if len(order) and not 0 <= order.min() <= order.max() < len(views):
        raise ValueError(f"order: expected sample ids 0..{len(views) - 1}, got {order.min()}..{order.max()}")
    if not 0 <= start <= len(order):
        raise ValueError(f"start: expected 0..{len(order)}, got {start}")
    for first in range(start, len(order), batch_size):
        yield order[first : first + batch_size]
