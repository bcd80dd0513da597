"""A pack on the disk: threads gather the rows of a batch, the GPU crops them while the next ones are on their way.

The gathered pixels lie in page-locked memory and travel on a stream of their own, beside the student's work. Without a
GPU the threads crop.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.errors import BadInput
from fastofa.images import crop_resize_one
from fastofa.kernels import crop_resize
from fastofa.pipelines.augment import augment, with_partners
from fastofa.pipelines.batch import Batch, make_batch
from fastofa.views import Views, batches

AHEAD = 2  # batches that are gathered while another is used


class _Gathered(NamedTuple):
    """A batch on its way: what the threads fill, and when they are done."""

    rows: np.ndarray
    needed: np.ndarray
    images: Tensor
    parts: list[Future[None]]


class Pipeline:
    """See `fastofa.pipelines.open_pipeline`. Needs pixels in one array, as a pack has them."""

    def __init__(
        self,
        dataset: Any,
        image_size: int,
        batch_size: int,
        device: torch.device,
        workers: int,
        normalize: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        if dataset.pixels is None:
            raise BadInput(f"pipeline packed: expected a .pack, got {dataset.spec}; `fastofa write` makes one")
        self.image_size, self.batch_size, self.device, self.normalize = image_size, batch_size, device, normalize
        self.pixels, self.sizes, self.workers = dataset.pixels, dataset.stored_sizes, workers
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def epoch(self, views: Views, order: np.ndarray, start: int = 0) -> Iterator[Batch]:
        threads = max(self.workers, 1)
        pool = ThreadPoolExecutor(threads, "packed", initializer=torch.set_num_threads, initargs=(1,))
        coming: deque[_Gathered] = deque()
        try:
            for rows in batches(views, order, start, self.batch_size):
                coming.append(self._gather(pool, threads, views, rows))
                if len(coming) > AHEAD:
                    yield self._finish(views, coming.popleft())
            while coming:
                yield self._finish(views, coming.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _gather(self, pool: ThreadPoolExecutor, threads: int, views: Views, rows: np.ndarray) -> _Gathered:
        """Begin to fill uint8 [M, H, W, 3] with the pictures of `rows` and of partners, on a CPU with their crops."""
        needed = with_partners(views, rows)
        ids, table = needed % len(self.sizes), views.take(needed)
        height, width = (self.image_size,) * 2 if self.stream is None else self.pixels.shape[1:3]
        images = torch.empty(len(ids), height, width, 3, dtype=torch.uint8, pin_memory=self.stream is not None)
        boxes, size = table.boxes(self.sizes[ids]), self.image_size
        out = images.numpy()  # threads are never in inference mode, and could not write to a tensor made in it

        def copy(part: np.ndarray) -> None:
            np.take(self.pixels, ids[part], axis=0, out=out[part[0] : part[-1] + 1], mode="clip")

        def crop(part: np.ndarray) -> None:
            for i in part.tolist():
                image = torch.from_numpy(self.pixels[ids[i]]).permute(2, 0, 1)
                out[i] = crop_resize_one(image, boxes[i].tolist(), bool(table.flip[i]), size).permute(1, 2, 0)

        parts = [part for part in np.array_split(np.arange(len(ids)), threads) if len(part)]
        return _Gathered(rows, needed, images, [pool.submit(crop if self.stream is None else copy, p) for p in parts])

    def _finish(self, views: Views, gathered: _Gathered) -> Batch:
        rows, needed, images, parts = gathered
        for part in parts:
            part.result()
        if self.stream is None:
            images = images.permute(0, 3, 1, 2)
        else:
            images = self._cropped(images, views.take(needed), needed, self.stream)
        return make_batch(augment(images, views, needed, len(rows)), self.labels, views, rows, self.normalize)

    def _cropped(self, images: Tensor, table: Views, needed: np.ndarray, stream: torch.cuda.Stream) -> Tensor:
        """To the GPU on `stream`, cropped on the student's. PyTorch keeps the memory of both ends until then."""
        boxes = torch.from_numpy(table.boxes(self.sizes[needed % len(self.sizes)]))
        with torch.cuda.stream(stream):
            box, flip, pixels = (
                v.to(self.device, non_blocking=True) for v in (boxes, torch.from_numpy(table.flip), images)
            )
        student = torch.cuda.current_stream(self.device)
        student.wait_stream(stream)
        for tensor in (box, flip, pixels):
            tensor.record_stream(student)
        return crop_resize(pixels, box, flip, self.image_size)
