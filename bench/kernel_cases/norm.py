"""Batch norm, addition and activation: a training step's passes together, then each kernel by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases.case import Call, Case, on, rotate, training_dtype, twins
from fastofa.kernels import norm_act, reference
from fastofa.kernels.choice import can_run_triton

# Channels, side, batch, residual and activation: a ResNet-18 at batch 1,024, a ResNet-50 at 256, a MobileNetV2 at 512.
NORMS = [
    (64, 56, 1024, True, "relu"), (64, 56, 1024, False, "relu"), (128, 28, 1024, True, "relu"),
    (512, 7, 1024, True, "relu"), (256, 56, 256, True, "relu"), (96, 112, 512, False, "relu6"),
    (144, 56, 512, False, "relu6"),
]  # fmt: skip


def norm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward of everything between two convolutions in training; then each kernel by itself."""
    gpu = device.type == "cuda"
    for channels, side, batch, residual, activation in NORMS[: 1 if quick and not gpu else None]:
        shape = (batch, channels, side) if gpu else (2, channels, side // 8)
        for work in ("training", "statistics", "apply", "sums", "gradient"):
            yield norm_case(device, work, *shape, residual, activation)


def norm_case(
    device: torch.device, work: str, batch: int, channels: int, side: int, residual: bool, activation: str
) -> Case:
    dtype = training_dtype(device)
    act = torch.nn.functional.relu if activation == "relu" else torch.nn.functional.relu6
    maps = {"training": 8 + 3 * residual, "statistics": 1, "apply": 2, "sums": 2, "gradient": 3}[work]
    maps += residual * {"apply": 1, "sums": 2}.get(work, 0)
    weight, bias, running_mean, running_var = torch.rand(4, channels, device=device) + 0.5

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (3, batch, side, side, channels)
        found = torch.randn(shape, generator=generator, device=device, dtype=dtype).permute(0, 1, 4, 2, 3)
        x, other, dy = found.unbind()
        mean, var = reference.channel_statistics(x[:2])
        return x.requires_grad_(), other.requires_grad_(residual), dy, mean, var

    inputs = rotate(make, batch * side * side * channels * dtype.itemsize * maps / 2, device)
    given = (weight.requires_grad_(), bias.requires_grad_())

    def training(forward: Callable[..., Tensor]) -> Call:
        def run(x: Tensor, other: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            y = forward(x, other)
            return (y, *torch.autograd.grad(y, [x, *[other] * residual, *given], dy))

        return on(inputs, run)

    def eager(x: Tensor, other: Tensor) -> Tensor:
        y = torch.nn.functional.batch_norm(x, running_mean, running_var, *given, True, 0.1, 1e-5)
        return act(y + other if residual else y)

    def triton(x: Tensor, other: Tensor) -> Tensor:
        running = (running_mean, running_var, True, 0.1, 1e-5)
        return norm_act(x, *given, *running, activation, other if residual else None, impl="triton")

    size = f"{work}: C={channels}, {side} px, B={batch}, {activation}{', residual' if residual else ''}"
    moved = batch * side * side * channels * dtype.itemsize * maps
    candidates: dict[str, Call] = {}
    if work == "training":
        candidates = twins(eager, training)
        if can_run_triton(weight):
            candidates["triton"] = training(triton)
        return Case("norm", size, moved, batch, candidates, tuple(candidates)[1:], 0.03, inputs=inputs, by_norm=True)

    def part(x: Tensor, other: Tensor, dy: Tensor, mean: Tensor, var: Tensor) -> Any:
        from fastofa.kernels import triton_norm_act as kernels

        x, other, w, b = (t.detach() for t in (x, other, *given))
        y = other if residual else None
        if work == "statistics":
            return kernels.statistics(x)
        if work == "apply":
            return kernels.norm_act(x, mean, var, w, b, y, 1e-5, activation)
        if work == "sums":
            return kernels.norm_act_sums(dy, x, y, mean, var, w, b, 1e-5, activation)[1:]
        return kernels.norm_act_gradient(dy, x, mean, var, w, b, w, b, 1e-5, None if residual else activation)

    if can_run_triton(weight):
        candidates = {"triton": on(inputs, part)}  # there is no baseline: its share of a copy's bandwidth counts
    return Case("norm", size, moved, batch, candidates, inputs=inputs)
