"""The data set as uint8 in device memory; crop, resize and flip there."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastofa.errors import BadInput
from fastofa.images import crop_resize_one, read_image
from fastofa.kernels import crop_resize
from fastofa.pipelines.batch import Batch, normalized
from fastofa.views import Views, batches


class Pipeline:
    """See `fastofa.pipelines.open_pipeline`. Needs pictures of one size."""

    def __init__(
        self,
        dataset: Any,
        image_size: int,
        batch_size: int,
        device: torch.device,
        workers: int,
        normalize: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        self.image_size, self.batch_size, self.device, self.normalize = image_size, batch_size, device, normalize
        self.sizes = dataset.sizes
        smallest, largest = self.sizes.min(axis=0), self.sizes.max(axis=0)
        if (smallest != largest).any():
            raise BadInput(
                f"pipeline resident: expected pictures of one size, got heights {smallest[0]}..{largest[0]} and widths "
                f"{smallest[1]}..{largest[1]}; use --pipeline torchvision"
            )
        if dataset.pixels is None:
            pixels = torch.stack([read_image(dataset.path(i)).permute(1, 2, 0) for i in range(len(dataset))])
        else:
            pixels = torch.from_numpy(dataset.pixels)
        self.pixels = pixels.to(device)  # uint8 [N, H, W, 3]
        self.labels = torch.from_numpy(dataset.labels).to(device)

    def epoch(self, views: Views, order: np.ndarray, start: int = 0) -> Iterator[Batch]:
        boxes = views.boxes(self.sizes)
        for rows in batches(views, order, start, self.batch_size):
            ids = torch.from_numpy(rows).to(self.device, non_blocking=True)
            if self.device.type == "cpu":
                images = torch.empty(len(rows), 3, self.image_size, self.image_size, dtype=torch.uint8).contiguous(
                    memory_format=torch.channels_last
                )
                for out, row in zip(images, rows, strict=True):
                    image = self.pixels[row].permute(2, 0, 1)
                    out.copy_(crop_resize_one(image, boxes[row].tolist(), bool(views.flip[row]), self.image_size))
            else:
                box = torch.from_numpy(boxes[rows]).to(self.device, non_blocking=True)
                flip = torch.from_numpy(views.flip[rows]).to(self.device, non_blocking=True)
                images = crop_resize(self.pixels, box, flip, self.image_size, ids=ids)
            yield Batch(normalized(images, self.normalize), self.labels[ids], ids)
