"""A stem's strided convolution of few channels: on squares of pixels in plain PyTorch, or from uint8 in Triton.

Tensor cores need channels in multiples of eight, but an image has three. With stride 2, every square of 2 x 2 pixels
becomes one position of 12 channels (16 with padding), and a 7 x 7 kernel becomes a 4 x 4 kernel over squares, with
zeros where it had no weights. If a kernel is as wide as its stride, the convolution is a matrix product. The weights
are rearranged in the forward pass, so that their gradients have the stored layout. Everything is plain PyTorch, which a
compiler fuses with the operations that produce the pixels.

uint8 pixels are normalised first, in fp32, and rounded to the result's dtype. The Triton kernel does so while it reads
them, and also computes the statistics that a batch norm after it needs.

Shapes: B batch, C channels in, D channels out, S stride, K side of the kernel, T side of the kernel over squares,
OH and OW height and width of the result.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton

MAX_KERNEL = 8  # side of the kernel; a program of the Triton kernel holds the weights of all taps


def stem_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 2,
    padding: int = 0,
    multiple: int = 8,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding) with stride > 1, for few channels.

    Args:
        x: [B, C, H, W], floating, or uint8 [B, 3, H, W], which is normalised first. The kernel copies uint8 images
            whose memory format is not channels-last.
        weight: floating [D, C, K, K]; with uint8 images it may be fp32 with another `dtype`.
        bias: floating [D], or None.
        multiple: on squares, the channels are padded with zeros to a multiple of this.
        mean, std: floating [3], of RGB in 0..1; for uint8 images, for which they are required.
        dtype: for uint8 images, the dtype in which pixels and weights enter the products, and of the result; sums are
            computed in fp32. None for the weight's.
        impl: "triton", for uint8 images and K up to 8; "torch"; or None (choose).

    Returns:
        [B, D, OH, OW], channels last, differentiable in weight, bias and a floating x.

    Raises:
        ValueError: invalid shapes, dtypes, devices or options; the message states what was expected and what was given.
    """
    _check(x, weight, bias, stride, padding, mean, std)
    if mean is None or std is None:
        if impl == "triton":
            raise ValueError(f"impl: expected uint8 images for 'triton', got {x.dtype}; leave impl out")
        return _on_squares(x, weight, bias, stride, padding, multiple)
    dtype = dtype or weight.dtype
    if _use_triton(impl, x, weight, dtype):
        return stem_conv2d_op(x, weight, bias, stride, padding, mean, std, dtype, False)[0]
    return _of_uint8(x, weight, bias, stride, padding, mean, std, dtype, multiple)


def stem_conv2d_with_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 2,
    padding: int = 0,
    *,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`stem_conv2d` of uint8 images, and the mean and biased variance of each channel of its result, fp32 [D].

    The kernel computes the statistics before the result is rounded, from sums and sums of squares, so that the
    variance has a relative error of about 1e-6 (1 + mean² / variance). They have no gradient of their own: the batch
    norm's gradient includes the paths through them. Arguments and errors are those of `stem_conv2d`.
    """
    _check(x, weight, bias, stride, padding, mean, std)
    dtype = dtype or weight.dtype
    if _use_triton(impl, x, weight, dtype):
        return stem_conv2d_op(x, weight, bias, stride, padding, mean, std, dtype, True)
    y = _of_uint8(x, weight, bias, stride, padding, mean, std, dtype)
    return y, *reference.channel_statistics(y.detach())


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    mean: Tensor | None,
    std: Tensor | None,
) -> None:
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"expected x [B, C, H, W] and weight [D, C, K, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if stride < 2:
        raise ValueError(f"stride: expected at least 2, got {stride}")
    if min(output_size(x, weight.shape[2], stride, padding)) < 1:
        raise ValueError(
            f"x: expected at least {weight.shape[2]} pixels per side, padding included, got {tuple(x.shape)}"
        )
    if (x.dtype == torch.uint8) != (mean is not None and std is not None):
        raise ValueError(f"expected uint8 images with mean and std, or floating ones without, got {x.dtype}")
    for name, numbers in (("mean", mean), ("std", std)):
        if numbers is not None and (numbers.shape != (3,) or x.shape[1] != 3):
            raise ValueError(
                f"{name}: expected [3] with 3 channels, got {tuple(numbers.shape)} with {x.shape[1]} channels"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {tuple(bias.shape)}")


def _use_triton(impl: str | None, x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    if not use_triton("stem_conv2d", impl, x.device):
        return False
    fits = dtype in (torch.float32, torch.bfloat16, torch.float16) and weight.shape[2] <= MAX_KERNEL
    if impl == "triton" and not fits:
        raise ValueError(
            f"impl: expected fp32, bf16 or fp16 and a kernel of up to {MAX_KERNEL} x {MAX_KERNEL} for 'triton', "
            f"got {dtype} and {weight.shape[2]} x {weight.shape[3]}; leave impl out"
        )
    return fits and len(x) > 0


def output_size(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """OH and OW."""
    return (x.shape[2] + 2 * padding - kernel) // stride + 1, (x.shape[3] + 2 * padding - kernel) // stride + 1


# --- On squares of pixels, in plain PyTorch ---------------------------------------------------------------------------


def _of_uint8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    multiple: int = 8,
) -> Tensor:
    """The twin of the kernel."""
    pixels = _normalized(x, mean, std, dtype)
    bias = None if bias is None else bias.to(dtype)
    return _on_squares(pixels, weight.to(dtype), bias, stride, padding, multiple)


def _normalized(x: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    pixels = x.to(torch.promote_types(dtype, torch.float32)) / 255
    return ((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).to(dtype)


def _on_squares(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, multiple: int) -> Tensor:
    kernel = weight.shape[2]
    heights, widths = output_size(x, kernel, stride, padding)
    before, taps = squares(kernel, stride, padding)
    height, width = heights + taps - 1, widths + taps - 1  # of squares
    pad = [before * stride, width * stride - before * stride - x.shape[3]]
    pad += [before * stride, height * stride - before * stride - x.shape[2]]
    x = F.pad(x, pad)  # negative padding crops pixels that no kernel reaches
    batch, channels = x.shape[:2]
    x = x.view(batch, channels, height, stride, width, stride).permute(0, 2, 4, 3, 5, 1)
    x = x.reshape(batch, height, width, stride * stride * channels)

    lead = before * stride - padding  # rows of zeros above the kernel, so that its squares align with the image's
    weight = F.pad(weight, [lead, taps * stride - lead - kernel] * 2)
    weight = weight.view(-1, channels, taps, stride, taps, stride).permute(0, 2, 4, 3, 5, 1)
    weight = weight.reshape(weight.shape[0], taps, taps, stride * stride * channels)
    if taps == 1:
        return F.linear(x, weight.flatten(1), bias).permute(0, 3, 1, 2)
    more = -x.shape[3] % multiple
    x, weight = (F.pad(t, [0, more]).permute(0, 3, 1, 2) for t in (x, weight))
    return F.conv2d(x, weight, bias)


def squares(kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """How many squares before its output's square a kernel begins, and the number T of squares that it spans."""
    before = -(-padding // stride)
    return before, (kernel - 1 - padding) // stride + before + 1


# --- The kernel as PyTorch operators ----------------------------------------------------------------------------------

# On a CPU, the operators run the twins.


@torch.library.custom_op("fastofa::stem_conv2d", mutates_args=(), device_types="cuda")
def stem_conv2d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    with_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, D, OH, OW], channels last; the mean and biased variance of each channel, fp32 [D], or [0]."""
    from fastofa.kernels import triton_stem_conv

    with torch.cuda.device_of(x):
        return triton_stem_conv.stem_conv2d(x, weight, bias, stride, padding, mean, std, dtype, with_statistics)


@stem_conv2d_op.register_kernel("cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options, dtype, with_statistics = arguments
    if interpreted() and dtype != torch.float64:
        from fastofa.kernels import triton_stem_conv

        return triton_stem_conv.stem_conv2d(x, weight, bias, *arguments)
    stride, padding, mean, std = options
    y = _of_uint8(x, weight, bias, stride, padding, mean, std, dtype)
    y = _empty(y.shape, y, dtype).copy_(y)
    statistics = reference.channel_statistics(y) if with_statistics else (_vector(y, 0), _vector(y, 0))
    return y, *statistics


@stem_conv2d_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, with_statistics = arguments[-2:]
    size = (len(x), len(weight), *output_size(x, weight.shape[2], stride, padding))
    y = _empty(size, x, dtype)
    length = len(weight) if with_statistics else 0
    return y, _vector(y, length), _vector(y, length)


@torch.library.custom_op("fastofa::stem_conv2d_backward", mutates_args=(), device_types="cuda")
def stem_conv2d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, mean: Tensor, std: Tensor
) -> Tensor:
    """The weight's gradient, with its shape and dtype."""
    from fastofa.kernels import triton_stem_conv

    with torch.cuda.device_of(x):
        return triton_stem_conv.stem_conv2d_backward(dy, x, weight, stride, padding, mean, std)


@stem_conv2d_backward_op.register_kernel("cpu")
def _(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, mean: Tensor, std: Tensor) -> Tensor:
    if interpreted() and dy.dtype != torch.float64:
        from fastofa.kernels import triton_stem_conv

        return triton_stem_conv.stem_conv2d_backward(dy, x, weight, stride, padding, mean, std)
    pixels = _normalized(x, mean, std, dy.dtype)
    return conv2d_weight(pixels, weight.shape, dy, stride, padding).to(weight.dtype).contiguous()


@stem_conv2d_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return weight.new_empty(weight.shape)


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _vector(y: Tensor, length: int) -> Tensor:
    return y.new_empty(length, dtype=torch.promote_types(y.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.options, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, weight = ctx.saved_tensors
    dweight = stem_conv2d_backward_op(dy, x, weight, *ctx.options) if ctx.needs_input_grad[1] else None
    dbias = None
    if ctx.needs_input_grad[2]:
        dbias = dy.sum(dim=(0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    return None, dweight, dbias, *(None,) * 6


stem_conv2d_op.register_autograd(_backward, setup_context=_save)
