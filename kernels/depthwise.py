"""Depthwise 3x3 convolution, channels last, with the batch norm and activation before it: checks the arguments, then
runs an implementation.

Shapes: B batch, C channels, H and W of the input.
"""

from typing import Any

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton

ACTIVATIONS = (None, "relu", "relu6")


def depthwise_conv3x3(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Depthwise 3x3 convolution of act(x * scale + shift), with a zero padding of 1 and no bias.

    Args:
        x: [B, C, H, W] fp32, bf16, fp16 or float64, preferably in channels-last memory format; others are copied.
        weight: floating [C, 1, 3, 3]; it may be fp32 with a bf16 x. Sums are computed in fp32 (float64 for float64).
        stride: 1 or 2.
        scale, shift: floating [C], both or neither: a batch norm before the convolution.
        activation: None, "relu" or "relu6", applied after scale and shift, before the padding.
        impl: "triton", "torch" or None (choose).

    Returns:
        [B, C, ceil(H / stride), ceil(W / stride)] in x's dtype, differentiable in x, weight, scale and shift.

    Raises:
        ValueError: invalid shapes, dtypes, devices or options; the message states what was expected and what was given.
    """
    _check(x, weight, stride, scale, shift, activation)
    if not use_triton("depthwise_conv3x3", impl, x.device):
        return reference.depthwise_conv3x3(x, weight, stride, scale, shift, activation)
    if x.dtype == torch.float64:
        raise ValueError("impl: expected fp32, bf16 or fp16 for 'triton', got torch.float64; leave impl out")
    return depthwise_op(x, weight, stride, scale, shift, activation)


def _check(
    x: Tensor, weight: Tensor, stride: int, scale: Tensor | None, shift: Tensor | None, activation: str | None
) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [B, C, H, W], got {x.dtype} {tuple(x.shape)}")
    _, channels, height, width = x.shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"x: expected at least one channel and one pixel, got {tuple(x.shape)}")
    if weight.shape != (channels, 1, 3, 3) or not weight.is_floating_point():
        raise ValueError(f"weight: expected floating [{channels}, 1, 3, 3], got {weight.dtype} {tuple(weight.shape)}")
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift: expected both or neither, got one of them")
    if scale is None and activation is not None:
        raise ValueError(f"activation: expected scale and shift with {activation!r}, got none; give 1 and 0")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and (tensor.shape != (channels,) or not tensor.is_floating_point()):
            raise ValueError(f"{name}: expected floating [{channels}], got {tensor.dtype} {tuple(tensor.shape)}")
    devices = {t.device for t in (x, weight, scale, shift) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {sorted(map(str, devices))}")


# --- The kernels as PyTorch operators ---------------------------------------------------------------------------------

# On a CPU, the operators run the twins.


@torch.library.custom_op("fastofa::depthwise_conv3x3", mutates_args=(), device_types="cuda")
def depthwise_op(
    x: Tensor, weight: Tensor, stride: int, scale: Tensor | None, shift: Tensor | None, activation: str | None
) -> Tensor:
    """[B, C, OH, OW], channels last."""
    from fastofa.kernels import triton_depthwise

    with torch.cuda.device_of(x):
        return triton_depthwise.depthwise_conv3x3(x, weight, stride, scale, shift, activation)


@depthwise_op.register_kernel("cpu")
def _(x: Tensor, *arguments: Any) -> Tensor:
    if interpreted() and x.dtype != torch.float64:
        from fastofa.kernels import triton_depthwise

        return triton_depthwise.depthwise_conv3x3(x, *arguments)
    y = reference.depthwise_conv3x3(x, *arguments)
    return _channels_last(y.shape, y).copy_(y)


@depthwise_op.register_fake
def _(x: Tensor, weight: Tensor, stride: int, *arguments: Any) -> Tensor:
    batch, channels, height, width = x.shape
    return _channels_last((batch, channels, (height + stride - 1) // stride, (width + stride - 1) // stride), x)


@torch.library.custom_op("fastofa::depthwise_conv3x3_backward", mutates_args=(), device_types="cuda")
def backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [B, C, H, W], channels last, and dw [C, 1, 3, 3], with the dtypes of x and weight; dscale and dshift fp32 [C],
    or [0] if there are none."""
    from fastofa.kernels import triton_depthwise

    with torch.cuda.device_of(x):
        return triton_depthwise.depthwise_conv3x3_backward(dy, x, weight, stride, scale, shift, activation)


@backward_op.register_kernel("cpu")
def _(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if interpreted() and x.dtype != torch.float64:
        from fastofa.kernels import triton_depthwise

        return triton_depthwise.depthwise_conv3x3_backward(dy, x, *arguments)
    dx, dw, dscale, dshift = reference.depthwise_gradients(dy, x, *arguments)
    return _channels_last(dx.shape, dx).copy_(dx), dw, dscale, dshift


@backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, scale: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dscale, dshift = (x.new_empty(0 if scale is None else x.shape[1], dtype=dtype) for _ in range(2))
    return _channels_last(x.shape, x), weight.new_empty(weight.shape), dscale, dshift


def _channels_last(shape: Any, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, stride, scale, shift, activation = inputs
    ctx.save_for_backward(x, weight, scale, shift)
    ctx.stride, ctx.activation = stride, activation


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, shift = ctx.saved_tensors
    dx, dw, dscale, dshift = backward_op(dy, x, weight, ctx.stride, scale, shift, ctx.activation)
    if scale is None:
        return dx, dw, None, None, None, None
    return dx, dw, None, dscale.to(scale.dtype), dshift.to(shift.dtype), None


depthwise_op.register_autograd(_backward, setup_context=_save)
