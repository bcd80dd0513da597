"""The training objective: the loss against the labels, and the losses of one or more distillation methods.

Shapes: B images, C classes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from fastofa.kernels import distillation_loss
from fastofa.kernels.comparison import Comparison, describe
from fastofa.kernels.reference import cross_entropy, heavier, mixed_labels
from fastofa.methods.find_method import method_class, own_options
from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.ofa import OFA
from fastofa.methods.options import ObjectiveOptions, is_own
from fastofa.methods.own_errors import explained
from fastofa.methods.targets import Targets
from fastofa.system.errors import BadInput

TOPK = 16  # K with which implementations are compared; their times hardly depend on it


class Objective(nn.Module):
    """`objective(outputs, labels, targets)` -> fp32 [len(parts)]: the weighted sum, then each part unweighted.

    loss = gt_weight * label loss of the final logits + sum of weight * loss over the parts of all methods

    For mixed images, `objective(outputs, labels, targets, partner_labels, mix)` with partner_labels int64 [B] and mix
    floating [B]: the label has weight `mix` and the partner's label weight 1 - `mix`, both smoothed, as in timm's
    mixup_target; methods get the label with the larger weight.

    Raises:
        BadInput: a method is unknown, or two have parts of the same name.
    """

    def __init__(self, options: ObjectiveOptions, sizes: Sizes) -> None:
        super().__init__()
        self.options = options
        each = [_create(name, values, sizes) for name, values in options.methods]
        self.methods = nn.ModuleList(each)
        names = [part for method in each for part in method.parts]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            chosen = "+".join(name for name, _ in options.methods)
            raise BadInput(
                f"method {chosen}: expected different losses, but two are called {doubled[0]}; give one of them"
            )
        self.parts = ("loss", "gt", *names)
        self.weights = (options.gt_weight, *(weight for method in each for weight in method.weights))
        self.binary = BinaryCrossEntropy(smoothing=options.smoothing) if options.gt_loss == "bce" else None
        self.is_joint = [type(method) for method in self.methods] == [OFA] and self.binary is None

    def forward(
        self,
        outputs: Outputs,
        labels: Tensor,
        targets: Targets | None,
        partner_labels: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        if self.is_joint and targets is not None:
            o, ofa = self.options, cast(OFA, self.methods[0])
            return ofa.with_label_loss(outputs, targets, labels, o.gt_weight, o.smoothing, partner_labels, mix)
        parts = [self._label_loss(outputs.logits, labels, partner_labels, mix)[None]]
        if partner_labels is not None and mix is not None:
            labels = heavier(labels, partner_labels, mix)
        if targets is not None:
            parts += [cast(Method, method).losses(outputs, targets, labels) for method in self.methods]
        joined = torch.cat(parts)
        total = sum(weight * part for weight, part in zip(self.weights, joined, strict=True))
        return torch.cat([torch.as_tensor(total)[None], joined])

    @property
    def impl(self) -> str | None:
        """The implementation of the methods' kernels, see `fastofa.kernels.distillation_loss`."""
        return cast(Method, self.methods[0]).impl if self.methods else None

    @impl.setter
    def impl(self, value: str | None) -> None:
        for method in self.methods:
            cast(Method, method).impl = value

    def comparisons(self, logits: Tensor) -> dict[str, Comparison]:
        """The loss of OFA and its gradient for logits [H, B, C] like these, K = TOPK, and images that are not mixed.

        The default is the twin, because a whole compiled step was faster with it on an H200 (docs/kernels.md).
        """
        if not self.is_joint:
            return {}
        ofa, (heads, batch, num_classes), device = cast(OFA, self.methods[0]), logits.shape, logits.device
        o, dtype, topk = ofa.options, logits.dtype, min(TOPK, num_classes)
        weights = (self.options.gt_weight, o.kd_weight, o.ofa_weight)

        def inputs() -> tuple[Tensor, ...]:
            log_probs, classes = torch.randn(batch, num_classes, device=device).log_softmax(dim=1).topk(topk)
            labels = torch.randint(num_classes, (batch,), device=device)
            logits = torch.randn(heads, batch, num_classes, device=device, dtype=dtype)
            return logits, labels, classes.to(torch.int32), log_probs.half(), ofa.eps

        def loss(impl: str, logits: Tensor, labels: Tensor, classes: Tensor, log_probs: Tensor, eps: Tensor) -> Tensor:
            given = (logits, labels, classes, log_probs, eps, o.temperature, *weights, self.options.smoothing)
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


def _create(name: str, options: Any, sizes: Sizes) -> Method:
    kind = method_class(name)
    if is_own(name) and (options is None or isinstance(options, Mapping)):
        options = own_options(name, options or {})
    with explained([name]):
        return kind(kind.Options() if options is None else options, sizes)
