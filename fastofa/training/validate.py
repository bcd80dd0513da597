"""The student's best classes for every validation image, and their accuracy."""

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
    world: World | None = None,
) -> np.ndarray:
    """As `best_classes_each`, of one student."""
    return best_classes_each([student], pipeline, dataset, crop, bf16, title, flip, world)[0]


@torch.inference_mode()
def best_classes_each(
    students: Sequence[Any],
    pipeline: Pipeline,
    dataset: Dataset,
    crop: float,
    bf16: bool,
    title: str = "",
    flip: bool = False,
    world: World | None = None,
) -> list[np.ndarray]:
    """Of each student the five best classes of its last head on the central crops, int64 [N, min(5, C)], best first.

    The pictures are read once for all of them.

    Args:
        crop: side of the central square, as a share of the picture's shorter side.
        flip: take the mean of the logits of each picture and of its mirror image.
        world: each rank looks at its share of the pictures; all get the answers of all.

    Raises:
        BadInput: a student's logits are not finite, so that none of them is the greatest.
    """
    world = world or World()
    training = [student.training for student in students]
    for student in students:
        student.eval()
    # The last column counts the logits that are not finite.
    best = [torch.zeros(len(dataset), min(5, len(dataset.classes)) + 1, dtype=torch.int64) for _ in students]
    order = np.arange(len(dataset))[world.rank :: world.size]
    found = []
    with closing(pipeline.epoch(center_views(dataset.sizes, crop), order)) as batches:
        for batch in track(batches, len(order), title, lambda batch: len(batch.labels)):
            for student, answers in zip(students, best, strict=True):
                logits = logits_of(student.classify, batch.images, bf16, flip)
                classes = logits.topk(answers.shape[1] - 1, dim=-1).indices
                odd = (~logits.isfinite()).sum(dim=-1, keepdim=True)
                found.append((answers, batch.sample_ids, torch.cat([classes, odd], dim=1)))
    for answers, sample_ids, rows in found:  # only now: the device is waited for once
        answers[sample_ids.cpu()] = rows.cpu()
    for student, was_training in zip(students, training, strict=True):
        student.train(was_training)
    best = [world.sum(answers) for answers in best]
    if odd_images := max(int((answers[:, -1] > 0).sum()) for answers in best):
        raise BadInput(
            f"the student answers NaN or infinity to {odd_images:,} of {len(dataset):,} validation images, so it has "
            "no accuracy: it diverged; train anew with a lower --lr or --clip"
        )
    return [answers[:, :-1].numpy() for answers in best]


def logits_of(classify: Callable[[Tensor], Tensor], images: Tensor, bf16: bool, flip: bool) -> Tensor:
    """[B, C] of uint8 images [B, 3, S, S]; with `flip` the mean over each image and its mirror image."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = classify(images)
        return (logits + classify(images.flip(-1))) / 2 if flip else logits


def accuracy(best: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(top-1, top-5) as shares; `best` as `best_classes` gives it."""
    hits = best == labels[:, None]
    return float(hits[:, 0].mean()), float(hits.any(axis=1).mean())
