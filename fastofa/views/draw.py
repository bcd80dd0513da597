"""Randomness is data: a view is one augmentation of every image, drawn in advance as a table with a row per image.

A table is a pure function of (policy, seed, view number, image sizes). The pixels are thus the same for any number of
workers or ranks, any batch size, and after resuming. A row depends only on its own image, except for the columns of
mixing, whose values are drawn for a pair of images.

A view changes an image in the order of the published code: crop and resize, flip, RandAugment's operations, mixing with
the partner (mixup or cutmix), erasing. Each step has its own random stream, so that one does not change another.
"""

from collections.abc import Iterator

import numpy as np

from fastofa.views import rand_augment
from fastofa.views.policy import ViewPolicy
from fastofa.views.random_streams import CROP, ERASE, MIX, OPS, PAIRS, RESIZE, random_stream
from fastofa.views.table import UNIT, Views, fractions

TRIES = 10  # as in torchvision's RandomResizedCrop and timm's RandomErasing
ROWS_AT_ONCE = 1 << 16
ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's defaults


def draw_views(policy: ViewPolicy, sizes: np.ndarray, seed: int, view: int) -> Views:
    """Draw one view of every image.

    Args:
        policy: the distributions to draw from.
        sizes: int [N, 2]: height and width of each image in pixels.
        seed: from 0 to 2^63 - 1.
        view: number of the view; each (seed, view) has its own random streams.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    crop, flip = _draw_crops(policy, sizes, seed, view)
    columns = {
        **(_draw_filters(policy, len(sizes), seed, view) if policy.bicubic else {}),
        **(_draw_ops(policy, len(sizes), seed, view) if policy.auto_augment else {}),
        **(_draw_mixing(policy, len(sizes), seed, view) if policy.mixes else {}),
        **(_draw_erasing(policy, len(sizes), seed, view) if policy.erase else {}),
    }
    return Views(crop, flip, **columns, mean=policy.mean, std=policy.std)


def _draws(rng: np.random.Generator, count: int, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Uniform numbers [rows, columns], some rows at a time. Every row takes the same number, so that rows do not
    depend on each other."""
    for first in range(0, count, ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, count))
        yield rows, rng.random((rows.stop - first, columns))


def _draw_crops(policy: ViewPolicy, sizes: np.ndarray, seed: int, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops uint16 [N, 4] and flips bool [N]: torchvision's RandomResizedCrop (10 tries, then the largest allowed
    centre crop) and RandomHorizontalFlip."""
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
    remaining = np.arange(len(sizes))
    for attempt in range(TRIES):
        height, width = sizes[remaining].T
        area, aspect, down, across = draws[remaining, attempt].T
        area = height * width * (policy.scale[0] + area * (policy.scale[1] - policy.scale[0]))
        aspect = np.exp(low + aspect * (high - low))
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top = (down * (height - h + 1)).astype(np.int64)
        left = (across * (width - w + 1)).astype(np.int64)
        boxes[remaining[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        remaining = remaining[~fits]
        if not len(remaining):
            return boxes

    height, width = sizes[remaining].T
    narrow, wide = width / height < policy.ratio[0], width / height > policy.ratio[1]
    w = np.where(wide, np.rint(height * policy.ratio[1]), width).astype(np.int64)
    h = np.where(narrow, np.rint(width / policy.ratio[0]), height).astype(np.int64)
    boxes[remaining] = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    return boxes


def _draw_filters(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """The column of the filter: timm's random choice between bilinear and bicubic."""
    return {"bicubic": random_stream(seed, RESIZE, view).random(count) < policy.bicubic}


def _draw_ops(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """Columns of RandAugment; see rand_augment.py."""
    parsed = rand_augment.parse(policy.auto_augment)
    ops = np.empty((count, parsed.layers), dtype=np.uint8)
    amounts = np.empty((count, parsed.layers), dtype=np.float32)
    for rows, draws in _draws(random_stream(seed, OPS, view), count, parsed.layers * rand_augment.COLUMNS):
        draws = draws.reshape(-1, parsed.layers, rand_augment.COLUMNS)
        ops[rows], amounts[rows] = rand_augment.choose(parsed, draws)
    return {"ops": ops, "amounts": amounts}


def _draw_mixing(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """Columns of mixing: a random perfect matching of the samples (one is left over if their number is odd), and the
    mixing parameters of each pair.

    This is timm's "pair" mode. The published recipes use its "batch" mode, in which all pairs of a batch share the
    parameters; the distribution of one pair's parameters is the same. The views of one group of repeated augmentation
    have the same pairs with different parameters, because a batch has to contain all copies of a sample, each with its
    partner.
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
    for samples, partners in ((firsts, seconds), (seconds, firsts)):
        columns["partner"][samples] = partners
        columns["mix"][samples] = share
        columns["mix_box"][samples] = box
    return columns


def _draw_erasing(policy: ViewPolicy, count: int, seed: int, view: int) -> dict[str, np.ndarray]:
    """Columns of timm's RandomErasing: one box of the cropped image (ten tries), and a key for the noise."""
    boxes = np.zeros((count, 4), dtype=np.uint16)
    noise = np.empty(count, dtype=np.int32)
    for rows, draws in _draws(random_stream(seed, ERASE, view), count, 2 * TRIES + 4):
        chance, key, down, across = draws[:, :4].T
        area, aspect = draws[:, 4:].reshape(-1, TRIES, 2).transpose(2, 0, 1)
        area = ERASE_AREA[0] + area * (ERASE_AREA[1] - ERASE_AREA[0])
        low, high = np.log(ERASE_ASPECT)
        aspect = np.exp(low + aspect * (high - low))
        height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
        fits = (height < 1) & (width < 1)
        first = np.arange(len(draws)), fits.argmax(axis=1)
        height, width = height[first], width[first]
        box = np.stack([down * (1 - height), across * (1 - width), height, width], axis=1)
        boxes[rows] = np.rint(np.where(((chance < policy.erase) & fits.any(axis=1))[:, None], box, 0) * UNIT)
        noise[rows] = (np.floor(key * 2.0**32) - 2.0**31).astype(np.int32)
    return {"erase": boxes, "noise": noise}
