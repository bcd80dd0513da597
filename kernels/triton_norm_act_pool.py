"""Batch norm, ReLU and 3x3 max-pooling with stride 2 in Triton, channels last: the normalised map is never stored.

Within a channel, a batch norm is monotonic in x, so that the maximum of nine values can be found in x itself, or in -x
if the channel's scale is negative. In the forward pass, a program handles a tile of columns and channels of the result
and iterates down the rows of a strip, as in the depthwise convolution. It stores the value of x at the maximum, and its
position. The backward pass can thus compute the sums over a channel from maps of the result's size, and one pass over x
computes its gradient: four values of dx from four of dy.

Shapes: B batch, C channels, H and W of the input, OH and OW of the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastofa.kernels.triton_depthwise import _place
from fastofa.kernels.triton_norm_act import _affine, _coefficients

NOWHERE = tl.constexpr(9)  # the position if the result is 0


@triton.jit
def _better(best, place, value, at):
    """The larger value with its position; of equal values, the first."""
    greater = value > best
    return tl.where(greater, value, best), tl.where(greater, at, place)


@triton.jit
def _best_of_row(image, row, column, channels, height, width, sign, C: tl.constexpr):
    """The maximum of x * sign left of each column, at it, and right of it, and its position among the three."""
    at = image + row * width * C + (column * C + channels)
    inside = (row >= 0) & (row < height) & (channels < C)
    inside_a, inside_b = inside & (column > 0) & (column <= width), inside & (column < width)
    inside_c = inside & (column < width - 1)
    a = tl.load(at - C, mask=inside_a, other=0.0).to(tl.float32)
    b = tl.load(at, mask=inside_b, other=0.0).to(tl.float32)
    c = tl.load(at + C, mask=inside_c, other=0.0).to(tl.float32)
    best = tl.where(inside_a, a * sign, -float("inf"))
    place = tl.zeros(best.shape, tl.int32)
    best, place = _better(best, place, tl.where(inside_b, b * sign, -float("inf")), 1)
    return _better(best, place, tl.where(inside_c, c * sign, -float("inf")), 2)


@triton.jit
def _forward_kernel(
    x, means, variances, weight, bias, y, greatest, places, batch, images, height, width, rows, eps,
    C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, greatest, places [B, OH, OW, C]. A row of x with an odd number contributes to two rows of them."""
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    columns, channels, first, last, image, _ = _place(images, out_height, out_width, rows, C, BLOCK_W, BLOCK_C)
    inside = (columns < out_width) & (channels < C)
    mean, scale, shift = _affine(means, variances, weight, bias, channels, eps, C)
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))

    for number in range(image, tl.minimum(image + images, batch)):
        source = x + tl.cast(number, tl.int64) * height * width * C
        target = tl.cast(number, tl.int64) * out_height * out_width * C
        above, above_place = _best_of_row(source, 2 * first - 1, 2 * columns, channels, height, width, sign, C)
        for row in range(first, last):
            middle, middle_place = _best_of_row(source, 2 * row, 2 * columns, channels, height, width, sign, C)
            below, below_place = _best_of_row(source, 2 * row + 1, 2 * columns, channels, height, width, sign, C)
            best, place = _better(above, above_place, middle, middle_place + 3)
            best, place = _better(best, place, below, below_place + 6)
            value = best * sign
            flat = inside & (scale == 0)  # all are equal: use the first
            corner = source + tl.maximum(2 * row - 1, 0) * width * C + tl.maximum(2 * columns - 1, 0) * C + channels
            value = tl.where(flat, tl.load(corner, mask=flat, other=0.0).to(tl.float32), value)
            result = tl.maximum((value - mean) * scale + shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
            place = tl.where(result > 0, place, NOWHERE)
            at = target + (row * out_width + columns) * C + channels
            tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
            tl.store(greatest + at, value.to(greatest.dtype.element_ty), mask=inside)
            tl.store(places + at, place.to(tl.uint8), mask=inside)
            above, above_place = below, below_place


@triton.jit
def _read_slope(dy, places, image, row, column, channels, out_height, out_width, C: tl.constexpr):
    """A tile of one row of dy and of the positions, which are NOWHERE outside of the map."""
    inside = (row < out_height) & (column < out_width) & (channels < C)
    at = image + row * out_width * C + (column * C + channels)
    slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    return slope, tl.load(places + at, mask=inside, other=9).to(tl.int32)


@triton.jit
def _if_at(slope, place, here: tl.constexpr):
    return tl.where(place == here, slope, 0.0)


@triton.jit
def _write(dx, x, image, row, column, channels, height, width, gradient, mean, scale, b, c, C: tl.constexpr):
    inside = (row < height) & (column < width) & (channels < C)
    at = image + row * width * C + (column * C + channels)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, (scale * gradient + b * (value - mean) + c).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    dy, places, x, means, variances, weight, dweight, dbias, dx, batch, images, height, width, rows, eps,
    C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [B, H, W, C] = scale g + b (x - mean) + c: four neighbours of it, p q above r s, from four of dy."""
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    columns, channels, first, last, image, _ = _place(images, out_height, out_width, rows, C, BLOCK_W, BLOCK_C)
    mean, scale, _ = _affine(means, variances, weight, weight, channels, eps, C)
    b, c = _coefficients(scale, variances, dweight, dbias, channels, batch * height * width, eps, C)

    for number in range(image, tl.minimum(image + images, batch)):
        source = tl.cast(number, tl.int64) * out_height * out_width * C
        target = tl.cast(number, tl.int64) * height * width * C
        d0, at0 = _read_slope(dy, places, source, first, columns, channels, out_height, out_width, C)
        d1, at1 = _read_slope(dy, places, source, first, columns + 1, channels, out_height, out_width, C)
        for row in range(first, last):
            d2, at2 = _read_slope(dy, places, source, row + 1, columns, channels, out_height, out_width, C)
            d3, at3 = _read_slope(dy, places, source, row + 1, columns + 1, channels, out_height, out_width, C)
            top, left = 2 * row, 2 * columns
            p = _if_at(d0, at0, 4)
            q = _if_at(d0, at0, 5) + _if_at(d1, at1, 3)
            r = _if_at(d0, at0, 7) + _if_at(d2, at2, 1)
            s = _if_at(d0, at0, 8) + _if_at(d1, at1, 6) + _if_at(d2, at2, 2) + _if_at(d3, at3, 0)
            _write(dx, x, target, top, left, channels, height, width, p, mean, scale, b, c, C)
            _write(dx, x, target, top, left + 1, channels, height, width, q, mean, scale, b, c, C)
            _write(dx, x, target, top + 1, left, channels, height, width, r, mean, scale, b, c, C)
            _write(dx, x, target, top + 1, left + 1, channels, height, width, s, mean, scale, b, c, C)
            d0, at0, d1, at1 = d2, at2, d3, at3


# --- Launch -----------------------------------------------------------------------------------------------------------


def _common(x: Tensor) -> tuple[tuple[int], tuple[int, ...], dict]:
    from fastofa.kernels.triton_depthwise import tiling

    batch, channels, height, width = x.shape
    t = tiling(batch, height, width, channels, 2)
    constants = {"C": channels, "BLOCK_W": t.block_w, "BLOCK_C": t.block_c}
    return (t.parts * t.blocks,), (batch, t.images, height, width, t.rows), constants


def norm_act_pool(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the operator of that name in norm_act.py."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    size = (batch, channels, (height + 1) // 2, (width + 1) // 2)
    y, greatest, places = (
        torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        for dtype in (x.dtype, x.dtype, torch.uint8)
    )
    grid, sizes, constants = _common(x)
    _forward_kernel[grid](x, mean, var, weight, bias, y, greatest, places, *sizes, eps, **constants)
    return y, greatest, places


def norm_act_pool_gradient(
    dy: Tensor,
    places: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    eps: float,
) -> Tensor:
    """Implements the operator of that name in norm_act.py."""
    dy, places, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, places, x))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid, sizes, constants = _common(x)
    _gradient_kernel[grid](dy, places, x, mean, var, weight, dweight, dbias, dx, *sizes, eps, **constants)
    return dx
