"""The portable pipeline: worker processes decode whole batches with torchvision.io and crop from the view table.

The rest of the augmentation is done where the batch ends up: on the GPU, or without one in the worker processes.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fastofa.errors import BadInput
from fastofa.images import crop_resize_one
from fastofa.pipelines.augment import augment, with_partners
from fastofa.pipelines.batch import Batch, make_batch
from fastofa.pipelines.request import Request
from fastofa.views import Views, batches


class _Batches(TorchDataset):
    """Item b is batch b, decoded. An unreadable picture comes back as its message: exceptions cross processes badly."""

    def __init__(self, dataset: Any, views: Views, batches: list[np.ndarray], image_size: int, augmented: bool) -> None:
        self.dataset, self.views, self.batches, self.image_size = dataset, views, batches, image_size
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor | str:
        rows = with_partners(self.views, self.batches[index])
        views, ids = self.views.take(rows), rows % len(self.dataset)
        size = self.image_size
        images = torch.empty(len(rows), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        boxes = views.boxes(self.dataset.stored_sizes[ids])
        for out, i, box, flip in zip(images, ids, boxes.tolist(), views.flip.tolist(), strict=True):
            try:
                image = self.dataset.read(i)
            except BadInput as error:
                return str(error)
            out.copy_(crop_resize_one(image, box, flip, size))
        return augment(images, self.views, rows, len(self.batches[index])) if self.augmented else images


def _begin(parent: int, _worker: int) -> None:
    """Ctrl-C, or a cluster's SIGTERM, reaches every process; the main process alone answers it and ends the workers.

    A worker ends with its parent, too: PyTorch sees to that, but from now on. If the parent is gone already, it takes
    whoever has adopted the worker for its parent, and the worker would stay for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes forked in here inherit the block, so that they ignore both from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pipeline:
    """See `fastofa.pipelines.open_pipeline`."""

    def __init__(self, request: Request) -> None:
        self.dataset, self.device, self.workers = request.dataset, request.device, request.workers
        self.image_size, self.batch_size, self.normalize = request.image_size, request.batch_size, request.normalize
        self.labels = torch.from_numpy(request.dataset.labels).to(request.device)

    def epoch(self, views: Views, order: np.ndarray, start: int = 0) -> Iterator[Batch]:
        all_rows = list(batches(views, order, start, self.batch_size))
        on_cpu = self.device.type == "cpu"
        loader = DataLoader(
            _Batches(self.dataset, views, all_rows, self.image_size, augmented=on_cpu),
            batch_size=None,
            num_workers=min(self.workers, len(all_rows)),
            worker_init_fn=partial(_begin, os.getpid()),
            generator=torch.Generator(),  # or it would draw a number from the global one, which belongs to the student
            pin_memory=self.device.type == "cuda",
        )
        with _signals_held():
            decoded = zip(all_rows, iter(loader), strict=True)
        try:
            for rows, images in decoded:
                if isinstance(images, str):
                    raise BadInput(images)
                images = images.to(self.device, non_blocking=True)
                if not on_cpu:
                    images = augment(images, views, with_partners(views, rows), len(rows))
                yield make_batch(images, self.labels, views, rows, self.normalize)
        finally:
            del decoded  # ends the workers now; left to the garbage collector, which ends their queues first, they stay
