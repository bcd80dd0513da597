"""What a method receives of the teacher."""

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """The teacher's answers for a batch (or for a whole view)."""

    classes: Tensor
    """integer [B, K], best first."""
    log_probs: Tensor
    """floating [B, K], at temperature 1."""
