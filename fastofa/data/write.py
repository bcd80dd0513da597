"""Write both splits of a dataset as a .pack or .beton. Every image is decoded and checked; the writing is atomic."""

import io
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich import filesize
from torch import Tensor
from torchvision.io import encode_jpeg

from fastofa.data.beton import MAX_BYTES, MAX_SIDE, PAGE, StoredImage, read_layout, write_beton
from fastofa.data.dataset import FFCV, FORMS, Dataset
from fastofa.data.decode import resize
from fastofa.data.names import Names
from fastofa.data.open import open_dataset
from fastofa.data.quick_checks import check_written
from fastofa.data.write_config import WriteConfig
from fastofa.data.written import (
    IMAGES,
    LABELS,
    File,
    Index,
    Part,
    beton_path,
    head_crc32,
    index_path,
    open_written,
    read_index,
    splits_of,
    verify,
    write_index,
)
from fastofa.system.device import choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import new_folder, reason, remove_leftovers, temporary_name
from fastofa.system.locks import writing
from fastofa.system.progress import notice, track
from fastofa.system.threads import in_order

SIZE, QUALITY = 256, 95
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


def write(config: WriteConfig) -> None:
    """Run `fastofa write`: write the dataset, and verify it if `config.verify`.

    Raises:
        BadInput: unreadable images (notices name each), OUT exists, the disk is full, or verifying finds damage.
    """
    check_written(config)
    sources = _open_splits(config)
    if not os.path.lexists(config.out):
        if config.out.suffix == ".pack":
            write_pack(config, sources)
        else:
            _write_beton(config, sources)
    if config.verify:
        _check_form(config)
        verify(config.out, choose_workers(config.workers))
        _check_source(config, sources)


def _open_splits(config: WriteConfig) -> list[Dataset]:
    """Open the splits. Raises BadInput after reporting what is wrong with either of them."""
    sources, problems = [], []
    for split in _splits(config.data):
        try:
            sources.append(open_dataset(config.data, split, config.skip_corrupt, limits=config.limits()))
        except BadInput as error:
            problems.append(str(error))
    if problems:
        for problem in set(problems[:-1]) - {problems[-1]}:
            notice(problem)
        raise BadInput(problems[-1])
    return sources


def _splits(data: str) -> list[Literal["train", "val"]]:
    """Both splits, or only "train" if the dataset has no validation split."""
    both: list[Literal["train", "val"]] = ["train", "val"]
    if Path(data).suffix in FORMS + FFCV and os.path.exists(data):
        written = splits_of(Path(data))
        return [split for split in both if split in written]
    folders = [split for split in both if os.path.isdir(os.path.join(data, split))]
    return folders if "train" in folders else both


def _check_form(config: WriteConfig) -> None:
    """Raises BadInput if the existing file has another image size or storage than the flags specify."""
    index = read_index(config.out)
    if config.size not in (None, index.size):
        raise BadInput(f"{config.out}: expected images of {config.size} pixels because of --size, got {index.size}")
    if config.raw and not index.raw:
        raise BadInput(f"{config.out}: expected pixels because of --raw, got JPEGs")


def _check_source(config: WriteConfig, sources: list[Dataset]) -> None:
    for source in sources:
        if open_written(config.out, source.split, source.limits).fingerprint != source.fingerprint:
            raise BadInput(
                f"{config.out}: expected the present images of {config.data}, got intact but different ones "
                f"({source.split}); write it again to another path"
            )


def write_pack(config: WriteConfig, sources: list[Dataset]) -> None:
    """Write the splits as the pack `config.out`, which appears when it is complete.

    Raises:
        BadInput: unreadable images (notices name each), OUT exists, or the disk has too little space.
    """
    size, total = config.size or SIZE, sum(map(len, sources))
    _check_space(config.out, total * size * size * 3)
    with new_folder(config.out) as folder:
        index = _index(config, sources, size)
        with open(folder / IMAGES, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for source in sources:
                for image in _images(config, source, index, np.arange(len(source))):
                    file.write(image.data)
        np.save(folder / LABELS, np.concatenate([source.labels for source in sources]))
        for name in (IMAGES, LABELS):
            count = (folder / name).stat().st_size
            head = count - (total * size * size * 3 if name == IMAGES else 0)
            index.files[name] = File(count, head_crc32(folder / name, head))
        write_index(folder / index_path(config.out).name, index)


def _write_beton(config: WriteConfig, sources: list[Dataset]) -> None:
    with writing(config.out):
        _fill_beton(config, sources)


def _fill_beton(config: WriteConfig, sources: list[Dataset]) -> None:
    if config.out.exists():  # another process wrote it meanwhile
        raise BadInput(f"{config.out}: already exists; choose another path or remove it")
    index = _index(config, sources, None)
    files: dict[Path, Path] = {}  # temporary names by final names
    try:
        for source in sources:
            largest = _largest(config, source)
            final = beton_path(config.out, source.split)
            remove_leftovers(final, locked=True)
            files[final] = temporary = temporary_name(final)
            order = _shuffled(len(source)) if source.split == "train" else np.arange(len(source))
            images = _images(config, source, index, order)
            write_beton(temporary, images, order, source.labels, config.raw, largest)
            index.files[source.split] = File(temporary.stat().st_size, read_layout(temporary).crc32)
        write_index(index_path(config.out), index)
        for final in sorted(files, key=lambda path: path == config.out):  # OUT is renamed last
            os.replace(files[final], final)
    except OSError as error:
        raise BadInput(f"could not write {config.out}: {reason(error)}") from None
    finally:
        for temporary in files.values():
            temporary.unlink(missing_ok=True)


def _shuffled(count: int) -> np.ndarray:
    """The order of training images in a .beton. Each page then contains many classes, so that it can be read whole."""
    return np.random.default_rng(0).permutation(count)


def _index(config: WriteConfig, sources: list[Dataset], size: int | None) -> Index:
    """The index without checksums; those of images and files are added while they are written."""
    parts = {
        source.split: Part(source.fingerprint, Names.of(source.names), source.sizes, np.zeros(len(source), np.int64))
        for source in sources
    }
    return Index(config.data, sources[0].classes, size, config.raw, parts, {})


def _largest(config: WriteConfig, source: Dataset) -> int:
    """Bytes of the largest image as pixels. Raises BadInput for an image that is too large for the format."""
    sizes = np.array([_limited(config, *size) for size in source.stored_sizes.tolist()])
    count = sizes.prod(axis=1) * 3
    for i in np.flatnonzero((sizes.max(axis=1) > MAX_SIDE) | (count > MAX_BYTES))[:1]:
        raise BadInput(
            f"{source.names[i]}: expected at most {MAX_SIDE} pixels per side and {MAX_BYTES:,} bytes of pixels in a "
            f".beton, got {sizes[i, 0]} x {sizes[i, 1]} pixels; give --max-size"
        )
    if config.raw:
        _check_space(config.out, int(count.sum()))
    return int(count.max())


def _check_space(out: Path, required: int) -> None:
    folder = next(folder for folder in out.resolve().parents if os.path.exists(folder))
    if (free := shutil.disk_usage(folder).free) < required:
        raise BadInput(
            f"{out}: needs {filesize.decimal(required)}, but only {filesize.decimal(free)} are free; free some space, "
            "or choose another disk or smaller images"
        )


def _images(config: WriteConfig, source: Dataset, index: Index, order: np.ndarray) -> Iterator[StoredImage]:
    """The images in this order of sample ids, decoded in threads; adds their checksums to the index.

    Raises:
        BadInput: at the end, if some are unreadable; notices have named each.
    """
    checksums, bad = index.splits[source.split].crc32, []

    def work(i: int) -> tuple[StoredImage, int] | str:
        try:
            image = _packed(config, source, i) if config.out.suffix == ".pack" else _encoded(config, source, i)
        except BadInput as error:
            return str(error)
        return image, zlib.crc32(image.data)

    title = f"writing {config.out.name} {source.split}"
    results = in_order(work, order.tolist(), choose_workers(config.workers))
    for i, result in zip(order.tolist(), track(results, len(source), title), strict=True):
        if isinstance(result, str):
            notice(result)
            bad.append(result)
        elif not bad:
            image, checksums[i] = result
            yield image
    if bad:
        images = counted(len(bad), "unreadable image")
        raise BadInput(f"nothing was written: {images} in {source.spec}, the first: {bad[0]}")


def _read(config: WriteConfig, source: Dataset, i: int) -> Tensor:
    """An image; one with signs of damage is refused, unless --skip-corrupt has checked all images already."""
    return source.read(i, strict=not config.skip_corrupt)


def _packed(config: WriteConfig, source: Dataset, i: int) -> StoredImage:
    size = config.size or SIZE
    return _pixels(resize(_read(config, source, i), size, size))


def _encoded(config: WriteConfig, source: Dataset, i: int) -> StoredImage:
    image = _read(config, source, i)
    height, width = _limited(config, *image.shape[1:])
    smaller = resize(image, height, width)
    if config.raw:
        return _pixels(smaller)
    if smaller is image and config.quality is None and (data := _upright_jpeg(source, i, image)) is not None:
        return StoredImage(data, height, width)
    return StoredImage(encode_jpeg(smaller.contiguous(), config.quality or QUALITY).numpy().data, height, width)


def _pixels(image: Tensor) -> StoredImage:
    _, height, width = image.shape
    return StoredImage(image.permute(1, 2, 0).contiguous().numpy().reshape(-1).data, height, width)


def _limited(config: WriteConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width, scaled so that the longer side is at most --max-size."""
    longer = max(height, width)
    if config.max_size is None or longer <= config.max_size:
        return height, width
    return max(round(height * config.max_size / longer), 1), max(round(width * config.max_size / longer), 1)


def _upright_jpeg(source: Dataset, i: int, image: Tensor) -> bytes | None:
    """The original JPEG, if it is RGB and upright and takes no more bytes than its pixels (or a page); else None."""
    if source.pixels is not None or (source.is_raw is not None and source.is_raw[i]):
        return None
    data = source.stored_bytes(i)
    try:
        with Image.open(io.BytesIO(data)) as file:
            suitable = file.format == "JPEG" and file.mode == "RGB" and file.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # Pillow raises many types of exceptions, also for files that torchvision reads
        return None
    return data if suitable and len(data) <= max(image.numel(), PAGE) else None
