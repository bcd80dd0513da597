"""Crop, antialiased resize, flip and normalise: checks the arguments, then runs an implementation.

Shapes: N images in the source, B crops, S side of the output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastofa.kernels import reference

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
) -> Tensor:
    """Crops of a batch (or of a resident data set, by sample id), resized to S x S by antialiased bilinear filtering.

    Equals torchvision's `resized_crop(antialias=True)` and `horizontal_flip` up to their 8-bit rounding.

    Args:
        images: uint8 [N, H, W, 3].
        boxes: [B, 4] top, left, height, width in pixels of the source (fractions of a pixel are allowed).
        flip: bool [B], mirror left to right.
        size: S.
        ids: int64 [B], which image each box belongs to; None: box i belongs to image i (B = N).
        mean, std: per channel, for pixels scaled to 0..1; both or neither, and only for a floating `dtype`.
        dtype: uint8 (rounded), or bf16, fp16, fp32.
        impl: "torch" or None (choose).

    Returns:
        [B, 3, S, S] in channels-last memory format; floating results are pixels / 255, normalised if asked.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, saying what was expected and what came.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8 [N, H, W, 3], got {images.dtype} {tuple(images.shape)}")
    batch = len(images) if ids is None else len(ids)
    if boxes.shape != (batch, 4):
        raise ValueError(f"boxes: expected [{batch}, 4], got {tuple(boxes.shape)}")
    if flip.shape != (batch,) or flip.dtype != torch.bool:
        raise ValueError(f"flip: expected bool [{batch}], got {flip.dtype} {tuple(flip.shape)}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype}")
    if (mean is None) != (std is None) or (mean is not None and not dtype.is_floating_point):
        raise ValueError(f"mean and std: expected both, with a floating dtype, got {mean}, {std}, {dtype}")
    if impl not in (None, "torch"):
        raise ValueError(f"impl: expected None or 'torch', got {impl!r}")
    return reference.crop_resize(images if ids is None else images[ids], boxes, flip, size, mean, std, dtype)
