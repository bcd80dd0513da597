"""The portable pipeline: worker processes decode whole batches with torchvision.io and crop by the view table.

The rest of the augmentation runs on the GPU, or in the worker processes if there is none.
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
from fastofa.pipelines.workers import Fill, fill_batches
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
        row_batches = list(batches(views, order, start, self.batch_size))
        size, on_cpu = image_size or self.image_size, self.device.type == "cpu"
        image_bytes = size * size * 3

        def fill(number: int, out: np.ndarray) -> int:
            """Fill `out` with augmented images, or for a GPU with cropped ones, followed by missing partners."""
            rows = row_batches[number]
            all_rows = with_partners(views, rows)
            images = torch.from_numpy(out[: len(all_rows) * image_bytes]).view(-1, size, size, 3).permute(0, 3, 1, 2)
            self._read(views, all_rows, images)
            if not on_cpu:
                return len(all_rows) * image_bytes
            augmented = augment(images, views, all_rows, len(rows))
            if augmented.data_ptr() != images.data_ptr():
                images[: len(rows)] = augmented
            return len(rows) * image_bytes

        max_images = self.batch_size * (1 if views.partner is None else 2)
        with closing(self._fill_batches(fill, len(row_batches), max_images * image_bytes)) as filled:
            for rows, pixels in zip(row_batches, filled, strict=True):
                shape = (len(pixels) // image_bytes, size, size, 3)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=not on_cpu)
                images.numpy()[:] = pixels.reshape(shape)
                images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                if not on_cpu:
                    images = augment(images, views, with_partners(views, rows), len(rows))
                yield make_batch(images, self.labels, views, rows, self.normalize)

    def _fill_batches(self, fill: Fill, count: int, batch_bytes: int) -> Generator[np.ndarray, None, None]:
        """The bytes of each batch, filled by the workers, or by this process if there are none."""
        if self.workers:
            yield from fill_batches(fill, count, batch_bytes, self.workers)
            return
        memory = np.empty(batch_bytes, np.uint8)
        for number in range(count):
            yield memory[: fill(number, memory)]

    def _read(self, views: Views, rows: np.ndarray, images: Tensor) -> None:
        """Write the images of the table's rows [M], cropped and flipped, into `images`, uint8 [M, 3, S, S]."""
        table, ids = views.take(rows), samples_of(rows, len(self.dataset))
        boxes = table.boxes(self.dataset.stored_sizes[ids])
        for out, i, box, flip, bicubic in zip(images, ids, boxes.tolist(), table.flip, table.is_bicubic, strict=True):
            image = self.dataset.read(i)
            out.copy_(crop_resize_one(image, box, bool(flip), images.shape[-1], bool(bicubic)))
