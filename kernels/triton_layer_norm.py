"""Layer norm with the addition of a residual in Triton: one pass forward, one pass backward.

A tile has some rows and all channels. Forward, a program handles one tile; backward, it iterates over every P-th tile.
Its sums for weight and bias are added up afterwards, so that they are the same in every run.

Shapes: M rows, C channels, P programs backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastofa.kernels.triton_norm_act import _per_channel, _read, _tile

# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, residual, weight, bias, stream, y, means, inverses, rows, eps,
    C: tl.constexpr, WITH_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """stream = x + residual, y = layer_norm(stream), and each row's mean and 1 / sqrt(variance + eps), fp32 [M]."""
    start = tl.program_id(0) * BLOCK_M
    channels = tl.arange(0, BLOCK_C)[None, :]
    at, inside = _tile(start, channels, rows, C, BLOCK_M)
    value = _read(x, at, inside)
    if WITH_RESIDUAL:
        rounded = (value + _read(residual, at, inside)).to(stream.dtype.element_ty)
        tl.store(stream + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, axis=1)[:, None] / C
    away = tl.where(channels < C, value - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(away * away, axis=1)[:, None] / C + eps)
    result = away * inverse * _per_channel(weight, channels, C) + _per_channel(bias, channels, C)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
    row = start + tl.arange(0, BLOCK_M)[:, None]
    tl.store(means + row, mean, mask=row < rows)
    tl.store(inverses + row, inverse, mask=row < rows)


@triton.jit
def _backward_kernel(
    dy, dstream, stream, weight, means, inverses, dx, dresidual, sums, rows, parts,
    C: tl.constexpr, WITH_STREAM: tl.constexpr, WITH_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = the gradient through the norm + dstream, also in the residual's dtype; each program's sums for weight and
    bias, fp32 [P, 2, C]."""
    part = tl.program_id(0)
    channels = tl.arange(0, BLOCK_C)[None, :]
    factor = _per_channel(weight, channels, C)
    products = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(part * BLOCK_M, rows, parts * BLOCK_M):
        at, inside = _tile(start, channels, rows, C, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)[:, None]
        inverse = tl.load(inverses + row, mask=row < rows, other=0.0)
        normal = (_read(stream, at, inside) - tl.load(means + row, mask=row < rows, other=0.0)) * inverse
        normal = tl.where(inside, normal, 0.0)
        gradient = _read(dy, at, inside)
        products += gradient * normal
        total += gradient
        gradient *= factor
        along = tl.sum(gradient * normal, axis=1)[:, None] / C
        gradient = (gradient - tl.sum(gradient, axis=1)[:, None] / C - normal * along) * inverse
        if WITH_STREAM:
            gradient += _read(dstream, at, inside)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
        if WITH_RESIDUAL:
            tl.store(dresidual + at, gradient.to(dresidual.dtype.element_ty), mask=inside)
    at = sums + tl.cast(part, tl.int64) * 2 * C + channels
    tl.store(at, tl.sum(products, axis=0)[None, :], mask=channels < C)
    tl.store(at + C, tl.sum(total, axis=0)[None, :], mask=channels < C)


# --- Launch -----------------------------------------------------------------------------------------------------------

ELEMENTS, PROGRAMS = 2048, 528  # the size of a tile, and the maximum of programs backward; not measured yet


def tiling(channels: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_C and the number of warps."""
    block_c = max(triton.next_power_of_2(channels), 16)
    return max(ELEMENTS // block_c, 1), block_c, max(4, min(block_c // 512, 16))


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements the operator of that name in layer_norm.py."""
    x = x.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // channels
    other = x if residual is None else residual.contiguous()
    stream = x.new_empty(0 if residual is None else x.shape, dtype=torch.promote_types(x.dtype, other.dtype))
    y = x.new_empty(x.shape, dtype=dtype)
    means, inverses = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    block_m, block_c, num_warps = tiling(channels)
    if rows:
        _forward_kernel[(-(-rows // block_m),)](
            x, other, weight, bias, stream, y, means, inverses, rows, eps,
            C=channels, WITH_RESIDUAL=residual is not None, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=num_warps,
        )  # fmt: skip
    return stream, y, means, inverses


def layer_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements the operator of that name in layer_norm.py."""
    dy, stream = dy.contiguous(), stream.contiguous()
    other = dy if dstream is None else dstream.contiguous()
    channels = stream.shape[-1]
    rows = stream.numel() // channels
    dx = stream.new_empty(stream.shape, dtype=x_dtype)
    dresidual = stream.new_empty(0 if residual_dtype is None else stream.shape, dtype=residual_dtype or x_dtype)
    block_m, block_c, num_warps = tiling(channels)
    parts = min(-(-rows // block_m), PROGRAMS)
    sums = stream.new_empty((parts, 2, channels), dtype=torch.float32)
    if rows:
        _backward_kernel[(parts,)](
            dy, other, stream, weight, mean, inverse, dx, dresidual, sums, rows, parts,
            C=channels, WITH_STREAM=dstream is not None, WITH_RESIDUAL=residual_dtype is not None,
            BLOCK_M=block_m, BLOCK_C=block_c, num_warps=num_warps,
        )  # fmt: skip
    return dx, dresidual, sums[:, 0].sum(dim=0), sums[:, 1].sum(dim=0)
