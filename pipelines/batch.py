"""What a pipeline yields."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One batch on the pipeline's device."""

    images: Tensor
    """[B, 3, S, S] channels-last; uint8, or normalised bf16 (fp32 on a CPU)."""
    labels: Tensor
    """int64 [B]."""
    sample_ids: Tensor
    """int64 [B], rows of the data set, of the view table and of the teacher cache."""


def normalized(images: Tensor, normalize: tuple[Sequence[float], Sequence[float]] | None) -> Tensor:
    """uint8 pixels as they are, or scaled to 0..1 and normalised: bf16 on a GPU, fp32 on a CPU."""
    if normalize is None:
        return images
    mean, std = (images.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in normalize)
    values = (images.to(torch.float32) / 255 - mean) / std
    return values.to(torch.bfloat16 if images.is_cuda else torch.float32)
