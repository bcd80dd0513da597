"""Bias and GELU after a matrix product: a public function that checks its arguments, then runs an implementation.

Shapes: C channels, after any number of leading dimensions.
"""

from typing import Any

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton

APPROXIMATIONS = ("none", "tanh")


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none", impl: str | None = None) -> Tensor:
    """gelu(x + bias), computed in fp32 (float64 for float64) and rounded once.

    Args:
        x: [..., C] fp32, bf16, fp16 or float64, a matrix product without its bias; it is kept for the backward pass.
        bias: floating [C]; it may be fp32 with a bf16 x.
        approximate: "none" (the exact normal distribution) or "tanh", as in nn.GELU.
        impl: "triton", "torch" or None (choose).

    Returns:
        [..., C] in x's dtype, differentiable in x and bias.

    Raises:
        ValueError: invalid shapes, dtypes, devices or options; the message states what was expected and what was given.
    """
    if x.ndim < 1 or not x.is_floating_point() or not x.shape[-1]:
        raise ValueError(f"x: expected floating [..., C], got {x.dtype} {tuple(x.shape)}")
    if bias.shape != x.shape[-1:] or not bias.is_floating_point():
        raise ValueError(f"bias: expected floating [{x.shape[-1]}], got {bias.dtype} {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias: expected on {x.device}, got {bias.device}")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate: expected one of {APPROXIMATIONS}, got {approximate!r}")
    triton = use_triton("bias_gelu", impl, x.device)
    if triton and x.dtype == torch.float64:
        if impl is not None:
            raise ValueError("impl: expected fp32, bf16 or fp16 for 'triton', got torch.float64; leave impl out")
        triton = False
    return (bias_gelu_op if triton else reference.bias_gelu)(x, bias, approximate)


# --- The kernel as PyTorch operators ----------------------------------------------------------------------------------

# On a CPU, the operators run the twins.


@torch.library.custom_op("fastofa::bias_gelu", mutates_args=(), device_types="cuda")
def bias_gelu_op(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """A contiguous tensor like x."""
    from fastofa.kernels import triton_gelu

    with torch.cuda.device_of(x):
        return triton_gelu.bias_gelu(x, bias, approximate == "tanh")


@bias_gelu_op.register_kernel("cpu")
def _(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    if _interpreted(x):
        from fastofa.kernels import triton_gelu

        return triton_gelu.bias_gelu(x, bias, approximate == "tanh")
    return reference.bias_gelu(x, bias, approximate).contiguous()


@bias_gelu_op.register_fake
def _(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastofa::bias_gelu_backward", mutates_args=(), device_types="cuda")
def backward_op(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """dx, contiguous and like x; dbias, fp32 [C]."""
    from fastofa.kernels import triton_gelu

    with torch.cuda.device_of(x):
        return triton_gelu.bias_gelu_backward(dy, x, bias, approximate == "tanh")


@backward_op.register_kernel("cpu")
def _(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    if _interpreted(x):
        from fastofa.kernels import triton_gelu

        return triton_gelu.bias_gelu_backward(dy, x, bias, approximate == "tanh")
    dx, dbias = reference.bias_gelu_gradients(dy, x, bias, approximate)
    return dx.contiguous(), dbias


@backward_op.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:], dtype=dtype)


def _interpreted(x: Tensor) -> bool:
    return interpreted() and x.dtype != torch.float64


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = backward_op(dy, x, bias, ctx.approximate)
    return dx, dbias.to(bias.dtype), None


bias_gelu_op.register_autograd(_backward, setup_context=_save)
