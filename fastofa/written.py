"""The forms that `fastofa write` gives a data set, opened and checked.

photos.pack/     images.npy uint8 [N, S, S, 3] and labels.npy int64 [N], first the training split, then the other;
                 dataset.json
photos.beton     the training split in FFCV's format; photos.val.beton the validation split; photos.beton.json

The .json is the index: of every picture its name, the original's height and width and a checksum, the class names and
the fingerprint of the source. So a data set is the same one in every form, and a cache made from one serves the others.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastofa.beton import read_layout
from fastofa.dataset import Dataset
from fastofa.errors import BadInput
from fastofa.files import map_file, write_atomic
from fastofa.progress import notice, track
from fastofa.threads import in_order

SCHEMA = 1
IMAGES, LABELS = "images.npy", "labels.npy"
NAMED = 5  # how many damaged pictures an error names; the others are listed before it


def index_path(path: Path) -> Path:
    return path / "dataset.json" if path.suffix == ".pack" else path.with_name(f"{path.name}.json")


def beton_path(path: Path, split: str) -> Path:
    """The file of one split; `path` is the training split's."""
    return path if split == "train" else path.with_suffix(f".{split}.beton")


def write_index(path: Path, index: dict[str, Any]) -> None:
    """JSON, whose last entry is the sha256 of what stands before it."""
    body = json.dumps({"schema": SCHEMA, **index})[:-1].encode()
    write_atomic(path, body + _seal(body))


def read_index(path: Path) -> dict[str, Any]:
    """Of a .pack or .beton. Raises BadInput if it is missing, damaged or of another version."""
    if not path.exists():
        raise BadInput(f"{path} does not exist; `fastofa write DATA {path}` makes it")
    found = index_path(path)
    if not found.exists():
        training = path.with_name(path.name.replace(".val.beton", ".beton"))
        if training != path and index_path(training).exists():
            raise BadInput(f"{path}: expected {training} as --data, whose validation part this is")
        raise BadInput(
            f"{path}: expected {found} with it, as `fastofa write` makes them; move all its files or write it again"
        )
    try:
        text = found.read_bytes()
    except OSError as error:
        raise BadInput(f"could not read {found}: {error.strerror}") from None
    body = text[: -len(_seal(b""))]
    if text != body + _seal(body):
        raise BadInput(f"{found}: its checksum does not match, it was edited or damaged; write {path} again")
    index = json.loads(text)
    if index["schema"] != SCHEMA:
        raise BadInput(f"{found}: expected schema {SCHEMA}, got {index['schema']}; write {path} again by this version")
    return index


def _seal(body: bytes) -> bytes:
    return f', "sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def open_written(path: Path, split: str) -> Dataset:
    """See `fastofa.dataset.open_dataset`. Raises BadInput: missing, damaged, or without this split."""
    index = read_index(path)
    if split not in index["splits"]:
        raise BadInput(f"{path}: expected the split {split}, it holds {', '.join(index['splits'])} only")
    part = index["splits"][split]
    form = _open_pack if path.suffix == ".pack" else _open_beton
    dataset = Dataset(
        spec=str(path),
        split=split,
        classes=tuple(index["classes"]),
        names=part["names"],
        sizes=np.array(part["sizes"], dtype=np.int64).reshape(-1, 2),
        fingerprint=part["fingerprint"],
        index=index_path(path),
        **form(path, split, index),
    )
    if not len(dataset.names) == len(dataset.labels) == len(dataset.stored_sizes) or not (
        0 <= dataset.labels.min() <= dataset.labels.max() < len(dataset.classes)
    ):
        raise BadInput(f"{path}: its files are not of one writing, or damaged; remove them and write again")
    return dataset


def _open_pack(path: Path, split: str, index: dict[str, Any]) -> dict[str, Any]:
    for name in (IMAGES, LABELS):
        _check_size(path / name, index["files"][name]["bytes"])
    try:
        file = np.load(path / IMAGES, mmap_mode="r")
        pixels = np.frombuffer(map_file(path / IMAGES), file.dtype, file.size, file.offset).reshape(file.shape)
        labels = np.load(path / LABELS)
        if between(path / LABELS) != index["files"][LABELS]["crc32"]:
            raise ValueError("its checksum does not match")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {IMAGES} or {LABELS} is damaged ({error}); remove it and write it again") from None
    counts = {name: len(part["names"]) for name, part in index["splits"].items()}
    size = index["size"]
    if pixels.dtype != np.uint8 or pixels.shape != (sum(counts.values()), size, size, 3):
        raise BadInput(f"{path / IMAGES}: expected uint8 {[sum(counts.values()), size, size, 3]}; write {path} again")
    first = 0 if split == "train" else counts.get("train", 0)
    rows = slice(first, first + counts[split])
    return {
        "labels": labels[rows].astype(np.int64),
        "pixels": pixels[rows],
        "file": path / IMAGES,
        "stored": np.full((counts[split], 2), size, dtype=np.int64),
        "spans": _rows(file)[rows],
    }


def _open_beton(path: Path, split: str, index: dict[str, Any]) -> dict[str, Any]:
    file = beton_path(path, split)
    _check_size(file, index["files"][split]["bytes"])
    layout = read_layout(file)
    return {
        "labels": layout.labels, "file": file, "stored": layout.sizes, "spans": layout.spans, "raw": layout.raw,
    }  # fmt: skip


def _check_size(file: Path, expected: int) -> None:
    if not file.exists():
        raise BadInput(f"{file} is missing; remove what is left and write it again")
    if file.stat().st_size != expected:
        raise BadInput(
            f"{file}: expected {expected:,} bytes, got {file.stat().st_size:,}; remove it and write it again"
        )


def verify(path: Path, workers: int) -> None:
    """Compare every byte with the checksums and decode every picture.

    Raises:
        BadInput: naming the pictures and files that are damaged.
    """
    index = read_index(path)
    bad = []
    for name, file in index["files"].items():
        found = path / name if path.suffix == ".pack" else beton_path(path, name)
        _check_size(found, file["bytes"])
        if between(found) != file["crc32"]:
            bad.append(f"{found} (its header or table)")
    for split, part in index["splits"].items() if not bad else ():
        for name, reason in _damaged_pictures(open_written(path, split), part["crc32"], workers):
            bad.append(f"{split}/{name} ({reason})")
    if bad:
        for line in bad[NAMED:]:
            notice(f"damaged: {line}")
        more = f" and the {len(bad) - NAMED} above" if len(bad) > NAMED else ""
        raise BadInput(f"{path}: {len(bad)} damaged: {'; '.join(bad[:NAMED])}{more}; remove it and write it again")


def _damaged_pictures(dataset: Dataset, expected: list[int], workers: int) -> Iterator[tuple[str, str]]:
    def check(i: int) -> str | None:
        if zlib.crc32(dataset.stored_bytes(i)) != expected[i]:
            return "its checksum does not match"
        try:
            dataset.read(i)
        except BadInput as error:
            return str(error)
        return None

    assert dataset.spans is not None
    order = np.argsort(dataset.spans[:, 0]).tolist()  # as they lie there
    found = in_order(check, order, workers)
    for i, reason in zip(order, track(found, len(dataset), f"verifying {dataset.spec} {dataset.split}"), strict=True):
        if reason:
            yield dataset.names[i], reason


def between(path: Path) -> int:
    """crc32 of all bytes of a file that belong to no picture. Raises BadInput where it is not known which do."""
    spans, crc, done = _spans(path), 0, 0
    with open(path, "rb") as file:
        for at, count in [*spans[np.argsort(spans[:, 0])].tolist(), [path.stat().st_size, 0]]:
            if at > done:
                file.seek(done)
                crc = zlib.crc32(file.read(at - done), crc)
            done = at + count
    return crc


def _spans(path: Path) -> np.ndarray:
    """int64 [N, 2]: where the pictures of a file begin, and their bytes."""
    if path.suffix != ".npy":
        return read_layout(path).spans
    try:
        array = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); remove it and write it again") from None
    if array.ndim == 1:  # labels
        return np.zeros((0, 2), dtype=np.int64)
    return _rows(array)


def _rows(array: np.memmap) -> np.ndarray:
    """int64 [N, 2]: where in its file each row of an array begins, and its bytes."""
    each = array[0].nbytes
    return np.stack([array.offset + each * np.arange(len(array)), np.full(len(array), each)], axis=1)
