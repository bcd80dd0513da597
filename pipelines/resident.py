"""The dataset as uint8 in device memory, where it is cropped, resized, flipped and augmented."""

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from fastofa.data.decode import crop_resize_one
from fastofa.kernels.comparison import Comparison
from fastofa.kernels.crop_resize import crop_comparison
from fastofa.pipelines.augment import augment, with_partners
from fastofa.pipelines.batch import Batch, make_batch
from fastofa.pipelines.crops import crop_on_device
from fastofa.pipelines.request import Request
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice
from fastofa.views.order import batches
from fastofa.views.table import Views, samples_of


class Pipeline:
    """See `fastofa.pipelines.open_pipeline`. Needs images of one size."""

    crop_impl: str | None = None

    def __init__(self, request: Request) -> None:
        dataset, self.device = request.dataset, request.device
        self.image_size, self.batch_size, self.normalize = request.image_size, request.batch_size, request.normalize
        self.sizes = dataset.stored_sizes
        smallest, largest = self.sizes.min(axis=0), self.sizes.max(axis=0)
        if (smallest != largest).any():
            raise BadInput(
                f"pipeline resident: expected images of one size, got heights {smallest[0]}..{largest[0]} and widths "
                f"{smallest[1]}..{largest[1]}; use --pipeline auto"
            )
        if self.device.type == "cuda":
            check_memory(len(dataset) * int(largest.prod()) * 3, self.device, dataset.spec)
        if dataset.pixels is None:
            pixels = torch.stack([dataset.read(i).permute(1, 2, 0) for i in range(len(dataset))])
        else:
            pixels = torch.from_numpy(dataset.pixels)
        self.pixels = pixels.to(self.device)  # uint8 [N, H, W, 3]; on a CPU, the array or pack itself
        self.labels = torch.from_numpy(dataset.labels).to(self.device)

    def epoch(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        size = image_size or self.image_size
        for rows in batches(views, order, start, self.batch_size):
            all_rows = with_partners(views, rows)
            crops = self._crops(views.take(all_rows), samples_of(all_rows, len(self.sizes)), size)
            images = augment(crops, views, all_rows, len(rows))
            yield make_batch(images, self.labels, views, rows, self.normalize)

    def comparisons(self) -> dict[str, Comparison]:
        shape = (self.batch_size, *self.pixels.shape[1:])
        return {"crop_impl": crop_comparison(shape, self.image_size, self.device)}

    def _crops(self, views: Views, ids: np.ndarray, size: int) -> Tensor:
        """uint8 [B, 3, S, S]: row b of the views applied to image ids[b]."""
        boxes = views.boxes(self.sizes[ids])
        if self.device.type != "cpu":
            box, flip, at = (torch.from_numpy(v).to(self.device, non_blocking=True) for v in (boxes, views.flip, ids))
            return crop_on_device(self.pixels, box, flip, size, at, views.bicubic, self.crop_impl)
        images = torch.empty(len(ids), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for out, i, box, flip, bicubic in zip(images, ids, boxes.tolist(), views.flip, views.is_bicubic, strict=True):
            out.copy_(crop_resize_one(self.pixels[i].permute(2, 0, 1), box, bool(flip), size, bool(bicubic)))
        return images


def check_memory(required: int, device: torch.device, spec: str) -> None:
    """Report the device memory that the images take, `required` in bytes. Raises BadInput if less is free."""
    free, total = torch.cuda.mem_get_info(device)
    text = (
        f"{spec} takes {required / 2**30:.1f} GiB of {device}'s {total / 2**30:.0f} GiB, {free / 2**30:.1f} GiB are "
        "free"
    )
    if required > free:
        raise BadInput(f"pipeline resident: {text}; use --pipeline packed, or write a smaller --size")
    notice(f"pipeline resident: {text}")
