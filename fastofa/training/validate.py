"""A student's best classes for every validation image."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.pipelines import Pipeline
from fastofa.system.errors import BadInput
from fastofa.system.progress import track
from fastofa.training.distributed import World
from fastofa.views.table import center_views


def best_classes(
    student: Any,
    pipeline: Pipeline,
    dataset: Dataset,
    crop: float,
    bf16: bool,
    title: str = "",
    flip: bool = False,
    bicubic: bool = False,
) -> np.ndarray:
    """`best_classes_each` for one student."""
    return best_classes_each([student], pipeline, dataset, crop, bf16, title, flip, bicubic)[0]


@torch.inference_mode()
def best_classes_each(
    students: Sequence[Any],
    pipeline: Pipeline,
    dataset: Dataset,
    crop: float,
    bf16: bool,
    title: str = "",
    flip: bool = False,
    bicubic: bool = False,
    world: World | None = None,
    compiled: bool = False,
) -> list[np.ndarray]:
    """The five best classes for every image's central crop by each student's final logits.

    Every image is read once for all students.

    Args:
        crop: side of the central square, as a fraction of the image's shorter side.
        flip: average the logits of each image and of its mirror image.
        bicubic: resize the squares with a bicubic filter; False: bilinear.
        world: each rank evaluates its share of the images and gets the predictions of all ranks.
        compiled: compile the students, at the first call; a smaller last batch is padded to the size of the others.

    Returns:
        For each student int64 [N, min(5, C)], best class first.

    Raises:
        BadInput: some of a student's logits are not finite.
    """
    world = world or World()
    training = [student.training for student in students]
    for student in students:
        student.eval()
    # The last column counts the logits that are not finite.
    predictions = [torch.zeros(len(dataset), min(5, len(dataset.classes)) + 1, dtype=torch.int64) for _ in students]
    order = np.arange(len(dataset))[world.rank :: world.size]
    results = []
    compute = torch.compile(logits_of, fullgraph=True, dynamic=False) if compiled else logits_of
    size = 0
    with closing(pipeline.epoch(center_views(dataset.sizes, crop, bicubic), order)) as batches:
        for batch in track(batches, len(order), title, lambda batch: len(batch.labels)):
            size = size or len(batch.images)  # of the first batch: no later one is larger
            images = _padded(batch.images, size) if compiled else batch.images
            for student, table in zip(students, predictions, strict=True):
                logits = compute(student.classify, images, bf16, flip)[: len(batch.images)]
                classes = logits.topk(table.shape[1] - 1, dim=-1).indices
                infinite = (~logits.isfinite()).sum(dim=-1, keepdim=True)
                results.append((table, batch.sample_ids, torch.cat([classes, infinite], dim=1)))
    for table, sample_ids, rows in results:  # copied at the end, so that the CPU waits for the device only once
        table[sample_ids.cpu()] = rows.cpu()
    for student, was_training in zip(students, training, strict=True):
        student.train(was_training)
    predictions = [world.sum(table) for table in predictions]
    if diverged := max(int((table[:, -1] > 0).sum()) for table in predictions):
        raise BadInput(
            f"expected finite logits, but the student gives NaN or infinity for {diverged:,} of {len(dataset):,} "
            "validation images; it diverged, train again with a lower --lr or --clip"
        )
    return [table[:, :-1].numpy() for table in predictions]


def _padded(images: Tensor, size: int) -> Tensor:
    """`size` images [size, 3, S, S], channels last: the given ones, then the first of them again and again."""
    missing = images[:1].expand(size - len(images), -1, -1, -1)
    return torch.cat([images, missing]).contiguous(memory_format=torch.channels_last) if len(missing) else images


def logits_of(classify: Callable[[Tensor], Tensor], images: Tensor, bf16: bool, flip: bool) -> Tensor:
    """Logits [B, C] of uint8 images [B, 3, S, S]; with `flip` the mean over each image and its mirror image."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = classify(images)
        return (logits + classify(images.flip(-1))) / 2 if flip else logits
