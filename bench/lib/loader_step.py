"""A pipeline in front of the ladder's step, or alone to measure its rate."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.lib.photographs import SIDE, SIZES, in_memory, write_folder
from bench.lib.sources import FORMS, write_form
from bench.lib.steps import Job
from bench.lib.timing import wait
from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.pipelines import Batch, open_pipeline
from fastofa.pipelines.threaded import AHEAD
from fastofa.system.device import choose_workers
from fastofa.training.step import Step
from fastofa.views.draw import draw_views
from fastofa.views.order import epoch_order
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views

DALI_QUEUE = 2  # the default of its prefetch_queue_depth
HEIGHT, WIDTH = SIZES[0]


def open_source(pipeline: str, folder: Path, count: int, side: int = SIDE) -> Dataset:
    """The dataset that a pipeline reads: pixels in memory, or files, which are written if they do not exist."""
    if pipeline == "resident":
        return in_memory(count, side)
    data = folder / "photographs"
    if not data.exists():
        write_folder(data, count, [(side * HEIGHT // SIDE, side * WIDTH // SIDE)])
    return open_dataset(write_form(FORMS[pipeline], data, folder, side))


def made_ahead(pipeline: str, workers: int) -> int:
    """The number of batches that are ready while one is in use."""
    return {"torchvision": 2 * workers, "dali": DALI_QUEUE, "resident": 0}.get(pipeline, AHEAD)


def views_and_order(dataset: Dataset) -> tuple[Views, np.ndarray]:
    """An almost endless epoch, so that workers start only once: one order, repeated."""
    views = draw_views(ViewPolicy(), dataset.sizes, 0, 0)
    return views, np.tile(epoch_order(len(dataset), seed=0, epoch=0), 1 + 1_000_000 // len(dataset))


def stream(pipeline: Any, dataset: Dataset) -> Iterator[Batch]:
    """Batches of such an epoch."""
    return pipeline.epoch(*views_and_order(dataset))


class LoaderStep:
    """Our step behind a pipeline. Its workers run only during a round, which begins by using up the ready batches."""

    def __init__(self, job: Job, step: Step, targets: Any, pipeline: str, folder: Path) -> None:
        self.step, self.targets = step, targets
        workers = choose_workers(None)
        side = job.image_size * SIDE // 224
        self.dataset = open_source(pipeline, folder, job.batch_size, side)
        self.pipeline = open_pipeline(pipeline, self.dataset, job.image_size, job.batch_size, job.device, workers)
        self.ready = made_ahead(pipeline, workers)

    def __enter__(self) -> "LoaderStep":
        self.batches = stream(self.pipeline, self.dataset)
        for batch in itertools.islice(self.batches, self.ready):
            self.step([batch], self.targets, lr=0.1)
        return self

    def __call__(self) -> None:
        self.step([next(self.batches)], self.targets, lr=0.1)

    def __exit__(self, *_error: object) -> None:
        self.batches.close()  # type: ignore[attr-defined]


def rate(pipeline: Any, dataset: Dataset, device: torch.device, ready: int, calls: int) -> float:
    """Images per second of a pipeline alone."""
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
