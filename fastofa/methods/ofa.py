"""OFA-KD (Hao et al., NeurIPS 2023): every exit, and the final logits, learn from the teacher's final logits."""

import torch
from torch import Tensor

from fastofa.kernels import distillation_loss, ofa_loss
from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.options import OFAOptions
from fastofa.methods.targets import Targets


class OFA(Method):
    """kd_weight * L(final; eps[-1]) + ofa_weight * sum_k L(exit_k; eps[k]) (eq. 7-10); L is `fastofa.kernels.ofa_loss`.

    Options: `OFAOptions`; a single eps applies to all heads.
    """

    Options = OFAOptions
    eps: Tensor

    def __init__(self, options: OFAOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        # A buffer: a list would be copied to the device at every step, and the step would wait for the copy.
        self.register_buffer("eps", torch.tensor(options.eps), persistent=False)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("kd", "ofa")

    @property
    def weights(self) -> tuple[float, ...]:
        return (self.options.kd_weight, self.options.ofa_weight)

    def losses(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        o = self.options
        teacher = (targets.classes, targets.log_probs, self.eps, o.temperature)
        each = ofa_loss(outputs.heads, labels, *teacher, self.impl, o.variant)
        return torch.stack([each[-1], each[:-1].sum()])

    def with_label_loss(
        self,
        outputs: Outputs,
        targets: Targets,
        labels: Tensor,
        gt_weight: float,
        smoothing: float,
        partner_labels: Tensor | None,
        mix: Tensor | None,
    ) -> Tensor:
        """The total with the cross-entropy against the labels, and gt, kd and ofa, fp32 [4], in one kernel."""
        o = self.options
        teacher = (targets.classes, targets.log_probs, self.eps, o.temperature)
        weights = (gt_weight, o.kd_weight, o.ofa_weight)
        total, parts = distillation_loss(
            outputs.heads, labels, *teacher, *weights, smoothing, partner_labels, mix, self.impl, o.variant
        )
        return torch.cat([total[None], parts])
