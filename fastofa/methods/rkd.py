"""Relational knowledge distillation (Park et al., CVPR 2019): distances and angles between images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.methods.method import Method, Outputs
from fastofa.methods.options import RKDOptions
from fastofa.methods.targets import Targets, full

TINY = 1e-12


class RKD(Method):
    """distance * Huber of the distances over their mean (eq. 5-6) + angle * Huber of the cosines of angles (eq. 7-8).

    Relations are those between the images of the part of the batch that this rank computes at once.
    """

    Options = RKDOptions
    needs = "pooled vector"

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        assert outputs.pooled is not None
        assert targets.pooled is not None
        student, teacher = full(outputs.pooled), full(targets.pooled)
        distance = F.smooth_l1_loss(distances(student), distances(teacher))
        angle = F.smooth_l1_loss(angles(student), angles(teacher))
        return self.options.distance * distance + self.options.angle * angle


def distances(x: Tensor) -> Tensor:
    """Distances between the rows of x [B, D] over their mean, [B, B]; 0 on the diagonal."""
    squares = x.pow(2).sum(dim=1)
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    found = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=TINY).sqrt() * others
    return found * others.sum() / found.sum()


def angles(x: Tensor) -> Tensor:
    """Cosine of the angle at row i between rows j and k of x [B, D], [B, B, B]."""
    sides = F.normalize(x[None] - x[:, None], dim=2)
    return sides @ sides.transpose(1, 2)
