"""A stem's convolution in Triton, straight from uint8 pixels: forward with a batch norm's statistics, weight gradient.

An implicit matrix product of [positions, 3 K K] pixels and [3 K K, D] weights. A program reads a tile of the left
matrix byte by byte, normalises and rounds it in registers, and multiplies it by its block of the right one on tensor
cores. The weights are read once per program. The columns are in the order of the kernel's rows, so that neighbouring
columns are neighbouring bytes of an image. Padding is zero after the normalisation, as PyTorch pads a normalised image.
Sums over the positions are written per program and added up afterwards, so that they are the same in every run.

Shapes: B batch, H and W of an image, K side of the kernel, S stride, D channels out, OH and OW of the result, P
programs per block of channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastofa.kernels.choice import interpreted

# --- Tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _normalization(means, stds, BLOCK_K: tl.constexpr):
    """Scale and shift of each column's colour, for columns BLOCK_K * (0, 1, 2) and on, after which they repeat:
    (u / 255 - mean) / std = u * scale + shift."""
    scale = ()
    shift = ()
    for phase in tl.static_range(3):
        colour = (phase * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]) % 3
        std = tl.load(stds + colour).to(tl.float32)
        scale += (1 / (255 * std),)  # type: ignore[assignment]
        shift += (-tl.load(means + colour).to(tl.float32) / std,)  # type: ignore[assignment]
    return scale, shift


@triton.jit
def _pixels(
    image, top, left, height, scale, shift, START: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
    OPERAND: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Normalised pixels [BLOCK_M, BLOCK_K], columns START and on; windows begin at row `top` and byte `left`."""
    column = START + tl.arange(0, BLOCK_K)[None, :]
    row, byte = top + column // (3 * K), left + column % (3 * K)
    inside = (row >= 0) & (row < height) & (byte >= 0) & (byte < 3 * W)
    value = tl.load(image + (row * (3 * W) + byte), mask=inside, other=0).to(tl.float32)
    return tl.where(inside, value * scale + shift, 0.0).to(DTYPE).to(OPERAND)


@triton.jit
def _tile(
    x, tile, height, BLOCK_M: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    S: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """A tile's image, the positions in it [BLOCK_M], and where their windows begin: rows and bytes [BLOCK_M, 1]."""
    TILES: tl.constexpr = (OH * OW + BLOCK_M - 1) // BLOCK_M
    number = tl.cast(tile // TILES, tl.int64)
    position = tile % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    top = (position // OW * S - PADDING)[:, None]
    left = ((position % OW * S - PADDING) * 3)[:, None]
    # The height is no constant: the compiler would keep so many addresses in registers that fewer programs fit.
    return x + number * (height * (3 * W)), number, position, top, left


# --- Forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, weight, bias, means, stds, y, sums, tiles, parts, height,
    W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, PADDING: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_SUMS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [B, OH, OW, D]; each program's sums of y, before it is rounded, and of its square, fp32 [P, 2, D]."""
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    CHUNKS: tl.constexpr = (3 * K * K + BLOCK_K - 1) // BLOCK_K
    DTYPE: tl.constexpr = y.dtype.element_ty
    channels = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(0) // BLOCKS
    kept = channels < D
    added = tl.zeros([BLOCK_D], tl.float32)
    if WITH_BIAS:
        added += tl.load(bias + channels, mask=kept, other=0.0).to(tl.float32)

    scale, shift = _normalization(means, stds, BLOCK_K)
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = column % 3 * (K * K) + column // 3
        w_at = channels[None, :] * (3 * K * K) + tap[:, None]
        values = tl.load(weight + w_at, mask=(column < 3 * K * K)[:, None] & kept[None, :], other=0.0).to(DTYPE)
        weights += (values.to(OPERAND),)  # type: ignore[assignment]
    total = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)

    for tile in range(part, tiles, parts):
        image, number, position, top, left = _tile(x, tile, height, BLOCK_M, W, OH, OW, S, PADDING)
        result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            pixels = _pixels(
                image, top, left, height, scale[chunk % 3], shift[chunk % 3],
                chunk * BLOCK_K, BLOCK_K, DTYPE, OPERAND, W, K,
            )  # fmt: skip
            result = tl.dot(pixels, weights[chunk], result, input_precision=PRECISION)
        if WITH_BIAS:
            result += added[None, :]
        inside = (position < OH * OW)[:, None] & kept[None, :]
        if WITH_SUMS:
            value = tl.where(inside, result, 0.0)
            total += tl.sum(value, axis=0)
            squares += tl.sum(value * value, axis=0)
        target = y + number * (OH * OW * D) + (position[:, None] * D + channels[None, :])
        tl.store(target, result.to(DTYPE), mask=inside)
    if WITH_SUMS:
        tl.store(sums + part * (2 * D) + channels, total, mask=kept)
        tl.store(sums + part * (2 * D) + D + channels, squares, mask=kept)


# --- Weight gradient --------------------------------------------------------------------------------------------------


@triton.jit
def _weight_gradient_kernel(
    x, means, stds, dy, sums, tiles, parts, height,
    W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, PADDING: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program's sum of dy times pixels over its positions, fp32 [P, D, 3 K K]."""
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    CHUNKS: tl.constexpr = (3 * K * K + BLOCK_K - 1) // BLOCK_K
    DTYPE: tl.constexpr = dy.dtype.element_ty
    channels = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(0) // BLOCKS
    kept = channels < D
    scale, shift = _normalization(means, stds, BLOCK_K)
    products = ()
    for _ in tl.static_range(CHUNKS):
        products += (tl.zeros([BLOCK_D, BLOCK_K], tl.float32),)  # type: ignore[assignment]

    for tile in range(part, tiles, parts):
        image, number, position, top, left = _tile(x, tile, height, BLOCK_M, W, OH, OW, S, PADDING)
        source = dy + number * (OH * OW * D) + (position[:, None] * D + channels[None, :])
        slope = tl.load(source, mask=(position < OH * OW)[:, None] & kept[None, :], other=0.0)
        slope = tl.trans(slope.to(OPERAND))
        more = ()
        for chunk in tl.static_range(CHUNKS):
            pixels = _pixels(
                image, top, left, height, scale[chunk % 3], shift[chunk % 3],
                chunk * BLOCK_K, BLOCK_K, DTYPE, OPERAND, W, K,
            )  # fmt: skip
            more += (tl.dot(slope, pixels, products[chunk], input_precision=PRECISION),)  # type: ignore[assignment]
        products = more

    target = sums + tl.cast(part, tl.int64) * (D * 3 * K * K) + channels[:, None] * (3 * K * K)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        tl.store(target + column, products[chunk], mask=kept[:, None] & (column < 3 * K * K))


# --- Launch -----------------------------------------------------------------------------------------------------------

BLOCK_M, MAX_BLOCK_D = 128, 64
FORWARD_K, GRADIENT_K = 16, 32  # columns of a tile: those that need the fewest registers
PROGRAMS = 396  # at most: three for each of an H100's 132 multiprocessors


@dataclass(frozen=True)
class Tiling:
    tiles: int
    parts: int
    """Programs per block of channels, P."""
    blocks: int
    """Number of blocks of channels."""
    constants: dict[str, int]


def tiling(size: tuple[int, ...], weight: tuple[int, ...], stride: int, padding: int) -> Tiling:
    """For images of `size` [B, 3, H, W] and a weight [D, 3, K, K]."""
    batch, _, height, width = size
    channels, kernel = weight[0], weight[2]
    out_height, out_width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    block_d = min(max(triton.next_power_of_2(channels), 16), MAX_BLOCK_D)
    tiles, blocks = batch * -(-out_height * out_width // BLOCK_M), -(-channels // block_d)
    constants = {
        "W": width, "OH": out_height, "OW": out_width, "D": channels, "K": kernel, "S": stride,
        "PADDING": padding, "BLOCK_M": BLOCK_M, "BLOCK_D": block_d,
    }  # fmt: skip
    return Tiling(tiles, min(tiles, max(PROGRAMS // blocks, 1)), blocks, constants)


def _common(
    x: Tensor, weight: Tensor, stride: int, padding: int, dtype: torch.dtype
) -> tuple[Tiling, tuple[int], tuple[int, int, int], dict[str, Any]]:
    """The tiling; a kernel's grid, its sizes and its constants."""
    t = tiling(tuple(x.shape), tuple(weight.shape), stride, padding)
    constants = {**t.constants, "OPERAND": operand(dtype), "PRECISION": "tf32x3" if dtype == torch.float32 else None}
    return t, (t.parts * t.blocks,), (t.tiles, t.parts, x.shape[2]), constants


def operand(dtype: torch.dtype) -> tl.dtype:
    """The type of both matrices of a product, after rounding: `dtype`, except that the interpreter cannot multiply
    bf16 matrices."""
    if dtype == torch.bfloat16:
        return tl.float32 if interpreted() else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def stem_conv2d(
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
    """Implements the operator of that name in stem_conv.py."""
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
    mean, std = mean.contiguous(), std.contiguous()
    t, grid, sizes, constants = _common(x, weight, stride, padding, dtype)
    channels = weight.shape[0]
    size = (len(x), channels, constants["OH"], constants["OW"])
    y = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    sums = y.new_empty((t.parts, 2, channels) if with_statistics else 0, dtype=torch.float32)
    _forward_kernel[grid](
        x, weight, weight if bias is None else bias, mean, std, y, sums, *sizes,
        WITH_BIAS=bias is not None, WITH_SUMS=with_statistics, BLOCK_K=FORWARD_K, **constants,
    )  # fmt: skip
    if not with_statistics:
        return y, sums, torch.empty_like(sums)
    mean_y, squares = (sums.sum(dim=0, dtype=torch.float64) / (y.numel() // channels)).unbind()
    return y, mean_y.float(), (squares - mean_y * mean_y).clamp(min=0).float()


def stem_conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, mean: Tensor, std: Tensor
) -> Tensor:
    """Implements the operator of that name in stem_conv.py."""
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    t, grid, sizes, constants = _common(x, weight, stride, padding, dy.dtype)
    channels, _, kernel, _ = weight.shape
    mean, std = mean.contiguous(), std.contiguous()
    sums = dy.new_empty(t.parts, channels, kernel, kernel, 3, dtype=torch.float32)
    _weight_gradient_kernel[grid](x, mean, std, dy, sums, *sizes, BLOCK_K=GRADIENT_K, **constants)
    return sums.sum(dim=0).permute(0, 3, 1, 2).to(weight.dtype, memory_format=torch.contiguous_format)
