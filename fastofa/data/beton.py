"""Read and write FFCV's file format (.beton, version 2) without FFCV.

    header | field descriptions | one record per sample: image, label | pages of images | allocation table

Two fields are written, named as in FFCV's own examples: `image` (RGBImageField) and `label` (IntField). FFCV's own
writer is not used because it waits forever for a worker that failed and compresses JPEGs a second time. Its files can
be read, even if they have further fields.
"""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastofa.system.errors import BadInput

VERSION = 2
PAGE = 8 << 20  # bytes, or the next power of two that holds the largest image; no image crosses a page boundary
INT, RGB_IMAGE = 1, 2  # field types
MARK = b"written by fastofa"  # stored as the label field's arguments, which FFCV ignores
JPEG, RAW = 0, 1  # image modes
MAX_SIDE = 65535  # pixels; the format stores sides in 16 bits
MAX_BYTES = 1 << 31  # of a page; the format stores the page size in 32 bits

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("spans_at", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
OTHER = np.dtype([("at", "<u8"), ("bytes", "<u8")])
IN_RECORD = {0: "<f8", INT: "<i8", RGB_IMAGE: IMAGE, 3: OTHER, 4: "<u8", 5: OTHER, 6: "<u8"}  # by field type
SPAN = np.dtype([("sample", "<u8"), ("at", "<u8"), ("bytes", "<u8")])


class StoredImage(NamedTuple):
    """One image as a file stores it."""

    data: bytes | memoryview
    """A JPEG, or uint8 pixels [H, W, 3]."""
    height: int
    width: int


class Layout(NamedTuple):
    """The contents of a file's header and tables, for N samples."""

    labels: np.ndarray
    """int64 [N]."""
    sizes: np.ndarray
    """int64 [N, 2]: height and width as stored."""
    spans: np.ndarray
    """int64 [N, 2]: byte offset of each image in the file, and its length in bytes."""
    is_raw: np.ndarray
    """bool [N]: the image is stored as pixels, not as a JPEG."""
    by_fastofa: bool
    """The file was written by fastofa, not by FFCV."""
    image_bytes: tuple[int, int]
    """Start and end of the images' byte range, which lies between the records and the allocation table."""
    crc32: int
    """Checksum of the header, the records and the allocation table."""


def write_beton(
    path: Path, images: Iterable[StoredImage], order: np.ndarray, labels: np.ndarray, raw: bool, largest: int
) -> None:
    """Write a new file and flush it to the disk.

    Args:
        path: file to write.
        images: N images in the order in which the file stores them.
        order: int64 [N]: the sample id of each of `images`.
        labels: int64 [N]: labels in the order of sample ids.
        raw: the images are pixels, not JPEGs.
        largest: an upper bound for the length of an image in bytes.
    """
    page = max(PAGE, 1 << (largest - 1).bit_length())
    header = np.zeros(1, HEADER)
    fields = np.array([(RGB_IMAGE, b"image", b""), (INT, b"label", MARK)], FIELD)
    records, spans = np.zeros(len(labels), RECORD), np.zeros(len(labels), SPAN)
    records["label"] = labels
    at = _round_up(header.nbytes + fields.nbytes + records.nbytes, page)
    with open(path, "wb") as file:
        for place, (sample, image) in enumerate(zip(order, images, strict=True)):
            count = len(image.data)
            if at % page + count > page:
                at = _round_up(at, page)
            records["image"][sample] = (RAW if raw else JPEG, image.width, image.height, at)
            spans[place] = (sample, at, count)
            file.seek(at)
            file.write(image.data)
            at += count
        header[0] = (VERSION, len(fields), page, len(labels), _round_up(at, page))
        file.seek(_round_up(at, page))
        file.write(spans.tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + records.tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_layout(path: Path) -> Layout:
    """Read the header and the tables of a file.

    Raises:
        BadInput: there is no such file, it is not in this format, or it lacks one image and one label per sample.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return _layout(file)
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror or error}") from None
    except (ValueError, OverflowError) as error:
        raise BadInput(
            f"{path}: expected an FFCV file, version {VERSION}, with one image and one label per sample, but {error}; "
            "write it again, or give --data the images from which it was written"
        ) from None


def _layout(file: BinaryIO) -> Layout:
    """Parse a file. Never reads more than the file holds, whatever its header claims. Raises ValueError."""
    size = os.fstat(file.fileno()).st_size
    crc = 0

    def read(kind: np.dtype, count: int, at: int) -> np.ndarray:
        nonlocal crc
        if at + count * kind.itemsize > size:
            raise ValueError("it is truncated or in another format")
        file.seek(at)
        data = file.read(count * kind.itemsize)
        crc = zlib.crc32(data, crc)
        return np.frombuffer(data, kind)

    header = read(HEADER, 1, 0)[0]
    if header["version"] != VERSION:
        raise ValueError("it is in another format")
    fields = read(FIELD, int(header["fields"]), HEADER.itemsize)
    image_field, label_field = _fields(fields)
    record = np.dtype([(f"{i}", IN_RECORD[kind]) for i, kind in enumerate(fields["type"].tolist())], align=True)
    samples, spans_at = int(header["samples"]), int(header["spans_at"])
    records = read(record, samples, HEADER.itemsize + fields.nbytes)
    if not samples:
        raise ValueError("it contains no sample")
    image, labels = records[image_field], records[label_field].astype(np.int64)
    places = (size - spans_at) // SPAN.itemsize
    if not samples <= places <= samples * len(fields):
        raise ValueError("its allocation table is damaged")
    spans = read(SPAN, places, spans_at)
    spans = spans[np.argsort(spans["at"], kind="stable")]  # it also lists the data of other fields
    place = np.minimum(np.searchsorted(spans["at"], image["at"]), places - 1)
    if (spans["at"][place] != image["at"]).any():
        raise ValueError("it is damaged: its tables contradict each other")
    begin, count = image["at"], spans["bytes"][place]
    height, width, is_raw = image["height"].astype(np.int64), image["width"].astype(np.int64), image["mode"] == RAW
    if (begin > spans_at).any() or (count > spans_at - begin).any():
        raise ValueError("it is damaged: images extend beyond its end")
    if (
        (image["mode"] > RAW).any()
        or not (height * width).all()
        or (count[is_raw] != (height * width * 3)[is_raw]).any()
    ):
        raise ValueError("it is damaged: the sizes of its images do not match their bytes")
    return Layout(
        labels=labels,
        sizes=np.stack([height, width], axis=1),
        spans=np.stack([begin, count], axis=1).astype(np.int64),
        is_raw=is_raw,
        by_fastofa=fields["arguments"][-1].tobytes().startswith(MARK),
        image_bytes=(HEADER.itemsize + fields.nbytes + records.nbytes, spans_at),
        crc32=crc,
    )


def find_nonzero_gap(path: Path) -> int | None:
    """The offset of the first gap before, between or after the images that is not all zero; None if all gaps are.

    fastofa fills gaps with zeros, so other bytes in a file of its own are damage.
    """
    layout = read_layout(path)
    spans = layout.spans[np.argsort(layout.spans[:, 0])]
    begins = [layout.image_bytes[0], *spans.sum(axis=1).tolist()]
    ends = [*spans[:, 0].tolist(), layout.image_bytes[1]]
    with open(path, "rb") as file:
        for begin, end in zip(begins, ends, strict=True):
            if end > begin and os.pread(file.fileno(), end - begin, begin).strip(b"\0"):
                return begin
    return None


def _fields(fields: np.ndarray) -> tuple[str, str]:
    """The names of the image and label fields of a record. Raises ValueError, listing the fields of the file."""
    kinds = fields["type"].tolist()
    if not all(kind in IN_RECORD for kind in kinds):
        raise ValueError("it has fields of an unknown type")
    names = [name.decode(errors="replace") for name in fields["name"].tolist()]
    images = [i for i, kind in enumerate(kinds) if kind == RGB_IMAGE]
    labels = [i for i, kind in enumerate(kinds) if kind == INT]
    if len(images) > 1:
        images = [i for i in images if names[i] == "image"]
    if len(labels) > 1:
        labels = [i for i in labels if names[i] == "label"]
    if len(images) != 1 or len(labels) != 1:
        field_types = {INT: "IntField", RGB_IMAGE: "RGBImageField"}
        listed = ", ".join(
            f"{name} ({field_types.get(kind, 'another type')})" for name, kind in zip(names, kinds, strict=True)
        )
        raise ValueError(
            f"it has the fields {listed or 'none'}; it needs exactly one RGBImageField or one named image, and exactly "
            "one IntField or one named label"
        )
    return f"{images[0]}", f"{labels[0]}"


def _round_up(at: int, page: int) -> int:
    """The next offset at which a page begins."""
    return -(-at // page) * page
