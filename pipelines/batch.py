"""The batches that a pipeline yields."""

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
    """int64 [B]: indices into the dataset."""
    rows: Tensor
    """int64 [B]: rows of the view table and of the teacher's targets; equal to sample_ids unless views are joined."""
    partner_labels: Tensor | None = None
    """int64 [B]: labels of the images mixed in; None if the views do not mix."""
    mix: Tensor | None = None
    """float32 [B]: weight of the sample's own label, the rest being the partner's; None if the views do not mix."""


def make_batch(
    images: Tensor,
    labels: Tensor,
    views: Views,
    rows: np.ndarray,
    normalize: tuple[Sequence[float], Sequence[float]] | None,
) -> Batch:
    """A batch from augmented images, uint8 [B, 3, S, S], of the table's `rows` [B].

    `labels` are those of the whole dataset, int64 [N], on the device. `normalize` is as in `open_pipeline`.
    """

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(labels.device, non_blocking=True)

    ids = put(samples_of(rows, len(labels)))
    batch = Batch(normalized(images, normalize), labels[ids], ids, put(rows))
    if views.partner is None:
        return batch
    partner_labels = labels[put(samples_of(views.partner[rows].astype(np.int64), len(labels)))]
    return batch._replace(partner_labels=partner_labels, mix=put(shares(views, rows, images.shape[-1])))


def normalized(images: Tensor, normalize: tuple[Sequence[float], Sequence[float]] | None) -> Tensor:
    """uint8 [B, 3, S, S], unchanged or normalised by (mean, std) of RGB in 0..1: bf16 on a GPU, fp32 on a CPU."""
    if normalize is None:
        return images
    mean, std = (_rgb_tensor(tuple(values), images.device) for values in normalize)
    values = (images.to(torch.float32) / 255 - mean) / std
    return values.to(torch.bfloat16 if images.is_cuda else torch.float32)


@functools.cache
def _rgb_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [1, 3, 1, 1], cached because copying it to a GPU blocks the CPU."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
