"""Depthwise 3x3 convolution in Triton, channels last: forward, input gradient, weight gradient.

A program computes a tile of BLOCK_W columns and BLOCK_C channels of the output and iterates down the rows of a strip,
of one image or several. It reads every row once, as three tiles (left of each column, at it, and right of it), and
keeps partial sums of the rows in registers. The batch norm and the activation before the convolution are applied on
load. Sums over the batch are written per program and added up afterwards, so that they are the same in every run.

Shapes: B batch, C channels, H and W of the input, OH and OW of the output, P programs per block of channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- Tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(images, out_height, out_width, rows, C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns [BLOCK_W, 1], channels [1, BLOCK_C], first row, end of rows, first image, program number p < P."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) // BLOCKS
    tiles = (out_width + BLOCK_W - 1) // BLOCK_W
    strips = (out_height + rows - 1) // rows
    channels = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    columns = part % tiles * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    first = part // tiles % strips * rows
    last = tl.minimum(first + rows, out_height)
    return columns, channels, first, last, part // tiles // strips * images, part


@triton.jit
def _per_channel(values, channels, stride: tl.constexpr, offset: tl.constexpr, C: tl.constexpr):
    return tl.load(values + channels * stride + offset, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    """The activation, which keeps NaN."""
    if ACTIVATION is not None:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        value = tl.minimum(value, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def _read(image, row, column, channels, height, width, C: tl.constexpr):
    """Load a tile of one row in fp32, 0 outside of the image."""
    inside = (row >= 0) & (row < height) & (column < width) & (channels < C)
    return tl.load(image + row * width * C + (column * C + channels), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _read_three(
    image, row, column, channels, height, width, scale, shift,
    C: tl.constexpr, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """act(x * scale + shift) left of each column, at it, and right of it; 0 in the padding."""
    at = image + row * width * C + (column * C + channels)
    inside = (row >= 0) & (row < height) & (channels < C)
    inside_a, inside_b = inside & (column > 0) & (column <= width), inside & (column < width)
    inside_c = inside & (column < width - 1)
    a = tl.load(at - C, mask=inside_a, other=0.0).to(tl.float32)
    b = tl.load(at, mask=inside_b, other=0.0).to(tl.float32)
    c = tl.load(at + C, mask=inside_c, other=0.0).to(tl.float32)
    if FOLDED:
        a = tl.where(inside_a, _activate(a * scale + shift, ACTIVATION), 0.0)
        b = tl.where(inside_b, _activate(b * scale + shift, ACTIVATION), 0.0)
        c = tl.where(inside_c, _activate(c * scale + shift, ACTIVATION), 0.0)
    return a, b, c


@triton.jit
def _weights(weight, channels, C: tl.constexpr):
    """The nine weights of the kernel, [1, BLOCK_C] each, in fp32, row by row."""
    return (
        _per_channel(weight, channels, 9, 0, C), _per_channel(weight, channels, 9, 1, C),
        _per_channel(weight, channels, 9, 2, C), _per_channel(weight, channels, 9, 3, C),
        _per_channel(weight, channels, 9, 4, C), _per_channel(weight, channels, 9, 5, C),
        _per_channel(weight, channels, 9, 6, C), _per_channel(weight, channels, 9, 7, C),
        _per_channel(weight, channels, 9, 8, C),
    )  # fmt: skip


@triton.jit
def _store(image, row, column, channels, width, value, mask, C: tl.constexpr):
    tl.store(image + (row * width + column) * C + channels, value.to(image.dtype.element_ty), mask=mask)


@triton.jit
def _add(total, a, b, c, u, v, w):
    return total + a * u + b * v + c * w


# --- Forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, weight, scales, shifts, y, batch, images, height, width, rows,
    C: tl.constexpr, STRIDE: tl.constexpr, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [B, OH, OW, C]. A row of the input contributes to up to three rows of the output."""
    out_height, out_width = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    columns, channels, first, last, image, _ = _place(images, out_height, out_width, rows, C, BLOCK_W, BLOCK_C)
    inside = (columns < out_width) & (channels < C)
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = _weights(weight, channels, C)
    scale, shift = w00, w00
    if FOLDED:
        scale, shift = _per_channel(scales, channels, 1, 0, C), _per_channel(shifts, channels, 1, 0, C)

    for number in range(image, tl.minimum(image + images, batch)):
        source = x + tl.cast(number, tl.int64) * height * width * C
        target = y + tl.cast(number, tl.int64) * out_height * out_width * C
        begun = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)  # partial sums of the next row of the output,
        if STRIDE == 1:
            later = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)  # and of the one after it
            for row in range(first - 1, last + 1, 2):  # two rows at a time, for more loads in flight
                a, b, c = _read_three(
                    source, row, columns, channels, height, width, scale, shift, C, FOLDED, ACTIVATION
                )
                d, e, f = _read_three(
                    source, row + 1, columns, channels, height, width, scale, shift, C, FOLDED, ACTIVATION
                )
                begun = _add(begun, a, b, c, w20, w21, w22)
                _store(target, row - 1, columns, channels, out_width, begun, inside & (row > first), C)
                begun = _add(_add(later, a, b, c, w10, w11, w12), d, e, f, w20, w21, w22)
                _store(target, row, columns, channels, out_width, begun, inside & (row >= first) & (row < last), C)
                begun = _add(_add(0.0, a, b, c, w00, w01, w02), d, e, f, w10, w11, w12)
                later = _add(0.0, d, e, f, w00, w01, w02)
        else:
            a, b, c = _read_three(
                source, 2 * first - 1, 2 * columns, channels, height, width, scale, shift, C, FOLDED, ACTIVATION
            )
            begun = _add(begun, a, b, c, w00, w01, w02)
            for row in range(first, last):
                a, b, c = _read_three(
                    source, 2 * row, 2 * columns, channels, height, width, scale, shift, C, FOLDED, ACTIVATION
                )
                d, e, f = _read_three(
                    source, 2 * row + 1, 2 * columns, channels, height, width, scale, shift, C, FOLDED, ACTIVATION
                )
                begun = _add(_add(begun, a, b, c, w10, w11, w12), d, e, f, w20, w21, w22)
                _store(target, row, columns, channels, out_width, begun, inside, C)
                begun = _add(0.0, d, e, f, w00, w01, w02)


# --- Input gradient ---------------------------------------------------------------------------------------------------


@triton.jit
def _read_x(
    image, row, column, channels, height, width, mask, C: tl.constexpr, FOLDED: tl.constexpr
):  # fmt: skip
    """A tile of x (needed only with a folded batch norm), its offsets in the image, and a mask of those inside."""
    at = row * width * C + (column * C + channels)
    inside = mask & (row < height) & (column < width) & (channels < C)
    value = 0.0
    if FOLDED:
        value = tl.load(image + at, mask=inside, other=0.0).to(tl.float32)
    return value, at, inside


@triton.jit
def _store_dx(
    dx, gradient, x, at, inside, scale, shift, dscale, dshift, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Store a tile of dx, from the gradient of the convolution's input; accumulate dscale and dshift."""
    if FOLDED:
        before = x * scale + shift
        passes = inside
        if ACTIVATION is not None:
            passes = passes & (before > 0)
        if ACTIVATION == "relu6":
            passes = passes & (before < 6)
        gradient = tl.where(passes, gradient, 0.0)
        dscale += gradient * x
        dshift += gradient
        gradient *= scale
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
    return dscale, dshift


@triton.jit
def _input_gradient_kernel(
    dy, x, weight, scales, shifts, dx, sums, batch, images, height, width, rows,
    C: tl.constexpr, STRIDE: tl.constexpr, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [B, H, W, C], and each program's partial sums of dscale and dshift, fp32 [P, 2, C].

    Stride 1: dy is convolved with the weight rotated by 180 degrees. Stride 2: four values of dx come from four of dy.
    """
    out_height, out_width = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    columns, channels, first, last, image, part = _place(images, out_height, out_width, rows, C, BLOCK_W, BLOCK_C)
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = _weights(weight, channels, C)
    scale, shift = 1.0, 0.0
    if FOLDED:
        scale, shift = _per_channel(scales, channels, 1, 0, C), _per_channel(shifts, channels, 1, 0, C)
    dscale = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)

    for number in range(image, tl.minimum(image + images, batch)):
        source = dy + tl.cast(number, tl.int64) * out_height * out_width * C
        values = x + tl.cast(number, tl.int64) * height * width * C
        target = dx + tl.cast(number, tl.int64) * height * width * C
        if STRIDE == 1:
            begun = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
            later = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
            for row in range(first - 1, last + 1):
                a, b, c = _read_three(source, row, columns, channels, height, width, scale, shift, C, False, None)
                value, at, inside = _read_x(values, row - 1, columns, channels, height, width, row > first, C, FOLDED)
                begun = _add(begun, a, b, c, w02, w01, w00)
                dscale, dshift = _store_dx(
                    target, begun, value, at, inside, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                begun = _add(later, a, b, c, w12, w11, w10)
                later = _add(0.0, a, b, c, w22, w21, w20)
        else:
            a = _read(source, first, columns, channels, out_height, out_width, C)
            b = _read(source, first, columns + 1, channels, out_height, out_width, C)
            for row in range(first, last):
                c = _read(source, row + 1, columns, channels, out_height, out_width, C)
                d = _read(source, row + 1, columns + 1, channels, out_height, out_width, C)
                top, left = 2 * row, 2 * columns  # the four neighbours in dx: p q above r s
                p, at_p, in_p = _read_x(values, top, left, channels, height, width, True, C, FOLDED)
                q, at_q, in_q = _read_x(values, top, left + 1, channels, height, width, True, C, FOLDED)
                r, at_r, in_r = _read_x(values, top + 1, left, channels, height, width, True, C, FOLDED)
                s, at_s, in_s = _read_x(values, top + 1, left + 1, channels, height, width, True, C, FOLDED)
                dscale, dshift = _store_dx(
                    target, a * w11, p, at_p, in_p, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                dscale, dshift = _store_dx(
                    target, a * w12 + b * w10, q, at_q, in_q, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                dscale, dshift = _store_dx(
                    target, a * w21 + c * w01, r, at_r, in_r, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                gradient = a * w22 + b * w20 + c * w02 + d * w00
                dscale, dshift = _store_dx(
                    target, gradient, s, at_s, in_s, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                a, b = c, d

    if FOLDED:
        at = sums + tl.cast(part, tl.int64) * 2 * C + channels
        tl.store(at, tl.sum(dscale, axis=0)[None, :], mask=channels < C)
        tl.store(at + C, tl.sum(dshift, axis=0)[None, :], mask=channels < C)


# --- Weight gradient --------------------------------------------------------------------------------------------------


@triton.jit
def _store_sum(sums, part, index: tl.constexpr, channels, tile, C: tl.constexpr):
    at = sums + (tl.cast(part, tl.int64) * 9 + index) * C + channels
    tl.store(at, tl.sum(tile, axis=0)[None, :], mask=channels < C)


@triton.jit
def _weight_gradient_kernel(
    dy, x, scales, shifts, sums, batch, images, height, width, rows,
    C: tl.constexpr, STRIDE: tl.constexpr, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program's partial sums of dw, fp32 [P, 9, C]: a row of x times each row of dy to which it contributes."""
    out_height, out_width = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    columns, channels, first, last, image, part = _place(images, out_height, out_width, rows, C, BLOCK_W, BLOCK_C)
    scale, shift = 1.0, 0.0
    if FOLDED:
        scale, shift = _per_channel(scales, channels, 1, 0, C), _per_channel(shifts, channels, 1, 0, C)
    d00 = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    d01, d02, d10, d11, d12, d20, d21, d22 = d00, d00, d00, d00, d00, d00, d00, d00

    for number in range(image, tl.minimum(image + images, batch)):
        slopes = dy + tl.cast(number, tl.int64) * out_height * out_width * C
        values = x + tl.cast(number, tl.int64) * height * width * C
        at = _read(slopes, first, columns, channels, out_height, out_width, C)
        above = at
        if STRIDE == 1:
            above = _read(slopes, first - 1, columns, channels, out_height, out_width, C)
        for row in range(first, last):
            below = _read(slopes, row + 1, columns, channels, out_height, out_width, C)
            a, b, c = _read_three(
                values, STRIDE * row, STRIDE * columns, channels, height, width, scale, shift, C, FOLDED, ACTIVATION
            )
            d10 += a * at
            d11 += b * at
            d12 += c * at
            if STRIDE == 2:
                above = at
                a, b, c = _read_three(
                    values, 2 * row + 1, 2 * columns, channels, height, width, scale, shift, C, FOLDED, ACTIVATION
                )
            d00 += a * below
            d01 += b * below
            d02 += c * below
            d20 += a * above
            d21 += b * above
            d22 += c * above
            above, at = at, below

    _store_sum(sums, part, 0, channels, d00, C)
    _store_sum(sums, part, 1, channels, d01, C)
    _store_sum(sums, part, 2, channels, d02, C)
    _store_sum(sums, part, 3, channels, d10, C)
    _store_sum(sums, part, 4, channels, d11, C)
    _store_sum(sums, part, 5, channels, d12, C)
    _store_sum(sums, part, 6, channels, d20, C)
    _store_sum(sums, part, 7, channels, d21, C)
    _store_sum(sums, part, 8, channels, d22, C)


# --- Launch -----------------------------------------------------------------------------------------------------------

PROGRAMS = 528  # the minimum before a program takes several images: four per multiprocessor of an H100
ROWS = 32  # the maximum per strip of one image
ELEMENTS = 1024  # of a tile: eight channels per lane, which are 128 bits in bf16


def register_limit(kernel: Any, stride: int) -> int | None:
    """The registers per thread that let three programs of 128 threads share a multiprocessor; two for stride 2's dx."""
    return None if kernel is _input_gradient_kernel and stride == 2 else 168


@dataclass(frozen=True)
class Tiling:
    block_w: int
    block_c: int
    rows: int
    images: int
    """Images per program."""
    parts: int
    """Programs per block of channels, P."""
    blocks: int
    """Number of blocks of channels."""


def tiling(batch: int, height: int, width: int, channels: int, stride: int, elements: int | None = None) -> Tiling:
    """Blocks of ELEMENTS (or `elements`) that extend past the edges least; strips of up to ROWS rows, or several small
    images."""
    out_height, out_width = -(-height // stride), -(-width // stride)
    sizes = [((elements or ELEMENTS) // c, c) for c in ((128, 64, 32) if channels > 16 else (16, 8))]
    block_w, block_c = min(sizes, key=lambda size: -(-out_width // size[0]) * -(-channels // size[1]))
    tiles, blocks, strips = -(-out_width // block_w), -(-channels // block_c), -(-out_height // ROWS)
    rows = -(-out_height // strips)
    images = max(min(ROWS // rows, batch * strips * tiles * blocks // PROGRAMS), 1)
    return Tiling(block_w, block_c, rows, images, -(-batch // images) * strips * tiles, blocks)


def depthwise_conv3x3(
    x: Tensor, weight: Tensor, stride: int, scale: Tensor | None, shift: Tensor | None, activation: str | None
) -> Tensor:
    """Implements the operator of that name in depthwise.py."""
    batch, channels, height, width = x.shape
    size = (batch, channels, -(-height // stride), -(-width // stride))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not y.numel():
        return y
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
    tiles, arguments, constants = _common(x, stride, scale, activation)
    limit, folding = register_limit(_forward_kernel, stride), _folded(x, scale, shift)
    _forward_kernel[(tiles.parts * tiles.blocks,)](x, weight, *folding, y, *arguments, **constants, maxnreg=limit)
    return y


def input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the operator of that name in depthwise.py."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    channels = 0 if scale is None else x.shape[1]
    if not x.numel():
        return dx, x.new_zeros(channels, dtype=torch.float32), x.new_zeros(channels, dtype=torch.float32)
    tiles, arguments, constants = _common(x, stride, scale, activation)
    sums = x.new_empty(tiles.parts, 2, channels, dtype=torch.float32)
    _input_gradient_kernel[(tiles.parts * tiles.blocks,)](
        dy, x, weight.contiguous(), *_folded(x, scale, shift), dx, sums, *arguments, **constants,
        maxnreg=register_limit(_input_gradient_kernel, stride),
    )  # fmt: skip
    dscale, dshift = sums.sum(dim=0).unbind()
    return dx, dscale.clone(), dshift.clone()


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Implements the operator of that name in depthwise.py."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if not x.numel():
        return weight.new_zeros(weight.shape)
    tiles, arguments, constants = _common(x, stride, scale, activation)
    products = x.new_empty(tiles.parts, 9, x.shape[1], dtype=torch.float32)
    _weight_gradient_kernel[(tiles.parts * tiles.blocks,)](
        dy, x, *_folded(x, scale, shift), products, *arguments, **constants,
        maxnreg=register_limit(_weight_gradient_kernel, stride),
    )  # fmt: skip
    return products.sum(dim=0).t().reshape(weight.shape).to(weight.dtype).contiguous()


def _common(
    x: Tensor, stride: int, scale: Tensor | None, activation: str | None, elements: int | None = None
) -> tuple[Tiling, tuple, dict]:
    """The tiling, and the arguments of all kernels."""
    batch, channels, height, width = x.shape
    tiles = tiling(batch, height, width, channels, stride, elements)
    constants = {
        "C": channels, "STRIDE": stride, "FOLDED": scale is not None, "ACTIVATION": activation,
        "BLOCK_W": tiles.block_w, "BLOCK_C": tiles.block_c,
    }  # fmt: skip
    return tiles, (batch, tiles.images, height, width, tiles.rows), constants


def _folded(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift; a placeholder tensor if there are none."""
    return (x, x) if scale is None or shift is None else (scale.contiguous(), shift.contiguous())
