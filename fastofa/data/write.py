"""Write a data set as a .pack or a .beton: both splits, every image decoded and checked, whole or not at all."""

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

from fastofa.data.beton import MOST_BYTES, MOST_PIXELS, PAGE, Picture, read_layout, write_beton
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
    """Write, and verify if asked to.

    Raises:
        BadInput: unreadable pictures, each named; a place that is taken; a full disk; with `verify`, damage.
    """
    check_written(config)
    sources = _open_splits(config)
    if not os.path.lexists(config.out):
        if config.out.suffix == ".pack":
            _write_pack(config, sources)
        else:
            _write_beton(config, sources)
    if config.verify:
        _check_form(config)
        verify(config.out, choose_workers(config.workers))
        _check_source(config, sources)


def _open_splits(config: WriteConfig) -> list[Dataset]:
    """Raises BadInput when what is wrong with either has been told."""
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
    """Both, but for a folder that has training pictures only."""
    found: list[Literal["train", "val"]] = ["train", "val"]
    if Path(data).suffix in FORMS + FFCV and os.path.exists(data):
        there = splits_of(Path(data))
        return [split for split in found if split in there]
    here = [split for split in found if os.path.isdir(os.path.join(data, split))]
    return here if "train" in here else found


def _check_form(config: WriteConfig) -> None:
    """Raises BadInput if what lies there has another size or kind of pictures than was asked for."""
    index = read_index(config.out)
    if config.size not in (None, index.size):
        raise BadInput(f"{config.out}: expected images of {config.size} pixels, as asked for, got {index.size}")
    if config.raw and not index.raw:
        raise BadInput(f"{config.out}: expected pixels, as asked for by --raw, got JPEGs")


def _check_source(config: WriteConfig, sources: list[Dataset]) -> None:
    for source in sources:
        if open_written(config.out, source.split, source.limits).fingerprint != source.fingerprint:
            raise BadInput(
                f"{config.out}: is whole, but was not made from {config.data} as it is now ({source.split} differs); "
                "write it again elsewhere"
            )


def _write_pack(config: WriteConfig, sources: list[Dataset]) -> None:
    size, total = config.size or SIZE, sum(map(len, sources))
    _check_space(config.out, total * size * size * 3)
    with new_folder(config.out) as folder:
        index = _index(config, sources, size)
        with open(folder / IMAGES, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for source in sources:
                for picture in _pictures(config, source, index, np.arange(len(source))):
                    file.write(picture.data)
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
    if config.out.exists():  # by now
        raise BadInput(f"{config.out}: exists already; choose another place or remove it")
    index = _index(config, sources, None)
    files: dict[Path, Path] = {}  # by their later names
    try:
        for source in sources:
            largest = _largest(config, source)
            final = beton_path(config.out, source.split)
            remove_leftovers(final, locked=True)
            files[final] = temporary = temporary_name(final)
            order = _shuffled(len(source)) if source.split == "train" else np.arange(len(source))
            pictures = _pictures(config, source, index, order)
            write_beton(temporary, pictures, order, source.labels, config.raw, largest)
            index.files[source.split] = File(temporary.stat().st_size, read_layout(temporary).crc32)
        write_index(index_path(config.out), index)
        for final in sorted(files, key=lambda path: path == config.out):  # by the last one it is whole
            os.replace(files[final], final)
    except OSError as error:
        raise BadInput(f"could not write {config.out}: {reason(error)}") from None
    finally:
        for temporary in files.values():
            temporary.unlink(missing_ok=True)


def _shuffled(count: int) -> np.ndarray:
    """The order in which training pictures lie in a .beton: a page then holds many classes, and can be read whole."""
    return np.random.default_rng(0).permutation(count)


def _index(config: WriteConfig, sources: list[Dataset], size: int | None) -> Index:
    """What lies beside the images; their checksums and the files' are added while they are written."""
    parts = {
        source.split: Part(source.fingerprint, Names.of(source.names), source.sizes, np.zeros(len(source), np.int64))
        for source in sources
    }
    return Index(config.data, sources[0].classes, size, config.raw, parts, {})


def _largest(config: WriteConfig, source: Dataset) -> int:
    """Bytes of the largest picture, as pixels. Raises BadInput for one that the format has no room for."""
    sizes = np.array([_limited(config, *size) for size in source.stored_sizes.tolist()])
    count = sizes.prod(axis=1) * 3
    for i in np.flatnonzero((sizes.max(axis=1) > MOST_PIXELS) | (count > MOST_BYTES))[:1]:
        raise BadInput(
            f"{source.names[i]}: expected at most {MOST_PIXELS} pixels a side and {MOST_BYTES:,} bytes of pixels in a "
            f".beton, got {sizes[i, 0]} x {sizes[i, 1]} pixels; give --max-size"
        )
    if config.raw:
        _check_space(config.out, int(count.sum()))
    return int(count.max())


def _check_space(out: Path, need: int) -> None:
    place = next(folder for folder in out.resolve().parents if os.path.exists(folder))
    if (free := shutil.disk_usage(place).free) < need:
        raise BadInput(
            f"{out}: needs {filesize.decimal(need)}, {filesize.decimal(free)} are free; free space, choose another "
            "place or smaller pictures"
        )


def _pictures(config: WriteConfig, source: Dataset, index: Index, order: np.ndarray) -> Iterator[Picture]:
    """The pictures in this order of samples, decoded in threads; notes their checksums in the index.

    Raises:
        BadInput: at the end, if some are unreadable; each has been named.
    """
    checksums, bad = index.splits[source.split].crc32, []

    def work(i: int) -> tuple[Picture, int] | str:
        try:
            picture = _packed(config, source, i) if config.out.suffix == ".pack" else _encoded(config, source, i)
        except BadInput as error:
            return str(error)
        return picture, zlib.crc32(picture.data)

    title = f"writing {config.out.name} {source.split}"
    made = in_order(work, order.tolist(), choose_workers(config.workers))
    for i, found in zip(order.tolist(), track(made, len(source), title), strict=True):
        if isinstance(found, str):
            notice(found)
            bad.append(found)
        elif not bad:
            checksums[i] = found[1]
            yield found[0]
    if bad:
        images = counted(len(bad), "unreadable image")
        raise BadInput(f"nothing was written: {images} in {source.spec}, the first: {bad[0]}")


def _checked(config: WriteConfig, source: Dataset, i: int) -> Tensor:
    """An image; one that shows signs of damage is unreadable. With --skip-corrupt they were all looked at before."""
    return source.read(i, strict=not config.skip_corrupt)


def _packed(config: WriteConfig, source: Dataset, i: int) -> Picture:
    size = config.size or SIZE
    return _pixels(resize(_checked(config, source, i), size, size))


def _encoded(config: WriteConfig, source: Dataset, i: int) -> Picture:
    image = _checked(config, source, i)
    height, width = _limited(config, *image.shape[1:])
    smaller = resize(image, height, width)
    if config.raw:
        return _pixels(smaller)
    if smaller is image and config.quality is None and (data := _upright_jpeg(source, i, image)) is not None:
        return Picture(data, height, width)
    return Picture(encode_jpeg(smaller.contiguous(), config.quality or QUALITY).numpy().data, height, width)


def _pixels(image: Tensor) -> Picture:
    _, height, width = image.shape
    return Picture(image.permute(1, 2, 0).contiguous().numpy().reshape(-1).data, height, width)


def _limited(config: WriteConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width with the longer side within --max-size."""
    longer = max(height, width)
    if config.max_size is None or longer <= config.max_size:
        return height, width
    return max(round(height * config.max_size / longer), 1), max(round(width * config.max_size / longer), 1)


def _upright_jpeg(source: Dataset, i: int, image: Tensor) -> bytes | None:
    """As it is stored, if it is a JPEG of three colours that needs no turning and takes less than its pixels."""
    if source.pixels is not None or (source.is_raw is not None and source.is_raw[i]):
        return None
    data = source.stored_bytes(i)
    try:
        with Image.open(io.BytesIO(data)) as file:
            as_it_is = file.format == "JPEG" and file.mode == "RGB" and file.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # Pillow raises many kinds, also for what torchvision reads
        return None
    return data if as_it_is and len(data) <= max(image.numel(), PAGE) else None
