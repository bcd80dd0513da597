"""Threads prepare the next batches while one is in use; they are copied to a GPU on a separate stream.

The work of a thread should release the GIL, as decoding, resizing and copying do.
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

AHEAD = 2  # batches that are prepared while another is in use
MAX_QUEUED = 4  # batches that wait for a GPU; without a limit, a CPU can queue a thousand steps of one launch each


class HostBatch(NamedTuple):
    """A batch in host memory, as the threads prepare it."""

    rows: np.ndarray
    """int64 [B]: rows of the view table."""
    all_rows: np.ndarray
    """int64 [M]: the same rows, followed by partners that are not among them."""
    images: Tensor
    """uint8 [M, H, W, 3], pinned if they will be copied to a GPU."""


class _Pending(NamedTuple):
    """A batch in preparation, and the threads' tasks for its parts."""

    batch: HostBatch
    parts: list[Future[None]]

    def wait(self) -> HostBatch:
        """The finished batch. Raises a thread's exception, or Stopped for a signal while waiting for a thread."""
        with waiting():
            for part in self.parts:
                part.result()
        return self.batch


def _end(pool: ThreadPoolExecutor, running: Iterable[Future[None]]) -> bool:
    """End the threads. Returns False if one is still running (e.g. if the disk does not respond) and is left behind."""
    pool.shutdown(wait=False, cancel_futures=True)
    started = [future for future in running if not future.cancelled()]  # `wait` is not notified of cancelled ones
    done = not wait(started, timeout=PATIENCE_S).not_done
    if done:
        pool.shutdown()
    return done


class Threaded(ABC):
    """A pipeline (see `fastofa.pipelines.open_pipeline`) whose subclasses define how to read an image."""

    def __init__(self, request: Request) -> None:
        self.dataset = request.dataset
        self.device, self.workers, self.sizes = request.device, request.workers, request.dataset.stored_sizes
        self.image_size, self.batch_size, self.normalize = request.image_size, request.batch_size, request.normalize
        self.labels = torch.from_numpy(request.dataset.labels).to(self.device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.queued: deque[torch.cuda.Event] = deque()

    @abstractmethod
    def read(self, sample_id: int) -> Tensor:
        """An image as stored, uint8 [3, H, W]. Called by threads."""

    def epoch(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        with closing(self.host_batches(views, order, start, image_size)) as host_batches:
            for batch in host_batches:
                yield self._finish(views, batch, image_size or self.image_size)

    def host_batches(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[HostBatch, None, None]:
        """The batches of `epoch` in host memory, before augmentation. Closing the generator ends the threads."""
        threads = max(self.workers, 1)
        pool = ThreadPoolExecutor(threads, "pipeline", initializer=torch.set_num_threads, initargs=(1,))
        reader = ThreadPoolExecutor(1, "read-ahead")  # a separate thread, because requests block when the disk is busy
        stop = Event()
        requests = read_ahead(self.dataset, views, order[start:], self.batch_size, stop)
        requested: deque[Future[None]] = deque()
        pending: deque[_Pending] = deque()
        try:
            for rows in batches(views, order, start, self.batch_size):
                requested.append(reader.submit(next, requests, None))
                while requested and requested[0].done():
                    requested.popleft().result()  # raises the thread's exception
                pending.append(self._begin(pool, threads, views, rows, image_size or self.image_size))
                if len(pending) > AHEAD:
                    batch = pending[0].wait()
                    pending.popleft()
                    yield batch
            while pending:
                batch = pending[0].wait()
                pending.popleft()
                yield batch
            stop.set()
            for request in requested:
                request.result()
        finally:
            stop.set()
            if _end(reader, requested) and _end(pool, [part for batch in pending for part in batch.parts]):
                requests.close()

    def _begin(self, pool: ThreadPoolExecutor, threads: int, views: Views, rows: np.ndarray, size: int) -> _Pending:
        """Start the threads' tasks that prepare the images of `rows` and of partners that are not among them."""
        all_rows = with_partners(views, rows)
        shape = (len(all_rows), *self._extent(size), 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.stream is not None)
        out = images.numpy()  # threads are not in inference mode and cannot write to a tensor created in it
        fill = self._filler(samples_of(all_rows, len(self.sizes)), views.take(all_rows), out, size)
        parts = [part for part in np.array_split(np.arange(len(all_rows)), threads) if len(part)]
        return _Pending(HostBatch(rows, all_rows, images), [pool.submit(fill, part) for part in parts])

    def _extent(self, size: int) -> tuple[int, int]:
        """Height and width of the images in host memory."""
        return size, size

    def _filler(self, ids: np.ndarray, table: Views, out: np.ndarray, size: int) -> Callable[[np.ndarray], None]:
        """The threads' task. Its argument is positions in the batch, int64, which index `out`, `ids` and `table`."""
        boxes, bicubic = table.boxes(self.sizes[ids]), table.is_bicubic

        def crop(part: np.ndarray) -> None:
            for i in part.tolist():
                image = self.read(ids[i])
                pixels = crop_resize_one(image, boxes[i].tolist(), bool(table.flip[i]), size, bool(bicubic[i]))
                out[i] = pixels.permute(1, 2, 0)

        return crop

    def _finish(self, views: Views, batch: HostBatch, size: int) -> Batch:
        rows, all_rows, images = batch
        images = images.permute(0, 3, 1, 2) if self.stream is None else self._to_gpu(images, views, all_rows, size)
        return make_batch(augment(images, views, all_rows, len(rows)), self.labels, views, rows, self.normalize)

    def _to_gpu(self, images: Tensor, views: Views, rows: np.ndarray, size: int) -> Tensor:
        """The cropped images on the GPU, uint8 [M, 3, S, S]."""
        return self._copy(images)[0].permute(0, 3, 1, 2)

    def _copy(self, *tensors: Tensor) -> list[Tensor]:
        """Copy to the GPU on `stream`, for use on the current stream. PyTorch keeps both copies until that use."""
        assert self.stream is not None
        with torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        student = torch.cuda.current_stream(self.device)
        student.wait_stream(self.stream)
        for tensor in copies:
            tensor.record_stream(student)
        self.queued.append(student.record_event())
        if len(self.queued) > MAX_QUEUED:
            self.queued.popleft().synchronize()
        return copies
