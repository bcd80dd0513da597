"""Predictions for image files without labels, by a run's student or an exported model.

    for prediction in predict("run", "photos"):
        print(prediction.file, prediction.classes[0], prediction.probabilities[0])

An image becomes pixels as in `fastofa evaluate`: the central square, resized by torch's antialiased bilinear kernel,
normalised as the model was trained. So the top-1 of a run's validation images is the one that `evaluate` computes.

Shapes: B batch, S image side, C classes.
"""

import os
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastofa.data.decode import REMEDY, crop_resize_one, read_image
from fastofa.data.image_files import image_files
from fastofa.models.normalized import Normalized
from fastofa.models.timm_models import (
    CONFIG,
    check_channels,
    find_folder,
    first_line,
    input_size,
    normalization,
    open_model_folder,
)
from fastofa.runs.config import Weights
from fastofa.runs.run import is_run, open_run
from fastofa.system.device import choose_bf16, choose_device, choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.progress import notice
from fastofa.system.threads import in_order
from fastofa.training.validate import logits_of
from fastofa.views.table import center_views


@dataclass(frozen=True)
class Prediction:
    file: Path
    classes: tuple[str, ...]
    """The most probable classes, best first: names, or the numbers of the model's outputs where it has no names."""
    probabilities: tuple[float, ...]
    """Of each, 0 to 1: the softmax over all classes of the model."""


class UnreadableImages(BadInput):
    """Some images could not be read; all others have been predicted."""


@dataclass(frozen=True)
class Classifier:
    """Made by `open_classifier`."""

    name: str
    model: Normalized
    device: torch.device
    classes: tuple[str, ...]
    """The name of each output, or its number."""
    image_size: int
    """S, in pixels."""
    crop: float
    """Side of the central square, as a share of the image's shorter side."""
    flip: bool
    """Take the mean of the logits of each image and of its mirror image."""
    bf16: bool

    def read(self, file: Path) -> Tensor:
        """uint8 [3, S, S]. Raises BadInput for a file that cannot be read."""
        image = read_image(file)
        sizes = np.array([image.shape[1:]])
        box = center_views(sizes, self.crop).boxes(sizes)[0]
        return crop_resize_one(image, box.tolist(), False, self.image_size)

    @torch.inference_mode()
    def predict(self, files: list[Path], images: list[Tensor], topk: int) -> list[Prediction]:
        """Raises BadInput where a logit is not finite."""
        batch = torch.stack(images).contiguous(memory_format=torch.channels_last).to(self.device)
        logits = logits_of(self.model, batch, self.bf16, self.flip)
        if odd := (~logits.isfinite()).any(dim=1).nonzero().flatten().tolist():
            raise BadInput(
                f"{self.name}: expected finite logits, got NaN or infinity for {files[odd[0]]}; its weights are "
                "damaged or its training diverged"
            )
        best = logits.topk(topk, dim=1).indices
        probabilities = logits.float().softmax(dim=1).gather(1, best)
        return [
            Prediction(file, tuple(self.classes[i] for i in outputs), tuple(shares))
            for file, outputs, shares in zip(files, best.tolist(), probabilities.tolist(), strict=True)
        ]


def open_classifier(model: str | Path, weights: Weights = "last", device: str = "auto") -> Classifier:
    """A run's student, or a model as `fastofa export` and timm write it, ready to predict.

    Args:
        model: a run's folder; a folder with config.json and weights, also as local-dir:FOLDER; hf-hub:OWNER/NAME.
        weights: which of a run's, see `fastofa evaluate --help`.
        device: auto, cuda, cuda:1, cpu.

    Raises:
        BadInput: no such model, weights that do not fit, `weights` of what holds but one set of them.
    """
    folder, on = find_folder(str(model)), choose_device(device)
    if folder is None or not (folder / CONFIG).is_file():
        found = f"there is no {CONFIG} in it" if folder is not None else "there is no such folder"
        raise BadInput(
            f"{model}: expected the folder of a run or of an exported model, local-dir:FOLDER or hf-hub:OWNER/NAME; "
            f"{found}"
        )
    classifier = _of_run(folder, weights, on) if is_run(folder) else _of_model(str(model), folder, weights, on)
    classifier.model.eval().to(on)
    side, name = classifier.image_size, classifier.name
    try:
        with torch.inference_mode():
            shape = classifier.model(torch.zeros(2, 3, side, side, dtype=torch.uint8, device=on)).shape
    except Exception as error:  # a model that a strange config.json describes fails in many ways
        raise BadInput(f"{name}: does not run at {side} px ({first_line(error)}); correct its {CONFIG}") from None
    if shape != (2, len(classifier.classes)):
        raise BadInput(f"{name}: expected logits [images, classes], got {list(shape)} of two images")
    return classifier


def _of_run(folder: Path, weights: Weights, device: torch.device) -> Classifier:
    run = open_run(folder)
    c, student = run.config, run.trained_student(weights)
    return Classifier(
        name=str(folder),
        model=Normalized(student.backbone, student.mean, student.std),
        device=device,
        classes=run.classes,
        image_size=c.eval_size or student.image_size,
        crop=c.eval_crop,
        flip=c.eval_flip,
        bf16=choose_bf16(c.precision, device),
    )


def _of_model(name: str, folder: Path, weights: Weights, device: torch.device) -> Classifier:
    """At the size and crop that config.json gives for tests, if any: they are those of the run's evaluation."""
    if weights != "last":
        raise BadInput(f"weights: expected a run to choose {weights} from, {name} is a model; leave --weights out")
    model, config = open_model_folder(folder)
    check_channels(model, name)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization(model))
    given = config.preprocessing
    size = given.get("test_input_size") or given.get("input_size")
    return Classifier(
        name=name,
        model=Normalized(model, mean, std),
        device=device,
        classes=tuple(config.label_names.get(i, str(i)) for i in range(model.num_classes)),
        image_size=size[-1] if size else input_size(model),
        crop=min(given.get("test_crop_pct") or given.get("crop_pct") or 0.875, 1.0),
        flip=False,
        bf16=choose_bf16("auto", device),
    )


def predict(
    model: str | Path,
    files: str | Path | Iterable[str | Path],
    topk: int = 5,
    weights: Weights = "last",
    batch_size: int = 256,
    device: str = "auto",
    workers: int | None = None,
    skip_corrupt: bool = False,
) -> Generator[Prediction, None, None]:
    """The most probable classes of each image, in the order of `files`, while later images are being read.

    Args:
        model, weights, device: see `open_classifier`.
        files: images, and folders that are searched to any depth (see `image_files`); one or several.
        topk: classes for each image, at most as many as the model has.
        batch_size: images at once.
        workers: threads that decode; 0: none but the caller's; None: one per core, at most 16.
        skip_corrupt: do not raise an error for images that cannot be read.

    An image that cannot be read is named by a notice and has no prediction.

    Raises:
        BadInput: at the call: no such model, no images, a number that cannot be; later: logits that are not finite.
        UnreadableImages: after the last prediction, if some images could not be read; not with `skip_corrupt`.
    """
    for name, value, least in (("topk", topk, 1), ("batch-size", batch_size, 1), ("workers", workers or 0, 0)):
        if value < least:
            raise BadInput(f"{name}: expected at least {least}, got {value}")
    found = image_files([files] if isinstance(files, str | os.PathLike) else files)
    classifier = open_classifier(model, weights, device)
    return predict_images(classifier, found, topk, batch_size, choose_workers(workers), skip_corrupt)


def predict_images(
    classifier: Classifier, files: list[Path], topk: int, batch_size: int, workers: int, skip_corrupt: bool
) -> Generator[Prediction, None, None]:
    """As `predict`, of files that were listed before."""
    unreadable, topk = 0, min(topk, len(classifier.classes))
    with closing(_read(classifier, files, workers)) as images:
        while batch := list(islice(images, batch_size)):
            readable = [(file, image) for file, image in batch if isinstance(image, Tensor)]
            for _, image in batch:
                if isinstance(image, BadInput):
                    notice(str(image).removesuffix(f"; {REMEDY}"))
                    unreadable += 1
            if readable:
                yield from classifier.predict([f for f, _ in readable], [image for _, image in readable], topk)
    if unreadable and not skip_corrupt:
        raise UnreadableImages(
            f"expected {counted(len(files), 'readable image')}, {unreadable:,} could not be read, named above; all "
            "others are predicted; mend or remove these, or --skip-corrupt accepts it"
        )


def _read(
    classifier: Classifier, files: list[Path], workers: int
) -> Generator[tuple[Path, Tensor | BadInput], None, None]:
    """The pixels of each file, or why it cannot be read."""

    def read(file: Path) -> tuple[Path, Tensor | BadInput]:
        try:
            return file, classifier.read(file)
        except BadInput as error:
            return file, error

    yield from in_order(read, files, workers) if workers else map(read, files)
