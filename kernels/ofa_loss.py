"""The OFA loss, alone and with labels: public functions that check their arguments, then run an implementation.

Shapes: H heads (the last one is the model's own), B batch, C classes, K classes kept of the teacher.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton_for

VARIANTS = ("official", "paper")


def ofa_loss(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: float | Sequence[float] | Tensor,
    temperature: float = 1.0,
    impl: str | None = None,
    variant: str = "official",
) -> Tensor:
    """OFA loss of each head for the teacher's top-K predictions, mean over the batch (OFA-KD, NeurIPS 2023, eq. 7-9).

    Args:
        logits: [H, B, C] fp32, bf16, fp16 or float64; the loss is computed in fp32 (float64 for float64).
        labels: int64 [B], each in 0..C-1. Others raise on a CPU; on a GPU, where checking would wait for the device,
            the kernel returns NaN.
        classes: integer [B, K], the teacher's K classes of each sample, all different (K = C: the dense case).
        log_probs: floating [B, K], the teacher's log-probabilities of these classes at temperature 1. The remaining
            probability is spread evenly over the other C - K classes.
        eps: exponent of the target enhancement, one number or one per head; 1 is soft-label cross-entropy.
        temperature: divides the logits of student and teacher, whose probabilities are renormalised; the loss has no
            factor T^2, as published.
        impl: "triton", "torch" or None (choose). The kernel reads the logits once for the loss and once for the
            gradient.
        variant: "official" (the published code: every class to the power eps) or "paper" (only the target class).

    Returns:
        fp32 (or float64) [H], differentiable in `logits`.

    Raises:
        ValueError: invalid shapes, dtypes, devices or values; the message states what was expected and what was given.
    """
    eps = _check(logits, labels, classes, log_probs, eps, temperature, variant)
    if not use_triton_for("ofa_loss", impl, logits):
        return reference.head_losses(logits, labels, classes, log_probs, eps, temperature, variant)
    return ofa_loss_op(logits, labels, classes, log_probs, eps, temperature, variant)


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: float | Sequence[float] | Tensor,
    temperature: float = 1.0,
    gt_weight: float = 1.0,
    kd_weight: float = 1.0,
    ofa_weight: float = 1.0,
    smoothing: float = 0.0,
    partner_labels: Tensor | None = None,
    mix: Tensor | None = None,
    impl: str | None = None,
    variant: str = "official",
) -> tuple[Tensor, Tensor]:
    """The objective of OFA-KD (eq. 10): labels and teacher for the last head, only the teacher for the others.

    total = gt_weight * CE(z[-1], label) + kd_weight * L_OFA(z[-1]; eps[-1]) + ofa_weight * sum_h L_OFA(z[h]; eps[h])

    Args:
        smoothing: label smoothing in CE, 0 to 1.
        partner_labels, mix: for mixed images, int64 [B] and floating [B], or neither. The label is `mix` times the
            image's own label plus 1 - `mix` times the partner's; the OFA loss enhances the class of larger weight.
        Others: as in `ofa_loss`.

    Returns:
        The total, fp32 (or float64) [], differentiable in `logits`; and its unweighted parts gt, kd, ofa [3], detached,
        for logging without waiting for the device.

    Raises:
        ValueError: as `ofa_loss`.
    """
    eps = _check(logits, labels, classes, log_probs, eps, temperature, variant)
    _check_labels(labels, smoothing, partner_labels, mix)
    if not use_triton_for("distillation_loss", impl, logits):
        gt = reference.cross_entropy(logits[-1], labels, partner_labels, mix, smoothing)
        if partner_labels is not None and mix is not None:
            labels = reference.heavier(labels, partner_labels, mix)
        heads = reference.head_losses(logits, labels, classes, log_probs, eps, temperature, variant)
        kd, ofa = heads[-1], heads[:-1].sum()
        total = gt_weight * gt + kd_weight * kd + ofa_weight * ofa
        return total, torch.stack([gt, kd, ofa]).detach()
    weights = [gt_weight, kd_weight, ofa_weight]
    losses = distillation_loss_op(
        logits, labels, classes, log_probs, eps, temperature, variant, weights, smoothing, partner_labels, mix
    )
    return losses[0], losses[1:].detach()


# --- Checks -----------------------------------------------------------------------------------------------------------


def _check(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: float | Sequence[float] | Tensor,
    temperature: float,
    variant: str,
) -> Tensor:
    """eps [H] on the device. Raises ValueError, except for class numbers, which the implementations check."""
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating [H, B, C], got {logits.dtype} {tuple(logits.shape)}")
    heads, batch, num_classes = logits.shape
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 [{batch}], got {labels.dtype} {tuple(labels.shape)}")
    if classes.ndim != 2 or classes.shape[0] != batch or classes.is_floating_point():
        raise ValueError(f"classes: expected integer [{batch}, K], got {classes.dtype} {tuple(classes.shape)}")
    if not 1 <= classes.shape[1] <= num_classes:
        raise ValueError(f"classes: expected K between 1 and C = {num_classes}, got K = {classes.shape[1]}")
    if log_probs.shape != classes.shape or not log_probs.is_floating_point():
        raise ValueError(
            f"log_probs: expected floating {tuple(classes.shape)}, got {log_probs.dtype} {tuple(log_probs.shape)}"
        )
    devices = {t.device for t in (logits, labels, classes, log_probs)}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {sorted(map(str, devices))}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    if not isinstance(eps, Tensor):
        values = [float(eps)] * heads if isinstance(eps, int | float) else [float(e) for e in eps]
        if not all(e > 0 for e in values):
            raise ValueError(f"eps: expected numbers > 0, got {values}")
        eps = torch.tensor(values, device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    if eps.shape not in ((), (heads,)):
        raise ValueError(f"eps: expected one number or {heads} (one per head), got shape {tuple(eps.shape)}")
    return eps.detach().expand(heads)


def _check_labels(labels: Tensor, smoothing: float, partner_labels: Tensor | None, mix: Tensor | None) -> None:
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing: expected 0 to 1, got {smoothing}")
    if partner_labels is None and mix is None:
        return
    if partner_labels is None or mix is None:
        raise ValueError("partner_labels and mix: expected both or neither, got one of them")
    if partner_labels.shape != labels.shape or partner_labels.dtype != torch.int64:
        raise ValueError(
            f"partner_labels: expected int64 {tuple(labels.shape)}, "
            f"got {partner_labels.dtype} {tuple(partner_labels.shape)}"
        )
    if mix.shape != labels.shape or not mix.is_floating_point():
        raise ValueError(f"mix: expected floating {tuple(labels.shape)}, got {mix.dtype} {tuple(mix.shape)}")
    if {partner_labels.device, mix.device} != {labels.device}:
        raise ValueError(
            f"partner_labels and mix: expected on {labels.device}, got {partner_labels.device} and {mix.device}"
        )


# --- The kernels as PyTorch operators ---------------------------------------------------------------------------------

# Forward writes only the losses. Backward reads the logits again and writes their gradient, already multiplied by the
# incoming one. That takes three passes over memory, whereas storing a gradient and multiplying it later takes four.
# On a CPU, the operators run the twins.


@torch.library.custom_op("fastofa::ofa_loss", mutates_args=(), device_types="cuda")
def ofa_loss_op(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
) -> Tensor:
    """Losses fp32 [H]."""
    from fastofa.kernels import triton_ofa_loss

    with torch.cuda.device_of(logits):
        return triton_ofa_loss.losses(logits, labels, classes, log_probs, eps, temperature, variant)


@ofa_loss_op.register_kernel("cpu")
def _(logits: Tensor, *arguments: Any) -> Tensor:
    if _interpreted(logits):
        from fastofa.kernels import triton_ofa_loss

        return triton_ofa_loss.losses(logits, *arguments)
    return reference.head_losses(logits, *arguments)


@torch.library.custom_op("fastofa::ofa_loss_backward", mutates_args=(), device_types="cuda")
def ofa_loss_backward_op(
    incoming: Tensor,
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
) -> Tensor:
    """The gradient of the logits [H, B, C], in their dtype, from that of the losses [H]."""
    from fastofa.kernels import triton_ofa_loss

    with torch.cuda.device_of(logits):
        return triton_ofa_loss.gradient(incoming, logits, labels, classes, log_probs, eps, temperature, variant)


@ofa_loss_backward_op.register_kernel("cpu")
def _(incoming: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    if _interpreted(logits):
        from fastofa.kernels import triton_ofa_loss

        return triton_ofa_loss.gradient(incoming, logits, *arguments)
    return (reference.head_gradients(logits, *arguments) * incoming[:, None, None]).to(logits.dtype)


@torch.library.custom_op("fastofa::distillation_loss", mutates_args=(), device_types="cuda")
def distillation_loss_op(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
    weights: Sequence[float],
    smoothing: float,
    partner_labels: Tensor | None,
    mix: Tensor | None,
) -> Tensor:
    """Total, gt, kd and ofa, fp32 [4]; only the total has a gradient. `weights` are those of gt, kd and ofa."""
    from fastofa.kernels import triton_ofa_loss

    arguments = (logits, labels, classes, log_probs, eps, temperature, variant, weights, smoothing, partner_labels, mix)
    with torch.cuda.device_of(logits):
        return triton_ofa_loss.losses(*arguments)


@distillation_loss_op.register_kernel("cpu")
def _(logits: Tensor, labels: Tensor, *arguments: Any) -> Tensor:
    if _interpreted(logits):
        from fastofa.kernels import triton_ofa_loss

        return triton_ofa_loss.losses(logits, labels, *arguments)
    *teacher, weights, smoothing, partner_labels, mix = arguments
    heads = reference.head_losses(logits, _enhanced(labels, partner_labels, mix), *teacher)
    gt = reference.cross_entropy(logits[-1], labels, partner_labels, mix, smoothing)
    parts = torch.stack([gt, heads[-1], heads[:-1].sum()])
    return torch.cat([parts @ parts.new_tensor(weights)[:, None], parts])


@torch.library.custom_op("fastofa::distillation_loss_backward", mutates_args=(), device_types="cuda")
def distillation_loss_backward_op(
    incoming: Tensor,
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
    weights: Sequence[float],
    smoothing: float,
    partner_labels: Tensor | None,
    mix: Tensor | None,
) -> Tensor:
    """The gradient of the logits [H, B, C], in their dtype, from that of the total [1]."""
    from fastofa.kernels import triton_ofa_loss

    arguments = (logits, labels, classes, log_probs, eps, temperature, variant, weights, smoothing, partner_labels, mix)
    with torch.cuda.device_of(logits):
        return triton_ofa_loss.gradient(incoming, *arguments)


@distillation_loss_backward_op.register_kernel("cpu")
def _(incoming: Tensor, logits: Tensor, labels: Tensor, *arguments: Any) -> Tensor:
    if _interpreted(logits):
        from fastofa.kernels import triton_ofa_loss

        return triton_ofa_loss.gradient(incoming, logits, labels, *arguments)
    *teacher, weights, smoothing, partner_labels, mix = arguments
    gradient = reference.head_gradients(logits, _enhanced(labels, partner_labels, mix), *teacher)
    gradient *= gradient.new_tensor([weights[2]] * (len(logits) - 1) + [weights[1]])[:, None, None]
    of_labels = reference.cross_entropy_gradient(logits[-1], labels, partner_labels, mix, smoothing)
    gradient[-1] += weights[0] * of_labels
    return (gradient * incoming).to(logits.dtype)


def _interpreted(logits: Tensor) -> bool:
    return interpreted() and logits.dtype != torch.float64


def _enhanced(labels: Tensor, partner_labels: Tensor | None, mix: Tensor | None) -> Tensor:
    """The class that the OFA loss enhances."""
    if partner_labels is None or mix is None:
        return labels
    return reference.heavier(labels, partner_labels, mix)


def _fake_losses(logits: Tensor, count: int) -> Tensor:
    return logits.new_empty(count, dtype=torch.promote_types(logits.dtype, torch.float32))


@ofa_loss_op.register_fake
def _(logits: Tensor, *arguments: Any) -> Tensor:
    return _fake_losses(logits, len(logits))


@distillation_loss_op.register_fake
def _(logits: Tensor, *arguments: Any) -> Tensor:
    return _fake_losses(logits, 4)


@ofa_loss_backward_op.register_fake
@distillation_loss_backward_op.register_fake
def _(incoming: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the tensors and the other inputs for backward, each in order."""
    ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))
    ctx.others = [None if isinstance(each, Tensor) else (each,) for each in inputs]


def _inputs(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def _backward_of_heads(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    return ofa_loss_backward_op(incoming, *_inputs(ctx)), *([None] * 6)


def _backward_of_total(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    return distillation_loss_backward_op(incoming[:1], *_inputs(ctx)), *([None] * 10)


ofa_loss_op.register_autograd(_backward_of_heads, setup_context=_save)
distillation_loss_op.register_autograd(_backward_of_total, setup_context=_save)
