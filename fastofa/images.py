"""One picture at a time on the CPU: read it, crop and resize it."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from fastofa.errors import BadInput

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")


def read_image(path: Path) -> Tensor:
    """uint8 [3, H, W]: grey, palette, RGBA, CMYK and 16-bit pictures become RGB, EXIF orientation is applied.

    Raises:
        BadInput: naming the file that is missing, truncated, animated or no picture.
    """
    return _decode(str(path), str(path))


def decode(data: bytearray | np.ndarray, name: str) -> Tensor:
    """The same from the bytes of a file."""
    return _decode(torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8), name)


def _decode(source: str | Tensor, name: str) -> Tensor:
    try:
        image = decode_image(source, ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise BadInput(
            f"unreadable image {name} ({reason}); mend or remove it, or run `fastofa precompute` or `fastofa write` "
            "with --skip-corrupt, which lists such files and leaves them out"
        ) from None
    if image.ndim != 3:
        raise BadInput(f"unreadable image {name} (animated, {len(image)} frames); keep one frame or use --skip-corrupt")
    return image if image.dtype == torch.uint8 else to_dtype(image, torch.uint8, scale=True)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] -> [3, height, width], antialiased bilinear, as crops are."""
    if list(image.shape[1:]) == [height, width]:
        return image
    return F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]


def crop_resize_one(image: Tensor, box: list[int], flip: bool, size: int) -> Tensor:
    """uint8 [3, H, W] -> [3, S, S] through torch's own antialiased uint8 kernel, the fastest on a CPU."""
    top, left, height, width = box
    crop = resize(image[:, top : top + height, left : left + width], size, size)
    return crop.flip(-1) if flip else crop
