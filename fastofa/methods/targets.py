"""The teacher's targets for a distillation method."""

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """The teacher's K most probable classes for each image of a batch (or of a whole view); B images."""

    classes: Tensor
    """integer [B, K], most probable first."""
    log_probs: Tensor
    """floating [B, K]: log-probabilities of these classes at temperature 1."""
