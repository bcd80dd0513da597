"""The teacher's targets for a distillation method. B images, C classes, K classes kept of the teacher."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.kernels.reference import dense_probs


class TopK(NamedTuple):
    """The part of the teacher's predictions that a cache stores, for a batch or a whole view."""

    classes: Tensor
    """integer [B, K]: the K most probable classes, most probable first."""
    log_probs: Tensor
    """floating [B, K]: log-probabilities of these classes at temperature 1."""


class Targets(NamedTuple):
    """What a method receives from the teacher for the images of a batch."""

    classes: Tensor
    """integer [B, K]: the K most probable classes, most probable first."""
    log_probs: Tensor
    """floating [B, K]: log-probabilities of these classes at temperature 1."""
    pooled: Tensor | None = None
    """floating [B, D]: the input of the teacher's classifier, for methods that need it."""
    sample_ids: Tensor | None = None
    """int64 [B]: the sample ids of the images, for methods that need the pooled vector."""
    all_log_probs: Tensor | None = None
    """fp32 [B, C]: log-probabilities of all classes at temperature 1, for methods that need all classes; None if only
    the K classes are known."""
    stages: dict[int, Tensor] | None = None
    """By number of the stage: its features, floating [B, channels, height, width], for methods that need them."""

    def probs(self, num_classes: int, temperature: float = 1.0) -> Tensor:
        """Probabilities of all classes at a temperature, fp32 [B, C].

        Without `all_log_probs`, the probability outside the K classes is spread evenly over the other classes.
        """
        if self.all_log_probs is not None:
            return torch.softmax(self.all_log_probs / temperature, dim=1)
        return dense_probs(self.classes, full(self.log_probs), num_classes, temperature)


def full(x: Tensor) -> Tensor:
    """x in fp32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def agreement(predicted: np.ndarray, targets: TopK) -> float:
    """The fraction of samples for which `predicted` (class indices [N]) is the teacher's most probable class."""
    return float((predicted == targets.classes[:, 0].to(torch.int64).numpy()).mean())
