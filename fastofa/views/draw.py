"""Randomness is data: a view is one augmentation of every image, drawn up front as a table with a row per image.

A table is a pure function of (policy, seed, view number, image sizes), so pixels are the same for any number of workers
or ranks, any batch size, and after resuming. A row depends on its own image only, not on the other rows; but for the
columns of mixing, where two images that are each other's partner share what is drawn.

What a view does to a picture, in the order of the published code: crop and resize, flip, RandAugment's operations,
mixing with the partner (mixup or cutmix), erasing. Each part has its own random stream: one does not move another.
"""

from collections.abc import Iterator

import numpy as np

from fastofa.views import rand_augment
from fastofa.views.policy import ViewPolicy
from fastofa.views.streams import CROP, ERASE, MIX, OPS, PAIRS, random_stream
from fastofa.views.table import UNIT, Views, fractions

TRIES = 10  # as in torchvision's RandomResizedCrop and timm's RandomErasing
ROWS_AT_ONCE = 1 << 16
ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's


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


def _draws(rng: np.random.Generator, count: int, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Uniform numbers for every row, some rows at a time: always as many, so that a row does not depend on others."""
    for first in range(0, count, ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, count))
        yield rows, rng.random((rows.stop - first, columns))


def _draw_crops(policy: ViewPolicy, sizes: np.ndarray, seed: int, view: int) -> tuple[np.ndarray, np.ndarray]:
    """RandomResizedCrop (torchvision's algorithm: 10 tries, then the largest allowed centre crop) and flip."""
    boxes = np.empty((len(sizes), 4), dtype=np.int64)
    flip = np.empty(len(sizes), dtype=bool)
    for rows, draws in _draws(random_stream(seed, CROP, view), len(sizes), 4 * TRIES + 1):
        boxes[rows] = _random_resized_crop(policy, sizes[rows], draws[:, 1:].reshape(-1, TRIES, 4))
        flip[rows] = draws[:, 0] < policy.flip
    return fractions(boxes, sizes), flip


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
    for rows, draws in _draws(random_stream(seed, OPS, view), count, parsed.layers * rand_augment.COLUMNS):
        draws = draws.reshape(-1, parsed.layers, rand_augment.COLUMNS)
        ops[rows], amounts[rows] = rand_augment.choose(parsed, draws)
    return {"ops": ops, "amounts": amounts}


def _draw_mixing(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """A random perfect matching of the samples (one stays alone if their number is odd), and a mixture for each pair.

    timm's "pair" mode; the published recipes use its "batch" mode, where all pairs of a batch share one mixture: each
    mixture by itself is distributed the same. The views of one repeated augmentation have the same pairs (with other
    mixtures), since all copies of a sample, each with its partner, are to be in one batch.
    """
    firsts, seconds = (
        random_stream(seed, PAIRS, view // policy.repeats).permutation(count)[: count // 2 * 2].reshape(2, -1)
    )
    rng = random_stream(seed, MIX, view)
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
    for rows, draws in _draws(random_stream(seed, ERASE, view), count, 2 * TRIES + 4):
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
