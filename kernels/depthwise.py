"""Depthwise 3x3 convolution, channels last, with the batch norm and activation before it: checks the arguments, then
runs an implementation.

Its three passes are chosen separately, because the fastest implementation differs (docs/kernels.md). "torch" is cuDNN's
convolution on a GPU.

Shapes: B batch, C channels, H and W of the input.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton_for
from fastofa.kernels.comparison import Comparison, describe, random_like

ACTIVATIONS = (None, "relu", "relu6")


class Passes(NamedTuple):
    """The implementation of each pass, "triton" or "torch"."""

    forward: str
    input_gradient: str
    weight_gradient: str


def default_passes(stride: int, folded: bool) -> Passes:
    """The fastest on an H200: Triton, but cuDNN for the forward pass, and for the weight gradient of stride 1, if no
    batch norm is folded in."""
    return Passes(
        "triton" if folded else "torch", "triton", "triton" if folded or stride == 2 else "torch"
    )  # fmt: skip


def depthwise_conv3x3(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    impl: str | Passes | None = None,
) -> Tensor:
    """Depthwise 3x3 convolution of act(x * scale + shift), with a zero padding of 1 and no bias.

    Args:
        x: [B, C, H, W] fp32, bf16, fp16 or float64, preferably in channels-last memory format; others are copied.
        weight: floating [C, 1, 3, 3]; it may be fp32 with a bf16 x. Sums are computed in fp32 (float64 for float64).
        stride: 1 or 2.
        scale, shift: floating [C], both or neither: a batch norm before the convolution.
        activation: None, "relu" or "relu6", applied after scale and shift, before the padding.
        impl: "triton", "torch", one for each pass, or None (`default_passes` on a GPU).

    Returns:
        [B, C, ceil(H / stride), ceil(W / stride)] in x's dtype, differentiable in x, weight, scale and shift.

    Raises:
        ValueError: invalid shapes, dtypes, devices or options; the message states what was expected and what was given.
    """
    _check(x, weight, stride, scale, shift, activation)
    passes = impl if isinstance(impl, Passes) else [impl]
    if not any([use_triton_for("depthwise_conv3x3", each, x) for each in passes]):
        return reference.depthwise_conv3x3(x, weight, stride, scale, shift, activation)
    if impl is None:
        impl = default_passes(stride, scale is not None)
    elif not isinstance(impl, Passes):
        impl = Passes(impl, impl, impl)
    return depthwise_op(x, weight, stride, scale, shift, activation, *impl)


def comparisons(
    x: Tensor, weight: Tensor, stride: int, scale: Tensor | None, shift: Tensor | None, activation: str | None
) -> dict[str, Comparison]:
    """A comparison for each field of `Passes`, for tensors like these."""
    folded = scale is not None
    y = _channels_last((*x.shape[:2], *(-(-side // stride) for side in x.shape[2:])), x)
    options = {"stride": stride, "before": activation or ("scale" if folded else "nothing")}
    given = [x, weight, scale, shift]

    def forward(impl: str) -> Any:
        return lambda x, weight, scale, shift: depthwise_conv3x3(x, weight, stride, scale, shift, activation, impl)

    def backward(run: Any) -> Any:
        return lambda dy, x, weight, scale, shift: run(dy, x, weight, stride, scale, shift, activation)

    runs: dict[str, dict[str, Any]] = {
        "forward": {impl: forward(impl) for impl in ("triton", "torch")},
        "input_gradient": {
            "triton": backward(input_gradient_op),
            "torch": backward(reference.depthwise_input_gradient),
        },
        "weight_gradient": {
            "triton": backward(weight_gradient_op),
            "torch": backward(reference.depthwise_weight_gradient),
        },
    }
    found = {}
    for name, first in default_passes(stride, folded)._asdict().items():
        tensors = given if name == "forward" else [y, *given]
        candidates = dict(sorted(runs[name].items(), key=lambda item: item[0] != first))
        found[name] = Comparison(
            f"depthwise_conv3x3 {name.replace('_', ' ')}",
            describe(x, weight, **options),
            random_like(*tensors),
            candidates,
            fused=("torch",) if folded and name != "forward" else (),  # the operator runs its forward pass eagerly
            elements=x.numel(),
        )
    return found


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
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    forward: str,
    input_gradient: str,
    weight_gradient: str,
) -> Tensor:
    """[B, C, OH, OW], channels last. The last three arguments are those of `Passes`."""
    if forward == "torch":
        return _as_channels_last(reference.depthwise_conv3x3(x, weight, stride, scale, shift, activation))
    from fastofa.kernels import triton_depthwise

    with torch.cuda.device_of(x):
        return triton_depthwise.depthwise_conv3x3(x, weight, stride, scale, shift, activation)


@depthwise_op.register_kernel("cpu")
def _(x: Tensor, *arguments: Any) -> Tensor:
    *given, forward, _, _ = arguments
    if forward == "triton" and _interpreted(x):
        from fastofa.kernels import triton_depthwise

        return triton_depthwise.depthwise_conv3x3(x, *given)
    return _as_channels_last(reference.depthwise_conv3x3(x, *given))


@depthwise_op.register_fake
def _(x: Tensor, weight: Tensor, stride: int, *arguments: Any) -> Tensor:
    batch, channels, height, width = x.shape
    return _channels_last((batch, channels, (height + stride - 1) // stride, (width + stride - 1) // stride), x)


@torch.library.custom_op("fastofa::depthwise_conv3x3_input_gradient", mutates_args=(), device_types="cuda")
def input_gradient_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, C, H, W], channels last, in x's dtype; dscale and dshift fp32 [C], or [0] if there are none."""
    from fastofa.kernels import triton_depthwise

    with torch.cuda.device_of(x):
        return triton_depthwise.input_gradient(dy, x, weight, stride, scale, shift, activation)


@input_gradient_op.register_kernel("cpu")
def _(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _interpreted(x):
        from fastofa.kernels import triton_depthwise

        return triton_depthwise.input_gradient(dy, x, *arguments)
    dx, dscale, dshift = reference.depthwise_input_gradient(dy, x, *arguments)
    return _as_channels_last(dx), dscale, dshift


@input_gradient_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, scale: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dscale, dshift = (x.new_empty(0 if scale is None else x.shape[1], dtype=dtype) for _ in range(2))
    return _channels_last(x.shape, x), dscale, dshift


@torch.library.custom_op("fastofa::depthwise_conv3x3_weight_gradient", mutates_args=(), device_types="cuda")
def weight_gradient_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    """dw [C, 1, 3, 3], in the dtype of `weight`."""
    from fastofa.kernels import triton_depthwise

    with torch.cuda.device_of(x):
        return triton_depthwise.weight_gradient(dy, x, weight, stride, scale, shift, activation)


@weight_gradient_op.register_kernel("cpu")
def _(dy: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    if _interpreted(x):
        from fastofa.kernels import triton_depthwise

        return triton_depthwise.weight_gradient(dy, x, *arguments)
    return reference.depthwise_weight_gradient(dy, x, *arguments)


@weight_gradient_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return weight.new_empty(weight.shape)


def _interpreted(x: Tensor) -> bool:
    return interpreted() and x.dtype != torch.float64


def _channels_last(shape: Any, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _as_channels_last(t: Tensor) -> Tensor:
    """t itself, or a copy, with exactly the strides of `_channels_last`, which `contiguous` does not ensure for sides
    of 1."""
    expected = _channels_last(t.shape, t)
    return t if t.stride() == expected.stride() else expected.copy_(t)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, stride, scale, shift, activation, _, ctx.input_gradient, ctx.weight_gradient = inputs
    ctx.save_for_backward(x, weight, scale, shift)
    ctx.stride, ctx.activation = stride, activation


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """For a pass that is "torch", PyTorch's operations, which the compiler can fuse with others."""
    x, weight, scale, shift = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    arguments = (dy, x, weight, ctx.stride, scale, shift, ctx.activation)
    of_input = input_gradient_op if ctx.input_gradient == "triton" else reference.depthwise_input_gradient
    of_weight = weight_gradient_op if ctx.weight_gradient == "triton" else reference.depthwise_weight_gradient
    dx, dscale, dshift = of_input(*arguments)
    folded = () if scale is None else (dscale.to(scale.dtype), dshift.to(shift.dtype))
    return dx, of_weight(*arguments), None, *(folded or (None, None)), None, None, None, None


depthwise_op.register_autograd(_backward, setup_context=_save)
