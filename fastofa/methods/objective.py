"""The training objective: label loss, and teacher loss of the final logits and of every exit (OFA-KD, eq. 7-10).

Shapes: H heads (exits in stage order, then the final logits), B images, C classes, K classes kept from the teacher.
"""

from functools import partial

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from fastofa.kernels import distillation_loss, ofa_loss
from fastofa.kernels.comparison import Comparison, describe
from fastofa.kernels.reference import cross_entropy, heavier, mixed_labels
from fastofa.methods.options import Options
from fastofa.methods.targets import Targets

PARTS = ("loss", "gt", "kd", "ofa")
TOPK = 16  # K with which implementations are compared; their times hardly depend on it


class Objective:
    """`objective(logits, labels, targets)` -> fp32 [4]: the weighted sum of the parts, then each part unweighted.

    logits floating [H, B, C], labels int64 [B]; without targets only the label loss is computed.

    loss = gt_weight * CE(final, label) + kd_weight * L_OFA(final; eps[-1]) + ofa_weight * sum_k L_OFA(exit_k; eps[k])

    For mixed images, `objective(logits, labels, targets, partner_labels, mix)` with partner_labels int64 [B] and mix
    floating [B]: the label has weight `mix` and the partner's label weight 1 - `mix`, both smoothed, as in timm's
    mixup_target; the OFA loss enhances the label with the larger weight.

    `impl` is the implementation of the loss, see `fastofa.kernels.distillation_loss`.
    """

    def __init__(self, options: Options, device: torch.device, impl: str | None = None) -> None:
        self.options, self.impl = options, impl
        # Created once: a list would be copied to the device at every step, and the step would wait for the copy.
        self.eps = torch.tensor(options.eps, device=device)
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

    def comparisons(self, logits: Tensor) -> dict[str, Comparison]:
        """The loss and its gradient for logits like these, with K = TOPK, for images that are not mixed.

        The default is the twin, since the whole step was measured to be faster with it, if compiled.
        """
        o, (heads, batch, num_classes), device = self.options, logits.shape, logits.device
        dtype, topk = logits.dtype, min(TOPK, num_classes)

        def inputs() -> tuple[Tensor, ...]:
            log_probs, classes = torch.randn(batch, num_classes, device=device).log_softmax(dim=1).topk(topk)
            labels = torch.randint(num_classes, (batch,), device=device)
            logits = torch.randn(heads, batch, num_classes, device=device, dtype=dtype)
            return logits, labels, classes.to(torch.int32), log_probs.half(), self.eps

        def loss(impl: str, logits: Tensor, labels: Tensor, classes: Tensor, log_probs: Tensor, eps: Tensor) -> Tensor:
            weights = (o.gt_weight, o.kd_weight, o.ofa_weight)
            given = (logits, labels, classes, log_probs, eps, o.temperature, *weights, o.smoothing)
            return distillation_loss(*given, impl=impl, variant=o.variant)[0]

        candidates = {impl: partial(loss, impl) for impl in ("torch", "triton")}
        size = describe(logits, k=topk, variant=o.variant, temperature=o.temperature)
        return {"impl": Comparison("loss", size, inputs, candidates, (0,), ("torch",), logits.numel())}

    def _label_loss(self, final: Tensor, labels: Tensor, partner_labels: Tensor | None, mix: Tensor | None) -> Tensor:
        smoothing, final = self.options.smoothing, final.float()
        if self.binary is None:
            return cross_entropy(final, labels, partner_labels, mix, smoothing)
        if partner_labels is None or mix is None:
            return self.binary(final, labels)  # it smooths the labels itself
        target = mixed_labels(labels, partner_labels, mix, final.shape[1], smoothing)
        return self.binary(final, target.to(final.dtype))
