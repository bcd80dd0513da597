"""The loss: ours, on dense probabilities, and Liger-Kernel's divergences."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.kernel_cases.case import Call, Case, rotate, short, training_dtype, twins
from fastofa.kernels import ofa_loss
from fastofa.kernels.choice import HAS_TRITON
from fastofa.kernels.reference import dense_probs, ofa_loss_dense

HEADS, TOPK = 5, 16


def loss_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and gradient of five heads against the top 16 classes."""
    gpu = device.type == "cuda"
    sizes = [(c, b) for c in (100, 1000, 21841) for b in (256, 1024, 2048)] if gpu else [(100, 256), (1000, 256)]
    if quick:
        sizes = [(1000, 1024), (21841, 1024)] if gpu else [(100, 32)]
    for num_classes, batch in sizes:
        yield loss_case(device, num_classes, batch)


def loss_case(device: torch.device, num_classes: int, batch: int) -> Case:
    dtype = training_dtype(device)
    eps = torch.full((HEADS,), 1.5, device=device)
    moved = 2 * HEADS * batch * num_classes * dtype.itemsize + batch * (TOPK * 6 + 8)

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(HEADS, batch, num_classes, generator=generator, device=device).to(dtype)
        labels = torch.randint(0, num_classes, (batch,), generator=generator, device=device)
        teacher = (2 * torch.randn(batch, num_classes, generator=generator, device=device)).log_softmax(dim=1)
        log_probs, classes = teacher.topk(min(TOPK, num_classes))
        return logits.requires_grad_(), labels, classes.to(torch.int32), log_probs.half()

    inputs = rotate(make, moved / 2, device)

    def ours(impl: str) -> Callable[..., Tensor]:
        return lambda logits, labels, classes, log_probs: ofa_loss(logits, labels, classes, log_probs, eps, impl=impl)

    def dense(logits: Tensor, labels: Tensor, classes: Tensor, log_probs: Tensor) -> Tensor:
        return ofa_loss_dense(logits.float(), labels, dense_probs(classes, log_probs.float(), num_classes), eps)

    def call(function: Callable[..., Tensor]) -> Call:
        def forward_and_gradient(i: int) -> tuple[Tensor, Tensor]:
            logits, *rest = inputs[i]
            losses = function(logits, *rest)
            return losses, torch.autograd.grad(losses.sum(), logits)[0]

        return forward_and_gradient

    candidates = twins(ours("torch"), call) | {"dense, eager": call(dense)}
    skipped = {}
    compared = ["twin, compiled", "dense, eager"]
    liger: dict[str, Call] = {}
    if device.type == "cuda" and HAS_TRITON:
        candidates["triton"] = call(ours("triton"))
        compared += ["triton"]
        try:
            liger = {name: call(function) for name, function in liger_losses(num_classes).items()}
        except ImportError as error:
            skipped["liger, KL and JSD"] = f"pip install liger-kernel ({error})"
    size = f"C={num_classes}, B={batch}, {HEADS} heads, {short(dtype)}"
    return Case(
        "loss", size, moved, batch, candidates | liger, tuple(compared),
        waiting=tuple(liger), inputs=inputs, skipped=skipped,
    )  # fmt: skip


def liger_losses(num_classes: int) -> dict[str, Callable[..., Tensor]]:
    """Peers: Liger-Kernel's two divergences, which take dense log-probabilities and have no target enhancement."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    def on_log_probs(loss: Callable[[Tensor, Tensor], Tensor], log_target: bool) -> Callable[..., Tensor]:
        def function(logits: Tensor, labels: Tensor, classes: Tensor, log_probs: Tensor) -> Tensor:
            target = dense_probs(classes, log_probs.float(), num_classes).repeat(HEADS, 1)
            student = logits.float().log_softmax(dim=-1).flatten(0, 1)
            return loss(student, target.clamp(min=1e-30).log() if log_target else target)

        return function

    return {
        "liger, KL": on_log_probs(LigerKLDIVLoss(reduction="batchmean"), log_target=False),
        "liger, JSD": on_log_probs(LigerJSD(), log_target=True),
    }
