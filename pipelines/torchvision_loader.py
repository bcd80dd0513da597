"""The portable pipeline: worker processes decode whole batches with torchvision.io and crop from the view table.

The rest of the augmentation is done where the batch ends up: on the GPU, or without one in the worker processes.
"""

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from fastofa.data.decode import crop_resize_one
from fastofa.pipelines.augment import augment, with_partners
from fastofa.pipelines.batch import Batch, make_batch
from fastofa.pipelines.request import Request
from fastofa.pipelines.workers import Fill, filled
from fastofa.views.order import batches
from fastofa.views.table import Views, samples_of


class Pipeline:
    """See `fastofa.pipelines.open_pipeline`."""

    def __init__(self, request: Request) -> None:
        self.dataset, self.device, self.workers = request.dataset, request.device, request.workers
        self.image_size, self.batch_size, self.normalize = request.image_size, request.batch_size, request.normalize
        self.labels = torch.from_numpy(request.dataset.labels).to(request.device)

    def epoch(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        all_rows = list(batches(views, order, start, self.batch_size))
        size, on_cpu = image_size or self.image_size, self.device.type == "cpu"
        image_bytes = size * size * 3

        def fill(number: int, out: np.ndarray) -> int:
            """With a GPU the pictures of the batch and of partners that are not among them, else finished ones."""
            rows = all_rows[number]
            needed = with_partners(views, rows)
            images = torch.from_numpy(out[: len(needed) * image_bytes]).view(-1, size, size, 3).permute(0, 3, 1, 2)
            self._read(views, needed, images)
            if not on_cpu:
                return len(needed) * image_bytes
            finished = augment(images, views, needed, len(rows))
            if finished.data_ptr() != images.data_ptr():
                images[: len(rows)] = finished
            return len(rows) * image_bytes

        most = self.batch_size * (1 if views.partner is None else 2)
        with closing(self._filled(fill, len(all_rows), most * image_bytes)) as made:
            for rows, pixels in zip(all_rows, made, strict=True):
                shape = (len(pixels) // image_bytes, size, size, 3)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=not on_cpu)
                images.numpy()[:] = pixels.reshape(shape)
                images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                if not on_cpu:
                    images = augment(images, views, with_partners(views, rows), len(rows))
                yield make_batch(images, self.labels, views, rows, self.normalize)

    def _filled(self, fill: Fill, count: int, batch_bytes: int) -> Generator[np.ndarray, None, None]:
        """By the workers, or without any in this process."""
        if self.workers:
            yield from filled(fill, count, batch_bytes, self.workers)
            return
        memory = np.empty(batch_bytes, np.uint8)
        for number in range(count):
            yield memory[: fill(number, memory)]

    def _read(self, views: Views, rows: np.ndarray, images: Tensor) -> None:
        """The pictures of the table's rows, cropped and flipped, into uint8 [M, 3, S, S]."""
        table, ids = views.take(rows), samples_of(rows, len(self.dataset))
        boxes = table.boxes(self.dataset.stored_sizes[ids])
        for out, i, box, flip in zip(images, ids, boxes.tolist(), table.flip.tolist(), strict=True):
            image = self.dataset.read(i)
            out.copy_(crop_resize_one(image, box, flip, images.shape[-1]))
