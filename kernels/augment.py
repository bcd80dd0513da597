"""RandAugment's operations, random erasing and mixing on batches of uint8 images, with a separate amount per image.

OPERATIONS["rotate"](images, amounts, fill) -> images

The results match those of timm's AugmentOp on Pillow images with bilinear resampling; tests compare them. Nothing waits
for the device, and the pixels of an image do not depend on the other images of the batch.

Shapes: B batch, S side of an image. Images are uint8 [B, 3, S, S] in any memory format, amounts are float32 [B] on the
CPU, where the view tables are.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Color = tuple[int, int, int]


def _per_image(values: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
    """[B] on the CPU -> [B, 1, 1, 1] on the images' device."""
    return values.to(dtype).to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def _choose(mask: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """`others` where the mask [B, 1 or 3, S, S] is set, else `images`; on a CPU, much faster than torch.where."""
    return images ^ ((images ^ others) & mask.to(torch.uint8) * 255)


# --- Operations on single pixels --------------------------------------------------------------------------------------


def invert(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    return ~images


def posterize(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Keep the highest `amount` bits, 0 to 8. 0 gives black, as in the version of Pillow that the publications used."""
    return images & _per_image(kept_bits(amounts), images, torch.uint8)


def kept_bits(amounts: Tensor) -> Tensor:
    """The mask of the highest `amount` bits of a byte: uint8 of any shape."""
    return (256 - 2 ** (8 - amounts)).to(torch.int32).to(torch.uint8)


def solarize(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Invert levels of at least `amount`; 256 changes nothing."""
    reached = images >= _per_image(amounts.clamp(max=255), images, torch.uint8)
    return images ^ reached.to(torch.uint8) * _per_image((amounts < 256) * 255, images, torch.uint8)


def solarize_add(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Add `amount`, at most 128, to levels below 128."""
    return images + (images < 128) * _per_image(amounts, images, torch.uint8)


def _blend(base: Tensor | int, images: Tensor, factors: Tensor) -> Tensor:
    """Pillow's Image.blend: computed in fp32, clipped and truncated."""
    away = images.to(torch.float32) - base
    return away.mul_(_per_image(factors, images, torch.float32)).add_(base).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Pillow's conversion to L, int32 [B, 1, S, S]."""
    red, green, blue = images.contiguous().to(torch.int32).unbind(dim=1)
    weighted = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return (weighted + 0x8000 >> 16).unsqueeze(1)


def brightness(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    return _blend(0, images, amounts)


def color(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    return _blend(_grey(images), images.contiguous(), amounts)


def contrast(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Blend with the rounded mean of the grey image; factors above 1 extrapolate away from it."""
    pixels = images.shape[2] * images.shape[3]
    total = _grey(images).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    mean = torch.div(2 * total + pixels, 2 * pixels, rounding_mode="floor").to(torch.int32)
    return _blend(mean, images, amounts)


def sharpness(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Blend with the image smoothed by [[1 1 1] [1 5 1] [1 1 1]] / 13, or extrapolate; its border stays unchanged."""
    if min(images.shape[2:]) < 3:
        return images.clone()
    values = images.to(torch.int16)
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    smooth = images.to(torch.float32)
    smooth[:, :, 1:-1, 1:-1] = ((total + 6.5) / 13).floor_()
    return _blend(smooth, images, amounts)


# --- Operations that depend on the whole image ------------------------------------------------------------------------


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Map the levels of each channel by its own table, [B, 3, 256]."""
    return table.to(torch.uint8).gather(2, images.flatten(2).to(torch.int64)).view(images.shape)


def auto_contrast(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Stretch the range of each channel, from its lowest to its highest level, to 0..255."""
    low, high = (v.to(torch.float64)[..., None] for v in images.flatten(2).aminmax(dim=2))
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # number / tensor would round twice
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    return _look_up(images, torch.where(high > low, (levels * scale - low * scale).clamp(0, 255), levels))


def equalize(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Equalise each channel's histogram."""
    values = images.flatten(2).to(torch.int64)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values[..., :1]).expand_as(values))
    levels = torch.arange(256, device=images.device).expand_as(counts)
    lightest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = torch.div(values.shape[2] - lightest, 255, rounding_mode="floor")
    below = counts.cumsum(dim=2) - counts
    table = torch.div(torch.div(step, 2, rounding_mode="floor") + below, step.clamp(min=1), rounding_mode="floor")
    return _look_up(images, torch.where(step > 0, table.clamp(max=255), levels))


# --- Operations that move pixels --------------------------------------------------------------------------------------


# As in Pillow's transform, the centre of an output pixel is mapped to a position in the source, which is interpolated
# bilinearly; outside the source, it takes the fill colour. Near the edges, the outermost pixels are repeated.


def _slide(images: Tensor, by: Tensor, fill: Color) -> Tensor:
    """Shift rows: output pixel x is the source at x + `by`, which is float64 [B, 1, S or 1, 1] on the CPU."""
    size = images.shape[-1]
    x = torch.arange(size, dtype=torch.float64, device=images.device) + 0.5 + by.to(images.device, non_blocking=True)
    outside = (x < 0) | (x >= size)
    x = x - 0.5
    left = x.floor()
    source = images.to(torch.float64, memory_format=torch.contiguous_format)
    near, beside = (source.gather(3, v.to(torch.int64).clamp_(0, size - 1).expand_as(source)) for v in (left, left + 1))
    return _choose(outside, beside.sub_(near).mul_(x - left).add_(near).to(torch.uint8), _color(fill, images.device))


def shear_x(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Shift each row by `amount` pixels more than the one above."""
    down = torch.arange(images.shape[-1], dtype=torch.float64) + 0.5
    return _slide(images, amounts.to(torch.float64).view(-1, 1, 1, 1) * down[:, None], fill)


def translate_x(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Shift by `amount` as a fraction of the side; positive amounts shift to the left."""
    return _slide(images, amounts.to(torch.float64).view(-1, 1, 1, 1) * images.shape[-1], fill)


def shear_y(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    return shear_x(images.mT, amounts, fill).mT


def translate_y(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    return translate_x(images.mT, amounts, fill).mT


def rotate(images: Tensor, amounts: Tensor, fill: Color) -> Tensor:
    """Rotate by `amount` degrees counter-clockwise about the centre, interpolating in fp32 (Pillow uses fp64)."""
    batch, channels, size, _ = images.shape
    constants = torch.stack(rotation(amounts, size))
    cos, sin, right, lower = constants.to(images.device, non_blocking=True).view(4, batch, 1, 1)
    across = torch.arange(size, dtype=torch.float64, device=images.device) + 0.5
    down = across[:, None]
    x, y = cos * across + (sin * down + right), cos * down - sin * across + lower
    outside = (x < 0) | (x >= size) | (y < 0) | (y >= size)

    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    along, below = ((v - whole).to(torch.float32).flatten(1)[:, None] for v, whole in ((x, left), (y, top)))
    columns = [v.to(torch.int64).clamp_(0, size - 1) for v in (left, left + 1)]
    source = images.to(torch.float32, memory_format=torch.contiguous_format).flatten(2)

    def line(row: Tensor) -> Tensor:
        """For every output pixel, the interpolation along one row of the source: fp32 [B, 3, S * S]."""
        row = row.to(torch.int64).clamp_(0, size - 1) * size
        near, beside = (source.gather(2, (row + v).flatten(1)[:, None].expand(-1, channels, -1)) for v in columns)
        return beside.sub_(near).mul_(along).add_(near)

    upper = line(top)
    values = line(top + 1).sub_(upper).mul_(below).add_(upper).to(torch.uint8).view(images.shape)
    return _choose(outside[:, None], values, _color(fill, images.device))


def rotation(amounts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos, sin, right, lower, float64 [B]: x = cos across + sin down + right, y = cos down - sin across + lower."""
    angle, middle = -torch.deg2rad(amounts.to(torch.float64)), size / 2
    cos, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    return cos, sin, middle - (cos + sin) * middle, middle - (cos - sin) * middle


@lru_cache(maxsize=16)
def _color(fill: Color, device: torch.device) -> Tensor:
    return torch.tensor(fill, dtype=torch.uint8, device=device).view(1, 3, 1, 1)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Color], Tensor]] = {
    operation.__name__: operation
    for operation in (
        auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast, brightness,
        sharpness, shear_x, shear_y, translate_x, translate_y,
    )
}  # fmt: skip


# --- Mixing and erasing -----------------------------------------------------------------------------------------------


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """bool [B, 1, S, S] from top, left, bottom, right in pixels, int64 [B, 4] on the CPU."""
    top, left, bottom, right = boxes.to(images.device, non_blocking=True).view(-1, 4, 1, 1).unbind(dim=1)
    place = torch.arange(images.shape[-1], device=images.device)
    down, across = place[:, None], place
    return ((down >= top) & (down < bottom) & (across >= left) & (across < right)).unsqueeze(1)


def mixup(images: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    """share * image + (1 - share) * other, rounded half to even; shares float32 [B] on the CPU."""
    share = _per_image(shares, images, torch.float32)
    return (images * share).add_(others * (1 - share)).round_().to(torch.uint8)


def cutmix(images: Tensor, others: Tensor, boxes: Tensor) -> Tensor:
    """Replace the box with the other image; boxes are top, left, bottom, right in pixels, int64 [B, 4] on the CPU."""
    return _choose(_inside(boxes, images), images, others)


def erase(images: Tensor, boxes: Tensor, keys: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Fill the box with normal noise of `mean` and `std` (RGB in 0..1), rounded and clipped to 0..255.

    Boxes are as in `cutmix`, keys are int32 [B] on the CPU. The noise is a pure function of (key, channel, row, column)
    and the same on every device.
    """
    bits = _scrambled(_places(images.shape[-1], images.device) ^ _per_image(keys, images, torch.int32))
    level = (bits & 0xFFFF) + 65536 * torch.arange(3, dtype=torch.int32, device=images.device).view(3, 1, 1)
    noise = normal_levels(tuple(mean), tuple(std), images.device).index_select(0, level.flatten()).view(level.shape)
    return _choose(_inside(boxes, images), images, noise)


@lru_cache(maxsize=4)
def _places(size: int, device: torch.device) -> Tensor:
    """int32 [1, 3, S, S]: a hash of each position."""
    return _scrambled(torch.arange(3 * size * size, dtype=torch.int32, device=device).view(1, 3, size, size))


def _scrambled(values: Tensor) -> Tensor:
    """A 32-bit hash of each int32 (lowbias32): xor-shift and multiply, twice, with products modulo 2^32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        values = (values ^ (values >> shift & (1 << 32 - shift) - 1)) * factor
    return values ^ (values >> 16 & 0xFFFF)


@lru_cache(maxsize=16)
def normal_levels(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """uint8 [3 * 65536]: the quantiles of each channel's normal distribution, to be indexed by 16 random bits."""
    quantiles = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    levels = [(m + s * quantiles) * 255 for m, s in zip(mean, std, strict=True)]
    return torch.cat(levels).round().clamp(0, 255).to(torch.uint8).to(device)
