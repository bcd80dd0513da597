"""Time reading a .beton larger than memory: in random order or page by page, with and without read-ahead.

python -m bench.read_order            writes bench/results/read_order_cpu.json

Each measurement reads the first part of an epoch from a file of 12 GB, so that in random order, as with a file much
larger than memory, the neighbours of an image on the disk are seldom used. The file is not cached beforehand, except
for the images to read in the last two cases, which show the speed of the CPU alone and the cost of read-ahead.
Images are cropped to a small size, so that the disk takes most of the time.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np

from bench.lib import command_line
from bench.lib.photographs import SIDE
from bench.lib.record import markdown_table, write_record
from fastofa.data.dataset import Dataset
from fastofa.pipelines import open_pipeline
from fastofa.system.device import choose_workers
from fastofa.views.draw import draw_views
from fastofa.views.order import epoch_order
from fastofa.views.policy import ViewPolicy

IMAGES, READ = 61_440, 8192
EACH = SIDE * SIDE * 3  # bytes
IMAGE_SIZE, BATCH, ROUNDS = 64, 256, 5
CASES = {  # order, read-ahead, cached beforehand
    "random, when touched": ("random", False, False),
    "random, ahead": ("random", True, False),
    "pages, when touched": ("pages", False, False),
    "pages, ahead": ("pages", True, False),
    "random, in memory": ("random", False, True),
    "random, ahead, in memory": ("random", True, True),
}


def write_pixels(path: Path) -> None:
    """Write noise, since a disk may compress. It is flushed and dropped from the page cache as the file grows."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for _ in range(IMAGES // 1024):
            file.write(rng.bytes(1024 * EACH))
            file.flush()
            os.fsync(file.fileno())
            evict(file.fileno())


def evict(file: int) -> None:
    """Drop pages from the page cache that are written to the disk and not mapped."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def open_pixels(path: Path) -> Dataset:
    """The dataset that `open_dataset` returns for a .beton of pixels in shuffled order."""
    sizes, labels = np.full((IMAGES, 2), SIDE), np.zeros(IMAGES, dtype=np.int64)
    places = np.random.default_rng(0).permutation(IMAGES)
    spans = np.stack([EACH * places, np.full(IMAGES, EACH)], axis=1)
    names = [""] * IMAGES
    is_raw = np.ones(IMAGES, dtype=bool)
    return Dataset(
        "noise", "train", ("noise",), names, labels, sizes, "", file=path, stored=sizes, spans=spans, is_raw=is_raw
    )  # fmt: skip


def measure(path: Path, case: str, number: int) -> tuple[float, float]:
    """Images per second, and bytes read from the disk per byte of images."""
    kind, ahead, in_memory = CASES[case]
    with open(path, "rb") as file:
        evict(file.fileno())
    dataset = open_pixels(path)
    order = epoch_order(IMAGES, 0, number, page_ids=dataset.page_ids if kind == "pages" else None)[:READ]
    views = draw_views(ViewPolicy(), dataset.sizes, 0, number)
    pipeline = open_pipeline("ffcv", dataset, IMAGE_SIZE, BATCH, workers=choose_workers(None))
    if in_memory:
        for batch in pipeline.epoch(views, order):
            del batch
    before, began = read_bytes(), time.perf_counter()
    with nullcontext() if ahead else patch("fastofa.pipelines.threaded.read_ahead", no_read_ahead):
        images = sum(len(batch.labels) for batch in pipeline.epoch(views, order))
    seconds = time.perf_counter() - began
    return images / seconds, (read_bytes() - before) / (images * EACH)


def no_read_ahead(*_: object) -> Generator[None, None, None]:
    """Replaces `read_ahead`."""
    yield from ()


def read_bytes() -> int:
    """Bytes read from the disk by this process so far."""
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])


def main() -> None:
    args = command_line.parser(__doc__).parse_args()
    found: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pixels"
        write_pixels(path)
        for number in range(ROUNDS):
            cases = list(CASES)
            # Each measurement reads another epoch, since the disk has caches of its own.
            for i, case in enumerate(cases[number:] + cases[:number]):
                found[case].append(measure(path, case, number * len(cases) + i))
    baseline = [rate for rate, _ in found["random, when touched"]]
    rows = [
        {
            "case": case,
            "images_per_second": statistics.median(rate for rate, _ in rounds),
            "ratio": statistics.median(rate / base for (rate, _), base in zip(rounds, baseline, strict=True)),
            "read": statistics.median(read for _, read in rounds),
            "rounds": rounds,
        }
        for case, rounds in found.items()
    ]
    result = {
        "file_gb": IMAGES * EACH / 1e9, "images": IMAGES, "side": SIDE, "images_read": READ, "rounds": ROUNDS,
        "image_size": IMAGE_SIZE, "batch_size": BATCH, "workers": choose_workers(None), "rows": rows,
    }  # fmt: skip
    write_record("read_order_cpu", result, args.out)
    header = ["case", "images/s", "x first", "bytes read / needed"]
    lines = [[r["case"], f"{r['images_per_second']:,.0f}", f"{r['ratio']:.2f}", f"{r['read']:.2f}"] for r in rows]
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
