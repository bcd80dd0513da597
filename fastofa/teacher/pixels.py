"""Do teacher and student see the same pixels? The cache keeps a few pictures as the teacher saw them.

    CACHE/seen.png                  pictures of view 0, side by side, at the teacher's size

A view is the same region of a picture in every form of the data and through every pipeline, but not to the last bit:
a pack stores fewer pixels, decoders round otherwise. The difference is reported when a run begins.
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
PICTURES = 8  # spread over the classes, as samples are sorted by them


class Difference(NamedTuple):
    """Of pixels, 0 to 255."""

    mean: float
    """Over all pixels and colours of all pictures."""
    worst: float
    """The same of the picture where it is largest."""

    def __str__(self) -> str:
        if self.worst == 0:
            return "the very ones that the teacher saw"
        return (
            f"on average {self.mean:.2f} of 255 from those that the teacher saw, at most {self.worst:.2f} in a picture"
        )


def save_seen(cache: Path, pipeline: Pipeline, views: Views) -> None:
    """Write CACHE/seen.png; `views` is view 0."""
    side_by_side = torch.cat(list(_pictures(pipeline, views)), dim=2)
    write_atomic(cache / SEEN, encode_png(side_by_side).numpy().tobytes())


def compare_seen(cache: Path, pipeline: Pipeline, views: Views) -> Difference | None:
    """How far a pipeline's pixels are from the teacher's.

    Args:
        views: view 0 of the cache.

    Returns:
        None: the cache was made before it kept such pictures.

    Raises:
        BadInput: seen.png is damaged.
    """
    if not (cache / SEEN).is_file():
        return None
    seen = read_image(cache / SEEN)
    size, width = seen.shape[1:]
    count = min(PICTURES, len(views))
    if width != count * size:
        pictures = counted(count, "square picture")
        raise BadInput(f"{cache / SEEN}: expected {pictures} side by side, it was edited; delete it")
    here = _pictures(pipeline, views, size)
    each = (torch.stack(seen.split(size, dim=2)).float() - here.float()).abs().mean(dim=(1, 2, 3))
    return Difference(each.mean().item(), each.max().item())


def _pictures(pipeline: Pipeline, views: Views, size: int | None = None) -> Tensor:
    """uint8 [8, 3, S, S], of fewer samples fewer."""
    rows = np.linspace(0, len(views) - 1, min(PICTURES, len(views))).astype(np.int64)
    with closing(pipeline.epoch(views, rows, image_size=size)) as batches:
        return torch.cat([batch.images.cpu() for batch in batches])
