"""Layer norm with the addition before it, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases.case import Call, Case, on, rotate, training_dtype, twins
from fastofa.kernels import layer_norm
from fastofa.kernels.choice import can_run_triton


def layer_norm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward of an addition and the norm after it; channels of a DeiT-T, a DeiT-S and a Mixer-B."""
    for channels in (192, 384, 768)[: 1 if quick else None]:
        yield layer_norm_case(device, 197 * (1024 if device.type == "cuda" else 4), channels)


def layer_norm_case(device: torch.device, rows: int, channels: int) -> Case:
    """An fp32 stream and, on a GPU, bf16 branches, as under autocast."""
    dtype = training_dtype(device)
    weight, bias = (t.requires_grad_() for t in torch.rand(2, channels, device=device))
    moved = rows * channels * (5 * 4 + 4 * dtype.itemsize)

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dstream, branch, dy = torch.randn(4, rows, channels, generator=generator, device=device)
        return x.requires_grad_(), branch.to(dtype).requires_grad_(), dstream, dy.to(dtype)

    inputs = rotate(make, moved, device)

    def training(forward: Callable[..., Any]) -> Call:
        def run(x: Tensor, branch: Tensor, *slopes: Tensor) -> tuple[Tensor, ...]:
            both = forward(x, weight, bias, 1e-6, branch, dtype)
            return (*both, *torch.autograd.grad(both, [x, branch, weight, bias], slopes))

        return on(inputs, run)

    candidates = twins(partial(layer_norm, impl="torch"), training)
    if can_run_triton(weight):
        candidates["triton"] = training(partial(layer_norm, impl="triton"))
    size = f"addition and norm, training: C={channels}, {rows:,} rows"
    return Case("layer_norm", size, moved, rows // 197, candidates, tuple(candidates)[1:], inputs=inputs)
