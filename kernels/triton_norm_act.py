"""Batch norm, residual and activation in Triton, channels last: statistics, one pass forward, two passes backward.

A tensor is a matrix of M rows (the pixels of all images) and C channels. A program handles a block of channels and
iterates over every P-th tile of rows. Sums over the rows are written per program and added up by a second, small
kernel, so that they are the same in every run. Statistics are sums of each channel's differences from its first value,
which avoids cancellation if the mean is far from 0.

Shapes: M rows, C channels, P programs per block of channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- Tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [1, BLOCK_C], and the program number p < P. Neighbouring programs have the same rows."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channels = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return channels, tl.program_id(0) // BLOCKS


@triton.jit
def _tile(start, channels, rows, C: tl.constexpr, BLOCK_M: tl.constexpr):
    """The offsets of a tile, and a mask of those inside."""
    row = tl.arange(0, BLOCK_M)[:, None]
    return tl.cast(start, tl.int64) * C + (row * C + channels), (row < rows - start) & (channels < C)


@triton.jit
def _read(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _per_channel(values, channels, C: tl.constexpr):
    return tl.load(values + channels, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def _affine(means, variances, weight, bias, channels, eps, C: tl.constexpr):
    """The mean, scale and shift with which a batch norm computes (value - mean) * scale + shift."""
    scale = _per_channel(weight, channels, C) * tl.rsqrt(_per_channel(variances, channels, C) + eps)
    return _per_channel(means, channels, C), scale, _per_channel(bias, channels, C)


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    """The activation, which keeps NaN."""
    if ACTIVATION is not None:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        value = tl.minimum(value, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def _passes(value, ACTIVATION: tl.constexpr):
    """Whether the activation passes the gradient on, from its input or its output."""
    passes = value > 0
    if ACTIVATION == "relu6":
        passes = passes & (value < 6)
    return passes


@triton.jit
def _store_sums(sums, part, channels, first, second, C: tl.constexpr):
    at = sums + tl.cast(part, tl.int64) * 2 * C + channels
    tl.store(at, tl.sum(first, axis=0)[None, :], mask=channels < C)
    tl.store(at + C, tl.sum(second, axis=0)[None, :], mask=channels < C)


@triton.jit
def _add_up(sums, channels, parts, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The two sums over all programs [1, BLOCK_C], added in a fixed order."""
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (part < parts) & (channels < C)
        at = part * 2 * C + channels
        first += _read(sums, at, inside)
        second += _read(sums, at + C, inside)
    return tl.sum(first, axis=0)[None, :], tl.sum(second, axis=0)[None, :]


# --- Statistics -------------------------------------------------------------------------------------------------------


@triton.jit
def _statistics_kernel(
    x, sums, rows, parts, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Each program's sums of x minus the channel's first value, and of its square, fp32 [P, 2, C]."""
    channels, part = _place(C, BLOCK_C)
    first_value = _per_channel(x, channels, C)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(part * BLOCK_M, rows, parts * BLOCK_M):
        at, inside = _tile(start, channels, rows, C, BLOCK_M)
        away = tl.where(inside, _read(x, at, inside) - first_value, 0.0)
        total += away
        squares += away * away
    _store_sums(sums, part, channels, total, squares, C)


@triton.jit
def _move_towards(running, channels, value, momentum, C: tl.constexpr):
    """running += momentum * (value - running), [C]."""
    kept = channels < C
    old = _per_channel(running, channels, C)
    tl.store(running + channels, (old + momentum * (value - old)).to(running.dtype.element_ty), mask=kept)


@triton.jit
def _mean_and_variance_kernel(
    x, sums, running_means, running_variances, means, variances, rows, parts, momentum, unbiased,
    C: tl.constexpr, UPDATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance [C]. With UPDATE, the running statistics move towards the mean and the variance times
    `unbiased`."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total, squares = _add_up(sums, channels, parts, C, BLOCK_P, BLOCK_C)
    away = total / rows
    variance = tl.maximum(squares / rows - away * away, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mean = _per_channel(x, channels, C) + away
    tl.store(means + channels, mean, mask=channels < C)
    tl.store(variances + channels, variance, mask=channels < C)
    if UPDATE:
        _move_towards(running_means, channels, mean, momentum, C)
        _move_towards(running_variances, channels, variance * unbiased, momentum, C)


# --- Forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _apply_kernel(
    x, residual, means, variances, weight, bias, y, rows, parts, eps,
    C: tl.constexpr, WITH_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * scale + shift + residual)."""
    channels, part = _place(C, BLOCK_C)
    mean, scale, shift = _affine(means, variances, weight, bias, channels, eps, C)
    for start in range(part * BLOCK_M, rows, parts * BLOCK_M):
        at, inside = _tile(start, channels, rows, C, BLOCK_M)
        value = (_read(x, at, inside) - mean) * scale + shift
        if WITH_RESIDUAL:
            value += _read(residual, at, inside)
        tl.store(y + at, _activate(value, ACTIVATION).to(y.dtype.element_ty), mask=inside)


# --- Backward ---------------------------------------------------------------------------------------------------------

# With g the gradient before the activation and the batch's means of g and of g (x - mean) / std, which are dbias and
# dweight divided by the number of values,  dx = scale g + b (x - mean) + c.


@triton.jit
def _sums_kernel(
    dy, x, y, means, variances, weight, bias, masked, sums, rows, parts, eps,
    C: tl.constexpr, WITH_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program's sums of g and of g (x - mean), fp32 [P, 2, C]. With a residual and an activation, g is stored
    in `masked`.

    The positions at which the activation passes the gradient on follow from x or, after a residual, from y.
    """
    channels, part = _place(C, BLOCK_C)
    mean, scale, shift = _affine(means, variances, weight, bias, channels, eps, C)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(part * BLOCK_M, rows, parts * BLOCK_M):
        at, inside = _tile(start, channels, rows, C, BLOCK_M)
        away = _read(x, at, inside) - mean
        gradient = _read(dy, at, inside)
        if ACTIVATION is not None:
            if WITH_RESIDUAL:
                gradient = tl.where(_passes(_read(y, at, inside), ACTIVATION), gradient, 0.0)
                tl.store(masked + at, gradient.to(masked.dtype.element_ty), mask=inside)
            else:
                gradient = tl.where(_passes(away * scale + shift, ACTIVATION), gradient, 0.0)
        total += gradient
        products += gradient * away
    _store_sums(sums, part, channels, total, products, C)


@triton.jit
def _add_up_gradients_kernel(
    sums, variances, dweight, dbias, parts, eps, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The gradients of weight and bias [C]."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total, products = _add_up(sums, channels, parts, C, BLOCK_P, BLOCK_C)
    inverse = tl.rsqrt(_per_channel(variances, channels, C) + eps)
    tl.store(dweight + channels, products * inverse, mask=channels < C)
    tl.store(dbias + channels, total, mask=channels < C)


@triton.jit
def _coefficients(scale, variances, dweight, dbias, channels, count, eps, C: tl.constexpr):
    """b and c, from the gradients of weight and bias for `count` values per channel."""
    inverse = tl.rsqrt(_per_channel(variances, channels, C) + eps)
    b = -scale * inverse * (_per_channel(dweight, channels, C) / count)
    return b, -scale * (_per_channel(dbias, channels, C) / count)


@triton.jit
def _gradient_kernel(
    dy, x, means, variances, weight, bias, dweight, dbias, dx, rows, parts, eps,
    C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = scale g + b (x - mean) + c, with g = dy where the activation passes it on."""
    channels, part = _place(C, BLOCK_C)
    mean, scale, shift = _affine(means, variances, weight, bias, channels, eps, C)
    b, c = _coefficients(scale, variances, dweight, dbias, channels, rows, eps, C)
    for start in range(part * BLOCK_M, rows, parts * BLOCK_M):
        at, inside = _tile(start, channels, rows, C, BLOCK_M)
        away = _read(x, at, inside) - mean
        gradient = _read(dy, at, inside)
        if ACTIVATION is not None:
            gradient = tl.where(_passes(away * scale + shift, ACTIVATION), gradient, 0.0)
        tl.store(dx + at, (scale * gradient + b * away + c).to(dx.dtype.element_ty), mask=inside)


# --- Launch -----------------------------------------------------------------------------------------------------------

# For each kernel, the elements of a tile and the maximum number of programs: the best of a sweep on an H100
# (docs/kernels.md).
STATISTICS, APPLY = (2048, 1056), (4096, 8448)
SUMS, GRADIENT = (2048, 528), (2048, 4224)
BLOCK_P, SUMMED_CHANNELS = 128, 8  # for the small kernels that add up partial sums


@dataclass(frozen=True)
class Tiling:
    block_m: int
    block_c: int
    parts: int
    """Programs per block of channels, P."""
    blocks: int
    """Number of blocks of channels."""


def tiling(rows: int, channels: int, tile: tuple[int, int]) -> Tiling:
    """The widest of those blocks of channels that extend least past the last one. `tile` is STATISTICS or similar."""
    elements, programs = tile
    if channels <= 32:
        block_c = max(triton.next_power_of_2(channels), 8)
    else:
        block_c = min((128, 64, 32, 16), key=lambda block: -(-channels // block) * block)
    block_m, blocks = elements // block_c, -(-channels // block_c)
    return Tiling(block_m, block_c, min(-(-rows // block_m), max(programs // blocks, 1)), blocks)


def _empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _common(x: Tensor, tile: tuple[int, int]) -> tuple[tuple[int], tuple[int, int], dict]:
    """The grid, rows and P, and the constants of a kernel that covers x, channels last."""
    channels = x.shape[1]
    rows = x.numel() // channels
    t = tiling(rows, channels, tile)
    return (t.parts * t.blocks,), (rows, t.parts), {"C": channels, "BLOCK_M": t.block_m, "BLOCK_C": t.block_c}


def _summed(channels: int) -> tuple[tuple[int], dict]:
    """The grid and the constants of a kernel that adds up partial sums."""
    return (-(-channels // SUMMED_CHANNELS),), {"C": channels, "BLOCK_P": BLOCK_P, "BLOCK_C": SUMMED_CHANNELS}


def statistics(x: Tensor, running: tuple[Tensor, Tensor] | None = None, momentum: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, fp32 [C]; updates the running mean and variance, if given."""
    x = x.contiguous(memory_format=torch.channels_last)
    grid, (rows, parts), constants = _common(x, STATISTICS)
    channels = x.shape[1]
    sums, mean, var = _empty(x, parts, 2, channels), _empty(x, channels), _empty(x, channels)
    _statistics_kernel[grid](x, sums, rows, parts, **constants)
    grid, constants = _summed(channels)
    _mean_and_variance_kernel[grid](
        x, sums, *(running or (mean, var)), mean, var, rows, parts, momentum, rows / max(rows - 1, 1),
        UPDATE=running is not None, **constants,
    )  # fmt: skip
    return mean, var


def norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Implements the operator of that name in norm_act.py."""
    x = x.contiguous(memory_format=torch.channels_last)
    other = x if residual is None else residual.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    grid, sizes, constants = _common(x, APPLY)
    _apply_kernel[grid](
        x, other, mean, var, weight, bias, y, *sizes, eps,
        WITH_RESIDUAL=residual is not None, ACTIVATION=activation, **constants,
    )  # fmt: skip
    return y


def norm_act_sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the operator of that name in norm_act.py: the first backward pass."""
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    channels = x.shape[1]
    grid, (rows, parts), constants = _common(x, SUMS)
    masked = x.new_empty(0) if y is None else torch.empty_like(x)
    sums = _empty(x, parts, 2, channels)
    _sums_kernel[grid](
        dy, x, x if y is None else y, mean, var, weight, bias, dy if y is None else masked, sums, rows, parts, eps,
        WITH_RESIDUAL=y is not None, ACTIVATION=activation, **constants,
    )  # fmt: skip
    dweight, dbias = _empty(x, channels), _empty(x, channels)
    grid, constants = _summed(channels)
    _add_up_gradients_kernel[grid](sums, var, dweight, dbias, parts, eps, **constants)
    return masked, dweight, dbias


def norm_act_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Implements the operator of that name in norm_act.py: the second backward pass."""
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    dx = torch.empty_like(x)
    grid, sizes, constants = _common(x, GRADIENT)
    _gradient_kernel[grid](
        dy, x, mean, var, weight, bias, dweight, dbias, dx, *sizes, eps, ACTIVATION=activation, **constants
    )
    return dx
