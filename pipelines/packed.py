"""A pack on disk: threads gather the images of a batch and the GPU crops them. Without a GPU, the threads crop."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastofa.kernels.comparison import Comparison
from fastofa.kernels.crop_resize import crop_comparison
from fastofa.pipelines.crops import crop_on_device
from fastofa.pipelines.request import Request
from fastofa.pipelines.threaded import Threaded
from fastofa.system.errors import BadInput
from fastofa.views.table import Views, samples_of


class Cropped(Threaded):
    """A pack whose images are cropped by threads."""

    def __init__(self, request: Request) -> None:
        dataset = request.dataset
        if dataset.pixels is None:
            raise BadInput(f"pipeline packed: expected a .pack, got {dataset.spec}; `fastofa write` writes one")
        super().__init__(request)
        self.pixels = dataset.pixels

    def read(self, sample_id: int) -> Tensor:
        return torch.from_numpy(self.pixels[sample_id]).permute(2, 0, 1)


class Gathered(Cropped):
    """A pack whose images are gathered whole by threads and cropped by a GPU."""

    crop_impl: str | None = None

    def comparisons(self) -> dict[str, Comparison]:
        shape = (self.batch_size, *self.pixels.shape[1:])
        return {"crop_impl": crop_comparison(shape, self.image_size, self.device)}

    def _extent(self, size: int) -> tuple[int, int]:
        return self.pixels.shape[1:3]

    def _filler(self, ids: np.ndarray, table: Views, out: np.ndarray, size: int) -> Callable[[np.ndarray], None]:
        def copy(part: np.ndarray) -> None:
            np.take(self.pixels, ids[part], axis=0, out=out[part[0] : part[-1] + 1], mode="clip")

        return copy

    def _to_gpu(self, images: Tensor, views: Views, rows: np.ndarray, size: int) -> Tensor:
        table = views.take(rows)
        boxes = table.boxes(self.sizes[samples_of(rows, len(self.sizes))])
        pixels, box, flip = self._copy(images, torch.from_numpy(boxes), torch.from_numpy(table.flip))
        return crop_on_device(pixels, box, flip, size, None, table.bicubic, self.crop_impl)


def Pipeline(request: Request) -> Cropped:
    """See `fastofa.pipelines.open_pipeline`. Needs pixels in one array, such as a pack's."""
    return Gathered(request) if request.device.type == "cuda" else Cropped(request)
