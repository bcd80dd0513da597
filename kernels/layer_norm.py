"""The addition of a residual and the layer norm after it: a function that checks its arguments, then runs an
implementation.

Shapes: C channels, M rows (the product of any number of leading dimensions).
"""

from typing import Any

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton

MAX_CHANNELS = 8192  # the most that one tile of the kernel holds


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream x + residual, and its layer norm, computed in fp32 (float64 for float64) and rounded once.

    Continue with the returned stream: its gradient is added in the same pass as the norm's.

    Args:
        x: [..., C] fp32, bf16, fp16 or float64.
        weight, bias: floating [C].
        residual: shape and device as x, any floating dtype.
        dtype: the norm's dtype; None for the stream's.
        impl: "triton", "torch" or None (choose).

    Returns:
        [..., C] each: the stream, in the wider dtype of x and residual (x itself without a residual), and the norm.
        Differentiable in x, weight, bias and residual.

    Raises:
        ValueError: invalid shapes, dtypes, devices or options; the message states what was expected and what was given.
    """
    if x.ndim < 1 or not x.is_floating_point() or not x.shape[-1]:
        raise ValueError(f"x: expected floating [..., C], got {x.dtype} {tuple(x.shape)}")
    for name, tensor, shape in (
        ("weight", weight, x.shape[-1:]),
        ("bias", bias, x.shape[-1:]),
        ("residual", residual, x.shape),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected floating {list(shape)} on {x.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    stream_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = dtype or stream_dtype
    triton = use_triton("layer_norm", impl, x.device)
    if triton and (torch.float64 in (stream_dtype, dtype) or x.shape[-1] > MAX_CHANNELS):
        if impl is not None:
            raise ValueError(
                f"impl: expected fp32, bf16 or fp16 and at most {MAX_CHANNELS} channels for 'triton', got "
                f"{stream_dtype} and {x.shape[-1]}; leave impl out"
            )
        triton = False
    if not triton:
        return reference.layer_norm(x, residual, weight, bias, eps, dtype)
    return _LayerNorm.apply(x, residual, weight, bias, eps, dtype)


# --- The kernel as PyTorch operators ----------------------------------------------------------------------------------

# On a CPU, the operators run the twins.


def _interpreted(*tensors: Tensor) -> bool:
    return interpreted() and all(t.dtype != torch.float64 for t in tensors)


def _statistic(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("fastofa::layer_norm", mutates_args=(), device_types="cuda")
def layer_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream, [0] without a residual; the norm; the mean and 1 / sqrt(variance + eps) of each row, fp32 [M]."""
    from fastofa.kernels import triton_layer_norm

    with torch.cuda.device_of(x):
        return triton_layer_norm.layer_norm(x, residual, weight, bias, eps, dtype)


@layer_norm_op.register_kernel("cpu")
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _interpreted(x):
        from fastofa.kernels import triton_layer_norm

        return triton_layer_norm.layer_norm(x, residual, weight, bias, eps, dtype)
    stream, y = reference.layer_norm(x, residual, weight, bias, eps, dtype)
    mean, inverse = reference.row_statistics(stream, eps)
    return stream.contiguous() if residual is not None else x.new_empty(0), y.contiguous(), mean, inverse


@layer_norm_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    stream_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    stream = x.new_empty(0 if residual is None else x.shape, dtype=stream_dtype)
    return stream, x.new_empty(x.shape, dtype=dtype), _statistic(stream, rows), _statistic(stream, rows)


@torch.library.custom_op("fastofa::layer_norm_backward", mutates_args=(), device_types="cuda")
def backward_op(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and residual (in `residual_dtype`; [0] if None), and those of weight and bias, fp32 [C]."""
    from fastofa.kernels import triton_layer_norm

    with torch.cuda.device_of(stream):
        return triton_layer_norm.layer_norm_backward(
            dy, dstream, stream, weight, mean, inverse, x_dtype, residual_dtype
        )


@backward_op.register_kernel("cpu")
def _(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _interpreted(stream):
        from fastofa.kernels import triton_layer_norm

        return triton_layer_norm.layer_norm_backward(
            dy, dstream, stream, weight, mean, inverse, x_dtype, residual_dtype
        )
    dx, dweight, dbias = reference.layer_norm_gradients(dy, dstream, stream, weight, mean, inverse)
    dresidual = dx.new_empty(0, dtype=x_dtype) if residual_dtype is None else dx.to(residual_dtype, copy=True)
    return dx.to(x_dtype).contiguous(), dresidual.contiguous(), dweight, dbias


@backward_op.register_fake
def _(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = stream.new_empty(stream.shape, dtype=x_dtype)
    dresidual = stream.new_empty(0 if residual_dtype is None else stream.shape, dtype=residual_dtype or x_dtype)
    channels = stream.shape[-1]
    return dx, dresidual, _statistic(stream, channels), _statistic(stream, channels)


class _LayerNorm(torch.autograd.Function):
    """Needed because an operator must not return its argument, which is the stream if there is no residual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        stream, y, mean, inverse = layer_norm_op(x, residual, weight, bias, eps, dtype)
        stream = x.view_as(x) if residual is None else stream
        ctx.save_for_backward(stream, weight, mean, inverse)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype, weight.dtype, bias.dtype)
        ctx.set_materialize_grads(False)
        return stream, y

    @staticmethod
    def backward(ctx: Any, dstream: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if dy is None:
            both = [None if dstream is None or d is None else dstream.to(d) for d in (x_dtype, residual_dtype)]
            return (*both, None, None, None, None)
        other_dtype = None if residual_dtype == x_dtype else residual_dtype
        dx, dresidual, dweight, dbias = backward_op(dy, dstream, *ctx.saved_tensors, x_dtype, other_dtype)
        if residual_dtype is None or residual_dtype == x_dtype:
            dresidual = None if residual_dtype is None else dx
        return dx, dresidual, dweight.to(weight_dtype), dbias.to(bias_dtype), None, None
