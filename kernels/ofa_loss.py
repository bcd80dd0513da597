"""The OFA loss, alone and with labels, as public functions: check the arguments, then run an implementation.

Shapes: H heads (the last one is the model's own), B batch, C classes, K classes kept of the teacher.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton

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
    """OFA loss of each head against the teacher's top-K answer, mean over the batch (OFA-KD, NeurIPS 2023, eq. 7-9).

    Args:
        logits: [H, B, C] fp32, bf16, fp16 or float64; the loss is computed in fp32 (float64 for float64).
        labels: int64 [B], each in 0..C-1. Numbers outside raise on a CPU; on a GPU, where looking at them would wait
            for the device, the kernel makes the loss NaN.
        classes: integer [B, K], the teacher's K classes of each sample, all different (K = C: the dense case).
        log_probs: floating [B, K], the teacher's log-probabilities of those classes at temperature 1.
            The mass they leave is spread evenly over the other C - K classes.
        eps: exponent of the target enhancement, one number or one per head; 1 is soft-label cross-entropy.
        temperature: divides the student's logits and the teacher's (renormalised); no T^2 factor, as published.
        impl: "triton", "torch" or None (choose). The kernel makes loss and gradient in one pass over the logits.
        variant: "official" (the published code: every class to the power eps) or "paper" (only the target class).

    Returns:
        fp32 (or float64) [H], differentiable in `logits`.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, saying what was expected and what came.
    """
    eps = _check(logits, labels, classes, log_probs, eps, temperature, variant)
    if not use_triton("ofa_loss", impl, logits.device):
        return reference.head_losses(logits, labels, classes, log_probs, eps, temperature, variant)
    _check_triton(logits)
    gradient = torch.is_grad_enabled() and logits.requires_grad
    return ofa_loss_op(logits, labels, classes, log_probs, eps, temperature, variant, gradient)[0]


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
    """All of OFA-KD's objective (eq. 10): labels and teacher on the last head, the teacher on every other one.

    total = gt_weight * CE(z[-1], label) + kd_weight * L_OFA(z[-1]; eps[-1]) + ofa_weight * sum_h L_OFA(z[h]; eps[h])

    Args:
        smoothing: of the labels in CE, 0 to 1.
        partner_labels, mix: for mixed pictures, int64 [B] and floating [B] or neither: the label is `mix` of its own
            one and the rest of the partner's; the OFA loss enhances the class with more of it.
        the others: as in `ofa_loss`.

    Returns:
        total, fp32 (or float64) [], differentiable in `logits`; and its unweighted parts gt, kd, ofa [3], detached, for
        logging without waiting for the device.

    Raises:
        ValueError: as `ofa_loss`.
    """
    eps = _check(logits, labels, classes, log_probs, eps, temperature, variant)
    _check_labels(labels, smoothing, partner_labels, mix)
    if not use_triton("distillation_loss", impl, logits.device):
        gt = reference.cross_entropy(logits[-1], labels, partner_labels, mix, smoothing)
        if partner_labels is not None and mix is not None:
            labels = reference.heavier(labels, partner_labels, mix)
        heads = reference.head_losses(logits, labels, classes, log_probs, eps, temperature, variant)
        kd, ofa = heads[-1], heads[:-1].sum()
        total = gt_weight * gt + kd_weight * kd + ofa_weight * ofa
        return total, torch.stack([gt, kd, ofa]).detach()
    _check_triton(logits)
    gradient = torch.is_grad_enabled() and logits.requires_grad
    weights = [gt_weight, kd_weight, ofa_weight]
    losses, _ = distillation_loss_op(
        logits, labels, classes, log_probs, eps, temperature, variant, gradient, weights, smoothing, partner_labels, mix
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
    """Raises ValueError; gives eps [H] on the device. Class numbers are looked at by whoever uses them."""
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


def _check_triton(logits: Tensor) -> None:
    if logits.dtype == torch.float64:
        raise ValueError("impl: expected fp32, bf16 or fp16 logits for 'triton', got torch.float64; leave impl out")


# --- The kernels as operators of PyTorch ------------------------------------------------------------------------------

# Each gives the losses and, if asked, the gradient for an incoming gradient of 1 (times `reference.gradient_scale`), so
# that the backward pass is one multiplication. On a CPU the operators are the twins.


@torch.library.custom_op("fastofa::ofa_loss", mutates_args=(), device_types="cuda")
def ofa_loss_op(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses fp32 [H]; their gradient [H, B, C] in the logits' dtype, empty unless `gradient`."""
    from fastofa.kernels import triton_ofa_loss

    with torch.cuda.device_of(logits):
        return triton_ofa_loss.losses_and_gradient(
            logits, labels, classes, log_probs, eps, temperature, variant, gradient
        )


@ofa_loss_op.register_kernel("cpu")
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, gradient = arguments
    if interpreted() and logits.dtype != torch.float64:
        from fastofa.kernels import triton_ofa_loss

        return triton_ofa_loss.losses_and_gradient(logits, *arguments)
    found = reference.head_gradients(logits, *given) if gradient else None
    return reference.head_losses(logits, *given), _stored(found, logits)


@torch.library.custom_op("fastofa::distillation_loss", mutates_args=(), device_types="cuda")
def distillation_loss_op(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
    gradient: bool,
    weights: Sequence[float],
    smoothing: float,
    partner_labels: Tensor | None,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Total, gt, kd and ofa, fp32 [4]; the total's gradient [H, B, C] in the logits' dtype, empty unless `gradient`.

    `weights`: of gt, kd and ofa.
    """
    from fastofa.kernels import triton_ofa_loss

    given = (logits, labels, classes, log_probs, eps, temperature, variant, gradient)
    with torch.cuda.device_of(logits):
        return triton_ofa_loss.losses_and_gradient(*given, weights, smoothing, partner_labels, mix)


@distillation_loss_op.register_kernel("cpu")
def _(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *teacher, gradient, weights, smoothing, partner_labels, mix = arguments
    if interpreted() and logits.dtype != torch.float64:
        from fastofa.kernels import triton_ofa_loss

        return triton_ofa_loss.losses_and_gradient(logits, labels, *arguments)
    of_labels = (logits[-1], labels, partner_labels, mix, smoothing)
    hard = labels if partner_labels is None else reference.heavier(labels, partner_labels, mix)
    heads = reference.head_losses(logits, hard, *teacher)
    parts = torch.stack([reference.cross_entropy(*of_labels), heads[-1], heads[:-1].sum()])
    losses = torch.cat([parts @ parts.new_tensor(weights)[:, None], parts])
    if not gradient:
        return losses, _stored(None, logits)
    found = reference.head_gradients(logits, hard, *teacher)
    found *= found.new_tensor([weights[2]] * (len(logits) - 1) + [weights[1]])[:, None, None]
    found[-1] += weights[0] * reference.cross_entropy_gradient(*of_labels)
    return losses, _stored(found, logits)


def _stored(gradient: Tensor | None, logits: Tensor) -> Tensor:
    if gradient is None:
        return logits.new_empty(0)
    return (gradient * reference.gradient_scale(logits)).to(logits.dtype)


def _fake(count: int, logits: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(count, dtype=dtype), logits.new_empty(logits.shape if gradient else (0,))


@ofa_loss_op.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake(len(logits), logits, gradient=arguments[6])


@distillation_loss_op.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake(4, logits, gradient=arguments[6])


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward_of_heads(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return _scaled(gradient, incoming[:, None, None]), *([None] * 7)


def _backward_of_total(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return _scaled(gradient, incoming[:1, None, None]), *([None] * 11)


def _scaled(gradient: Tensor, incoming: Tensor) -> Tensor:
    """In fp32, in one pass over memory."""
    return torch.mul(gradient, incoming / reference.gradient_scale(gradient), out=torch.empty_like(gradient))


ofa_loss_op.register_autograd(_backward_of_heads, setup_context=_save_gradient)
distillation_loss_op.register_autograd(_backward_of_total, setup_context=_save_gradient)
