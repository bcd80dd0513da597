"""Predict the classes of image files without labels, with a run's student or an exported model.

    for prediction in predict("run", "photos"):
        print(prediction.file, prediction.classes[0], prediction.probabilities[0])

Images are preprocessed as in `fastofa evaluate`: the central square is cropped, resized with torch's antialiased
filter (bilinear or bicubic) and normalised as in training. Top-1 on a run's validation images therefore equals that of
`evaluate`.

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
from fastofa.data.headers import DEFAULT, Limits
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
    """The most probable classes, best first: names, or indices of the model's outputs if they have no names."""
    probabilities: tuple[float, ...]
    """The probability of each of them, 0 to 1: the softmax over all classes of the model."""


class UnreadableImages(BadInput):
    """Some images could not be read; all others were predicted."""


@dataclass(frozen=True)
class Classifier:
    """A model with its preprocessing, as returned by `open_classifier`."""

    name: str
    model: Normalized
    device: torch.device
    classes: tuple[str, ...]
    """The name of each output, or its index."""
    image_size: int
    """S, in pixels."""
    crop: float
    """Side of the central square, as a fraction of the image's shorter side."""
    bicubic: bool
    """Whether the square is resized with a bicubic filter, otherwise with a bilinear one."""
    flip: bool
    """Average the logits of each image and of its mirror image."""
    bf16: bool
    limits: Limits = DEFAULT
    """The limits within which images are accepted: those of a run's training."""

    def describe(self) -> str:
        """The model and its preprocessing, for a notice."""
        mean, std = (", ".join(f"{v:.4g}" for v in values.flatten()) for values in (self.model.mean, self.model.std))
        return (
            f"{self.name}: {counted(len(self.classes), 'output')}, {self.image_size} px, central crop {self.crop:g}, "
            f"mean {mean}, std {std}"
        )

    def read(self, file: Path) -> Tensor:
        """The cropped and resized image, uint8 [3, S, S]. Raises BadInput if the file cannot be read."""
        image = read_image(file, self.limits)
        sizes = np.array([image.shape[1:]])
        box = center_views(sizes, self.crop).boxes(sizes)[0]
        return crop_resize_one(image, box.tolist(), False, self.image_size, self.bicubic)

    @torch.inference_mode()
    def predict(self, files: list[Path], images: list[Tensor], topk: int) -> list[Prediction]:
        """The most probable classes of images as `read` returns them. Raises BadInput if a logit is not finite."""
        batch = torch.stack(images).contiguous(memory_format=torch.channels_last).to(self.device)
        logits = logits_of(self.model, batch, self.bf16, self.flip)
        if infinite := (~logits.isfinite()).any(dim=1).nonzero().flatten().tolist():
            raise BadInput(
                f"{self.name}: expected finite logits, got NaN or infinity for {files[infinite[0]]}; its weights are "
                "damaged or its training diverged"
            )
        best = logits.topk(topk, dim=1).indices
        probabilities = logits.float().softmax(dim=1).gather(1, best)
        return [
            Prediction(file, tuple(self.classes[i] for i in outputs), tuple(shares))
            for file, outputs, shares in zip(files, best.tolist(), probabilities.tolist(), strict=True)
        ]


def open_classifier(model: str | Path, weights: Weights = "last", device: str = "auto") -> Classifier:
    """Open a run's student, or a model written by `fastofa export` or timm.

    Args:
        model: a run's folder; a folder with config.json and weights, or local-dir:FOLDER; or hf-hub:OWNER/NAME.
        weights: which weights of a run (see `fastofa evaluate --help`).
        device: auto, cuda, cuda:1, cpu.

    Raises:
        BadInput: there is no such model; its weights do not fit; `weights` is given for a model that is not a run.
    """
    folder, on = find_folder(str(model)), choose_device(device)
    if folder is None or not (folder / CONFIG).is_file():
        problem = f"there is no {CONFIG} in it" if folder is not None else "there is no such folder"
        raise BadInput(
            f"{model}: expected the folder of a run or of an exported model, local-dir:FOLDER or hf-hub:OWNER/NAME; "
            f"{problem}"
        )
    classifier = _of_run(folder, weights, on) if is_run(folder) else _of_model(str(model), folder, weights, on)
    classifier.model.eval().to(on)
    side, name = classifier.image_size, classifier.name
    try:
        with torch.inference_mode():
            shape = classifier.model(torch.zeros(2, 3, side, side, dtype=torch.uint8, device=on)).shape
    except Exception as error:  # with a wrong config.json a model fails in many ways
        raise BadInput(f"{name}: does not run at {side} px ({first_line(error)}); correct its {CONFIG}") from None
    if shape != (2, len(classifier.classes)):
        raise BadInput(f"{name}: expected logits [images, classes], got {list(shape)} for two images")
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
        bicubic=c.eval_interpolation == "bicubic",
        flip=c.eval_flip,
        bf16=choose_bf16(c.precision, device),
        limits=c.limits(),
    )


def _of_model(name: str, folder: Path, weights: Weights, device: torch.device) -> Classifier:
    """A model with the test size, crop and filter from its config.json, where `fastofa export` writes the run's."""
    if weights != "last":
        raise BadInput(f"weights: only a run has {weights} weights, but {name} is a model; leave --weights out")
    model, config = open_model_folder(folder)
    check_channels(model, name)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization(model))
    preprocessing = config.preprocessing
    size = preprocessing.get("test_input_size") or preprocessing.get("input_size")
    return Classifier(
        name=name,
        model=Normalized(model, mean, std),
        device=device,
        classes=tuple(config.label_names.get(i, str(i)) for i in range(model.num_classes)),
        image_size=size[-1] if size else input_size(model),
        crop=min(preprocessing.get("test_crop_pct") or preprocessing.get("crop_pct") or 0.875, 1.0),
        bicubic=preprocessing.get("interpolation") == "bicubic",
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
    """Yield the most probable classes of each image, in the order of `files`. Later images are read in the background.

    An image that cannot be read is reported in a notice and has no prediction.

    Args:
        model, weights, device: see `open_classifier`.
        files: one or more images, or folders, which are searched recursively (see `image_files`).
        topk: number of classes per image, limited to those of the model.
        batch_size: images per forward pass.
        workers: decoder threads; 0: the calling thread decodes; None: one per core, at most 16.
        skip_corrupt: do not raise UnreadableImages.

    Raises:
        BadInput: when called: there is no such model or no image, or a number is out of range; while iterating: a logit
            is not finite.
        UnreadableImages: after the last prediction, if some images could not be read.
    """
    for name, value, least in (("topk", topk, 1), ("batch-size", batch_size, 1), ("workers", workers or 0, 0)):
        if value < least:
            raise BadInput(f"{name}: expected at least {least}, got {value}")
    images = image_files([files] if isinstance(files, str | os.PathLike) else files)
    classifier = open_classifier(model, weights, device)
    return predict_images(classifier, images, topk, batch_size, choose_workers(workers), skip_corrupt)


def predict_images(
    classifier: Classifier, files: list[Path], topk: int, batch_size: int, workers: int, skip_corrupt: bool
) -> Generator[Prediction, None, None]:
    """`predict` with an open classifier and a list of files."""
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
            f"expected {counted(len(files), 'readable image')}, but the {unreadable:,} named above could not be read "
            "(all others are predicted); repair or remove them, or ignore them with --skip-corrupt"
        )


def _read(
    classifier: Classifier, files: list[Path], workers: int
) -> Generator[tuple[Path, Tensor | BadInput], None, None]:
    """Yield each file with its pixels, or with the error if it cannot be read."""

    def read(file: Path) -> tuple[Path, Tensor | BadInput]:
        try:
            return file, classifier.read(file)
        except BadInput as error:
            return file, error

    yield from in_order(read, files, workers) if workers else map(read, files)
