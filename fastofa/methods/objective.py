"""The training objective: label loss, and teacher loss of the final logits and of every exit (OFA-KD, eq. 7-10).

Shapes: H heads (exits in stage order, then the final logits), B images, C classes, K classes kept from the teacher.
"""

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from fastofa.kernels import distillation_loss, ofa_loss
from fastofa.kernels.reference import cross_entropy, heavier, mixed_labels
from fastofa.methods.options import Options
from fastofa.methods.targets import Targets

PARTS = ("loss", "gt", "kd", "ofa")


class Objective:
    """`objective(logits, labels, targets)` -> fp32 [4]: the weighted sum of the parts, then each part unweighted.

    logits floating [H, B, C], labels int64 [B]; without targets only the label loss is computed.

    loss = gt_weight * CE(final, label) + kd_weight * L_OFA(final; eps[-1]) + ofa_weight * sum_k L_OFA(exit_k; eps[k])

    For mixed images, `objective(logits, labels, targets, partner_labels, mix)` with partner_labels int64 [B] and mix
    floating [B]: the label has weight `mix` and the partner's label weight 1 - `mix`, both smoothed, as in timm's
    mixup_target; the OFA loss enhances the label with the larger weight.
    """

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options = options
        # Created once: a list would be copied to the device at every step, and the step would wait for the copy.
        self.eps = torch.tensor(options.eps, device=device)
        self.impl = "triton" if options.kernel else None
        self.binary = BinaryCrossEntropy(smoothing=options.smoothing) if options.gt_loss == "bce" else None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        targets: Targets | None,
        partner_labels: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        o = self.options
        if targets is None:
            gt = self._label_loss(logits[-1], labels, partner_labels, mix)
            return torch.stack([o.gt_weight * gt, gt, torch.zeros_like(gt), torch.zeros_like(gt)])
        teacher = (targets.classes, targets.log_probs, self.eps, o.temperature)
        if self.binary is None:
            weights = (o.gt_weight, o.kd_weight, o.ofa_weight)
            total, parts = distillation_loss(
                logits, labels, *teacher, *weights, o.smoothing, partner_labels, mix, self.impl, o.variant
            )
            return torch.cat([total[None], parts])
        gt = self._label_loss(logits[-1], labels, partner_labels, mix)
        if partner_labels is not None and mix is not None:
            labels = heavier(labels, partner_labels, mix)
        heads = ofa_loss(logits, labels, *teacher, self.impl, o.variant)
        kd, ofa = heads[-1], heads[:-1].sum()
        return torch.stack([o.gt_weight * gt + o.kd_weight * kd + o.ofa_weight * ofa, gt, kd, ofa])

    def _label_loss(self, final: Tensor, labels: Tensor, partner_labels: Tensor | None, mix: Tensor | None) -> Tensor:
        smoothing, final = self.options.smoothing, final.float()
        if self.binary is None:
            return cross_entropy(final, labels, partner_labels, mix, smoothing)
        if partner_labels is None or mix is None:
            return self.binary(final, labels)  # it smooths the labels itself
        target = mixed_labels(labels, partner_labels, mix, final.shape[1], smoothing)
        return self.binary(final, target.to(final.dtype))
