"""The depthwise convolution: each pass by itself, and all gradients in one pass."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases.case import Call, Case, on, rotate, short, training_dtype, twins
from fastofa.kernels import depthwise_conv3x3, reference
from fastofa.kernels.choice import HAS_TRITON, can_run_triton

# Channels, side and stride: the exits of a ResNet-18 at 224 px, then layers of a MobileNetV2.
EXITS = [(64, 56, 2), (64, 28, 1), (128, 28, 2), (128, 14, 1), (256, 14, 2), (256, 7, 1)]
MOBILENET = [(96, 112, 2), (144, 56, 1), (192, 28, 1), (384, 14, 1), (960, 7, 1)]


def depthwise_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward, input gradient and weight gradient, and forward with the preceding batch norm and ReLU folded in."""
    if device.type == "cuda":
        sizes, batch = ([(64, 28, 1), (64, 56, 2), (384, 14, 1)] if quick else EXITS + MOBILENET), 1024
    else:
        sizes, batch = [(32, 14, 1)] if quick else EXITS[:2], 2 if quick else 16
    for channels, side, stride in sizes:
        for work in ("forward", "folded", "input gradient", "weight gradient"):
            yield depthwise_case(device, work, batch, channels, side, stride)
        for folded in (False, True):
            yield depthwise_gradients_case(device, folded, batch, channels, side, stride)


def depthwise_gradients_case(
    device: torch.device, folded: bool, batch: int, channels: int, side: int, stride: int
) -> Case:
    """All gradients, by separate kernels and in one pass; with a preceding batch norm and ReLU if `folded`."""
    dtype = training_dtype(device)
    out_side = -(-side // stride)
    scale, shift = torch.rand(2, channels, device=device)
    norm = (scale, shift, "relu") if folded else (None, None, None)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = (
            torch.randn(batch, n, n, channels, generator=generator, device=device, dtype=dtype).permute(0, 3, 1, 2)
            for n in (side, out_side)
        )
        return x, dy, torch.randn(channels, 1, 3, 3, generator=generator, device=device)

    moved = batch * channels * (2 * side**2 + out_side**2) * dtype.itemsize
    inputs = rotate(make, moved, device)

    def with_function(gradients: Callable[..., tuple[Tensor, ...]]) -> Call:
        return on(inputs, lambda x, dy, weight: gradients(dy, x, weight, stride, *norm)[: 4 if folded else 2])

    def separate(implementation: Any) -> Callable[..., tuple[Tensor, ...]]:
        """Gradients of x, weight, scale and shift by the two functions of a module."""

        def gradients(*given: Any) -> tuple[Tensor, ...]:
            dx, *norms = implementation[0](*given)
            return dx, implementation[1](*given), *norms

        return gradients

    twin = separate((reference.depthwise_input_gradient, reference.depthwise_weight_gradient))
    candidates = twins(twin, with_function)
    if can_run_triton(scale):
        from fastofa.kernels import triton_depthwise, triton_depthwise_gradients

        both = (triton_depthwise.input_gradient, triton_depthwise.weight_gradient)
        candidates["triton, separate"] = with_function(separate(both))
        candidates["triton, one pass"] = with_function(triton_depthwise_gradients.all_gradients)
    size = f"gradients{', folded' * folded}: C={channels}, {side} px, stride {stride}, B={batch}"
    return Case("depthwise", size, moved, batch, candidates, tuple(candidates)[1:], 0.03, inputs=inputs, by_norm=True)


def depthwise_case(device: torch.device, work: str, batch: int, channels: int, side: int, stride: int) -> Case:
    dtype = training_dtype(device)
    size = f"{work}: C={channels}, {side} px, stride {stride}, B={batch}, {short(dtype)}"
    out_side = -(-side // stride)
    moved = batch * channels * (side**2 + out_side**2) * dtype.itemsize

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = (
            torch.randn(batch, channels, n, n, generator=generator, device=device, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )
            for n in (side, out_side)
        )
        return x, dy, torch.randn(channels, 1, 3, 3, generator=generator, device=device, dtype=dtype)

    inputs = rotate(make, moved, device)
    scale, shift = torch.rand(2, channels, device=device)

    def twin(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """On a GPU, cuDNN's convolution."""
        if work == "folded":
            return depthwise_conv3x3(x, weight, stride, scale, shift, "relu", impl="torch")
        if work == "forward":
            return depthwise_conv3x3(x, weight, stride, impl="torch")
        mask = [work == "input gradient", work == "weight gradient", False]
        settings = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], channels)
        return torch.ops.aten.convolution_backward(dy, x, weight, *settings, mask)[mask.index(True)]

    def triton(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        from fastofa.kernels import triton_depthwise

        if work == "folded":
            return triton_depthwise.depthwise_conv3x3(x, weight, stride, scale, shift, "relu")
        if work == "forward":
            return triton_depthwise.depthwise_conv3x3(x, weight, stride, None, None, None)
        if work == "input gradient":
            return triton_depthwise.input_gradient(dy, x, weight, stride, None, None, None)[0]
        return triton_depthwise.weight_gradient(dy, x, weight, stride, None, None, None)

    def narrow(*given: Tensor) -> Tensor:
        """Tiles of half the elements: four channels per lane."""
        from fastofa.kernels import triton_depthwise

        elements = triton_depthwise.ELEMENTS
        triton_depthwise.ELEMENTS = elements // 2
        try:
            return triton(*given)
        finally:
            triton_depthwise.ELEMENTS = elements

    candidates = twins(twin, partial(on, inputs))
    if device.type == "cuda" and HAS_TRITON:
        candidates |= {"triton": on(inputs, triton), "triton, four channels": on(inputs, narrow)}
    return Case("depthwise", size, moved, batch, candidates, tuple(candidates)[1:], inputs=inputs)
