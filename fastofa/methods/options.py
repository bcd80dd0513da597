"""The options of the objective, apart from the training run's configuration, so that it can be used alone."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """See `fastofa.methods.objective.Objective` for the formula; H heads."""

    eps: tuple[float, ...]
    """[H] target enhancement of each exit in stage order, then of the final logits."""
    temperature: float = 1.0
    variant: Literal["official", "paper"] = "official"
    gt_weight: float = 1.0
    kd_weight: float = 1.0
    ofa_weight: float = 1.0
    gt_loss: Literal["ce", "bce"] = "ce"
    smoothing: float = 0.0
    kernel: bool = False
    """Use the Triton kernel of the loss; otherwise the implementation that suits the device."""
