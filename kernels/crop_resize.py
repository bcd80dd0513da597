"""Crop, resize, flip and normalise images: checks the arguments, then runs an implementation.

Shapes: N images in the source, B crops, S side of the output.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton
from fastofa.kernels.comparison import Comparison

DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int,
    ids: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.uint8,
    impl: str | None = None,
    bicubic: bool = False,
) -> Tensor:
    """Crop images of a batch (or of a resident dataset, by sample id) and resize them to S x S, antialiased.

    Equals torchvision's `resized_crop` and `horizontal_flip` up to their 8-bit rounding.

    Args:
        images: uint8 [N, H, W, 3].
        boxes: [B, 4] top, left, height, width in pixels of the source (fractions of a pixel are allowed): finite,
            inside the image, height and width > 0. They are not checked, because on a GPU a check would wait for the
            device.
        flip: bool [B], flip horizontally.
        size: S.
        ids: int64 [B], the image of each box, in 0..N-1; None: box i belongs to image i (B = N). Ids outside the range
            raise on a CPU; on a GPU, the result is NaN for a floating-point dtype, and undefined for uint8.
        mean, std: per channel, for pixels scaled to 0..1; both or neither, and only for a floating-point `dtype`.
        dtype: uint8 (rounded), or bf16, fp16, fp32.
        impl: "triton", "torch" or None (choose). The kernel reads only the pixels it needs and does not copy
            images[ids].
        bicubic: the filter; False: bilinear. The kernel is bilinear only; the twin does both.

    Returns:
        [B, 3, S, S] in channels-last memory format; floating-point results are pixels / 255, normalised by mean and
        std if given.

    Raises:
        ValueError: invalid shapes, dtypes, devices or values; the message states what was expected and what was given.
    """
    _check(images, boxes, flip, size, ids, mean, std, dtype)
    if bicubic and impl == "triton":
        raise ValueError("impl: expected 'torch' or None for the bicubic filter, got 'triton'")
    triton = not bicubic and use_triton("crop_resize", impl, images.device)
    too_large = images.shape[1] * images.shape[2] * 3 >= 2**31
    if not triton or (too_large and impl is None):
        chosen = images if ids is None else images[ids]
        return reference.crop_resize(chosen, boxes, flip, size, mean, std, dtype, bicubic)
    if too_large:
        got = f"{images.shape[1]} x {images.shape[2]}"
        raise ValueError(f"images: expected less than 2^31 bytes each for 'triton', got {got} pixels; leave impl out")
    return crop_resize_op(images, boxes, flip, size, ids, mean, std, dtype)


def crop_comparison(shape: tuple[int, ...], size: int, device: torch.device) -> Comparison:
    """Crops of random boxes to `size` pixels, one from each of uint8 images [B, H, W, 3] of this shape."""
    batch, height, width, _ = shape

    def inputs() -> tuple[Tensor, ...]:
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        whole = torch.tensor([height, width], device=device)
        sides = (whole * (0.3 + 0.7 * torch.rand(batch, 2, device=device))).ceil()
        corners = ((whole - sides) * torch.rand(batch, 2, device=device)).floor()
        boxes = torch.cat([corners, sides], dim=1)
        return images, boxes, torch.rand(batch, device=device) < 0.5, torch.arange(batch, device=device)

    def crop(impl: str, images: Tensor, boxes: Tensor, flip: Tensor, ids: Tensor) -> Tensor:
        return crop_resize(images, boxes, flip, size, ids, impl=impl)

    candidates = {impl: partial(crop, impl) for impl in ("triton", "torch")}
    text = f"{'x'.join(map(str, shape))} uint8, size {size}"
    return Comparison("crop_resize", text, inputs, candidates, elements=math.prod(shape))


def _check(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int,
    ids: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8 [N, H, W, 3], got {images.dtype} {tuple(images.shape)}")
    if ids is not None and (ids.ndim != 1 or ids.dtype != torch.int64):
        raise ValueError(f"ids: expected int64 [B], got {ids.dtype} {tuple(ids.shape)}")
    batch = len(images) if ids is None else len(ids)
    if boxes.shape != (batch, 4):
        raise ValueError(f"boxes: expected [{batch}, 4], got {tuple(boxes.shape)}")
    if flip.shape != (batch,) or flip.dtype != torch.bool:
        raise ValueError(f"flip: expected bool [{batch}], got {flip.dtype} {tuple(flip.shape)}")
    devices = {t.device for t in (images, boxes, flip, ids) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {sorted(map(str, devices))}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype}")
    if (mean is None) != (std is None) or (mean is not None and not dtype.is_floating_point):
        raise ValueError(f"mean and std: expected both, with a floating dtype, got {mean}, {std}, {dtype}")
    if mean is not None and std is not None and not (len(mean) == len(std) == 3):
        raise ValueError(f"mean and std: expected three numbers each, got {mean}, {std}")
    if ids is not None and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ids[(ids < 0) | (ids >= len(images))]
        if len(wrong):
            raise ValueError(f"ids: expected numbers in 0..{len(images) - 1}, got {wrong[0]}")


# --- The kernel as a PyTorch operator; on a CPU, it runs the twin -----------------------------------------------------


@torch.library.custom_op("fastofa::crop_resize", mutates_args=(), device_types="cuda")
def crop_resize_op(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int,
    ids: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, 3, S, S], channels-last."""
    from fastofa.kernels import triton_crop_resize

    with torch.cuda.device_of(images):
        return triton_crop_resize.crop_resize(images, boxes, flip, size, ids, mean, std, dtype)


@crop_resize_op.register_kernel("cpu")
def _(images: Tensor, boxes: Tensor, flip: Tensor, size: int, ids: Tensor | None, *arguments: Any) -> Tensor:
    if interpreted():
        from fastofa.kernels import triton_crop_resize

        return triton_crop_resize.crop_resize(images, boxes, flip, size, ids, *arguments)
    return reference.crop_resize(images if ids is None else images[ids], boxes, flip, size, *arguments)


@crop_resize_op.register_fake
def _(images: Tensor, boxes: Tensor, flip: Tensor, size: int, *arguments: Any) -> Tensor:
    dtype = arguments[3]
    return images.new_empty(len(boxes), size, size, 3, dtype=dtype).permute(0, 3, 1, 2)
