"""RandAugment, mixing and erasing in Triton: four kernels, each for many images with different operations.

apply_operations, once per column of operations:
    _tables_kernel  builds the table of every image whose operation maps levels, from a histogram where it needs one
    _point_kernel   looks up the tables, blends colours, sharpens, copies; bytes in the order of memory
    _warp_kernel    rotates, shears, translates; a lane computes a pixel, whose channels share a position
mix_and_erase:
    _mix_erase_kernel

The results equal those of augment.py bit by bit. So every product and sum is rounded separately (enable_fp_fusion=False
forbids fused multiply-add), positions are computed in fp64 as there, and levels, histograms and noise are integers.

The images are sorted on the CPU by the kernel that changes them. A plan, int32 [R, 4], has a row for each image: its
number, its operation, the bits of the operation's fp32 amount, and padding, which aligns every plan to 16 bytes, so
that Triton compiles a kernel once.

Shapes: B images, R rows, n operations per image, S side of an image. Images are contiguous, or channels-last (LAST).
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastofa.kernels.augment import OPERATIONS, Color, kept_bits, normal_levels, rotation

if TYPE_CHECKING:
    from fastofa.kernels.augment_batch import Erasing, Mixing

NUMBERS = {name: number for number, name in enumerate(OPERATIONS, start=1)}
AUTO_CONTRAST, EQUALIZE, INVERT = (tl.constexpr(NUMBERS[name]) for name in ("auto_contrast", "equalize", "invert"))
POSTERIZE, SOLARIZE, SOLARIZE_ADD = (tl.constexpr(NUMBERS[name]) for name in ("posterize", "solarize", "solarize_add"))
COLOR, CONTRAST, SHARPNESS = (tl.constexpr(NUMBERS[name]) for name in ("color", "contrast", "sharpness"))
ROTATE = tl.constexpr(NUMBERS["rotate"])

TABLE, POINT, WARP = range(3)
KINDS = torch.full((len(NUMBERS) + 1,), TABLE)
"""The kernel that changes the image, by the operation's number."""
KINDS[[0, NUMBERS["color"], NUMBERS["sharpness"]]] = POINT
KINDS[[NUMBERS[name] for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")]] = WARP


# --- Shared by the kernels --------------------------------------------------------------------------------------------


@triton.constexpr_function
def _layout(S, LAST):
    """The distances in memory between channels, columns and rows of an image."""
    return (1, 3, 3 * S) if LAST else (S * S, 1, S)


@triton.jit
def _row(plan, row):
    """An image, its operation and the amount."""
    plan += row * 4
    return tl.load(plan).to(tl.int64), tl.load(plan + 1), tl.load(plan + 2).to(tl.float32, bitcast=True)


@triton.jit
def _load(at, inside):
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _blend(base, level, factor):
    """Integers 0..255 and an fp32 factor: computed in fp32, clipped and truncated."""
    base = base.to(tl.float32)
    blended = (level.to(tl.float32) - base) * factor + base
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _grey(pixel, inside, CHANNEL: tl.constexpr):
    red, green, blue = _load(pixel, inside), _load(pixel + CHANNEL, inside), _load(pixel + 2 * CHANNEL, inside)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


# --- Tables and single pixels -----------------------------------------------------------------------------------------


@triton.jit
def _tables_kernel(images, plan, tables, S: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Write tables uint8 [R, 3, 256] for the rows of a plan. A program handles one channel of an image."""
    channel = tl.program_id(0) % 3
    image, op, amount = _row(plan, tl.program_id(0) // 3)
    image = images + image * (3 * S * S)
    CHANNEL: tl.constexpr = _layout(S, LAST)[0]
    COLUMN: tl.constexpr = _layout(S, LAST)[1]
    levels = tl.arange(0, 256)
    table = levels
    if op == INVERT:
        table = 255 - levels
    elif op == POSTERIZE:
        table = levels & amount.to(tl.int32)
    elif op == SOLARIZE:
        table = tl.where(levels >= tl.minimum(amount, 256.0).to(tl.int32), 255 - levels, levels)
    elif op == SOLARIZE_ADD:
        table = tl.where(levels < 128, levels + amount.to(tl.int32), levels)
    elif op == CONTRAST:
        total = tl.zeros([], tl.int64)
        for start in range(0, S * S, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < S * S
            grey = _grey(image + at * COLUMN, inside, CHANNEL)
            total += tl.sum(tl.where(inside, grey, 0)).to(tl.int64)
        mean = ((2 * total + S * S) // (2 * S * S)).to(tl.int32)
        table = _blend(mean, levels, amount)
    elif (op == AUTO_CONTRAST) | (op == EQUALIZE):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, S * S, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < S * S
            counts += tl.histogram(_load(image + channel * CHANNEL + at * COLUMN, inside), 256, inside)
        highest = tl.max(tl.where(counts > 0, levels, 0))
        if op == EQUALIZE:
            step = (S * S - tl.sum(tl.where(levels == highest, counts, 0))) // 255
            below = tl.cumsum(counts) - counts
            if step > 0:
                table = tl.minimum((step // 2 + below) // step, 255)
        else:
            lowest = tl.min(tl.where(counts > 0, levels, 255))
            if highest > lowest:
                scale = tl.full([], 255, tl.float64) / (highest - lowest).to(tl.float64)
                stretched = levels.to(tl.float64) * scale - lowest.to(tl.float64) * scale
                table = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
    else:  # brightness
        table = _blend(levels * 0, levels, amount)
    tl.store(tables + tl.program_id(0) * 256 + levels, table.to(tl.uint8))


@triton.jit
def _point_kernel(images, result, plan, tables, S: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Images that change pixel by pixel, by the table of their row if they have one, or not at all."""
    SIZE: tl.constexpr = 3 * S * S
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // BLOCKS
    image, op, amount = _row(plan, row)
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    source = images + image * SIZE
    CHANNEL: tl.constexpr = _layout(S, LAST)[0]
    COLUMN: tl.constexpr = _layout(S, LAST)[1]
    ROW: tl.constexpr = _layout(S, LAST)[2]
    channel = at // CHANNEL % 3
    level = _load(source + at, inside)
    if op == COLOR:
        grey = _grey(source + (at - channel * CHANNEL), inside, CHANNEL)
        level = _blend(grey, level, amount)
    elif op == SHARPNESS:
        x, y = at // COLUMN % S, at // ROW % S
        inner = inside & (x > 0) & (x < S - 1) & (y > 0) & (y < S - 1)
        total = 4 * level
        for down in range(-1, 2):  # a loop, since unrolling takes more registers
            for across in tl.static_range(-1, 2):
                total += _load(source + at + (down * ROW + across * COLUMN), inner)
        smooth = tl.where(inner, (total + 6) // 13, level)
        level = _blend(smooth, level, amount)
    elif op != 0:
        level = _load(tables + row * 768 + channel * 256 + level, inside)
    tl.store(result + image * SIZE + at, level.to(tl.uint8), mask=inside)


# --- Positions --------------------------------------------------------------------------------------------------------


@triton.jit
def _bilinear(source, left, top, along, below, inside, S: tl.constexpr, COLUMN: tl.constexpr, ROW: tl.constexpr):
    """Interpolate along both rows, then between them, in the dtype of `along` and `below`; truncated."""
    last = S - 1.0
    near = tl.minimum(tl.maximum(left, 0.0), last).to(tl.int32) * COLUMN
    beside = tl.minimum(tl.maximum(left + 1, 0.0), last).to(tl.int32) * COLUMN
    upper = tl.minimum(tl.maximum(top, 0.0), last).to(tl.int32) * ROW
    lower = tl.minimum(tl.maximum(top + 1, 0.0), last).to(tl.int32) * ROW
    a, b = _load(source + upper + near, inside).to(along.dtype), _load(source + upper + beside, inside).to(along.dtype)
    c, d = _load(source + lower + near, inside).to(along.dtype), _load(source + lower + beside, inside).to(along.dtype)
    first = (b - a) * along + a
    second = (d - c) * along + c
    return ((second - first) * below + first).to(tl.int32)


@triton.jit
def _warp_kernel(
    images, result, plan, maps, red, green, blue, S: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Images whose pixels move, each by its row of maps fp64 [R, 6]; pixels from outside are (red, green, blue)."""
    PIXELS: tl.constexpr = S * S
    BLOCKS: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // BLOCKS
    image, op, _ = _row(plan, row)
    image *= 3 * PIXELS
    pixel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    across, down = (pixel % S).to(tl.float64) + 0.5, (pixel // S).to(tl.float64) + 0.5
    maps += row * 6
    x = tl.load(maps) * across + (tl.load(maps + 1) * down + tl.load(maps + 2))
    y = tl.load(maps + 3) * down - tl.load(maps + 4) * across + tl.load(maps + 5)
    shown = (x >= 0) & (x < S) & (y >= 0) & (y < S)
    x, y = x - 0.5, y - 0.5
    left, top = tl.floor(x), tl.floor(y)
    along, below = x - left, y - top
    CHANNEL: tl.constexpr = _layout(S, LAST)[0]
    COLUMN: tl.constexpr = _layout(S, LAST)[1]
    ROW: tl.constexpr = _layout(S, LAST)[2]
    inside = pixel < PIXELS
    taken = inside & shown
    for channel in tl.static_range(3):
        source = images + image + channel * CHANNEL
        if op == ROTATE:
            level = _bilinear(source, left, top, along.to(tl.float32), below.to(tl.float32), taken, S, COLUMN, ROW)
        else:
            level = _bilinear(source, left, top, along, below, taken, S, COLUMN, ROW)
        level = tl.where(shown, level, red if channel == 0 else (green if channel == 1 else blue))
        to = result + image + channel * CHANNEL + pixel * COLUMN
        tl.store(to, level.to(tl.uint8), mask=inside)


# --- Mixing and erasing -----------------------------------------------------------------------------------------------


@triton.jit
def _scrambled(bits):
    """The hash of augment.py, on uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _within(box, x, y):
    top, left, bottom, right = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right), (top < bottom) & (left < right)


@triton.jit
def _mix_erase_kernel(
    images, result, plan, noise, S: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mix, then erase by noise uint8 [3, 65536], the images of plan int32 [B, 11].

    Its columns: the partner, the bits of the fp32 share, the partner's box, the noise's box, the noise's key.
    """
    SIZE: tl.constexpr = 3 * S * S
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    CHANNEL: tl.constexpr = _layout(S, LAST)[0]
    COLUMN: tl.constexpr = _layout(S, LAST)[1]
    ROW: tl.constexpr = _layout(S, LAST)[2]
    channel, x, y = at // CHANNEL % 3, at // COLUMN % S, at // ROW % S
    plan += image * 11
    partner = images + tl.load(plan).to(tl.int64) * SIZE + at
    share = tl.load(plan + 1).to(tl.float32, bitcast=True)
    level = _load(images + image * SIZE + at, inside)

    if share < 1:
        blended = level.to(tl.float32) * share + _load(partner, inside).to(tl.float32) * (1 - share)
        level = ((blended + 12582912.0) - 12582912.0).to(tl.int32)  # half to even: 1.5 * 2^23 leaves no fraction
    cut, any_cut = _within(plan + 2, x, y)
    if any_cut:
        level = tl.where(cut, _load(partner, inside & cut), level)
    erased, any_erased = _within(plan + 6, x, y)
    if any_erased:
        place = (channel * S + y) * S + x
        bits = _scrambled(_scrambled(place.to(tl.uint32)) ^ tl.load(plan + 10).to(tl.uint32, bitcast=True))
        drawn = _load(noise + channel * 65536 + (bits & 0xFFFF).to(tl.int32), inside & erased)
        level = tl.where(erased, drawn, level)
    tl.store(result + image * SIZE + at, level.to(tl.uint8), mask=inside)


# --- Launches ---------------------------------------------------------------------------------------------------------

TABLE_BLOCK = 1024
"""Pixels per step of a program that reads a whole image."""
POINT_BLOCK = 2048
"""Bytes per program of 4 warps: 16 a thread, one wide load."""
WARP_BLOCK = 256
"""Pixels per program of 4 warps."""
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def apply_operations(images: Tensor, ops: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Implements the function of that name in augment_batch.py."""
    if not images.numel() or not ops.numel():
        return images
    size, batch = images.shape[-1], len(images)
    images, layout = _dense(images)
    kinds = KINDS[ops.T.long()]
    plans, maps = (values.to(images.device, non_blocking=True) for values in _plans(kinds, ops.T, amounts.T, size))
    table_counts, warp_counts = ((kinds == kind).sum(dim=1).tolist() for kind in (TABLE, WARP))
    tables = torch.empty(batch, 3, 256, dtype=torch.uint8, device=images.device)
    with torch.cuda.device_of(images):
        for plan, map_, with_table, warped in zip(plans, maps, table_counts, warp_counts, strict=True):
            result, points = torch.empty_like(images), batch - warped
            if with_table:
                _tables_kernel[(with_table * 3,)](images, plan, tables, **layout, BLOCK=TABLE_BLOCK, **OPTIONS)
            if points:
                grid = (points * triton.cdiv(3 * size * size, POINT_BLOCK),)
                _point_kernel[grid](images, result, plan, tables, **layout, BLOCK=POINT_BLOCK, **OPTIONS)
            if warped:
                grid = (warped * triton.cdiv(size * size, WARP_BLOCK),)
                rows = plan[points:], map_[points:]
                _warp_kernel[grid](images, result, *rows, *fill, **layout, BLOCK=WARP_BLOCK, **OPTIONS)
            images = result
    return images


def _plans(kinds: Tensor, ops: Tensor, amounts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Plans int32 [n, B, 4] and maps float64 [n, B, 6] of operations and amounts [n, B], sorted by kind.

    A map is xx, xy, x0, yy, yx, y0: pixels come from x = xx across + (xy down + x0), y = yy down - yx across + y0.
    """
    order = kinds.argsort(dim=1, stable=True)
    ops, amounts = ops.gather(1, order), amounts.gather(1, order)
    maps = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.float64).repeat(*ops.shape, 1)
    exact = amounts.to(torch.float64)
    for name, place, value in (
        ("shear_x", 1, exact),
        ("translate_x", 2, exact * size),
        ("shear_y", 4, -exact),
        ("translate_y", 5, exact * size),
    ):
        maps[..., place] = torch.where(ops == NUMBERS[name], value, maps[..., place])
    cos, sin, right, lower = rotation(amounts, size)
    rotations = torch.stack([cos, sin, right, cos, sin, lower], dim=-1)
    maps = torch.where((ops == NUMBERS["rotate"])[..., None], rotations, maps)
    amounts = torch.where(ops == NUMBERS["posterize"], kept_bits(amounts).to(torch.float32), amounts)
    order, ops = order.to(torch.int32), ops.to(torch.int32)
    return torch.stack([order, ops, amounts.view(torch.int32), torch.zeros_like(ops)], dim=-1), maps


def mix_and_erase(images: Tensor, count: int, mixing: "Mixing | None", erasing: "Erasing | None") -> Tensor:
    """Implements the function of that name in augment_batch.py."""
    size = images.shape[-1]
    images, layout = _dense(images)
    result = torch.empty_like(images[:count])
    plan = torch.zeros(count, 11, dtype=torch.int32)
    plan[:, 0] = torch.arange(count)
    plan[:, 1] = torch.ones(count).view(torch.int32)
    noise = images  # a pointer that is never read
    if mixing is not None:
        plan[:, 0] = mixing.partners
        plan[:, 1] = mixing.shares.view(torch.int32)
        plan[:, 2:6] = mixing.boxes
    if erasing is not None:
        plan[:, 6:10] = erasing.boxes
        plan[:, 10] = erasing.keys
        noise = normal_levels(tuple(erasing.mean), tuple(erasing.std), images.device)
    if result.numel():
        grid = (count * triton.cdiv(3 * size * size, POINT_BLOCK),)
        with torch.cuda.device_of(images):
            plan = plan.to(images.device, non_blocking=True)
            _mix_erase_kernel[grid](images, result, plan, noise, **layout, BLOCK=POINT_BLOCK, **OPTIONS)
    return result


def _dense(images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The images, copied unless they are contiguous or channels-last, and whether they are channels-last."""
    last = not images.is_contiguous()
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, {"S": images.shape[-1], "LAST": last}
