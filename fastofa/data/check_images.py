"""Many image files are looked at: their sizes, by the header or by decoding, and why some cannot be read."""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from fastofa.data.decode import read_file, read_image
from fastofa.data.headers import FIRST, Limits, Short, check_pixels, read_header
from fastofa.system.errors import BadInput
from fastofa.system.progress import track

ORIENTATION = 0x0112  # EXIF tag; 1 to 4 leave the sides as they are, 5 to 8 turn the image by a quarter


def header_size(path: Path, limits: Limits) -> tuple[int, int] | str:
    """(height, width) of what `read_image` gives, or why it cannot be read; from the header where that settles it."""
    try:
        data = read_file(path, FIRST)
        try:
            header = read_header(data)
        except Short:
            data = read_file(path)
            header = read_header(data)
        check_pixels(header, limits)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    if header.may_turn and not _keeps_sides(data):
        return checked_size(path, limits)
    return header.height, header.width


def _keeps_sides(data: bytearray) -> bool:
    """Surely, that is; Pillow and torchvision find an orientation in different places."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ORIENTATION) in (1, 2, 3, 4)
    except Exception:  # Pillow raises many kinds for damaged files
        return False


def checked_size(path: Path, limits: Limits) -> tuple[int, int] | str:
    """The same by decoding the whole image; one that shows signs of damage cannot be read."""
    try:
        _, height, width = read_image(path, limits, strict=True).shape
    except BadInput as error:
        return str(error).removeprefix(f"unreadable image {path} (").rpartition("); ")[0]
    return height, width


def in_parallel(
    check: Callable[[Path, Limits], tuple[int, int] | str], paths: list[Path], limits: Limits, title: str
) -> list[tuple[int, int] | str]:
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        found = pool.map(lambda path: check(path, limits), paths, chunksize=16)
        return list(track(found, len(paths), title))
