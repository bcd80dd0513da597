"""All gradients of the depthwise 3x3 convolution in one pass, in Triton, channels last.

The gradient of an input pixel and its products for the weight's gradient need the same nine values of dy. So a program
handles a tile of columns and channels of the input, reads each row of dy as three tiles and each row of x as one, and
computes both: three passes over memory (dy, x, dx) where separate kernels take five with a folded batch norm, and four
without. It keeps nine more sums in registers, so a tile has half as many elements: four channels per lane.

Shapes: B batch, C channels, H and W of the input, OH and OW of the output, P programs per block of channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastofa.kernels import triton_depthwise
from fastofa.kernels.triton_depthwise import (
    _activate,
    _add,
    _per_channel,
    _place,
    _read,
    _read_three,
    _store_dx,
    _weights,
)

ELEMENTS, REGISTERS = 512, 168  # of a tile; per thread, so that three programs of 128 threads share a multiprocessor


@triton.jit
def _read_row(
    image, row, first, last, column, channels, width, scale, shift,
    C: tl.constexpr, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile of row `row` of x, its offsets, a mask of those in rows first .. last - 1, and what was convolved."""
    at = row * width * C + (column * C + channels)
    inside = (row >= first) & (row < last) & (column < width) & (channels < C)
    value = tl.load(image + at, mask=inside, other=0.0).to(tl.float32)
    convolved = value
    if FOLDED:
        convolved = tl.where(inside, _activate(value * scale + shift, ACTIVATION), 0.0)
    return value, at, inside, convolved


@triton.jit
def _store_sum(sums, part, index: tl.constexpr, channels, tile, C: tl.constexpr):
    at = sums + (tl.cast(part, tl.int64) * 11 + index) * C + channels
    tl.store(at, tl.sum(tile, axis=0)[None, :], mask=channels < C)


@triton.jit
def _gradients_kernel(
    dy, x, weight, scales, shifts, dx, sums, batch, images, height, width, rows,
    C: tl.constexpr, STRIDE: tl.constexpr, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [B, H, W, C], and each program's partial sums of dw, dscale and dshift, fp32 [P, 11, C]."""
    out_height, out_width = (height + STRIDE - 1) // STRIDE, (width + STRIDE - 1) // STRIDE
    columns, channels, first, last, image, part = _place(images, out_height, out_width, rows, C, BLOCK_W, BLOCK_C)
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = _weights(weight, channels, C)
    scale, shift = 1.0, 0.0
    if FOLDED:
        scale, shift = _per_channel(scales, channels, 1, 0, C), _per_channel(shifts, channels, 1, 0, C)
    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    dscale, dshift = zero, zero
    d00, d01, d02, d10, d11, d12, d20, d21, d22 = zero, zero, zero, zero, zero, zero, zero, zero, zero

    for number in range(image, tl.minimum(image + images, batch)):
        source = dy + tl.cast(number, tl.int64) * out_height * out_width * C
        values = x + tl.cast(number, tl.int64) * height * width * C
        target = dx + tl.cast(number, tl.int64) * height * width * C
        if STRIDE == 1:
            begun, later = zero, zero  # partial sums of dx in the row before dy's and in dy's
            value_0, convolved_0 = zero, zero  # x in dy's row, and in the row before it
            # Separate tensors: in Triton 3.6, a variable to which a loop assigns another one keeps its value if both
            # began as the same tensor.
            value_m, convolved_m = tl.zeros([BLOCK_W, BLOCK_C], tl.float32), tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
            for row in range(first - 1, last + 1):
                a, b, c = _read_three(source, row, columns, channels, height, width, 1.0, 0.0, C, False, None)
                value_p, _, _, convolved_p = _read_row(
                    values, row + 1, first, last, columns, channels, width, scale, shift, C, FOLDED, ACTIVATION
                )
                at = (row - 1) * width * C + (columns * C + channels)
                inside = (row > first) & (columns < width) & (channels < C)
                begun = _add(begun, a, b, c, w02, w01, w00)
                dscale, dshift = _store_dx(
                    target, begun, value_m, at, inside, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                begun = _add(later, a, b, c, w12, w11, w10)
                later = _add(0.0, a, b, c, w22, w21, w20)
                d00 += convolved_m * c
                d01 += convolved_m * b
                d02 += convolved_m * a
                d10 += convolved_0 * c
                d11 += convolved_0 * b
                d12 += convolved_0 * a
                d20 += convolved_p * c
                d21 += convolved_p * b
                d22 += convolved_p * a
                value_m, convolved_m, value_0, convolved_0 = value_0, convolved_0, value_p, convolved_p
        else:
            a = _read(source, first, columns, channels, out_height, out_width, C)
            b = _read(source, first, columns + 1, channels, out_height, out_width, C)
            for row in range(first, last):
                c = _read(source, row + 1, columns, channels, out_height, out_width, C)
                d = _read(source, row + 1, columns + 1, channels, out_height, out_width, C)
                top, left = 2 * row, 2 * columns  # the four neighbours in x: p q above r s
                value, at, inside, p = _read_row(
                    values, top, 0, height, left, channels, width, scale, shift, C, FOLDED, ACTIVATION
                )
                dscale, dshift = _store_dx(
                    target, a * w11, value, at, inside, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                d11 += p * a
                value, at, inside, q = _read_row(
                    values, top, 0, height, left + 1, channels, width, scale, shift, C, FOLDED, ACTIVATION
                )
                gradient = a * w12 + b * w10
                dscale, dshift = _store_dx(
                    target, gradient, value, at, inside, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                d12 += q * a
                d10 += q * b
                value, at, inside, r = _read_row(
                    values, top + 1, 0, height, left, channels, width, scale, shift, C, FOLDED, ACTIVATION
                )
                gradient = a * w21 + c * w01
                dscale, dshift = _store_dx(
                    target, gradient, value, at, inside, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                d21 += r * a
                d01 += r * c
                value, at, inside, s = _read_row(
                    values, top + 1, 0, height, left + 1, channels, width, scale, shift, C, FOLDED, ACTIVATION
                )
                gradient = a * w22 + b * w20 + c * w02 + d * w00
                dscale, dshift = _store_dx(
                    target, gradient, value, at, inside, scale, shift, dscale, dshift, FOLDED, ACTIVATION
                )
                d22 += s * a
                d20 += s * b
                d02 += s * c
                d00 += s * d
                a, b = c, d

    _store_sum(sums, part, 0, channels, d00, C)
    _store_sum(sums, part, 1, channels, d01, C)
    _store_sum(sums, part, 2, channels, d02, C)
    _store_sum(sums, part, 3, channels, d10, C)
    _store_sum(sums, part, 4, channels, d11, C)
    _store_sum(sums, part, 5, channels, d12, C)
    _store_sum(sums, part, 6, channels, d20, C)
    _store_sum(sums, part, 7, channels, d21, C)
    _store_sum(sums, part, 8, channels, d22, C)
    _store_sum(sums, part, 9, channels, dscale, C)
    _store_sum(sums, part, 10, channels, dshift, C)


def all_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, scale and shift (the last two empty without them), see triton_depthwise.py."""
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    channels = x.shape[1]
    if not x.numel():
        totals = x.new_zeros(11, channels, dtype=torch.float32)
    else:
        tiles, arguments, constants = triton_depthwise._common(x, stride, scale, activation, ELEMENTS)
        sums = x.new_empty(tiles.parts, 11, channels, dtype=torch.float32)
        _gradients_kernel[(tiles.parts * tiles.blocks,)](
            dy, x, weight.contiguous(), *triton_depthwise._folded(x, scale, shift), dx, sums, *arguments, **constants,
            maxnreg=REGISTERS,
        )  # fmt: skip
        totals = sums.sum(dim=0)
    dw = totals[:9].t().reshape(weight.shape).to(weight.dtype).contiguous()
    folded = slice(0, 0 if scale is None else channels)
    return dx, dw, totals[9, folded].clone(), totals[10, folded].clone()
