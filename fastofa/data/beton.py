"""FFCV's file format (.beton, version 2), read and written without FFCV.

    header | what the fields are | a record a sample: image, label | pages with the pictures | where each picture lies

Two fields are written, as FFCV's own examples call them: `image` (RGBImageField) and `label` (IntField). Written here
and not by FFCV's writer, because that one waits for ever for a worker that failed, and compresses JPEGs a second time.
Files that it wrote are read, also with other fields beside these.
"""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastofa.system.errors import BadInput

VERSION = 2
PAGE = 8 << 20  # bytes, or the next power of two that holds the largest picture; no picture lies across two pages
INT, RGB_IMAGE = 1, 2  # numbers of the field types
OURS = b"written by fastofa"  # the label's arguments, of which FFCV takes no notice
JPEG, RAW = 0, 1  # how a picture is stored
MOST_PIXELS = 65535  # of a side, which has 16 bits
MOST_BYTES = 1 << 31  # of a page, whose size has 32 bits

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("spans_at", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
OTHER = np.dtype([("at", "<u8"), ("bytes", "<u8")])
IN_RECORD = {0: "<f8", INT: "<i8", RGB_IMAGE: IMAGE, 3: OTHER, 4: "<u8", 5: OTHER, 6: "<u8"}  # by type of field
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
    """int64 [N, 2]: where each image begins in the file, and its bytes."""
    is_raw: np.ndarray
    """bool [N]: pixels; else a JPEG."""
    ours: bool
    """fastofa wrote it."""
    room: tuple[int, int]
    """Where the images may lie: between the records and the table of places."""
    crc32: int
    """Of the header, the records and the table of places."""


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
    fields = np.array([(RGB_IMAGE, b"image", b""), (INT, b"label", OURS)], FIELD)
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
    """Raises BadInput: no such file, or one that is not of this format and has not one image and one label a sample."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return _layout(file)
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror or error}") from None
    except (ValueError, OverflowError) as error:
        raise BadInput(
            f"{path}: expected a file of FFCV, version {VERSION}, with one image and one label a sample, but {error}; "
            "make it again, or give --data the images that it was made from"
        ) from None


def _layout(file: BinaryIO) -> Layout:
    """Raises ValueError, saying what is wrong; whatever the file claims, no more is read than it holds."""
    size = os.fstat(file.fileno()).st_size
    crc = 0

    def read(kind: np.dtype, count: int, at: int) -> np.ndarray:
        nonlocal crc
        if at + count * kind.itemsize > size:
            raise ValueError("it is cut short, or is no such file")
        file.seek(at)
        data = file.read(count * kind.itemsize)
        crc = zlib.crc32(data, crc)
        return np.frombuffer(data, kind)

    header = read(HEADER, 1, 0)[0]
    if header["version"] != VERSION:
        raise ValueError("it is no such file")
    fields = read(FIELD, int(header["fields"]), HEADER.itemsize)
    image_field, label_field = _fields(fields)
    record = np.dtype([(f"{i}", IN_RECORD[kind]) for i, kind in enumerate(fields["type"].tolist())], align=True)
    samples, spans_at = int(header["samples"]), int(header["spans_at"])
    records = read(record, samples, HEADER.itemsize + fields.nbytes)
    if not samples:
        raise ValueError("it holds no sample")
    image, labels = records[image_field], records[label_field].astype(np.int64)
    places = (size - spans_at) // SPAN.itemsize
    if not samples <= places <= samples * len(fields):
        raise ValueError("its table of places is damaged")
    spans = read(SPAN, places, spans_at)
    spans = spans[np.argsort(spans["at"], kind="stable")]  # other fields have places there, too
    place = np.minimum(np.searchsorted(spans["at"], image["at"]), places - 1)
    if (spans["at"][place] != image["at"]).any():
        raise ValueError("its tables do not fit together, it is damaged")
    begin, count = image["at"], spans["bytes"][place]
    height, width, is_raw = image["height"].astype(np.int64), image["width"].astype(np.int64), image["mode"] == RAW
    if (begin > spans_at).any() or (count > spans_at - begin).any():
        raise ValueError("images lie outside of it, it is damaged")
    if (
        (image["mode"] > RAW).any()
        or not (height * width).all()
        or (count[is_raw] != (height * width * 3)[is_raw]).any()
    ):
        raise ValueError("the sizes of its images do not fit their bytes, it is damaged")
    return Layout(
        labels=labels,
        sizes=np.stack([height, width], axis=1),
        spans=np.stack([begin, count], axis=1).astype(np.int64),
        is_raw=is_raw,
        ours=fields["arguments"][-1].tobytes().startswith(OURS),
        room=(HEADER.itemsize + fields.nbytes + records.nbytes, spans_at),
        crc32=crc,
    )


def filled_gap(path: Path) -> int | None:
    """Where a file that fastofa wrote is not zero between two images, or before or behind all."""
    layout = read_layout(path)
    spans = layout.spans[np.argsort(layout.spans[:, 0])]
    begins, ends = [layout.room[0], *spans.sum(axis=1).tolist()], [*spans[:, 0].tolist(), layout.room[1]]
    with open(path, "rb") as file:
        for begin, end in zip(begins, ends, strict=True):
            if end > begin and os.pread(file.fileno(), end - begin, begin).strip(b"\0"):
                return begin
    return None


def _fields(fields: np.ndarray) -> tuple[str, str]:
    """Names in a record of the image and of the label. Raises ValueError, saying which are there."""
    kinds = fields["type"].tolist()
    if not all(kind in IN_RECORD for kind in kinds):
        raise ValueError("it has fields of an unknown kind")
    names = [name.decode(errors="replace") for name in fields["name"].tolist()]
    images = [i for i, kind in enumerate(kinds) if kind == RGB_IMAGE]
    labels = [i for i, kind in enumerate(kinds) if kind == INT]
    if len(images) > 1:
        images = [i for i in images if names[i] == "image"]
    if len(labels) > 1:
        labels = [i for i in labels if names[i] == "label"]
    if len(images) != 1 or len(labels) != 1:
        words = {INT: "IntField", RGB_IMAGE: "RGBImageField"}
        listed = ", ".join(
            f"{name} ({words.get(kind, 'another kind')})" for name, kind in zip(names, kinds, strict=True)
        )
        raise ValueError(
            f"it has the fields {listed or 'none'}: no single RGBImageField, or one called image, and no single "
            "IntField, or one called label"
        )
    return f"{images[0]}", f"{labels[0]}"


def _whole(at: int, page: int) -> int:
    """The next place where a page begins."""
    return -(-at // page) * page
