"""The order of an epoch's rows: permutations, mixed pairs, pages of a file, batches."""

from collections.abc import Iterator

import numpy as np

from fastofa.views.policy import ViewPolicy
from fastofa.views.random_streams import ORDER, random_stream
from fastofa.views.table import Views

WINDOW = 64  # pages of a file whose samples are shuffled together


def pair_order(views: Views, places: np.ndarray | None = None) -> np.ndarray:
    """All rows of a table, int64 [N], with partners next to each other: for a pass in which any order will do.

    Args:
        views: the table.
        places: [N]: byte offsets of the samples in a file; the rows (the first ones of pairs) are then in file order.
    """
    units = _units(len(views), views.partner)
    if places is not None:
        units = units[np.lexsort((places[units[:, 0]], units[:, -1] < 0))]
    return units.reshape(-1)[: len(views)]


def _units(size: int, partner: np.ndarray | None) -> np.ndarray:
    """The units that an order keeps together: samples, int64 [N, 1], or pairs, [M, 2], one left over with a -1."""
    ids = np.arange(size)
    if partner is None:
        return ids[:, None]
    alone, first = ids[partner[:size] == ids], ids[partner[:size] > ids]
    return np.concatenate([np.stack([first, partner[first]], axis=1), np.stack([alone, alone * 0 - 1], axis=1)])


def epoch_rows(policy: ViewPolicy, size: int) -> int:
    """The number of rows in an epoch of `size` samples, over all ranks."""
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
    page_ids: np.ndarray | None = None,
) -> np.ndarray:
    """One rank's share of an epoch's rows, int64: every world_size-th of a permutation determined by (seed, epoch).

    Batch b of all ranks together contains the same samples as batch b of a single rank with the total batch size.

    Args:
        size: number of samples.
        seed: seed of the run.
        epoch: number of the epoch.
        rank: number of this rank.
        world_size: number of ranks.
        partner: int32 [size], the column of the epoch's views, if they mix. Pairs are then shuffled and dealt to the
            ranks, so that every batch of an even size contains whole pairs.
        repeats: the policy's (repeated augmentation). The result then contains rows of `join_views` of `repeats` views,
            which are the same for `repeats` consecutive epochs. Each of these epochs takes a different part of the
            samples, with all views of a sample next to each other. Together they use every row once, except for a
            few if the samples do not divide evenly.
        page_ids: int64 [size], the page of the file that contains each sample. If given, the file is read page by page:
            the pages are shuffled and taken `WINDOW` at a time, and the samples of a window are shuffled together. A
            pair follows the page of its first sample. The second may lie anywhere in the file, so that only half of the
            samples are read page by page if views mix.
    """
    rng = random_stream(seed, ORDER, epoch // repeats)
    if partner is None and repeats == 1 and page_ids is None:
        return rng.permutation(size)[rank::world_size]
    units = _units(size, partner)
    whole, alone = units[units[:, -1] >= 0], units[units[:, -1] < 0]
    shuffled = whole[rng.permutation(len(whole)) if page_ids is None else _page_by_page(rng, page_ids[whole[:, 0]])]
    if repeats == 1:
        share = np.concatenate([shuffled, alone])[rank::world_size].reshape(-1)  # `alone` comes last: no pair is split
        return share[share >= 0]
    part = len(whole) // repeats
    units_of_epoch = shuffled[epoch % repeats * part :][:part]
    copies = units_of_epoch[:, None, :] + size * np.arange(repeats)[None, :, None]
    return copies.reshape(-1, units.shape[1])[rank::world_size].reshape(-1)


def _page_by_page(rng: np.random.Generator, page_ids: np.ndarray) -> np.ndarray:
    """A permutation, int64 [M], of units in the given pages, [M]: random within `WINDOW` random pages at a time."""
    window = rng.permutation(page_ids.max(initial=-1) + 1)[page_ids] // WINDOW
    return np.lexsort((rng.random(len(page_ids)), window))


def batches(views: Views, order: np.ndarray, start: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows of each batch from position `start` of the order on, int64.

    Raises:
        ValueError: the order contains rows outside of the table, or `start` is outside of the order.
    """
    order = np.asarray(order, dtype=np.int64)
    if len(order) and not 0 <= order.min() <= order.max() < len(views):
        raise ValueError(f"order: expected rows 0..{len(views) - 1}, got {order.min()}..{order.max()}")
    if not 0 <= start <= len(order):
        raise ValueError(f"start: expected 0..{len(order)}, got {start}")
    for first in range(start, len(order), batch_size):
        yield order[first : first + batch_size]
