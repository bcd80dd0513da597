"""The training objective: labels, the teacher on the final logits, the teacher on every exit (OFA-KD, eq. 7-10).

Shapes: H heads (exits in stage order, then the final logits), B batch, C classes, K classes kept of the teacher.
"""

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from fastofa.config import TrainConfig
from fastofa.kernels import ofa_loss
from fastofa.teacher_cache import Targets

PARTS = ("loss", "gt", "kd", "ofa")


class Objective:
    """Weighted sum of the parts; `objective(logits, labels, targets)` -> fp32 [4]: the sum, then each part unweighted.

    loss = gt_weight * CE(final, label) + kd_weight * L_OFA(final; eps[-1]) + ofa_weight * sum_k L_OFA(exit_k; eps[k])
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        heads = len(config.exits) + 1
        eps = config.eps if len(config.eps) == heads else config.eps * heads
        # A tensor made once: a list would be copied to the device, and waited for, at every step.
        self.eps = torch.tensor(eps, device=device)
        self.binary = BinaryCrossEntropy(smoothing=config.smoothing) if config.gt_loss == "bce" else None

    def __call__(self, logits: Tensor, labels: Tensor, targets: Targets | None) -> Tensor:
        c = self.config
        final = logits[-1].float()
        gt = self.binary(final, labels) if self.binary else F.cross_entropy(final, labels, label_smoothing=c.smoothing)
        if targets is None:
            return torch.stack([c.gt_weight * gt, gt, torch.zeros_like(gt), torch.zeros_like(gt)])
        heads = ofa_loss(logits, labels, targets.classes, targets.log_probs, self.eps, c.temperature, variant=c.variant)
        kd, ofa = heads[-1], heads[:-1].sum()
        return torch.stack([c.gt_weight * gt + c.kd_weight * kd + c.ofa_weight * ofa, gt, kd, ofa])
