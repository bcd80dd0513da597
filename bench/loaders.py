"""Images a second of every pipeline, alone: what the step could be fed with.

    python -m bench.loaders            writes bench/results/loaders_{cpu,gpu}.json

Made-up photographs of 500 x 375 pixels with the statistics of real ones (1/f noise), as JPEGs of quality 90 in a folder
and as pixels of 256 x 256 in memory.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import write_jpeg

from bench.record import RESULTS, markdown_table, write_record
from bench.steps import Job
from bench.timing import wait
from fastofa.dataset import Dataset, from_array, open_dataset
from fastofa.device import choose_workers
from fastofa.pipelines import Batch, open_pipeline
from fastofa.step import Step
from fastofa.views import ViewPolicy, draw_views, epoch_order

HEIGHT, WIDTH, SIDE, QUALITY = 375, 500, 256, 90
GROWTH = 1.1  # in strength from one scale to the next, twice as coarse: JPEGs of 109 kB
CLASSES = 10
PIPELINES = ("torchvision", "resident")
BASELINE = "torchvision"


def photographs(count: int, height: int, width: int) -> Tensor:
    """uint8 [count, 3, height, width]: noise of every scale, the coarser the stronger; JPEGs as large as ImageNet's."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, height, width)
    for level in range(8):
        coarse = torch.randn(count, 3, height >> level or 1, width >> level or 1, generator=generator)
        total += F.interpolate(coarse, (height, width), mode="bilinear") * GROWTH**level
    return (total / total.std() * 50 + 118).clamp(0, 255).to(torch.uint8)


def write_folder(out: Path, count: int, height: int = HEIGHT, width: int = WIDTH) -> float:
    """OUT/train/CLASS/NAME.jpg; returns the mean size of a file in kB (ImageNet's: 110)."""
    size = 0
    for first in range(0, count, 64):
        for i, picture in enumerate(photographs(min(64, count - first), height, width), first):
            path = out / "train" / str(i % CLASSES) / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jpeg(picture, str(path), quality=QUALITY)
            size += path.stat().st_size
    return size / count / 1e3


def in_memory(count: int, side: int = SIDE) -> Dataset:
    pixels = photographs(min(count, 64), side, side).permute(0, 2, 3, 1).numpy()
    pixels = np.tile(pixels, (-(-count // len(pixels)), 1, 1, 1))[:count]
    names, labels = [f"{i:05d}" for i in range(count)], np.arange(count) % CLASSES
    return from_array("photographs", "train", tuple(map(str, range(CLASSES))), names, labels, pixels)


def open_source(pipeline: str, folder: Path, count: int, side: int = SIDE) -> Dataset:
    """What a pipeline reads: pixels in memory, or JPEGs that are written where there are none yet."""
    if pipeline == "resident":
        return in_memory(count, side)
    if not (folder / "train").exists():
        write_folder(folder, count, side * HEIGHT // SIDE, side * WIDTH // SIDE)
    return open_dataset(str(folder), "train")


def stream(pipeline: Any, dataset: Dataset) -> Iterator[Batch]:
    """Batches nearly without end: one order again and again, as a single epoch, so that no worker is started twice."""
    views = draw_views(ViewPolicy(), dataset.sizes, 0, 0)
    return pipeline.epoch(views, np.tile(epoch_order(len(dataset), seed=0, epoch=0), 1 + 1_000_000 // len(dataset)))


class LoaderStep:
    """Our step behind a pipeline. Entered for a round: workers run only then, and what they had ready is used up."""

    def __init__(self, job: Job, step: Step, pipeline: str, folder: Path) -> None:
        self.step = step
        workers = choose_workers(None)
        side = job.image_size * SIDE // 224
        self.dataset = open_source(pipeline, folder, job.batch_size, side)
        self.pipeline = open_pipeline(pipeline, self.dataset, job.image_size, job.batch_size, job.device, workers)
        self.ready = 2 * workers if pipeline == "torchvision" else 0

    def __enter__(self) -> "LoaderStep":
        self.batches = stream(self.pipeline, self.dataset)
        for batch in itertools.islice(self.batches, self.ready):
            self.step([batch], lr=0.1)
        return self

    def __call__(self) -> None:
        self.step([next(self.batches)], lr=0.1)

    def __exit__(self, *_error: object) -> None:
        self.batches.close()  # type: ignore[attr-defined]


def rate(pipeline: Any, dataset: Dataset, device: torch.device, ready: int, calls: int) -> float:
    """Images a second of a pipeline that nothing waits for."""
    batches = stream(pipeline, dataset)
    for _ in range(ready + 1):
        next(batches)
    wait(device)
    began, images = time.perf_counter(), 0
    for batch in itertools.islice(batches, calls):
        images += len(batch.labels)
    wait(device)
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return images / seconds


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224, 192, 160])
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 64)
    parser.add_argument("--count", type=int, default=4096 if gpu else 512, help="pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=64 if gpu else 8, help="batches a round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    args = parser.parse_args(argv)
    workers = choose_workers(None)
    rates: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file_kb = write_folder(folder, args.count)
        sources = {name: open_source(name, folder, args.count) for name in PIPELINES}
        for _ in range(args.rounds):
            for size, name in itertools.product(args.image_sizes, PIPELINES):
                pipeline = open_pipeline(name, sources[name], size, args.batch_size, device, workers)
                ready = 2 * workers if name == "torchvision" else 0
                found = rate(pipeline, sources[name], device, ready, args.calls)
                rates.setdefault((name, size), []).append(found)
                del pipeline
    records: list[dict[str, Any]] = [
        {
            "pipeline": name,
            "image_size": size,
            "images_per_second": statistics.median(found),
            "ratio_to_torchvision": statistics.median(a / b for a, b in zip(found, rates[BASELINE, size], strict=True)),
            "rounds": found,
        }
        for (name, size), found in rates.items()
    ]
    settings = {"batch_size": args.batch_size, "workers": workers, "file_kb": file_kb, "rounds": args.rounds}
    write_record(
        f"loaders_{device.type.replace('cuda', 'gpu')}", {**settings, "baseline": BASELINE, "rows": records}, args.out
    )
    rows = [
        [r["pipeline"], str(r["image_size"]), f"{r['images_per_second']:,.0f}", f"{r['ratio_to_torchvision']:.2f}"]
        for r in records
    ]
    print(markdown_table(["pipeline", "px", "images/s", "x torchvision"], rows))


if __name__ == "__main__":
    main()
