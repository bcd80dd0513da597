"""The OFA loss as a public function: checks its arguments, then runs an implementation.

Shapes: H heads, B batch, C classes, K classes kept of the teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastofa.kernels import reference

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
        labels: int64 [B], each in 0..C-1 (not checked: that would wait for the device).
        classes: integer [B, K], the teacher's K classes of each sample, all different (K = C: the dense case).
        log_probs: floating [B, K], the teacher's log-probabilities of those classes at temperature 1.
            The mass they leave is spread evenly over the other C - K classes.
        eps: exponent of the target enhancement, one number or one per head; 1 is soft-label cross-entropy.
        temperature: divides the student's logits and the teacher's (renormalised); no T^2 factor, as published.
        impl: "torch" or None (choose).
        variant: "official" (the published code: every class to the power eps) or "paper" (only the target class).

    Returns:
        fp32 (or float64) [H], differentiable in `logits`.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, saying what was expected and what came.
    """
    _check(logits, labels, classes, log_probs, temperature, impl, variant)
    heads = logits.shape[0]
    if not isinstance(eps, Tensor):
        values = [float(eps)] * heads if isinstance(eps, int | float) else [float(e) for e in eps]
        if not all(e > 0 for e in values):
            raise ValueError(f"eps: expected numbers > 0, got {values}")
        eps = torch.tensor(values, device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    if eps.shape not in ((), (heads,)):
        raise ValueError(f"eps: expected one number or {heads} (one per head), got shape {tuple(eps.shape)}")
    return reference.ofa_loss(logits, labels, classes, log_probs, eps.expand(heads), temperature, variant)


def _check(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    temperature: float,
    impl: str | None,
    variant: str,
) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating [H, B, C], got {logits.dtype} {tuple(logits.shape)}")
    _, batch, num_classes = logits.shape
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
    if impl not in (None, "torch"):
        raise ValueError(f"impl: expected None or 'torch', got {impl!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
