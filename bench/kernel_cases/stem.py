"""A network's first layers: the convolution of uint8 pixels; batch norm, ReLU and max-pool together."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases.case import BASELINE, Call, Case, on, rotate, training_dtype, twins
from fastofa.kernels import norm_act_pool, reference, stem_conv2d, stem_conv2d_with_statistics
from fastofa.kernels.choice import can_run_triton
from fastofa.kernels.stem_conv import MAX_KERNEL


def stem_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """A ResNet's stem (convolution of the pixels; batch norm, ReLU and max-pool), and other models' convolutions."""
    gpu = device.type == "cuda"
    for name, kernel, stride, padding, width, batch in (
        ("ResNet", 7, 2, 3, 64, 1024), ("MobileNetV2", 3, 2, 1, 32, 512), ("DeiT-T", 16, 16, 0, 192, 1024),
    ):  # fmt: skip
        yield stem_case(device, name, kernel, stride, padding, width, batch if gpu else 2)
    for work in ("training", "forward", "backward"):
        yield pool_case(device, work, 1024 if gpu else 2, 64, 112 if gpu else 12)


def stem_case(device: torch.device, name: str, kernel: int, stride: int, padding: int, width: int, batch: int) -> Case:
    """From uint8 to the convolution's result, and the gradient of its weights, compiled as in a training step."""
    dtype, side = training_dtype(device), 224 if device.type == "cuda" else 32
    weight = torch.randn(width, 3, kernel, kernel, device=device).requires_grad_()
    out = (side + 2 * padding - kernel) // stride + 1

    def make(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        images = torch.randint(0, 256, (batch, side, side, 3), generator=generator, device=device, dtype=torch.uint8)
        dy = torch.randn(batch, out, out, width, generator=generator, device=device, dtype=dtype)
        return images.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)

    moved = batch * (2 * side * side * 3 + 2 * out * out * width * dtype.itemsize)
    inputs = rotate(make, moved, device)

    def forward(conv: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(images: Tensor, weight: Tensor) -> Tensor:
            pixels = ((images.float() / 255 - 0.45) / 0.22).to(dtype)
            return conv(pixels, weight.to(dtype), None, stride=stride, padding=padding)

        return run

    def call(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def run(images: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            y = function(images, weight)
            return y, *torch.autograd.grad(y, weight, dy)

        return on(inputs, run)

    library = forward(torch.nn.functional.conv2d)
    candidates = {
        BASELINE: call(library),
        "library, compiled": call(torch.compile(library, dynamic=False)),
        "squares, compiled": call(torch.compile(forward(stem_conv2d), dynamic=False)),
        "squares of 12, compiled": call(
            torch.compile(forward(lambda *a, **k: stem_conv2d(*a, **k, multiple=4)), dynamic=False)
        ),
    }
    if kernel <= MAX_KERNEL and can_run_triton(weight):
        normalization = {
            name: torch.full((3,), value, device=device) for name, value in (("mean", 0.45), ("std", 0.22))
        }
        options = {"stride": stride, "padding": padding, "dtype": dtype, "impl": "triton", **normalization}
        candidates["triton, from uint8"] = call(partial(stem_conv2d, **options))
        with_statistics = partial(stem_conv2d_with_statistics, **options)
        candidates["triton, with statistics"] = call(lambda images, weight: with_statistics(images, weight)[0])
    size = f"{name} {kernel}x{kernel}/{stride} to {width}, {side} px, B={batch}"
    return Case("stem", size, moved, batch, candidates, tuple(candidates)[1:], inputs=inputs, by_norm=True)


def pool_case(device: torch.device, work: str, batch: int, channels: int, side: int) -> Case:
    dtype = training_dtype(device)
    out = (side + 1) // 2
    weight, bias, running_mean, running_var = torch.rand(4, channels, device=device) + 0.5

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = (
            torch.randn(batch, n, n, channels, generator=generator, device=device, dtype=dtype).permute(0, 3, 1, 2)
            for n in (side, out)
        )
        mean, var = reference.channel_statistics(x[:2])
        kept = kernels.norm_act_pool(x, mean, var, *weights, 1e-5)[1:] if work == "backward" else ()
        return (x.requires_grad_(), dy, mean, var, *kept)

    whole, pooled = (batch * n * n * channels for n in (side, out))
    moved = {  # bytes that the kernels read and write; a position takes one byte
        "training": (5 * whole + 5 * pooled) * dtype.itemsize + 2 * pooled,
        "forward": (whole + 2 * pooled) * dtype.itemsize + pooled,
        "backward": (2 * whole + 3 * pooled) * dtype.itemsize + pooled,
    }[work]
    inputs = rotate(make, moved / 2, device)
    given = (weight.requires_grad_(), bias.requires_grad_())

    def eager(x: Tensor) -> Tensor:
        y = torch.nn.functional.batch_norm(x, running_mean, running_var, *given, True, 0.1, 1e-5)
        return torch.nn.functional.max_pool2d(torch.nn.functional.relu(y), 3, 2, 1)

    def training(function: Callable[[Tensor], Tensor]) -> Call:
        def run(x: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            y = function(x)
            dweight, dbias, _dx = torch.autograd.grad(y, [*given, x], dy)
            return y, dweight, dbias  # without dx, which differs where values are equal

        return on(inputs, run)

    size = f"norm and maximum, {work}: C={channels}, {side} px, B={batch}"
    candidates: dict[str, Call] = {}
    if work == "training":
        candidates = twins(eager, training)
        if can_run_triton(weight):
            running = (running_mean, running_var, True, 0.1, 1e-5)
            candidates["triton"] = training(lambda x: norm_act_pool(x, *given, *running, impl="triton"))
        return Case("stem", size, moved, batch, candidates, tuple(candidates)[1:], 0.03, inputs=inputs, by_norm=True)
    if can_run_triton(weight):
        from fastofa.kernels import triton_norm_act_pool as kernels
        from fastofa.kernels.triton_norm_act import norm_act_sums

        weights = weight.detach(), bias.detach()

        def part(x: Tensor, dy: Tensor, mean: Tensor, var: Tensor, *kept: Tensor) -> Any:
            if work == "forward":
                return kernels.norm_act_pool(x.detach(), mean, var, *weights, 1e-5)
            greatest, places = kept
            _, *sums = norm_act_sums(dy, greatest, None, mean, var, *weights, 1e-5, "relu")
            return kernels.norm_act_pool_gradient(dy, places, x.detach(), mean, var, weights[0], *sums, 1e-5), *sums

        candidates = {"triton": on(inputs, part)}
    return Case("stem", size, moved, batch, candidates, inputs=inputs)
