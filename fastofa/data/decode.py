"""Read, crop and resize one image at a time on the CPU.

The header is read first, so that the kind and the size of an image are checked before it is decoded.
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
    "repair or remove it, or give `fastofa precompute`, `fastofa write` or `fastofa train` --skip-corrupt, which lists "
    "such files and skips them"
)


def read_image(path: Path, limits: Limits = DEFAULT, strict: bool = False) -> Tensor:
    """The image as uint8 [3, H, W], RGB.

    Grey, palette, RGBA, CMYK and 16-bit images are converted, and the EXIF orientation is applied.

    Args:
        path: image file.
        limits: the limits within which an image is accepted.
        strict: refuse an image that decodes, but with signs of damage; otherwise a notice names it once.

    Raises:
        BadInput: the file is missing, truncated, animated, too large or no image; the message names it.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise _unreadable(str(path), Reason.of(error)) from None
    return decode(data, str(path), limits, strict)


def decode(data: bytearray | np.ndarray, name: str, limits: Limits = DEFAULT, strict: bool = False) -> Tensor:
    """Same as `read_image`, from the bytes of a file; messages call it `name`."""
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
        if reason.startswith(("Internal error", "WebPDecode")):  # torchvision does not pass on libpng's or libwebp's
            reason = f"damaged {header.kind}"
        raise _unreadable(name, reason) from None
    if header.kind != "JPEG":  # libpng also warns about harmless things, such as colour profiles
        warning = ""
    if strict and not limits.allow_warnings and (reason := warning or damage(header.kind, data)):
        raise _unreadable(name, f"{reason}; --allow-warnings accepts it as decoded")
    if warning:
        _name_once(name, warning)
    return image if image.dtype == torch.uint8 else to_dtype(image, torch.uint8, scale=True)


def read_file(path: Path, count: int = -1) -> bytearray:
    """The first `count` bytes of a regular file, or all. Raises OSError, also for FIFOs, devices and the like."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # never blocks on a FIFO
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        return bytearray(file.read(count))


def check_still(data: bytearray | np.ndarray) -> None:
    """Raises ValueError for a GIF of several frames, which torchvision would decode into one array."""
    try:
        with Image.open(io.BytesIO(bytes(data))) as image:
            animated = getattr(image, "is_animated", False)
    except Exception as error:  # Pillow raises many types of exceptions for damaged files
        raise ValueError(str(error)) from None
    if animated:
        raise ValueError("an animated GIF, expected a single frame")


def _unreadable(name: str, reason: str) -> BadInput:
    return BadInput(f"unreadable image {name} ({reason}); {REMEDY}", reason)


_named = mmap.mmap(-1, 1 << 20)  # a byte per hash of a name, shared with forked processes


def _name_once(name: str, warning: str) -> None:
    place = zlib.crc32(name.encode(errors="replace")) % len(_named)
    if not _named[place]:
        _named[place] = 1
        notice(f"image {name}: {warning}; it may be damaged, but is used as decoded")


def resize(image: Tensor, height: int, width: int, bicubic: bool = False) -> Tensor:
    """uint8 [3, H, W] -> [3, height, width] by antialiased bilinear or bicubic interpolation, as for crops."""
    if list(image.shape[1:]) == [height, width]:
        return image
    mode = "bicubic" if bicubic else "bilinear"
    return F.interpolate(image[None], size=(height, width), mode=mode, antialias=True)[0]


def crop_resize_one(image: Tensor, box: list[int], flip: bool, size: int, bicubic: bool = False) -> Tensor:
    """Crop, resize and flip: uint8 [3, H, W] -> [3, S, S] with S = `size`.

    `box` is top, left, height, width in pixels. Uses torch's antialiased uint8 kernel, the fastest on a CPU, with a
    bilinear or a bicubic filter.
    """
    top, left, height, width = box
    crop = resize(image[:, top : top + height, left : left + width], size, size, bicubic)
    return crop.flip(-1) if flip else crop
