"""Pipelines: (dataset, view table, order) -> batches of images. Deterministic: the table contains all randomness.

pipeline = open_pipeline("auto", dataset, image_size=224, batch_size=256)
for batch in pipeline.epoch(views, order, start=0):
    batch.images, batch.labels, batch.sample_ids
"""

import functools
from collections.abc import Generator, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch

from fastofa.pipelines.batch import Batch
from fastofa.pipelines.request import Request
from fastofa.system import torchrun
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice
from fastofa.system.tuning import keep_freed_memory
from fastofa.views.table import Views

PIPELINES = {
    "resident": "fastofa.pipelines.resident",
    "packed": "fastofa.pipelines.packed",
    "ffcv": "fastofa.pipelines.ffcv_loader",
    "dali": "fastofa.pipelines.dali_loader",
    "torchvision": "fastofa.pipelines.torchvision_loader",
}


SMALL = 0.25  # fraction of the free device memory up to which `choose` keeps a pack on the device


class Pipeline(Protocol):
    """The interface of every pipeline."""

    def epoch(
        self, views: Views, order: np.ndarray, start: int = 0, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        """Yield the batches of `order` from position `start` on; the last one may be smaller.

        Threads or processes may run until the generator is exhausted or closed.

        Args:
            views: the view table.
            order: int64, rows of `views`.
            start: position in `order` at which to start.
            image_size: S in pixels, for this epoch only; None for the size given to `open_pipeline`.
        """
        ...


def open_pipeline(
    name: str,
    dataset: Any,
    image_size: int,
    batch_size: int,
    device: str | torch.device = "cpu",
    workers: int = 0,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Pipeline:
    """Open a pipeline by name.

    Args:
        name: "resident" (the dataset in device memory), "packed" (a pack on disk), "ffcv" (a .beton), "dali" (a
            folder), "torchvision" (any dataset, with worker processes), or "auto" for the choice of `choose`, which a
            notice reports.
        dataset: a `fastofa.data.dataset.Dataset`.
        image_size: S, the side of the images in pixels.
        batch_size: samples per batch.
        device: the device of the batches.
        workers: decoder processes of the torchvision pipeline (0: decode in this process), or threads of the others.
        normalize: (mean, std) of RGB in 0..1 for normalised images (bf16 on a GPU, fp32 on a CPU); None for uint8
            images.

    Raises:
        BadInput: an unknown name, or a dataset that the pipeline does not support.
    """
    if name == "auto":
        name, reason = choose(dataset, torch.device(device))
        _say(f"pipeline {name}: {reason}")
    if name not in PIPELINES:
        raise BadInput(f"unknown pipeline {name!r}: expected auto or one of {', '.join(PIPELINES)}")
    if image_size < 1 or batch_size < 1 or workers < 0:
        raise BadInput(
            f"expected image size and batch size of at least 1 and workers of at least 0, got {image_size}, "
            f"{batch_size} and {workers}"
        )
    keep_freed_memory()
    request = Request(dataset, image_size, batch_size, torch.device(device), workers, normalize)
    return import_module(PIPELINES[name]).Pipeline(request)


def choose(dataset: Any, device: torch.device) -> tuple[str, str]:
    """The name of the pipeline for this dataset and device, and the reason."""
    if dataset.pixels is None:
        if dataset.file is None:
            return "torchvision", "the images are separate files"
        return "ffcv", f"{dataset.spec} is in FFCV's format"
    if dataset.file is None:
        return "resident", "the images are one array in memory"
    if device.type == "cuda" and dataset.pixels.nbytes <= torch.cuda.mem_get_info(device)[0] * SMALL:
        return "resident", f"{dataset.spec} takes less than {SMALL:.0%} of the free device memory"
    return "packed", f"{dataset.spec} has pixels of one size"


@functools.cache
def _say(line: str) -> None:
    """Print a notice once, on rank 0 only."""
    if torchrun.is_main():
        notice(line)


__all__ = ["PIPELINES", "Batch", "Pipeline", "choose", "open_pipeline"]
