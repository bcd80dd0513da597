"""What is asked of a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Request:
    """The arguments of `fastofa.pipelines.open_pipeline`, checked."""

    dataset: Any
    """A `fastofa.data.dataset.Dataset`."""
    image_size: int
    """Side of the pictures in pixels, where an epoch asks for no other."""
    batch_size: int
    device: torch.device
    workers: int
    """Decoding processes or threads."""
    normalize: tuple[Sequence[float], Sequence[float]] | None
    """Mean and std for floating images; None: uint8."""
