"""Read-ahead: request the images that come later in an epoch's order, so that the disk reads while the CPU works.

Without it, the bytes of a memory-mapped file are read when a thread accesses them, and the thread waits.
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

BATCHES = 4  # batches requested ahead of the current one
PROBED = 256  # images of an epoch that are probed; if all are in memory, nothing is requested (a request takes 3 us)
SHARED = 3  # minimum images per page, among the first 512 of the order, for requesting whole pages
CALL = 128 << 10  # bytes per request; the kernel may ignore what exceeds the device's own read-ahead


def read_ahead(
    dataset: Any, views: Views, order: np.ndarray, batch_size: int, stop: Event
) -> Generator[None, None, None]:
    """Advance this generator as each batch of the order begins; it then requests data for later batches.

    Each image is requested once, or each page if the order reads the file page by page.

    Args:
        dataset: a `fastofa.data.dataset.Dataset`; nothing is requested unless its images are in one file.
        views: the view table.
        order: rows of `views`, from the position at which the epoch starts.
        batch_size: rows per batch.
        stop: when set, ends the requests of a batch early, since they can take long if the disk is slow.
    """
    if dataset.file is None or not len(order):
        return
    try:
        with open(dataset.file, "rb") as file:
            probed = samples_of(order[:: -(-len(order) // PROBED)], len(dataset))
            if _in_memory(file.fileno(), dataset.spans[probed, 0]):
                return
            first_use, ranges, ahead = plan(dataset, views, order)
            ahead = max(ahead, BATCHES * batch_size)
            done = 0
            for first in range(0, len(order), batch_size):
                due = int(np.searchsorted(first_use, first + batch_size + ahead))
                for begin, end in ranges[done:due].tolist():
                    for place in range(begin, end, CALL):
                        if stop.is_set():
                            return
                        os.posix_fadvise(file.fileno(), place, min(CALL, end - place), os.POSIX_FADV_WILLNEED)
                done = due
                yield
    except OSError as error:  # the mapped file can still be read
        notice(f"{dataset.file}: no read-ahead in this epoch, which may be slow: {error.strerror}")


def plan(dataset: Any, views: Views, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The byte ranges that an epoch reads, in the order of first use.

    A range is an image, or a page for images that the order reads page by page. Of a mixed pair only the first image,
    which determines the pair's position in the order, can be covered by its page.

    Returns:
        int64 [R]: position in the order at which each range is first used, ascending.
        int64 [R, 2]: begin and end of each range in the file.
        How many samples ahead to request: for pages, those of a window; else 0.
    """
    ids = samples_of(order, len(dataset))
    page_ids = dataset.spans[:, 0] // PAGE
    images, pages = np.cumsum(dataset.spans, axis=1), _pages(dataset.spans, page_ids)
    leads = np.ones(len(order), bool) if views.partner is None else views.partner[order] >= order
    lead_pages = page_ids[ids[leads]]
    begin = slice(8 * WINDOW * len(views) // len(dataset))  # 512 images, counting repeats once
    used, ahead = len(pages) + ids, 0
    if SHARED * len(np.unique(lead_pages[begin])) <= len(np.unique(ids[leads][begin])):
        used[leads] = lead_pages
        ahead = len(order) * WINDOW // len(np.unique(lead_pages))
    distinct, first_use = np.unique(used, return_index=True)
    by_use = np.argsort(first_use)
    return first_use[by_use], np.concatenate([pages, images])[distinct[by_use]], ahead


def _pages(spans: np.ndarray, page_ids: np.ndarray) -> np.ndarray:
    """int64 [P, 2]: begin and end of the images that begin in each page; the last one may extend into the next page."""
    ends, count = spans.sum(axis=1), page_ids.max() + 1
    pages = np.stack([np.full(count, ends.max()), np.zeros(count, np.int64)], axis=1)
    np.minimum.at(pages[:, 0], page_ids, spans[:, 0])
    np.maximum.at(pages[:, 1], page_ids, ends)
    return pages


def _in_memory(file: int, offsets: np.ndarray) -> bool:
    """Whether the bytes at these offsets can be read without waiting; False if the file system cannot tell."""
    try:
        return all(os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) for offset in offsets.tolist())
    except OSError:
        return False
