"""A run's student as a model that plain timm loads; the exits are left out.

What was written is loaded back with timm: its logits are compared with the run's, and its answers to validation images
that went through timm's own transform with those of the run's own evaluation.
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
from fastofa.runs.quick_checks import check_new, check_onnx
from fastofa.runs.run import Run, open_run
from fastofa.student.model import Student
from fastofa.system.device import choose_device
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import new_folder
from fastofa.system.progress import notice
from fastofa.training.export_onnx import export_onnx
from fastofa.views.table import center_views

SAMPLE = 100  # validation images that are looked at
AT_ONCE = 50


def export(run_folder: str | Path, out: str | Path, weights: Weights = "last", onnx: bool = False) -> str:
    """Write the model, load it back with timm, compare its answers with the run's; returns the line that loads it.

    Args:
        onnx: write OUT/model.onnx, too (see `fastofa.training.export_onnx`).

    Raises:
        BadInput: no run, no checkpoint, a folder that exists already, a full disk; a package that `onnx` needs is
            missing.
    """
    run_folder, out = Path(run_folder), Path(out)
    check_new(out)
    if onnx:
        check_onnx()
    run = open_run(run_folder)
    student = run.trained_student(weights)
    size, eval_size = student.image_size, run.config.eval_size or student.image_size
    try:
        sample = _own_answers(run, student, eval_size)
    except BadInput as error:
        notice(f"export: compared with the run on made-up images only, as its own cannot be had: {error}")
        sample = None
    with new_folder(out) as folder:
        save_for_hf(
            student.backbone,
            str(folder),
            model_config={"label_names": list(run.classes)},
            safe_serialization=True,
            data_config={
                "input_size": (3, size, size),
                "mean": tuple(student.mean.flatten().tolist()),
                "std": tuple(student.std.flatten().tolist()),
                "test_input_size": (3, eval_size, eval_size),
                "crop_pct": run.config.eval_crop,
                "crop_mode": "center",
                "interpolation": "bilinear",
            },
        )
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        _compare_logits(student.cpu(), model)
        if sample is not None:
            _compare_answers(sample, model)
        if onnx:
            pixels = Normalized(student.backbone, student.mean, student.std).eval()
            notice(f"export: {export_onnx(pixels, folder, run.classes, eval_size, run.config.eval_crop)}")
    return f"timm.create_model({json.dumps(f'local-dir:{out}', ensure_ascii=False)}, pretrained=True)"


@dataclass(frozen=True)
class _Sample:
    """Validation images, and what the run's own evaluation answers to them."""

    images: list[Image.Image]
    labels: np.ndarray
    answers: np.ndarray


@torch.inference_mode()
def _own_answers(run: Run, student: Student, size: int) -> _Sample:
    """Raises BadInput where the run's validation images are not there any more."""
    dataset = open_dataset(run.config.data, "val")
    if dataset.classes != run.classes:
        raise BadInput(f"{run.config.data} has other classes now")
    ids = np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).round().astype(np.int64))
    boxes = center_views(dataset.sizes, run.config.eval_crop).boxes(dataset.stored_sizes)
    device = choose_device("auto")
    student.to(device)
    answers = []
    for part in np.array_split(ids, -(-len(ids) // AT_ONCE)):
        pixels = [crop_resize_one(dataset.read(i), boxes[i].tolist(), False, size) for i in part.tolist()]
        answers.append(student.classify(torch.stack(pixels).to(device)).argmax(dim=1).cpu().numpy())
    return _Sample([_picture(dataset, i) for i in ids.tolist()], dataset.labels[ids], np.concatenate(answers))


def _picture(dataset: Dataset, sample_id: int) -> Image.Image:
    """As whoever uses timm has it: from its file, if it has one."""
    if dataset.pixels is not None or dataset.spans is not None:
        return Image.fromarray(np.ascontiguousarray(dataset.read(sample_id).permute(1, 2, 0).numpy()))
    try:
        with Image.open(dataset.path(sample_id)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise BadInput(f"{dataset.path(sample_id)}: Pillow cannot read it ({error})") from None


@torch.inference_mode()
def _compare_logits(student: Student, model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, student.image_size, student.image_size, generator=torch.Generator().manual_seed(0))
    expected, got = student(images)[-1], model(images)
    if not torch.allclose(expected, got, rtol=1e-4, atol=1e-4):
        raise BadInput(f"export: timm's logits differ from the run's by up to {(expected - got).abs().max():.2g}")


@torch.inference_mode()
def _compare_answers(sample: _Sample, model: Any) -> None:
    """Pixels differ a little, as timm resizes before it crops; a wrong size, crop or normalisation costs accuracy."""
    transform: Any = create_transform(**resolve_model_data_config(model, use_test_size=True))
    device = choose_device("auto")
    model.to(device)
    found = []
    for i in range(0, len(sample.images), AT_ONCE):
        images = torch.stack([transform(image) for image in sample.images[i : i + AT_ONCE]])
        found.append(model(images.to(device)).argmax(dim=1).cpu().numpy())
    answers, count = np.concatenate(found), len(sample.labels)
    own, timms = (float((a == sample.labels).mean()) for a in (sample.answers, answers))
    where = counted(count, "validation image")
    figures = f"through timm's own transform top-1 is {timms:.2%} on {where}, in the run {own:.2%}"
    if own - timms > 0.05 + 1 / math.sqrt(count):
        raise BadInput(f"export: {figures}; nothing was written, as timm's users would get another model")
    notice(f"export: {figures}; {(answers == sample.answers).mean():.2%} of the answers are the same")
