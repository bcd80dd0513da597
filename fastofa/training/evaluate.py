"""Evaluate a run's student, an exported model or a checkpoint: metrics, recall of each class and confusion matrix.

For a run also the agreement with its teacher.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastofa.data.dataset import Dataset
from fastofa.data.headers import DEFAULT
from fastofa.data.open import open_dataset
from fastofa.methods.targets import TopK, agreement
from fastofa.models.timm_models import CONFIG, find_folder
from fastofa.pipelines import open_pipeline
from fastofa.reports.confusion import confusion
from fastofa.reports.metrics import measure
from fastofa.runs.config import Weights
from fastofa.runs.quick_checks import check_checkpoint
from fastofa.runs.run import Run, is_run, open_run
from fastofa.system.device import choose_device, choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import write_json
from fastofa.system.progress import notice
from fastofa.teacher.staged_cache import open_cache
from fastofa.training.checkpoint_model import open_checkpoint
from fastofa.training.online_targets import online_targets
from fastofa.training.predict_files import Classifier, open_classifier
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
    """Fraction of the images, 0 to 1; None without a teacher cache for these images or an online teacher."""
    agreement: float | None
    """Fraction of images for which student and teacher predict the same class; None likewise."""
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
    model: str | Path,
    data: str | None = None,
    weights: Weights = "last",
    batch_size: int = 256,
    device: str = "auto",
    pipeline: str = "auto",
    workers: int | None = None,
    student: str | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    eval_crop: float | None = None,
) -> Evaluation:
    """Evaluate a model on validation images. The figures of a run are also written to RUN/evaluation.json.

    Args:
        model: a run's folder; a folder with config.json and weights, or local-dir:FOLDER; hf-hub:OWNER/NAME; or, with
            `student`, a file with weights.
        data: dataset whose validation images are used; None: the run's own.
        student: timm's name of the checkpoint's architecture.
        mean, std: normalisation of RGB in 0..1 for a checkpoint; None: timm's for `student`.
        eval_crop: side of the central square for a checkpoint, as a fraction of the image's shorter side; None: timm's.
        weights, batch_size, device, pipeline, workers: see the flags of `fastofa evaluate`.

    Raises:
        BadInput: there is no such model, no checkpoint or no dataset; the dataset has other classes; the logits are
            not finite.
    """
    check_checkpoint(Path(model), student, mean, std, eval_crop, weights)
    on = choose_device(device)
    run = None
    if student is None:
        folder = find_folder(str(model)) or Path(model)
        run = open_run(folder) if is_run(folder) or not (folder / CONFIG).is_file() else None
    if data is not None:
        dataset = open_dataset(data, "val", limits=DEFAULT if run is None else run.config.limits())
    elif run is not None:
        dataset = _own_data(run)
    else:
        raise BadInput(f"data: expected --data with the images, got none; {model} is not a run, which names its own")
    if run is not None and dataset.classes != run.classes:
        raise BadInput(
            f"data {dataset.spec}: expected the {counted(len(run.classes), 'class')} that {model} was trained on, "
            f"got {len(dataset.classes)}: {_difference(run.classes, dataset.classes)}"
        )
    if student is None:
        classifier = open_classifier(model, weights, device)
    else:
        classifier = open_checkpoint(Path(model), student, mean, std, eval_crop, on)
    columns = None
    if run is None:
        columns = _columns(classifier, dataset)
        notice(f"{classifier.describe()}; evaluated on {counted(len(dataset.classes), 'class')} of {dataset.spec}")
    loader = open_pipeline(pipeline, dataset, classifier.image_size, batch_size, on, choose_workers(workers))
    network = _DataLogits(classifier.model, columns).to(on)
    best = best_classes(
        network, loader, dataset, classifier.crop, classifier.bf16, "evaluate", classifier.flip, classifier.bicubic
    )
    if run is not None and run.teacher is not None:
        teacher = online_targets(run, dataset, on, pipeline, batch_size, workers)
    else:
        teacher = None if run is None else _teacher_targets(run, dataset)
    evaluation = Evaluation(
        data=dataset.spec,
        images=len(dataset),
        metrics=measure(best, dataset.labels),
        teacher_top1=None if teacher is None else agreement(dataset.labels, teacher),
        agreement=None if teacher is None else agreement(best[:, 0], teacher),
        classes=dataset.classes,
        confusion=confusion(best[:, 0], dataset.labels, len(dataset.classes)),
    )
    if run is not None:
        write_json(run.path / "evaluation.json", {"weights": weights, **evaluation.summary()})
    return evaluation


class _DataLogits(nn.Module):
    """`classify(pixels)`: logits [B, C] of the data's classes, as `best_classes` needs them."""

    columns: Tensor | None

    def __init__(self, model: nn.Module, columns: list[int] | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("columns", None if columns is None else torch.tensor(columns))

    def classify(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits if self.columns is None else logits[:, self.columns]


def _columns(classifier: Classifier, dataset: Dataset) -> list[int] | None:
    """The output for each class of the data by name; None if the outputs are those classes in the same order.

    Raises:
        BadInput: the names do not match; or the outputs have no names and the numbers of classes differ.
    """
    outputs, classes = classifier.classes, dataset.classes
    if outputs == classes:
        return None
    unnamed = outputs == tuple(map(str, range(len(outputs))))
    if unnamed and len(outputs) == len(classes):
        notice(f"{classifier.name}: has no class names; its outputs are taken for the data's classes in their order")
        return None
    index = {name: i for i, name in enumerate(outputs)}
    if not unnamed and all(name in index for name in classes):
        return [index[name] for name in classes]
    reason = "without names" if unnamed else _difference(classes, outputs)
    raise BadInput(
        f"{classifier.name}: expected outputs for the {counted(len(classes), 'class')} of {dataset.spec}, got "
        f"{len(outputs):,}: {reason}; give the --data that it was trained for, or another model"
    )


def _own_data(run: Run) -> Dataset:
    """Open the run's own validation images and report their dataset. Raises BadInput if they cannot be opened."""
    try:
        dataset = open_dataset(run.data, "val", run.config.skip_corrupt, limits=run.config.limits())
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
        cache = open_cache(run.cache)
        header = cache.header
        if (header["dataset"]["val"], header["num_val_samples"]) != (dataset.fingerprint, len(dataset)):
            raise BadInput(f"{cache.path} contains predictions for other validation images")
        if cache.digests(len(run.view_digests)) != run.view_digests:
            raise BadInput(f"{cache.path} does not contain the predictions that the run started with")
        return cache.val_targets(run.config.teacher_weights)
    except BadInput as error:
        notice(f"agreement with the teacher not measured: {error}")
    return None


def _difference(expected: tuple[str, ...], got: tuple[str, ...]) -> str:
    """Describe the first missing or unexpected classes, or the first difference in their order."""
    missing, unexpected = ([name for name in a if name not in b] for a, b in ((expected, got), (got, expected)))
    if missing or unexpected:
        parts = ((kind, names) for kind, names in (("missing", missing), ("unexpected", unexpected)) if names)
        return "; ".join(f"{kind} {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for kind, names in parts)
    first = next(i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b)
    return f"in another order, with {got[first]} instead of {expected[first]}"
