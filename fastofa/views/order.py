"""The order of an epoch: permutations, mixed pairs, pages of a file, batches."""

from collections.abc import Iterator

import numpy as np

from fastofa.views.policy import ViewPolicy
from fastofa.views.streams import ORDER, random_stream
from fastofa.views.table import Views

WINDOW = 64  # pages of a file whose samples are shuffled together


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
    page_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Sample ids of one rank's share of an epoch, int64: every world_size-th of a permutation by (seed, epoch).

    The ranks' batches number b together hold the same samples as batch b of one rank with the whole batch size.

    Args:
        partner: of the epoch's views, if they mix: pairs are shuffled then and dealt to the ranks, so that any batch of
            an even size holds whole pairs.
        repeats: of the policy (repeated augmentation). The ids are then rows of `join_views` of as many views, the same
            views for `repeats` epochs in a row. Each of these takes another part of the samples, and all views of it
            next to each other; after them every row has been used once (but for a few that no part could hold).
        page_ids: int64 [size], the page of the file in which each sample lies. If given, the file is read page by page:
            the pages are shuffled and taken `WINDOW` at a time, and the samples of these are shuffled together. A pair
            goes by the page of the first of its two; the other may lie anywhere in the file, so that of views that mix
            only one half is read page by page.
    """
    rng = random_stream(seed, ORDER, epoch // repeats)
    if partner is None and repeats == 1 and page_ids is None:
        return rng.permutation(size)[rank::world_size]
    units = _units(size, partner)
    whole, alone = units[units[:, -1] >= 0], units[units[:, -1] < 0]
    shuffled = whole[rng.permutation(len(whole)) if page_ids is None else _page_by_page(rng, page_ids[whole[:, 0]])]
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
