"""The arguments with which a pipeline is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Request:
    """The validated arguments of `fastofa.pipelines.open_pipeline`."""

    dataset: Any
    """A `fastofa.data.dataset.Dataset`."""
    image_size: int
    """Side of the images in pixels, unless an epoch overrides it."""
    batch_size: int
    device: torch.device
    workers: int
    """Decoder processes or threads."""
    normalize: tuple[Sequence[float], Sequence[float]] | None
    """Mean and std of RGB in 0..1 for normalised images; None for uint8 images."""
