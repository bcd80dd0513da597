"""What comes later in an epoch's order is asked for, so that the disk reads while the CPU works.

The bytes of a mapped file are read when they are touched, and whoever touches them waits.
"""

import os
from collections.abc import Generator
from threading import Event
from typing import Any

import numpy as np

from fastofa.data.beton import PAGE
from fastofa.system.progress import notice
from fastofa.views.order import WINDOW
from fastofa.views.table import Views, samples_of

BATCHES = 4  # that are asked for ahead of the one which begins
PROBED = 256  # pictures of an epoch; if all are in memory, nothing is asked for: that takes 3 us a picture
SHARED = 3  # pictures in a page, of 512 in a row, from which on pages are asked for whole; so are small files
CALL = 128 << 10  # bytes; of more the kernel may ignore what exceeds the device's own read-ahead


def read_ahead(
    dataset: Any, views: Views, order: np.ndarray, batch_size: int, stop: Event
) -> Generator[None, None, None]:
    """To be advanced as each batch of the order begins; asks then for what is read some batches later.

    Each picture is asked for once; or where the order goes through the file page by page, each page.

    Args:
        dataset: a `fastofa.data.dataset.Dataset`; unless its pictures lie in one file, nothing is asked for.
        views, order, batch_size: as a pipeline has them, the order from where it starts.
        stop: ends it soon, where the disk is slow and much is to be asked for.
    """
    if dataset.file is None or not len(order):
        return
    try:
        with open(dataset.file, "rb") as file:
            probed = samples_of(order[:: -(-len(order) // PROBED)], len(dataset))
            if _in_memory(file.fileno(), dataset.spans[probed, 0]):
                return
            at, ranges, ahead = plan(dataset, views, order)
            ahead = max(ahead, BATCHES * batch_size)
            done = 0
            for first in range(0, len(order), batch_size):
                due = int(np.searchsorted(at, first + batch_size + ahead))
                for begin, end in ranges[done:due].tolist():
                    for place in range(begin, end, CALL):
                        if stop.is_set():
                            return
                        os.posix_fadvise(file.fileno(), place, min(CALL, end - place), os.POSIX_FADV_WILLNEED)
                done = due
                yield
    except OSError as error:  # what is mapped can still be read
        notice(f"{dataset.file}: not asked for ahead in this epoch, which may be slow: {error.strerror}")


def plan(dataset: Any, views: Views, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """What an epoch reads: where in the order it is first touched, ascending [R]; begin and end in the file [R, 2].

    And how many samples ahead it should be asked for: for pages a window's. Of two pictures that are mixed only the
    first, which the order goes by, can stand for its page.
    """
    ids = samples_of(order, len(dataset))
    numbers = dataset.spans[:, 0] // PAGE
    pictures, pages = np.cumsum(dataset.spans, axis=1), _pages(dataset.spans, numbers)
    leads = np.ones(len(order), bool) if views.partner is None else views.partner[order] >= order
    lead_pages = numbers[ids[leads]]
    begin = slice(8 * WINDOW * len(views) // len(dataset))  # 512 pictures, however often each is shown
    pieces, ahead = len(pages) + ids, 0
    if SHARED * len(np.unique(lead_pages[begin])) <= len(np.unique(ids[leads][begin])):
        pieces[leads] = lead_pages
        ahead = len(order) * WINDOW // len(np.unique(lead_pages))
    found, first = np.unique(pieces, return_index=True)
    by_place = np.argsort(first)
    return first[by_place], np.concatenate([pages, pictures])[found[by_place]], ahead


def _pages(spans: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int64 [P, 2]: begin and end of the pictures of every page up to the last; some reach into the next page."""
    ends = spans.sum(axis=1)
    pages = np.stack([np.full(numbers.max() + 1, ends.max()), np.zeros(numbers.max() + 1, np.int64)], axis=1)
    np.minimum.at(pages[:, 0], numbers, spans[:, 0])
    np.maximum.at(pages[:, 1], numbers, ends)
    return pages


def _in_memory(file: int, places: np.ndarray) -> bool:
    """Are the bytes at these places of a file there without waiting? No where the file system cannot tell."""
    try:
        return all(os.preadv(file, [bytearray(1)], place, os.RWF_NOWAIT) for place in places.tolist())
    except OSError:
        return False
