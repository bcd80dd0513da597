"""Export a run's student, without the exits, or a checkpoint as a model that plain timm loads.

The exported model is then loaded with timm. Its logits are compared with the run's, and its predictions for validation
images, preprocessed by timm's own transform, with those of the run's evaluation.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from fastofa.data.dataset import Dataset
from fastofa.data.decode import crop_resize_one
from fastofa.data.open import open_dataset
from fastofa.models.normalized import Normalized
from fastofa.runs.config import Weights
from fastofa.runs.quick_checks import check_checkpoint, check_new, check_onnx
from fastofa.runs.run import Run, open_run
from fastofa.student.model import Student
from fastofa.system.device import choose_device
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import new_folder
from fastofa.system.progress import notice
from fastofa.training.checkpoint_model import open_checkpoint
from fastofa.training.export_onnx import export_onnx
from fastofa.views.table import center_views

SAMPLE = 100  # validation images whose predictions are compared
BATCH_SIZE = 50


def export(run_folder: str | Path, out: str | Path, weights: Weights = "last", onnx: bool = False) -> str:
    """Write the model, load it with timm and compare its predictions with the run's.

    Args:
        run_folder: folder written by `train`.
        out: new folder for the model.
        weights: see `fastofa export --help`.
        onnx: also write OUT/model.onnx (see `fastofa.training.export_onnx`).

    Returns:
        The line of Python that loads the model with timm.

    Raises:
        BadInput: there is no run or no checkpoint; `out` exists; the disk is full; a package that `onnx` needs is
            missing; the exported model's logits or predictions differ from the run's.
    """
    run_folder, out = Path(run_folder), Path(out)
    check_new(out)
    if onnx:
        check_onnx()
    run = open_run(run_folder)
    student = run.trained_student(weights)
    size, eval_size = student.image_size, run.config.eval_size or student.image_size
    try:
        sample = _own_predictions(run, student, eval_size)
    except BadInput as error:
        notice(
            f"export: compared with the run on random images only, because its validation images are "
            f"unavailable: {error}"
        )
        sample = None
    normalized = Normalized(student.backbone, student.mean, student.std).cpu().eval()
    with new_folder(out) as folder:
        view = eval_size, run.config.eval_crop, run.config.eval_interpolation
        model = _write(normalized, folder, run.classes, size, *view)
        if sample is not None:
            _compare_predictions(sample, model)
        if onnx:
            notice(f"export: {export_onnx(normalized, folder, run.classes, *view)}")
    return _line(out)


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    student: str,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    eval_crop: float | None = None,
    onnx: bool = False,
) -> str:
    """Write the model with a checkpoint's weights under timm's present names, load it with timm and compare the logits.

    A checkpoint has no class names, and so the model has none.

    Args:
        checkpoint, student, mean, std, eval_crop: see `fastofa.training.checkpoint_model.open_checkpoint`.
        out: new folder for the model.
        onnx: also write OUT/model.onnx.

    Returns:
        The line of Python that loads the model with timm.

    Raises:
        BadInput: the weights cannot be read or do not match; `out` exists; the disk is full; a package that `onnx`
            needs is missing.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_new(out)
    check_checkpoint(checkpoint, student, mean, std, eval_crop)
    if onnx:
        check_onnx()
    classifier = open_checkpoint(checkpoint, student, mean, std, eval_crop)
    notice(f"export: {classifier.describe()}")
    size, crop = classifier.image_size, classifier.crop
    interpolation = "bicubic" if classifier.bicubic else "bilinear"
    with new_folder(out) as folder:
        _write(classifier.model, folder, (), size, size, crop, interpolation)
        if onnx:
            notice(f"export: {export_onnx(classifier.model, folder, classifier.classes, size, crop, interpolation)}")
    return _line(out)


def _line(out: Path) -> str:
    return f"timm.create_model({json.dumps(f'local-dir:{out}', ensure_ascii=False)}, pretrained=True)"


def _write(
    normalized: Normalized,
    folder: Path,
    classes: tuple[str, ...],
    size: int,
    eval_size: int,
    crop: float,
    interpolation: str,
) -> Any:
    """Write the model into the folder; returns it as timm loads it. Raises BadInput if timm's logits differ."""
    save_for_hf(
        normalized.model,
        str(folder),
        model_config={"label_names": list(classes)} if classes else None,
        safe_serialization=True,
        data_config={
            "input_size": (3, size, size),
            "mean": tuple(normalized.mean.flatten().tolist()),
            "std": tuple(normalized.std.flatten().tolist()),
            "test_input_size": (3, eval_size, eval_size),
            "crop_pct": crop,
            "crop_mode": "center",
            "interpolation": interpolation,
        },
    )
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _compare_logits(normalized.model, model, size)
    return model


@dataclass(frozen=True)
class _Sample:
    """Some validation images, with the predictions of the run's own evaluation."""

    images: list[Image.Image]
    labels: np.ndarray
    """int64 [N]."""
    predictions: np.ndarray
    """int64 [N], the best class of each image."""


@torch.inference_mode()
def _own_predictions(run: Run, student: Student, size: int) -> _Sample:
    """Raises BadInput if the run's validation images are no longer available."""
    dataset = open_dataset(run.data, "val", run.config.skip_corrupt, limits=run.config.limits())
    if dataset.classes != run.classes:
        raise BadInput(f"the classes of {run.data} have changed")
    ids = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).round().astype(np.int64))
    boxes = center_views(dataset.sizes, run.config.eval_crop).boxes(dataset.stored_sizes)
    device, bicubic = choose_device("auto"), run.config.eval_interpolation == "bicubic"
    student.to(device)
    predictions = []
    for part in np.array_split(ids, -(-len(ids) // BATCH_SIZE)):
        images = [crop_resize_one(dataset.read(i), boxes[i].tolist(), False, size, bicubic) for i in part.tolist()]
        predictions.append(student.classify(torch.stack(images).to(device)).argmax(dim=1).cpu().numpy())
    return _Sample([_pil_image(dataset, i) for i in ids.tolist()], dataset.labels[ids], np.concatenate(predictions))


def _pil_image(dataset: Dataset, sample_id: int) -> Image.Image:
    """The image as a user of timm would load it: with Pillow from its file, if it has one."""
    if dataset.pixels is not None or dataset.spans is not None:
        return Image.fromarray(np.ascontiguousarray(dataset.read(sample_id).permute(1, 2, 0).numpy()))
    try:
        with Image.open(dataset.path(sample_id)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise BadInput(f"{dataset.path(sample_id)}: not readable by Pillow ({error})") from None


@torch.inference_mode()
def _compare_logits(own: torch.nn.Module, model: torch.nn.Module, size: int) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, got = own(images), model(images)
    if not torch.allclose(expected, got, rtol=1e-4, atol=1e-4):
        raise BadInput(f"export: timm's logits differ from the model's by up to {(expected - got).abs().max():.2g}")


@torch.inference_mode()
def _compare_predictions(sample: _Sample, model: Any) -> None:
    """Compare top-1 on the sample through timm's transform with the run's. Raises BadInput if it is much lower.

    Pixels differ slightly, since timm resizes before it crops. A wrong size, crop or normalisation would cost accuracy.
    """
    transform: Any = create_transform(**resolve_model_data_config(model, use_test_size=True))
    device = choose_device("auto")
    model.to(device)
    batches = []
    for i in range(0, len(sample.images), BATCH_SIZE):
        images = torch.stack([transform(image) for image in sample.images[i : i + BATCH_SIZE]])
        batches.append(model(images.to(device)).argmax(dim=1).cpu().numpy())
    predictions, count = np.concatenate(batches), len(sample.labels)
    expected, got = (float((p == sample.labels).mean()) for p in (sample.predictions, predictions))
    figures = (
        f"top-1 on {counted(count, 'validation image')} is {got:.2%} through timm's own transform, {expected:.2%} in "
        "the run"
    )
    if expected - got > 0.05 + 1 / math.sqrt(count):
        raise BadInput(f"export: {figures}; nothing was written, since the model would behave differently in timm")
    notice(f"export: {figures}; {(predictions == sample.predictions).mean():.2%} of the predictions are the same")
