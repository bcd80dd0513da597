"""The options of the objective, separate from a training run's configuration so that the objective can be used
alone."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """Options of `fastofa.methods.objective.Objective`, whose docstring gives the formula. H heads."""

    eps: tuple[float, ...]
    """[H]: exponents of the target enhancement, for each exit in stage order, then for the final logits."""
    temperature: float = 1.0
    variant: Literal["official", "paper"] = "official"
    gt_weight: float = 1.0
    kd_weight: float = 1.0
    ofa_weight: float = 1.0
    gt_loss: Literal["ce", "bce"] = "ce"
    smoothing: float = 0.0
