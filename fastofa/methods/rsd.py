"""Redundancy suppression distillation (Zhang et al., ICCV 2025)."""

import torch
from torch import Tensor, nn

from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.options import RSDOptions
from fastofa.methods.targets import Targets, full

TINY = 1e-5  # added to standard deviations


class RSD(Method):
    """sum_ij k_ij (P_ij - I_ij)^2, P the correlation of the teacher's dimension i with the student's j over the batch.

    k is 1 on the diagonal and kappa elsewhere. A projector of two layers is applied to the student's pooled vector
    first. It is trained with the student and then discarded. Correlations are over the part of the batch that this rank
    computes at once.
    """

    Options = RSDOptions
    needs = "pooled vector"

    def __init__(self, options: RSDOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        hidden = sizes.student_dim * options.expansion
        self.projector = nn.Sequential(
            nn.Linear(sizes.student_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, sizes.teacher_dim, bias=False),
        )
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        assert outputs.pooled is not None
        assert targets.pooled is not None
        student, teacher = standardised(self.projector(full(outputs.pooled))), standardised(full(targets.pooled))
        away = teacher.T @ student / len(student) - torch.eye(student.shape[1], device=student.device)
        kappa = self.options.kappa
        return kappa * away.square().sum() + (1 - kappa) * away.diagonal().square().sum()


def standardised(x: Tensor) -> Tensor:
    """x [B, D] with mean 0 and standard deviation 1 over the batch."""
    return (x - x.mean(dim=0)) / (x.std(dim=0, unbiased=False) + TINY)
