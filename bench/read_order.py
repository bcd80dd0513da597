"""Reading a .beton that is not in memory: samples in random order or page by page, asked for ahead or when touched.

python -m bench.read_order            writes bench/results/read_order_cpu.json

A file of 12 GB, of which a measurement reads the first part of an epoch, so that in random order, as in a file much
larger than the memory, what lies beside a picture is seldom of use. Nothing of the file is in memory before; for the
last two ways all that is read is, which shows what the CPU alone can do and what asking costs it. Pictures are cropped
to a small size, which leaves the time to the disk.
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

from bench.photographs import SIDE
from bench.record import markdown_table, write_record
from fastofa.data.dataset import Dataset
from fastofa.pipelines import open_pipeline
from fastofa.system.device import choose_workers
from fastofa.views.draw import draw_views
from fastofa.views.order import epoch_order
from fastofa.views.policy import ViewPolicy

PICTURES, READ = 61_440, 8192
EACH = SIDE * SIDE * 3  # bytes
IMAGE_SIZE, BATCH, ROUNDS = 64, 256, 5
WAYS = {  # order, is it asked for ahead, is it in memory before
    "random, when touched": ("random", False, False),
    "random, ahead": ("random", True, False),
    "pages, when touched": ("pages", False, False),
    "pages, ahead": ("pages", True, False),
    "random, in memory": ("random", False, True),
    "random, ahead, in memory": ("random", True, True),
}


def write_pixels(path: Path) -> None:
    """Noise, since a disk may compress; on the disk and out of memory as it grows."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for _ in range(PICTURES // 1024):
            file.write(rng.bytes(1024 * EACH))
            file.flush()
            os.fsync(file.fileno())
            evict(file.fileno())


def evict(file: int) -> None:
    """Only what is written and not mapped leaves the memory."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def open_pixels(path: Path) -> Dataset:
    """As `open_dataset` gives a .beton of pixels, whose pictures lie in random order."""
    sizes, labels = np.full((PICTURES, 2), SIDE), np.zeros(PICTURES, dtype=np.int64)
    places = np.random.default_rng(0).permutation(PICTURES)
    spans = np.stack([EACH * places, np.full(PICTURES, EACH)], axis=1)
    names = [""] * PICTURES
    return Dataset(
        "noise", "train", ("noise",), names, labels, sizes, "", file=path, stored=sizes, spans=spans, raw=True
    )  # fmt: skip


def measure(path: Path, way: str, number: int) -> tuple[float, float]:
    """Images a second, and bytes read from the disk for each byte of them."""
    kind, ahead, in_memory = WAYS[way]
    with open(path, "rb") as file:
        evict(file.fileno())
    dataset = open_pixels(path)
    order = epoch_order(PICTURES, 0, number, page_ids=dataset.page_ids if kind == "pages" else None)[:READ]
    views = draw_views(ViewPolicy(), dataset.sizes, 0, number)
    pipeline = open_pipeline("ffcv", dataset, IMAGE_SIZE, BATCH, workers=choose_workers(None))
    if in_memory:
        for batch in pipeline.epoch(views, order):
            del batch
    before, began = read_bytes(), time.perf_counter()
    with nullcontext() if ahead else patch("fastofa.pipelines.threaded.read_ahead", ask_nothing):
        images = sum(len(batch.labels) for batch in pipeline.epoch(views, order))
    seconds = time.perf_counter() - began
    return images / seconds, (read_bytes() - before) / (images * EACH)


def ask_nothing(*_: object) -> Generator[None, None, None]:
    """In place of `read_ahead`."""
    yield from ()


def read_bytes() -> int:
    """That this process made the disk read so far."""
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])


def main() -> None:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pixels"
        write_pixels(path)
        for number in range(ROUNDS):
            ways = list(WAYS)
            # Each another epoch: below the file there are caches, too.
            for i, way in enumerate(ways[number:] + ways[:number]):
                found[way].append(measure(path, way, number * len(ways) + i))
    baseline = [rate for rate, _ in found["random, when touched"]]
    rows = [
        {
            "way": way,
            "images_per_second": statistics.median(rate for rate, _ in rounds),
            "ratio": statistics.median(rate / base for (rate, _), base in zip(rounds, baseline, strict=True)),
            "read": statistics.median(read for _, read in rounds),
            "rounds": rounds,
        }
        for way, rounds in found.items()
    ]
    result = {
        "file_gb": PICTURES * EACH / 1e9, "pictures": PICTURES, "side": SIDE, "images_read": READ, "rounds": ROUNDS,
        "image_size": IMAGE_SIZE, "batch_size": BATCH, "workers": choose_workers(None), "rows": rows,
    }  # fmt: skip
    write_record("read_order_cpu", result)
    header = ["way", "images/s", "x first", "bytes read / needed"]
    lines = [[r["way"], f"{r['images_per_second']:,.0f}", f"{r['ratio']:.2f}", f"{r['read']:.2f}"] for r in rows]
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
