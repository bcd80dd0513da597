"""Sizes of many image files, read from headers or by decoding, and the reasons why some are unreadable."""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from fastofa.data.decode import read_file, read_image
from fastofa.data.headers import FIRST, Limits, Short, check_pixels, read_header
from fastofa.system.errors import BadInput, Reason
from fastofa.system.progress import track

ORIENTATION = 0x0112  # EXIF tag; 1 to 4 keep height and width, 5 to 8 swap them


def header_size(path: Path, limits: Limits) -> tuple[int, int] | str:
    """(height, width) of the image that `read_image` returns, or the reason why it is unreadable.

    Reads the header only, unless the EXIF orientation may swap the sides.
    """
    try:
        data = read_file(path, FIRST)
        try:
            header = read_header(data)
        except Short:
            data = read_file(path)
            header = read_header(data)
        check_pixels(header, limits)
    except (OSError, ValueError) as error:
        return Reason.of(error)
    if header.may_turn and not _keeps_sides(data):
        return checked_size(path, limits)
    return header.height, header.width


def _keeps_sides(data: bytearray) -> bool:
    """Whether the EXIF orientation certainly keeps height and width.

    Pillow and torchvision look for it in different places.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ORIENTATION) in (1, 2, 3, 4)
    except Exception:  # Pillow raises many kinds for damaged files
        return False


def checked_size(path: Path, limits: Limits) -> tuple[int, int] | str:
    """Same as `header_size`, but decodes the whole image; one with signs of damage is unreadable."""
    try:
        _, height, width = read_image(path, limits, strict=True).shape
    except BadInput as error:
        return error.reason
    return height, width


def in_parallel(
    check: Callable[[Path, Limits], tuple[int, int] | str], paths: list[Path], limits: Limits, title: str
) -> list[tuple[int, int] | str]:
    """The result of `check` for each path, in order, with a progress bar called `title`."""
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        sizes = pool.map(lambda path: check(path, limits), paths, chunksize=16)
        return list(track(sizes, len(paths), title))
