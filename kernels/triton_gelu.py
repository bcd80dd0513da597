"""Bias and GELU in Triton: one pass forward; one pass backward, which also sums the bias's gradient.

A program handles a block of channels and iterates over every P-th tile of rows. Sums over the rows are written per
program and added up afterwards, so that they are the same in every run.

Shapes: M rows, C channels, P programs per block of channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastofa.kernels.triton_norm_act import _per_channel, _place, _read, _tile, tiling

# --- The function -----------------------------------------------------------------------------------------------------


@triton.jit
def _upper_tail(away):
    """1 - Phi(away) for away >= 0, where Phi is the cumulative normal distribution.

    2 to the power of a polynomial, fitted to the logarithm so that Phi and gelu are within 5e-7 of their values
    (PyTorch's gelu in fp32: 1.2e-6). With the library's erf, there would be twice as many
    instructions, which limit the speed.
    """
    power = -8.25190905e-07 * away + 4.05662089e-05
    power = power * away - 0.000781192701
    power = power * away + 0.00803646803
    power = power * away - 0.0532567229
    power = power * away - 0.458931979
    power = power * away - 1.15114118
    power = power * away - 0.999999272
    return tl.exp2(power)


@triton.jit
def _share_and_slope(u, TANH: tl.constexpr):
    """s(u) and u s'(u), where gelu(u) = u s(u) and so gelu'(u) = s(u) + u s'(u)."""
    if TANH:  # s = (1 + tanh z) / 2 = sigmoid(2 z)
        z2 = 1.5957691216 * (u + 0.044715 * u * u * u)
        share = 1.0 / (1.0 + tl.exp2(-1.4426950409 * z2))
        slope = u * share * (1.0 - share) * (1.5957691216 * (1.0 + 0.134145 * u * u))
    else:
        tail = _upper_tail(tl.abs(u))
        share = tl.where(u < 0, tail, 1.0 - tail)
        slope = 0.3989422804 * u * tl.exp2(-0.72134752044 * u * u)
    return share, slope


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, bias, y, rows, parts, C: tl.constexpr, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """y = gelu(x + bias)."""
    channels, part = _place(C, BLOCK_C)
    shift = _per_channel(bias, channels, C)
    for start in range(part * BLOCK_M, rows, parts * BLOCK_M):
        at, inside = _tile(start, channels, rows, C, BLOCK_M)
        u = _read(x, at, inside) + shift
        share, _ = _share_and_slope(u, TANH)
        tl.store(y + at, (u * share).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy, x, bias, dx, sums, rows, parts,
    C: tl.constexpr, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dy gelu'(x + bias), and each program's sum of dx over its rows, fp32 [P, C]."""
    channels, part = _place(C, BLOCK_C)
    shift = _per_channel(bias, channels, C)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(part * BLOCK_M, rows, parts * BLOCK_M):
        at, inside = _tile(start, channels, rows, C, BLOCK_M)
        share, slope = _share_and_slope(_read(x, at, inside) + shift, TANH)
        gradient = tl.where(inside, _read(dy, at, inside) * (share + slope), 0.0)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
        total += gradient
    at = sums + tl.cast(part, tl.int64) * C + channels
    tl.store(at, tl.sum(total, axis=0)[None, :], mask=channels < C)


# --- Launch -----------------------------------------------------------------------------------------------------------

# The elements of a tile and the maximum number of programs, as for norm_act's passes; not measured yet.
FORWARD, BACKWARD = (4096, 8448), (2048, 1056)


def bias_gelu(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """Implements the operator of that name in gelu.py."""
    x = x.contiguous()
    y = torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows:
        t = tiling(rows, channels, FORWARD)
        _forward_kernel[(t.parts * t.blocks,)](
            x, bias, y, rows, t.parts, C=channels, TANH=tanh, BLOCK_M=t.block_m, BLOCK_C=t.block_c
        )
    return y


def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """Implements the operator of that name in gelu.py."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    if not rows:
        return dx, x.new_zeros(channels, dtype=torch.float32)
    t = tiling(rows, channels, BACKWARD)
    sums = x.new_empty((t.parts, channels), dtype=torch.float32)
    _backward_kernel[(t.parts * t.blocks,)](
        dy, x, bias, dx, sums, rows, t.parts, C=channels, TANH=tanh, BLOCK_M=t.block_m, BLOCK_C=t.block_c
    )
    return dx, sums.sum(dim=0)
