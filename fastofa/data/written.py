"""Open and verify datasets that `fastofa write` wrote.

photos.pack/     images.npy uint8 [N, S, S, 3] and labels.npy int64 [N], the training split first, then the validation
                 split; dataset.safetensors
photos.beton     the training split in FFCV's format; photos.val.beton, the validation split; photos.beton.safetensors

The .safetensors is the index. It contains each image's name, original height and width and checksum, the class names
and the fingerprint of the source. A dataset thus has the same identity in every form, and a teacher cache made from
one form can be used with the others. Everything that is read on opening is compared with a checksum; images are
compared only by `verify`.

A file written by FFCV's own writer has no index; its samples and classes are named by numbers.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastofa.data.beton import find_nonzero_gap, read_layout
from fastofa.data.content import DIGEST, digest_of, sample
from fastofa.data.dataset import FFCV, Dataset, fingerprint_of
from fastofa.data.headers import LARGER, Limits
from fastofa.data.names import Names
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, map_file, save_tensors
from fastofa.system.progress import notice, track
from fastofa.system.threads import in_order

SCHEMA = 2
IMAGES, LABELS = "images.npy", "labels.npy"
MAX_NAMED = 5  # damaged images that an error names; notices before it name the others
MAX_CLASSES = 1_000_000  # in a file without class names


@dataclass
class Part:
    """The index's entries for the N samples of a split."""

    fingerprint: str
    names: Names
    sizes: np.ndarray
    """int64 [N, 2]: height and width of the original images in pixels."""
    crc32: np.ndarray
    """int64 [N]: checksum of each image as stored."""


@dataclass
class File:
    """The index's entry for a file."""

    bytes: int
    crc32: int
    """Checksum of all bytes outside the images."""


@dataclass
class Index:
    source: str
    """DATA of the command that wrote it."""
    classes: tuple[str, ...]
    size: int | None
    """Pack: height and width of the images in pixels; None for a .beton."""
    raw: bool
    """Beton: all images are stored as pixels, none as a JPEG."""
    splits: dict[str, Part]
    files: dict[str, File]
    """By file name for a pack, by split for a .beton."""


def index_path(path: Path) -> Path:
    return path / "dataset.safetensors" if path.suffix == ".pack" else path.with_name(f"{path.name}.safetensors")


def beton_path(path: Path, split: str) -> Path:
    """The file of one split; `path` is that of the training split."""
    return path if split == "train" else path.with_suffix(f".{split}{path.suffix}")


def files_of(path: Path) -> dict[Path, int]:
    """The files of a written dataset other than its index, each with its size in bytes. Raises BadInput as
    `read_index` does."""
    index = read_index(path)
    if path.suffix == ".pack":
        return {path / name: index.files[name].bytes for name in (IMAGES, LABELS)}
    return {beton_path(path, split): index.files[split].bytes for split in index.splits}


def is_foreign(path: Path) -> bool:
    """Whether FFCV's own writer wrote the file. Raises BadInput if it is in another format."""
    if path.suffix not in FFCV or os.path.lexists(index_path(path)) or not os.path.exists(path):
        return False
    return not read_layout(path).by_fastofa


def splits_of(path: Path) -> list[str]:
    """The splits of a written dataset. Raises BadInput as `read_index` does."""
    if is_foreign(path):
        return ["train", "val"] if _foreign_val(path) else ["train"]
    return list(read_index(path).splits)


# --- The index --------------------------------------------------------------------------------------------------------


def write_index(path: Path, index: Index) -> None:
    info = {
        "schema": SCHEMA, "source": index.source, "classes": index.classes, "size": index.size, "raw": index.raw,
        "splits": {split: part.fingerprint for split, part in index.splits.items()},
        "files": {name: astuple(file) for name, file in index.files.items()},
    }  # fmt: skip
    tensors = {}
    for split, part in index.splits.items():
        tensors[f"{split}.names"] = torch.tensor(np.frombuffer(part.names.text, dtype=np.uint8))
        tensors[f"{split}.sizes"] = torch.from_numpy(part.sizes.astype(np.int32))
        tensors[f"{split}.crc32"] = torch.from_numpy(part.crc32)
    save_tensors(path, tensors, info)


def read_index(path: Path) -> Index:
    """Read the index of a .pack or .beton. Raises BadInput if it is missing, damaged or of another version."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: expected a written dataset, found none; `fastofa write DATA {path}` writes it")
    file = index_path(path)
    if not os.path.exists(file):
        training = path.with_name(path.name.replace(".val.beton", ".beton"))
        if training != path and os.path.exists(index_path(training)):
            raise BadInput(f"{path}: expected the training split {training} as --data, got its validation split")
        raise BadInput(
            f"{path}: expected its index {file}, which `fastofa write` writes with it; move all its files together or "
            "write it again"
        )
    tensors, info = load_tensors(file)
    try:
        if info["schema"] != SCHEMA:
            raise BadInput(
                f"{file}: expected schema {SCHEMA}, got {info['schema']}; write {path} again with this version"
            )
        columns = {name: tensor.numpy() for name, tensor in tensors.items()}
        return Index(
            source=info["source"],
            classes=tuple(info["classes"]),
            size=info["size"],
            raw=info["raw"],
            splits={split: _part(columns, split, fingerprint) for split, fingerprint in info["splits"].items()},
            files={name: File(*file) for name, file in info["files"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadInput(f"{file}: expected an index that `fastofa write` wrote, got another file") from None


def _part(columns: dict[str, np.ndarray], split: str, fingerprint: str) -> Part:
    """Raises KeyError or ValueError for tensors that `write_index` does not write."""
    names, sizes = Names(columns[f"{split}.names"].tobytes()), columns[f"{split}.sizes"]
    crc32 = columns[f"{split}.crc32"]
    if sizes.shape != (len(names), 2) or crc32.shape != (len(names),) or (sizes < 1).any():
        raise ValueError
    return Part(fingerprint, names, sizes.astype(np.int64), crc32.astype(np.int64))


# --- Opening ----------------------------------------------------------------------------------------------------------


def open_written(path: Path, split: str, limits: Limits) -> Dataset:
    """See `fastofa.data.open.open_dataset`. Raises BadInput: missing, damaged, or without this split."""
    if is_foreign(path):
        return _open_foreign(path, split, limits)
    index = read_index(path)
    if split not in index.splits:
        raise BadInput(f"{path}: expected the split {split}, got only {', '.join(index.splits)}")
    part = index.splits[split]
    form = _open_pack if path.suffix == ".pack" else _open_beton
    dataset = Dataset(
        spec=str(path),
        split=split,
        classes=index.classes,
        names=part.names,
        sizes=part.sizes,
        fingerprint=part.fingerprint,
        index=index_path(path),
        limits=limits,
        **form(path, split, index),
    )
    if not 0 < len(dataset.names) == len(dataset.labels) == len(dataset.stored_sizes) or not (
        0 <= dataset.labels.min() <= dataset.labels.max() < len(dataset.classes)
    ):
        raise BadInput(
            f"{path}: expected files written together, got some of another dataset; remove and write it again"
        )
    return dataset


def _open_pack(path: Path, split: str, index: Index) -> dict[str, Any]:
    for name in (IMAGES, LABELS):
        _check(path / name, index.files[name], _head(path, name, index))
    counts = {name: len(part.names) for name, part in index.splits.items()}
    first = 0 if split == "train" else counts.get("train", 0)
    in_split = slice(first, first + counts[split])
    spans = _pack_spans(path, index)
    size = index.size or 0
    pixels = np.frombuffer(map_file(path / IMAGES), np.uint8, offset=int(spans[0, 0]))
    # The checksum has confirmed the file, so its header need not be parsed: the last 8 N bytes are N int64.
    labels = np.frombuffer((path / LABELS).read_bytes()[-8 * len(spans) :], "<i8")
    return {
        "labels": labels[in_split].astype(np.int64),
        "pixels": pixels.reshape(-1, size, size, 3)[in_split],
        "file": path / IMAGES,
        "stored": np.full((counts[split], 2), size, dtype=np.int64),
        "spans": spans[in_split],
    }


def _pack_spans(path: Path, index: Index) -> np.ndarray:
    """int64 [N, 2]: byte offset and length of the images of both splits, which fill the end of the file."""
    size, count = index.size, sum(len(part.names) for part in index.splits.values())
    if not isinstance(size, int) or index.files[IMAGES].bytes < count * size * size * 3:
        raise BadInput(f"{index_path(path)}: expected an index that `fastofa write` wrote, got another file")
    each = size * size * 3
    begin = index.files[IMAGES].bytes - count * each
    return np.stack([begin + each * np.arange(count), np.full(count, each)], axis=1)


def _head(path: Path, name: str, index: Index) -> int:
    """The number of bytes at the start of a pack's file that precede the images."""
    return int(_pack_spans(path, index)[0, 0]) if name == IMAGES else index.files[name].bytes


def _open_beton(path: Path, split: str, index: Index) -> dict[str, Any]:
    file = beton_path(path, split)
    expected = index.files[split]
    _check_size(file, expected.bytes)
    layout = read_layout(file)
    if layout.crc32 != expected.crc32:
        raise BadInput(f"{file}: the checksum of its tables does not match, so it is damaged; write {path} again")
    return {
        "labels": layout.labels, "file": file, "stored": layout.sizes, "spans": layout.spans, "is_raw": layout.is_raw,
    }  # fmt: skip


def _check_size(file: Path, expected: int) -> None:
    if not os.path.exists(file):
        raise BadInput(f"{file}: expected this file, found none; remove the other files and write the dataset again")
    if file.stat().st_size != expected:
        raise BadInput(
            f"{file}: expected {expected:,} bytes, got {file.stat().st_size:,}; remove it and write it again"
        )


def _check(file: Path, expected: File, head: int) -> None:
    """Raises BadInput unless the size and the checksum of the first `head` bytes of a pack's file match the index."""
    _check_size(file, expected.bytes)
    if head_crc32(file, head) != expected.crc32:
        raise BadInput(f"{file}: its checksum does not match, so it is damaged; remove it and write it again")


def head_crc32(file: Path, count: int) -> int:
    """The checksum of the first `count` bytes of a file. Raises BadInput if it cannot be read."""
    try:
        with open(file, "rb") as handle:
            return zlib.crc32(handle.read(count))
    except OSError as error:
        raise BadInput(f"could not read {file}: {error.strerror}") from None


# --- Files of FFCV's own writer ---------------------------------------------------------------------------------------


def _open_foreign(path: Path, split: str, limits: Limits) -> Dataset:
    """Open a file of FFCV's own writer. Samples are sorted by label, then by their position in the file.

    The classes are the numbers up to the largest label of either split.
    """
    val = _foreign_val(path)
    if split == "val" and val is None:
        places = " or ".join(map(str, _val_names(path)))
        raise BadInput(f"{path}: expected its validation split next to it as {places}, found none")
    layouts = {name: read_layout(file) for name, file in (("train", path), ("val", val)) if file is not None}
    for name, layout in layouts.items():
        if layout.labels.min() < 0 or layout.labels.max() >= MAX_CLASSES:
            raise BadInput(
                f"{path}: expected labels from 0 to {MAX_CLASSES - 1:,}, got {layout.labels.min()} to "
                f"{layout.labels.max()} ({name}); write it again with such labels"
            )
    file, layout = (path if split == "train" else val), layouts[split]
    assert file is not None
    order = np.argsort(layout.labels, kind="stable")
    if (large := np.flatnonzero(layout.sizes.prod(axis=1) > limits.max_pixels)).size:
        height, width = layout.sizes[large[0]].tolist()
        raise BadInput(
            f"{file}: the header of sample {large[0]} claims {height:,} x {width:,}, more than {limits.max_pixels:,} "
            f"pixels; {LARGER}"
        )
    names, labels, spans = Names.of(f"{i:08d}" for i in order.tolist()), layout.labels[order], layout.spans[order]
    notice(f"{file}: written by FFCV; samples and classes are named by numbers")
    return Dataset(
        spec=str(path),
        split=split,
        classes=tuple(str(i) for i in range(max(int(one.labels.max()) for one in layouts.values()) + 1)),
        names=names,
        labels=labels,
        sizes=layout.sizes[order],
        fingerprint=fingerprint_of(names, spans[:, 1], labels, _content(file, spans)),
        file=file,
        stored=layout.sizes[order],
        spans=spans,
        is_raw=layout.is_raw[order],
        shuffled=False,
        limits=limits,
    )


def _val_names(path: Path) -> list[Path]:
    """The paths at which the validation split may be, next to the training split's file."""
    names = [beton_path(path, "val")]
    if "train" in path.name:
        names.append(path.with_name(path.name.replace("train", "val")))
    return names


def _foreign_val(path: Path) -> Path | None:
    return next((name for name in _val_names(path) if os.path.isfile(name)), None)


def _content(file: Path, spans: np.ndarray) -> np.ndarray:
    """uint8 [n, 16]: digests of a sample of the images."""
    sampled = spans[sample(len(spans))].tolist()
    digests = np.zeros((len(sampled), DIGEST), np.uint8)
    with open(file, "rb") as handle:
        for digest, (begin, count) in zip(digests, sampled, strict=True):
            digest[:] = np.frombuffer(digest_of(handle.fileno(), begin, count), np.uint8)
    return digests


# --- Verifying --------------------------------------------------------------------------------------------------------


def verify(path: Path, workers: int, decode: bool = True) -> None:
    """Compare every byte with the checksums, and decode every image unless `decode` is False.

    Raises:
        BadInput: some are damaged; the message names images and files.
    """
    index = read_index(path)
    datasets = {split: open_written(path, split, Limits(1 << 62)) for split in index.splits}
    bad = []
    for split, part in index.splits.items():
        for name, why in _damaged_images(datasets[split], part.crc32, workers, decode):
            bad.append(f"{split}/{name} ({why})")
        file = beton_path(path, split)
        if path.suffix != ".pack" and (offset := find_nonzero_gap(file)) is not None:
            bad.append(f"{file} (expected zeros between its images, got other bytes after byte {offset:,})")
    if bad:
        for line in bad[MAX_NAMED:]:
            notice(f"damaged: {line}")
        more = f" and the {len(bad) - MAX_NAMED} above" if len(bad) > MAX_NAMED else ""
        raise BadInput(f"{path}: {len(bad)} damaged: {'; '.join(bad[:MAX_NAMED])}{more}; remove it and write it again")


def _damaged_images(dataset: Dataset, expected: np.ndarray, workers: int, decode: bool) -> Iterator[tuple[str, str]]:
    def check(i: int) -> str | None:
        if zlib.crc32(dataset.stored_bytes(i)) != expected[i]:
            return "its checksum does not match"
        try:
            if decode:
                dataset.read(i)
        except BadInput as error:
            return str(error)
        return None

    assert dataset.spans is not None
    order = np.argsort(dataset.spans[:, 0]).tolist()  # in file order
    results = in_order(check, order, workers)
    for i, reason in zip(order, track(results, len(dataset), f"verifying {dataset.spec} {dataset.split}"), strict=True):
        if reason:
            yield dataset.names[i], reason
