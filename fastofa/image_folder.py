"""A folder of pictures: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.

Names, byte sizes and labels come from the folder each time; picture sizes need every file opened, so they are read once
and kept in a small index: DIR/.fastofa/SPLIT.safetensors, or below the user's cache folder where DIR is read-only.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastofa.dataset import Dataset, fingerprint_of
from fastofa.errors import BadInput
from fastofa.files import load_tensors, save_tensors
from fastofa.images import SUFFIXES, read_image
from fastofa.progress import notice, track

ORIENTATION = 0x0112  # EXIF tag; 1 to 4 leave the sides as they are, 5 to 8 turn the picture by a quarter
NOT_READ = (".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".heic", ".heif", ".avif", ".jxl")  # pictures, too
NAMED = 5  # how many unreadable files an error names


def open_image_folder(spec: str, split: str, skip_corrupt: bool = False) -> Dataset:
    """See `fastofa.dataset.open_dataset`."""
    root = Path(spec) / split
    classes, names, labels, byte_sizes = _list_files(Path(spec), root)
    index = _index_path(Path(spec), split)
    sizes, skipped, checked = _read_index(index, names, byte_sizes)

    unknown = [i for i in range(len(names)) if sizes[i, 0] == 0 and names[i] not in skipped]
    if skip_corrupt and not checked:
        unknown = list(range(len(names)))
    if unknown:
        check = _checked_size if skip_corrupt else _header_size
        results = _in_parallel(check, [root / names[i] for i in unknown], f"indexing {root}")
        bad = {names[i]: found for i, found in zip(unknown, results, strict=True) if isinstance(found, str)}
        if bad and not skip_corrupt:  # then all are decoded, to name every one at once
            rest = [name for name in names if name not in bad and name not in skipped]
            decoded = _in_parallel(_checked_size, [root / name for name in rest], f"decoding {root}")
            bad |= {name: found for name, found in zip(rest, decoded, strict=True) if isinstance(found, str)}
            bad = {name: bad[name] for name in names if name in bad}
            listed = "; ".join(f"{root / name} ({reason})" for name, reason in list(bad.items())[:NAMED])
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            if more:
                for name, reason in bad.items():
                    notice(f"unreadable: {root / name} ({reason})")
            raise BadInput(
                f"{len(bad)} unreadable images: {listed}{more}; mend or remove them, or run `fastofa precompute` or "
                "`fastofa write` with --skip-corrupt, which lists such files and leaves them out"
            )
        for i, found in zip(unknown, results, strict=True):
            if not isinstance(found, str):
                sizes[i] = found
        skipped = skipped | bad
        index = _write_index(
            _index_path(Path(spec), split, to_write=True), names, byte_sizes, sizes, skipped, checked or skip_corrupt
        )

    if skipped:
        notice(f"{root}: left out {len(skipped)} unreadable images: {', '.join(list(skipped)[:NAMED])}")
    keep = np.array([i for i in range(len(names)) if names[i] not in skipped], dtype=np.int64)
    if not len(keep):
        raise BadInput(f"{root}: expected images, but all {len(names)} files are unreadable")
    names = [names[i] for i in keep]
    return Dataset(
        spec=spec,
        split=split,
        classes=classes,
        names=names,
        labels=labels[keep],
        sizes=sizes[keep],
        fingerprint=fingerprint_of(names, byte_sizes[keep], labels[keep]),
        root=root,
        index=index,
        skipped=tuple(f"{name}: {reason}" for name, reason in skipped.items()),
    )


def _list_files(top: Path, root: Path) -> tuple[tuple[str, ...], list[str], np.ndarray, np.ndarray]:
    """Class names, and name, label and byte size of every picture, in sample order (class, then name)."""
    if not root.is_dir():
        raise BadInput(f"{top}: expected a folder with train/ and val/ and a folder per class in each, found no {root}")
    classes = _class_names(root)
    train = _class_names(top / "train") if (top / "train").is_dir() else classes
    if not set(classes) <= set(train):
        extra = sorted(set(classes) - set(train))[:NAMED]
        raise BadInput(f"{root}: expected the classes of {top / 'train'}, found others: {', '.join(extra)}")
    names, labels, byte_sizes, others = [], [], [], []
    for label, name in enumerate(train):
        found = []
        folders = [root / name] if name in classes else []
        while folders:
            for entry in os.scandir(folders.pop()):
                if entry.is_dir():
                    folders.append(Path(entry.path))
                elif entry.name.lower().endswith(SUFFIXES):
                    size = entry.stat().st_size if entry.is_file() else 0  # a link that leads nowhere
                    found.append((Path(entry.path).relative_to(root).as_posix(), size))
                elif entry.name.lower().endswith(NOT_READ) and not entry.name.startswith("."):
                    others.append(Path(entry.path).relative_to(root).as_posix())
        if name in classes and not found:
            raise BadInput(f"{root / name}: expected images ({', '.join(SUFFIXES)}), found none; add some or remove it")
        for file, size in sorted(found):
            names.append(file)
            labels.append(label)
            byte_sizes.append(size)
    if others:
        more = ", ..." if len(others) > NAMED else ""
        kinds, listed = ", ".join(SUFFIXES), ", ".join(sorted(others)[:NAMED])
        notice(f"{root}: left out {len(others)} of other kinds than {kinds}: {listed}{more}")
    if not names:
        raise BadInput(f"{root}: expected a folder per class with images ({', '.join(SUFFIXES)}), found no image")
    try:
        "\n".join(names).encode()
    except UnicodeEncodeError as error:
        name = names[error.object[: error.start].count("\n")]
        raise BadInput(f"{root}: expected names in UTF-8, got {name!r}; rename it") from None
    return tuple(train), names, np.array(labels, dtype=np.int64), np.array(byte_sizes, dtype=np.int64)


def _class_names(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _header_size(path: Path) -> tuple[int, int] | str:
    """(height, width) of what `read_image` gives, or why it cannot be read; from the header where that settles it.

    Pillow and torchvision find the orientation in different places (XMP, a second picture in the file), so whatever
    may be turned by a quarter, and whatever Pillow cannot open, is decoded.
    """
    try:
        with Image.open(path) as image:
            (width, height), orientation = image.size, image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds for damaged files
        return _checked_size(path)
    return (height, width) if orientation in (1, 2, 3, 4) else _checked_size(path)


def _checked_size(path: Path) -> tuple[int, int] | str:
    """The same by decoding the whole picture."""
    try:
        _, height, width = read_image(path).shape
    except BadInput as error:
        if path.exists() and path.stat().st_size == 0:
            return "empty file"
        return str(error).replace(str(path), "file").partition("(")[2].partition(")")[0]
    return height, width


def _in_parallel(
    check: Callable[[Path], tuple[int, int] | str], paths: list[Path], title: str
) -> list[tuple[int, int] | str]:
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        return list(track(pool.map(check, paths, chunksize=16), len(paths), title))


def _index_path(top: Path, split: str, to_write: bool = False) -> Path:
    beside = top / ".fastofa" / f"{split}.safetensors"
    if os.access(beside.parent if beside.parent.is_dir() else top, os.W_OK):
        return beside
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(str(top.resolve()).encode()).hexdigest()[:16]
    cached = home / "fastofa" / key / f"{split}.safetensors"
    return cached if to_write or cached.exists() or not beside.exists() else beside


def _read_index(path: Path, names: list[str], byte_sizes: np.ndarray) -> tuple[np.ndarray, dict[str, str], bool]:
    """Sizes [N, 2] (0 where unknown), unreadable files with reasons, and whether every file was decoded."""
    sizes = np.zeros((len(names), 2), dtype=np.int64)
    if not path.exists():
        return sizes, {}, False
    try:
        tensors, info = load_tensors(path)
    except BadInput as error:
        notice(f"{error}; reading the folder anew")
        return sizes, {}, False
    rows = {name: i for i, name in enumerate(info["names"])}
    known_bytes, known_sizes = tensors["byte_sizes"].numpy(), tensors["sizes"].numpy()
    same = [(i, rows[n]) for i, n in enumerate(names) if n in rows and known_bytes[rows[n]] == byte_sizes[i]]
    if same:
        here, there = np.array(same).T
        sizes[here] = known_sizes[there]
    unchanged = {names[i] for i, _ in same}
    skipped = {name: reason for name, reason in info["skipped"].items() if name in unchanged}
    return sizes, skipped, info["checked"] and len(same) == len(names)


def _write_index(
    path: Path, names: list[str], byte_sizes: np.ndarray, sizes: np.ndarray, skipped: dict[str, str], checked: bool
) -> Path:
    tensors = {"byte_sizes": torch.from_numpy(byte_sizes), "sizes": torch.from_numpy(sizes.astype(np.int32))}
    save_tensors(path, tensors, {"names": names, "skipped": skipped, "checked": checked})
    return path
