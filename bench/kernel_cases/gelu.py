"""Bias and GELU of an MLP: a training step's passes together, then each by itself."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases.case import Call, Case, on, rotate, training_dtype, twins
from fastofa.kernels import bias_gelu
from fastofa.kernels.choice import can_run_triton

# Rows, channels and images: the MLPs of a DeiT-T at batch 1,024 and of a Swin-T's first stage at 256.
GELUS = [(1024 * 197, 768, 1024), (256 * 56 * 56, 384, 256)]


def gelu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward pass of an MLP's bias and GELU, with the bias's gradient; then each pass by itself."""
    gpu = device.type == "cuda"
    for rows, channels, images in GELUS[: 1 if quick else None]:
        for work in ("training", "forward", "backward"):
            yield gelu_case(device, work, rows if gpu else rows // 256, channels, images if gpu else images // 256)


def gelu_case(device: torch.device, work: str, rows: int, channels: int, images: int) -> Case:
    dtype = training_dtype(device)
    bias = torch.rand(channels, device=device).requires_grad_()
    moved = rows * channels * dtype.itemsize * {"training": 5, "forward": 2, "backward": 3}[work]

    def make(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = torch.randn(2, rows, channels, generator=generator, device=device, dtype=dtype).unbind()
        return x.requires_grad_(), dy

    inputs = rotate(make, moved, device)

    def training(forward: Callable[..., Tensor]) -> Call:
        def run(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            y = forward(x, bias)
            return (y, *torch.autograd.grad(y, [x, bias], dy))

        return on(inputs, run)

    def part(x: Tensor, dy: Tensor) -> Any:
        from fastofa.kernels import triton_gelu

        x, b = x.detach(), bias.detach()
        return (
            triton_gelu.bias_gelu(x, b, False) if work == "forward" else triton_gelu.bias_gelu_backward(dy, x, b, False)
        )

    size = f"bias and GELU, {work}: C={channels}, {rows:,} rows"
    candidates: dict[str, Call] = {}
    if work == "training":
        candidates = twins(partial(bias_gelu, impl="torch"), training)
        if can_run_triton(bias):
            candidates["triton"] = training(partial(bias_gelu, impl="triton"))
    elif can_run_triton(bias):
        candidates = {"triton": on(inputs, part)}  # there is no baseline: its share of a copy's bandwidth counts
    return Case("gelu", size, moved, images, candidates, tuple(candidates)[1:], inputs=inputs)
