"""Compare a pipeline's pixels with those that the teacher saw: a cache keeps a few of the teacher's images.

    CACHE/seen.png                  images of view 0, side by side, at the teacher's input size

A view is the same region of an image in every form of the data and with every pipeline, but its pixels may differ: a
pack stores fewer pixels, and decoders round differently. The difference is reported at startup; a large one is refused.
"""

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.io import encode_png

from fastofa.data.decode import read_image
from fastofa.pipelines import Pipeline
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import write_atomic
from fastofa.views.table import Views

SEEN = "seen.png"
IMAGES = 8  # evenly spaced in the order of samples, and thus spread over the classes
TOLERANCE = 20  # of 255; compression, resizing and rounding stay below, other pictures are far above (docs/caches.md)


class Difference(NamedTuple):
    """Mean absolute differences of pixel values, in levels of 255."""

    mean: float
    """Over all images."""
    worst: float
    """Over the image with the largest difference."""

    def check(self, cache: Path, data: str) -> None:
        """Raises BadInput if the mean is above the tolerance."""
        if self.mean > TOLERANCE:
            raise BadInput(
                f"data: expected the pixels that the teacher saw ({cache / SEEN}) within {TOLERANCE} of 255, got a "
                f"mean difference of {self.mean:.1f} with {data}; train on the form of the data that the cache was "
                "made from, or accept the difference with --allow-mismatch pixels"
            )

    def __str__(self) -> str:
        if self.worst == 0:
            return "identical to those that the teacher saw"
        return (
            f"mean difference {self.mean:.2f} of 255 from those that the teacher saw, {self.worst:.2f} in the worst "
            "image"
        )


def save_teacher_images(cache: Path, pipeline: Pipeline, views: Views) -> None:
    """Write CACHE/seen.png; `views` is view 0."""
    side_by_side = torch.cat(list(_images(pipeline, views)), dim=2)
    write_atomic(cache / SEEN, encode_png(side_by_side).numpy().tobytes())


def compare_teacher_images(cache: Path, pipeline: Pipeline, views: Views) -> Difference | None:
    """The difference between a pipeline's pixels and those that the teacher saw.

    Args:
        cache: folder of the cache.
        pipeline: the pipeline to compare.
        views: view 0 of the cache.

    Returns:
        The difference; None if the cache has no seen.png.

    Raises:
        BadInput: seen.png is damaged.
    """
    if not (cache / SEEN).is_file():
        return None
    side_by_side = read_image(cache / SEEN)
    size, width = side_by_side.shape[1:]
    count = min(IMAGES, len(views))
    if width != count * size:
        images = counted(count, "square image")
        raise BadInput(f"{cache / SEEN}: expected {images} side by side, got {width} x {size} pixels; delete the file")
    expected, actual = torch.stack(side_by_side.split(size, dim=2)), _images(pipeline, views, size)
    by_image = (expected.float() - actual.float()).abs().mean(dim=(1, 2, 3))
    return Difference(by_image.mean().item(), by_image.max().item())


def _images(pipeline: Pipeline, views: Views, size: int | None = None) -> Tensor:
    """uint8 [IMAGES, 3, S, S], or fewer images if there are fewer samples."""
    sample_ids = np.linspace(0, len(views) - 1, min(IMAGES, len(views))).astype(np.int64)
    with closing(pipeline.epoch(views, sample_ids, image_size=size)) as batches:
        return torch.cat([batch.images.cpu() for batch in batches])
