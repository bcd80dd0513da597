"""Crop, resize, flip and normalise in Triton: every output pixel gathers the source pixels under its filter.

A program computes a block of consecutive output pixels of one image. Their three channels share the filters' weights,
which are those of reference.py, computed on the fly. The number of pixels that a filter spans differs between images.

Shapes: N images in the source, B crops, S side of the output.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _filters(start, length, out, source, S: tl.constexpr):
    """The filters of output pixels `out` along one axis, for a box of pixels start .. start + length of `source`.

    Returns, for each filter, its first source pixel and that pixel's distance from the filter's centre; and for all
    filters the last pixel that overlaps the box, 1 / reach to each side, and the maximum number of pixels spanned.
    Pixels stay inside the image, and their number within its size, whatever the box.
    """
    scale = tl.div_rn(length, S * 1.0)
    reach = tl.maximum(scale, 1.0)
    count = tl.minimum(tl.ceil(2.0 * reach).to(tl.int32), source)
    lowest = tl.minimum(tl.maximum(tl.floor(start).to(tl.int32), 0), source - 1)
    highest = tl.minimum(tl.maximum(tl.ceil(start + length).to(tl.int32) - 1, lowest), source - 1)
    centre = (out + 0.5) * scale
    first = tl.floor(centre + (start - reach + 0.5)).to(tl.int32)
    first = tl.minimum(tl.maximum(first, lowest), highest)
    return first, first + 0.5 - start - centre, highest, 1.0 / reach, count


@triton.jit
def _tap(first, away, highest, inverse_reach, step):
    """Source pixel number `step` of each filter, and its weight, which is 0 outside of the box."""
    at = first + step
    weight = tl.maximum(1.0 - tl.abs(away + step) * inverse_reach, 0.0)
    return tl.minimum(at, highest), tl.where(at <= highest, weight, 0.0)


@triton.jit
def _round(x):
    """Round values in 0..255 half to even: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _crop_resize_kernel(
    images, ids, boxes, flips, result,
    count, height, width, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    S: tl.constexpr, BLOCK: tl.constexpr, WITH_IDS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """images uint8 [count, height, width, 3] -> result [B, S, S, 3]: each channel times its `scale`, plus `shift`."""
    PIXELS: tl.constexpr = S * S
    BLOCKS: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    crop = (program // BLOCKS).to(tl.int64)
    pixel = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    y, x = pixel // S, pixel % S

    image = crop
    if WITH_IDS:
        image = tl.load(ids + crop)
    top = tl.load(boxes + crop * 4).to(tl.float32)
    left = tl.load(boxes + crop * 4 + 1).to(tl.float32)
    box_height = tl.load(boxes + crop * 4 + 2).to(tl.float32)
    box_width = tl.load(boxes + crop * 4 + 3).to(tl.float32)
    x = tl.where(tl.load(flips + crop), S - 1 - x, x)
    row, away_y, last_row, per_row, rows = _filters(top, box_height, y, height, S)
    column, away_x, last_column, per_column, columns = _filters(left, box_width, x, width, S)
    rows = tl.where((image >= 0) & (image < count), rows, 0)  # an invalid id reads nothing and yields 0 / 0

    source = images + image * height * width * 3
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for i in range(rows):
        at_row, by_row = _tap(row, away_y, last_row, per_row, i)
        for j in range(columns):
            at_column, by_column = _tap(column, away_x, last_column, per_column, j)
            at = source + (at_row * width + at_column) * 3
            weight = by_row * by_column
            red += weight * tl.load(at).to(tl.float32)
            green += weight * tl.load(at + 1).to(tl.float32)
            blue += weight * tl.load(at + 2).to(tl.float32)
            weights += weight
    if ROUND:  # divide exactly, because values near a half could be rounded in the wrong direction
        red, green, blue = tl.div_rn(red, weights), tl.div_rn(green, weights), tl.div_rn(blue, weights)
        red, green, blue = _round(red), _round(green), _round(blue)
    else:
        red, green, blue = red / weights, green / weights, blue / weights
        red = red * scale_r + shift_r
        green = green * scale_g + shift_g
        blue = blue * scale_b + shift_b
    to = result + crop * (PIXELS * 3) + pixel * 3
    inside = pixel < PIXELS
    tl.store(to, red.to(result.dtype.element_ty), mask=inside)
    tl.store(to + 1, green.to(result.dtype.element_ty), mask=inside)
    tl.store(to + 2, blue.to(result.dtype.element_ty), mask=inside)


BLOCK = 512
"""Output pixels per program of 4 warps: each thread has 4 pixels, and thus 12 loads in flight."""


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int,
    ids: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Implements the operator of that name in crop_resize.py."""
    count, height, width, _ = images.shape
    batch = len(boxes)
    result = torch.empty(batch, size, size, 3, dtype=dtype, device=images.device)
    mean, std = mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0)
    if batch:
        _crop_resize_kernel[(batch * triton.cdiv(size * size, BLOCK),)](
            images.contiguous(),
            boxes if ids is None else ids.contiguous(),
            boxes.contiguous(),
            flip.contiguous(),
            result,
            count,
            height,
            width,
            *(1 / (255 * s) for s in std),
            *(-m / s for m, s in zip(mean, std, strict=True)),
            S=size,
            BLOCK=BLOCK,
            WITH_IDS=ids is not None,
            ROUND=dtype == torch.uint8,
            num_warps=4,
        )
    return result.permute(0, 3, 1, 2)
