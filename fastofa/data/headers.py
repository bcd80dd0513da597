"""The kind and size of an image file from its first bytes, and the limits within which images are accepted."""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastofa.system.errors import BadInput

PNG = b"\x89PNG\r\n\x1a\n"
EXIF = b"Exif\0"
FIRST = 64 << 10  # bytes that contain most headers
FOREIGN = {  # other kinds of files that are found with an image's suffix
    b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"8BPS": "a Photoshop file", b"%PDF": "a PDF",
    b"\0\0\x01\0": "an icon", b"\xff\x0a": "a JPEG XL", b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\xff\x4f\xff\x51": "a JPEG 2000", b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip file",
}  # fmt: skip
BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF"}  # in the ftyp box at the start of a file; HEIC has many


def kind_of(start: bytes | bytearray) -> str | None:
    """The kind of an image by its first 12 bytes: JPEG, PNG, WebP or GIF; None for others."""
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(PNG):
        return "PNG"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WebP"
    return "GIF" if start.startswith((b"GIF87a", b"GIF89a")) else None


class Header(NamedTuple):
    kind: str
    """JPEG, PNG, WebP or GIF."""
    height: int
    """Pixels as stored, before EXIF orientation is applied."""
    width: int
    may_turn: bool
    """The file has EXIF data, whose orientation may swap height and width."""


@dataclass(frozen=True)
class Limits:
    """The limits within which images are accepted."""

    max_pixels: int = 200_000_000
    """Height times width by the header, so that a small file cannot exhaust the memory."""
    allow_warnings: bool = False
    """When all images are checked, also accept those with a decoder warning or signs of damage."""

    def union(self, other: "Limits") -> "Limits":
        """The limits that accept every image that one of the two accepts."""
        return Limits(max(self.max_pixels, other.max_pixels), self.allow_warnings or other.allow_warnings)


DEFAULT = Limits()
LARGER = "resize it, or give --max-pixels to precompute, write or train"


def parse_limits(millions: float, allow_warnings: bool) -> Limits:
    """The limits from the values of --max-pixels and --allow-warnings. Raises BadInput."""
    if not 0 < millions < 1e6:
        raise BadInput(f"max-pixels: expected millions of pixels, above 0 and below 1,000,000, got {millions}")
    return Limits(round(millions * 1e6), allow_warnings)


def check_pixels(header: "Header", limits: Limits) -> None:
    """Raises ValueError if an image has more pixels than the limit."""
    if header.height * header.width > limits.max_pixels:
        remedy = f"; {LARGER}" if limits.max_pixels >= DEFAULT.max_pixels else ""
        raise ValueError(
            f"its header claims {header.height:,} x {header.width:,}, more than {limits.max_pixels:,} pixels{remedy}"
        )


class Short(ValueError):
    """The bytes end before the size of the image."""


def read_header(data: bytes | bytearray | np.ndarray) -> Header:
    """Read the header from the bytes of a file; the first FIRST bytes usually suffice.

    Raises:
        Short: the bytes do not suffice.
        ValueError: the file is not a JPEG, PNG, WebP or GIF, or its header is damaged.
    """
    try:
        return _header(bytes(data[:FIRST]))
    except Short:
        if len(data) <= FIRST:
            raise
        return _header(bytes(data))


def _header(data: bytes) -> Header:
    try:
        match kind_of(data):
            case "JPEG":
                return _jpeg(data)
            case "PNG":
                return _png(data)
            case "WebP":
                return _webp(data)
            case "GIF":
                width, height = struct.unpack_from("<HH", data, 6)
                return Header("GIF", height, width, False)
    except (IndexError, struct.error):
        raise Short("truncated") from None
    if not data:
        raise ValueError("empty file")
    raise ValueError(f"it is {_foreign(data)}, expected a JPEG, PNG or WebP")


def _jpeg(data: bytes) -> Header:
    at, may_turn = 2, False
    while True:
        at = data.find(b"\xff", at)
        while at >= 0 and data[at + 1] in (0x00, 0xFF):
            at = data.find(b"\xff", at + 1)
        if at < 0:
            raise Short("truncated")
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("JPEG", height, width, may_turn)
        if marker in (0xD9, 0xDA):
            raise ValueError("its header contains no size")
        if marker == 0xE1 and data[at + 4 : at + 9] == EXIF:
            may_turn = True
        alone = 0xD0 <= marker <= 0xD8 or marker == 0x01
        at += 2 if alone else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    at, name, may_turn = 8, b"", False
    while name not in (b"IDAT", b"IEND"):
        count, name = struct.unpack_from(">I4s", data, at)
        may_turn |= name == b"eXIf"
        at += count + 12
    return Header("PNG", height, width, may_turn)


def _webp(start: bytes) -> Header:
    if len(start) < 30:
        raise Short("truncated")
    kind = start[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(start[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", start, 21)[0]
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", start, 26))
    else:
        raise ValueError("truncated or damaged")
    return Header("WebP", height, width, False)  # torchvision does not apply a WebP's EXIF orientation


def _foreign(start: bytes) -> str:
    if start[4:8] == b"ftyp":
        return BRANDS.get(start[8:12], "a HEIC or video")
    if start[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    return next((name for begin, name in FOREIGN.items() if start.startswith(begin)), "no image")
