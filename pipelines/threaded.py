"""Threads make the batches that come next while one is used; a GPU gets them on a stream of its own.

What a thread does should release the GIL: decoding, resizing and copying do.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.data.decode import crop_resize_one
from fastofa.pipelines.augment import augment, with_partners
from fastofa.pipelines.batch import Batch, make_batch
from fastofa.pipelines.read_ahead import read_ahead
from fastofa.pipelines.request import Request
from fastofa.system.interrupt import PATIENCE_S, waiting
from fastofa.views.order import batches
from fastofa.views.table import Views, samples_of

AHEAD = 2  # batches that are made while another is used
QUEUED = 4  # batches that wait for a GPU; of steps that are one launch each, a CPU queues a thousand, all in memory


class Filled(NamedTuple):
    """What the threads make of a batch."""

    rows: np.ndarray
    """int64 [B], of the view table."""
    needed: np.ndarray
    """int64 [M]: the same, and of partners that are not among them."""
    images: Tensor
    """uint8 [M, H, W, 3] in host memory, pinned where a GPU is to have them."""


class _Coming(NamedTuple):
    """A batch on its way, and the parts that fill it."""

    batch: Filled
    parts: list[Future[None]]

    def wait(self) -> Filled:
        """Raises what a thread raised; Stopped by a signal while one does not answer."""
        with waiting():
            for part in self.parts:
                part.result()
        return self.batch


def _end(pool: ThreadPoolExecutor, running: Iterable[Future[None]]) -> bool:
    """End the threads; False if one is still at work (the disk does not answer), which is left behind."""
    pool.shutdown(wait=False, cancel_futures=True)
    begun = [future for future in running if not future.cancelled()]  # nobody tells `wait` of the others
    done = not wait(begun, timeout=PATIENCE_S).not_done
    if done:
        pool.shutdown()
    return done


class Threaded(ABC):
    """A pipeline (see `fastofa.pipelines.open_pipeline`) of which a subclass says how to get a picture."""

    def __init__(self, request: Request) -> None:
        self.dataset = request.dataset
        self.device, self.workers, self.sizes = request.device, request.workers, request.dataset.stored_sizes
        self.image_size, self.batch_size, self.normalize = request.image_size, request.batch_size, request.normalize
        self.labels = torch.from_numpy(request.dataset.labels).to(self.device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.queued: deque[torch.cuda.Event] = deque()

    @abstractmethod
    def picture(self, sample_id: int) -> Tensor:
        """uint8 [3, H, W], as it is stored. Called by threads."""

    def epoch(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        with closing(self.filled(views, order, start, image_size)) as made:
            for batch in made:
                yield self._finish(views, batch, image_size or self.image_size)

    def filled(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Filled, None, None]:
        """The threads' part: pictures in host memory, for each batch of `epoch`. Closing it ends the threads."""
        threads = max(self.workers, 1)
        pool = ThreadPoolExecutor(threads, "pipeline", initializer=torch.set_num_threads, initargs=(1,))
        reader = ThreadPoolExecutor(1, "read-ahead")  # its own: where the disk has much to do, asking takes a while
        stop = Event()
        asking = read_ahead(self.dataset, views, order[start:], self.batch_size, stop)
        asked: deque[Future[None]] = deque()
        coming: deque[_Coming] = deque()
        try:
            for rows in batches(views, order, start, self.batch_size):
                asked.append(reader.submit(next, asking, None))
                while asked and asked[0].done():
                    asked.popleft().result()  # raises what the thread raised
                coming.append(self._begin(pool, threads, views, rows, image_size or self.image_size))
                if len(coming) > AHEAD:
                    made = coming[0].wait()
                    coming.popleft()
                    yield made
            while coming:
                made = coming[0].wait()
                coming.popleft()
                yield made
            stop.set()
            for call in asked:
                call.result()
        finally:
            stop.set()
            if _end(reader, asked) and _end(pool, [part for batch in coming for part in batch.parts]):
                asking.close()

    def _begin(self, pool: ThreadPoolExecutor, threads: int, views: Views, rows: np.ndarray, size: int) -> _Coming:
        """Have uint8 [M, H, W, 3] filled with the pictures of `rows` and of partners that are not among them."""
        needed = with_partners(views, rows)
        shape = (len(needed), *self._extent(size), 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.stream is not None)
        out = images.numpy()  # threads are never in inference mode, and could not write to a tensor made in it
        fill = self._filler(samples_of(needed, len(self.sizes)), views.take(needed), out, size)
        parts = [part for part in np.array_split(np.arange(len(needed)), threads) if len(part)]
        return _Coming(Filled(rows, needed, images), [pool.submit(fill, part) for part in parts])

    def _extent(self, size: int) -> tuple[int, int]:
        """Height and width of what the threads make."""
        return size, size

    def _filler(self, ids: np.ndarray, table: Views, out: np.ndarray, size: int) -> Callable[[np.ndarray], None]:
        """What a thread does for its part of a batch: places in `out`, in `ids` and in the table."""
        boxes = table.boxes(self.sizes[ids])

        def crop(part: np.ndarray) -> None:
            for i in part.tolist():
                image = self.picture(ids[i])
                out[i] = crop_resize_one(image, boxes[i].tolist(), bool(table.flip[i]), size).permute(1, 2, 0)

        return crop

    def _finish(self, views: Views, batch: Filled, size: int) -> Batch:
        rows, needed, images = batch
        images = images.permute(0, 3, 1, 2) if self.stream is None else self._arrived(images, views, needed, size)
        return make_batch(augment(images, views, needed, len(rows)), self.labels, views, rows, self.normalize)

    def _arrived(self, images: Tensor, views: Views, needed: np.ndarray, size: int) -> Tensor:
        """On the GPU, uint8 [M, 3, S, S]."""
        return self._sent(images)[0].permute(0, 3, 1, 2)

    def _sent(self, *tensors: Tensor) -> list[Tensor]:
        """Copied on `stream` and used on the student's; PyTorch keeps the memory of both ends until then."""
        assert self.stream is not None
        with torch.cuda.stream(self.stream):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        student = torch.cuda.current_stream(self.device)
        student.wait_stream(self.stream)
        for tensor in sent:
            tensor.record_stream(student)
        self.queued.append(student.record_event())
        if len(self.queued) > QUEUED:
            self.queued.popleft().synchronize()
        return sent
