"""One image at a time on the CPU: read it, crop and resize it.

What a file claims to be, and how large, is known from its header before anything is decoded.
"""

import io
import mmap
import os
import stat
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from fastofa.data.decoder_messages import with_messages
from fastofa.data.headers import DEFAULT, Limits, check_pixels, read_header
from fastofa.data.integrity import damage
from fastofa.system.errors import BadInput, Reason
from fastofa.system.progress import notice

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
REMEDY = (
    "mend or remove it, or give `fastofa precompute`, `fastofa write` or `fastofa train` --skip-corrupt, which lists "
    "such files and leaves them out"
)


def read_image(path: Path, limits: Limits = DEFAULT, strict: bool = False) -> Tensor:
    """uint8 [3, H, W]: grey, palette, RGBA, CMYK and 16-bit images become RGB, EXIF orientation is applied.

    Args:
        strict: an image that decodes, but with signs of damage, is unreadable, too; else it is named once.

    Raises:
        BadInput: naming the file that is missing, truncated, animated, too large or no image.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise _unreadable(str(path), Reason.of(error)) from None
    return decode(data, str(path), limits, strict)


def decode(data: bytearray | np.ndarray, name: str, limits: Limits = DEFAULT, strict: bool = False) -> Tensor:
    """The same from the bytes of a file."""
    try:
        header = read_header(data)
        check_pixels(header, limits)
        if header.kind == "GIF":
            check_still(data)
        image, warning = with_messages(
            lambda: decode_image(
                torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True
            )
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        if reason.startswith(("Internal error", "WebPDecode")):  # all that libpng and libwebp give torchvision to say
            reason = f"damaged {header.kind}"
        raise _unreadable(name, reason) from None
    if header.kind != "JPEG":  # libpng warns of colour profiles and the like
        warning = ""
    if strict and not limits.allow_warnings and (reason := warning or damage(header.kind, data)):
        raise _unreadable(name, f"{reason}; --allow-warnings takes it as it decodes")
    if warning:
        _name_once(name, warning)
    return image if image.dtype == torch.uint8 else to_dtype(image, torch.uint8, scale=True)


def read_file(path: Path, most: int = -1) -> bytearray:
    """The bytes of a regular file, the first `most` or all. Raises OSError, also for what else bears a file's name."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a FIFO is not waited for
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        return bytearray(file.read(most))


def check_still(data: bytearray | np.ndarray) -> None:
    """Raises ValueError for a GIF of several frames, of which a decoder would make one array."""
    try:
        with Image.open(io.BytesIO(bytes(data))) as image:
            animated = getattr(image, "is_animated", False)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(str(error)) from None
    if animated:
        raise ValueError("an animated GIF; keep one frame")


def _unreadable(name: str, reason: str) -> BadInput:
    return BadInput(f"unreadable image {name} ({reason}); {REMEDY}", reason)


_named = mmap.mmap(-1, 1 << 20)  # a byte for each name's hash, shared with the processes that are forked from this one


def _name_once(name: str, warning: str) -> None:
    place = zlib.crc32(name.encode(errors="replace")) % len(_named)
    if not _named[place]:
        _named[place] = 1
        notice(f"image {name}: {warning}; it may be damaged, and is used as it decodes")


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
