"""What a pipeline yields."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.pipelines.augment import shares
from fastofa.views.table import Views, samples_of


class Batch(NamedTuple):
    """One batch on the pipeline's device."""

    images: Tensor
    """[B, 3, S, S] channels-last; uint8, or normalised bf16 (fp32 on a CPU)."""
    labels: Tensor
    """int64 [B]."""
    sample_ids: Tensor
    """int64 [B]: positions in the data set."""
    rows: Tensor
    """int64 [B]: of the view table and of the teacher's targets; equal to sample_ids unless views are joined."""
    partner_labels: Tensor | None = None
    """int64 [B]: of the pictures mixed in; None where the views do not mix."""
    mix: Tensor | None = None
    """float32 [B]: share of its own label, the rest is the partner's; None where the views do not mix."""


def make_batch(
    images: Tensor,
    labels: Tensor,
    views: Views,
    rows: np.ndarray,
    normalize: tuple[Sequence[float], Sequence[float]] | None,
) -> Batch:
    """Finished uint8 pictures of the table's `rows`, with what belongs to them; `labels` [N] of the whole data set."""

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(labels.device, non_blocking=True)

    ids = put(samples_of(rows, len(labels)))
    batch = Batch(normalized(images, normalize), labels[ids], ids, put(rows))
    if views.partner is None:
        return batch
    partner_labels = labels[put(samples_of(views.partner[rows].astype(np.int64), len(labels)))]
    return batch._replace(partner_labels=partner_labels, mix=put(shares(views, rows, images.shape[-1])))


def normalized(images: Tensor, normalize: tuple[Sequence[float], Sequence[float]] | None) -> Tensor:
    """uint8 pixels as they are, or scaled to 0..1 and normalised: bf16 on a GPU, fp32 on a CPU."""
    if normalize is None:
        return images
    mean, std = (_of_colours(tuple(values), images.device) for values in normalize)
    values = (images.to(torch.float32) / 255 - mean) / std
    return values.to(torch.bfloat16 if images.is_cuda else torch.float32)


@functools.cache
def _of_colours(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [1, 3, 1, 1], made once: a GPU is waited for while it is given them."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
