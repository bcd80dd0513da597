"""Evaluate a run's student: metrics, agreement with the teacher, recall of each class and confusion matrix."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.methods.targets import TopK
from fastofa.pipelines import open_pipeline
from fastofa.reports.confusion import confusion
from fastofa.reports.metrics import measure
from fastofa.runs.config import Weights
from fastofa.runs.run import Run, open_run
from fastofa.system.device import choose_bf16, choose_device, choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import write_json
from fastofa.system.progress import notice
from fastofa.teacher.cache import TeacherCache, agreement
from fastofa.training.validate import best_classes


@dataclass(frozen=True)
class Evaluation:
    data: str
    """Name of the dataset whose validation images were used."""
    images: int
    """Number of images."""
    metrics: dict[str, float]
    """Every metric of reports/metrics.py by name."""
    teacher_top1: float | None
    """Fraction of the images, 0 to 1; None without a teacher cache for these images."""
    agreement: float | None
    """Fraction of images for which student and teacher predict the same class; None without a teacher cache for
    them."""
    classes: tuple[str, ...] = field(repr=False)
    confusion: np.ndarray = field(repr=False, compare=False)
    """int64 [C, C]: number of images by true class (row) and predicted class (column)."""

    @property
    def top1(self) -> float:
        """Fraction of the images, 0 to 1; the same applies to top5."""
        return self.metrics["top1"]

    @property
    def top5(self) -> float:
        return self.metrics["top5"]

    def summary(self) -> dict[str, Any]:
        """The figures over all images, as written to JSON."""
        teacher = {"teacher_top1": self.teacher_top1, "agreement": self.agreement}
        return {"data": self.data, "images": self.images, **self.metrics, **teacher}

    def details(self) -> dict[str, Any]:
        """`summary` with "classes", a list of {name, images, recall}, and "confusion", the rows of the matrix, in the
        same class order.

        Recall is the fraction of a class's images that are predicted as that class; it is None for a class without
        images.
        """
        counts = self.confusion.sum(axis=1).tolist()
        recalls = [
            int(hits) / count if count else None for hits, count in zip(self.confusion.diagonal(), counts, strict=True)
        ]
        classes = [
            {"name": name, "images": count, "recall": recall}
            for name, count, recall in zip(self.classes, counts, recalls, strict=True)
        ]
        return {**self.summary(), "classes": classes, "confusion": self.confusion.tolist()}


def evaluate(
    run_folder: str | Path,
    data: str | None = None,
    weights: Weights = "last",
    batch_size: int = 256,
    device: str = "auto",
    pipeline: str = "auto",
    workers: int | None = None,
) -> Evaluation:
    """Evaluate a run's student and write the figures to RUN/evaluation.json.

    Args:
        run_folder: folder written by `train`.
        data: dataset whose validation images are used; None: the run's own.
        weights, batch_size, device, pipeline, workers: see the flags of `fastofa evaluate`.

    Raises:
        BadInput: there is no run, no checkpoint or no dataset, or the dataset has other classes; the student's logits
            are not finite.
    """
    run_folder = Path(run_folder)
    run = open_run(run_folder)
    dataset = open_dataset(data, "val") if data is not None else _own_data(run)
    if dataset.classes != run.classes:
        raise BadInput(
            f"data {dataset.spec}: expected the {counted(len(run.classes), 'class')} that {run_folder} was trained on, "
            f"got {len(dataset.classes)}: {_difference(run.classes, dataset.classes)}"
        )
    on = choose_device(device)
    student = run.trained_student(weights).to(on)
    size = run.config.eval_size or student.image_size
    loader = open_pipeline(pipeline, dataset, size, batch_size, on, choose_workers(workers))
    bf16 = choose_bf16(run.config.precision, on)
    c = run.config
    bicubic = c.eval_interpolation == "bicubic"
    best = best_classes(student, loader, dataset, c.eval_crop, bf16, "evaluate", c.eval_flip, bicubic)
    teacher = _teacher_targets(run, dataset)
    evaluation = Evaluation(
        data=dataset.spec,
        images=len(dataset),
        metrics=measure(best, dataset.labels),
        teacher_top1=None if teacher is None else agreement(dataset.labels, teacher),
        agreement=None if teacher is None else agreement(best[:, 0], teacher),
        classes=dataset.classes,
        confusion=confusion(best[:, 0], dataset.labels, len(dataset.classes)),
    )
    write_json(run_folder / "evaluation.json", {"weights": weights, **evaluation.summary()})
    return evaluation


def _own_data(run: Run) -> Dataset:
    """Open the run's own validation images and report their dataset. Raises BadInput if they cannot be opened."""
    try:
        dataset = open_dataset(run.data, "val")
    except BadInput as error:
        raise BadInput(f"{run.path}: could not open the run's own data, give --data: {error}") from None
    same = dataset.fingerprint == run.val_fingerprint
    notice(
        f"data {run.data}, which the run was trained on"
        + ("" if same else "; its validation images have changed since")
    )
    return dataset


def _teacher_targets(run: Run, dataset: Dataset) -> TopK | None:
    """The teacher's targets for these images; None without the cache that the run started with."""
    if run.cache is None:
        return None
    try:
        cache = TeacherCache.open(run.cache)
        header = cache.header
        if (header["dataset"]["val"], header["num_val_samples"]) != (dataset.fingerprint, len(dataset)):
            raise BadInput(f"{cache.path} contains predictions for other validation images")
        if cache.digests(len(run.view_digests)) != run.view_digests:
            raise BadInput(f"{cache.path} does not contain the predictions that the run started with")
        return cache.val_targets()
    except BadInput as error:
        notice(f"no agreement with the teacher: {error}")
    return None


def _difference(expected: tuple[str, ...], got: tuple[str, ...]) -> str:
    """Describe the first missing or unexpected classes, or the first difference in their order."""
    missing, unexpected = ([name for name in a if name not in b] for a, b in ((expected, got), (got, expected)))
    if missing or unexpected:
        parts = ((kind, names) for kind, names in (("missing", missing), ("unexpected", unexpected)) if names)
        return "; ".join(f"{kind} {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for kind, names in parts)
    first = next(i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b)
    return f"in another order, with {got[first]} instead of {expected[first]}"
