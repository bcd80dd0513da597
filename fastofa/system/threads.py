"""Run functions in threads. They should release the GIL, as reading, decoding, resizing and checksums do."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
IN_FLIGHT = 16  # results per thread that are in progress or waiting to be consumed


def in_order(work: Callable[[S], T], items: Iterable[S], workers: int) -> Iterator[T]:
    """Yield work(item) for each item, in order, running a limited number ahead; a thread's exception is raised here."""
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    running: deque[Future[T]] = deque()
    try:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) == workers * IN_FLIGHT:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
