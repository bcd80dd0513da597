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

    For mixed pictures, `objective(logits, labels, targets, partner_labels, mix)`: the label is `mix` of its own one
    and the rest of the partner's, smoothed, as timm's mixup_target; the OFA loss enhances the class with more of it.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        heads = len(config.exits) + 1
        eps = config.eps if len(config.eps) == heads else config.eps * heads
        # A tensor made once: a list would be copied to the device, and waited for, at every step.
        self.eps = torch.tensor(eps, device=device)
        self.binary = BinaryCrossEntropy(smoothing=config.smoothing) if config.gt_loss == "bce" else None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        targets: Targets | None,
        partner_labels: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        c = self.config
        final = logits[-1].float()
        if partner_labels is None or mix is None:
            gt = self._against(final, labels)
        else:
            gt = self._against(final, mixed_labels(labels, partner_labels, mix, final.shape[1], c.smoothing))
            labels = heavier(labels, partner_labels, mix)
        if targets is None:
            return torch.stack([c.gt_weight * gt, gt, torch.zeros_like(gt), torch.zeros_like(gt)])
        heads = ofa_loss(logits, labels, targets.classes, targets.log_probs, self.eps, c.temperature, variant=c.variant)
        kd, ofa = heads[-1], heads[:-1].sum()
        return torch.stack([c.gt_weight * gt + c.kd_weight * kd + c.ofa_weight * ofa, gt, kd, ofa])

    def _against(self, final: Tensor, labels: Tensor) -> Tensor:
        """The loss against class numbers [B], which are smoothed here, or against a distribution [B, C], as it is."""
        if self.binary:
            return self.binary(final, labels)
        smoothing = self.config.smoothing if labels.ndim == 1 else 0.0
        return F.cross_entropy(final, labels, label_smoothing=smoothing)


def mixed_labels(labels: Tensor, partner_labels: Tensor, mix: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """fp32 [B, C]: timm's mixup_target, with a share and a partner for each sample."""
    both = mix.new_full((len(labels), num_classes), smoothing / num_classes)
    own, others = (share.float()[:, None] * (1 - smoothing) for share in (mix, 1 - mix))
    return both.scatter_add(1, labels[:, None], own).scatter_add(1, partner_labels[:, None], others)


def heavier(labels: Tensor, partner_labels: Tensor, mix: Tensor) -> Tensor:
    """int64 [B]: argmax of the mixed label; of two equal shares the smaller class number, as argmax has it."""
    tie = torch.minimum(labels, partner_labels)
    return torch.where(mix == 0.5, tie, torch.where(mix > 0.5, labels, partner_labels))
