"""FFCV's file format (.beton, version 2), read and written without FFCV.

    header | what the fields are | a record a sample: image, label | pages with the pictures | where each picture lies

Two fields, as FFCV's own examples call them: `image` (RGBImageField) and `label` (IntField). Written here and not by
FFCV's writer, because that one waits for ever for a worker that failed, and compresses JPEGs a second time.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastofa.errors import BadInput

VERSION = 2
PAGE = 8 << 20  # bytes, or the next power of two that holds the largest picture; no picture lies across two pages
INT, RGB_IMAGE = 1, 2  # numbers of the field types
JPEG, RAW = 0, 1  # how a picture is stored
MOST_PIXELS = 65535  # of a side, which has 16 bits
MOST_BYTES = 1 << 31  # of a page, whose size has 32 bits

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("spans_at", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
SPAN = np.dtype([("sample", "<u8"), ("at", "<u8"), ("bytes", "<u8")])


class Picture(NamedTuple):
    """As it is stored."""

    data: bytes | memoryview
    """A JPEG, or pixels [H, W, 3]."""
    height: int
    width: int


class Layout(NamedTuple):
    """What a file says about its N samples."""

    labels: np.ndarray
    """int64 [N]."""
    sizes: np.ndarray
    """int64 [N, 2]: height and width as stored."""
    spans: np.ndarray
    """int64 [N, 2]: where each picture begins in the file, and its bytes."""
    raw: bool
    """Pixels; else JPEGs."""


def write_beton(
    path: Path, pictures: Iterable[Picture], order: np.ndarray, labels: np.ndarray, raw: bool, largest: int
) -> None:
    """A new file, flushed to the disk.

    Args:
        pictures: in the order in which they are to lie there, none of more than `largest` bytes.
        order: int64 [N], the sample of each.
        labels: int64 [N], by sample.
        raw: the pictures are pixels, not JPEGs.
    """
    page = max(PAGE, 1 << (largest - 1).bit_length())
    header = np.zeros(1, HEADER)
    fields = np.array([(RGB_IMAGE, b"image", b""), (INT, b"label", b"")], FIELD)
    records, spans = np.zeros(len(labels), RECORD), np.zeros(len(labels), SPAN)
    records["label"] = labels
    at = _whole(header.nbytes + fields.nbytes + records.nbytes, page)
    with open(path, "wb") as file:
        for place, (sample, picture) in enumerate(zip(order, pictures, strict=True)):
            count = len(picture.data)
            if at % page + count > page:
                at = _whole(at, page)
            records["image"][sample] = (RAW if raw else JPEG, picture.width, picture.height, at)
            spans[place] = (sample, at, count)
            file.seek(at)
            file.write(picture.data)
            at += count
        header[0] = (VERSION, len(fields), page, len(labels), _whole(at, page))
        file.seek(_whole(at, page))
        file.write(spans.tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + records.tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_layout(path: Path) -> Layout:
    """Raises BadInput: no such file, or one that is not of this format and these two fields."""
    try:
        header = np.fromfile(path, HEADER, 1)[0]
        fields = np.fromfile(path, FIELD, header["fields"], offset=HEADER.itemsize)
        kinds = {field["name"].decode(): int(field["type"]) for field in fields}
        if header["version"] != VERSION or kinds != {"image": RGB_IMAGE, "label": INT}:
            raise ValueError("its fields are others")
        samples = int(header["samples"])
        records = np.fromfile(path, RECORD, samples, offset=HEADER.itemsize + fields.nbytes)
        spans = np.fromfile(path, SPAN, samples, offset=int(header["spans_at"]))
        spans = spans[np.argsort(spans["sample"], kind="stable")]
        if not len(records) == len(spans) == samples or (records["image"]["at"] != spans["at"]).any():
            raise ValueError("it is cut short")
        begin, count = spans["at"], spans["bytes"]
        if (begin > header["spans_at"]).any() or (count > header["spans_at"] - begin).any():
            raise ValueError("pictures lie outside of it")
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror}") from None
    except (ValueError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path}: expected FFCV's format, version {VERSION}, with the fields image and label, got another file "
            f"({error}); write it again by `fastofa write`"
        ) from None
    image = records["image"]
    return Layout(
        labels=records["label"].astype(np.int64),
        sizes=np.stack([image["height"], image["width"]], axis=1).astype(np.int64),
        spans=np.stack([spans["at"], spans["bytes"]], axis=1).astype(np.int64),
        raw=bool((image["mode"] == RAW).all()),
    )


def _whole(at: int, page: int) -> int:
    """The next place where a page begins."""
    return -(-at // page) * page
