"""The teacher: a timm model with its own normalisation and input size, which computes log-probabilities.

Shapes: B batch, S image side, C classes of the data, O outputs of the model, D width of the pooled vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from fastofa.models.linear_head import check_linear_head, pooled_vector
from fastofa.models.model_config import ModelConfig, read_model_config
from fastofa.models.timm_models import (
    CONFIG,
    check_channels,
    create_model,
    find_folder,
    first_line,
    input_size,
    normalization,
    open_model_folder,
    published_model,
    resolve,
    weights_sha256,
)
from fastofa.models.weights import read_weights
from fastofa.runs.run import is_run, open_run
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import read_json
from fastofa.system.progress import notice
from fastofa.teacher.class_names import OutputNames, match_classes
from fastofa.teacher.vectors import Classifier

PURE_BF16 = "pure bf16"  # weights and activations; earlier versions wrote "bf16" for autocast, which rounds differently


class LogProbs(nn.Module):
    """`log_probs(images)`: uint8 [B, 3, S, S] -> log-probabilities fp32 [B, C] at temperature 1.

    Args:
        model: takes normalised images in its own precision, returns logits [B, O].
        mean, std: mean and standard deviation of RGB in 0..1, by which images are normalised.
        columns: the output for each class of the data; None if the outputs are the data's classes in the same order.
        bf16: the precision of `model`; the normalisation and the log-probabilities are fp32 either way.
    """

    mean: Tensor
    std: Tensor
    columns: Tensor | None

    def __init__(
        self,
        model: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        columns: tuple[int, ...] | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.dtype = model, torch.bfloat16 if bf16 else torch.float32
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.register_buffer("columns", None if columns is None else torch.tensor(columns))

    def forward(self, images: Tensor) -> Tensor:
        return self.log_probs(self.model(self.normalize(images)))

    def with_pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same log-probabilities, and the pooled vectors [B, D] in the model's precision. Needs a linear head."""
        vectors = pooled_vector(self.model, self.model.forward_features(self.normalize(images)))
        return self.log_probs(self.model.get_classifier()(vectors)), vectors

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images -> normalised, in the model's precision."""
        return ((images.float() / 255 - self.mean) / self.std).to(self.dtype)

    def log_probs(self, logits: Tensor) -> Tensor:
        """The model's logits [B, O] -> log-probabilities of the data's classes, fp32 [B, C]."""
        if self.columns is not None:
            logits = logits[:, self.columns]
        return torch.log_softmax(logits.float(), dim=-1)


@dataclass(frozen=True)
class Teacher:
    """A timm model ready to predict the data's classes; see `open_teacher`."""

    name: str
    network: LogProbs
    """The model with its normalisation, on `device`."""
    sha256: str
    """Digest of the weights as they were read, before they were rounded to bf16."""
    device: torch.device
    image_size: int
    """S, in pixels."""
    crop: float
    """Side of the central square for evaluation, as a fraction of the image's shorter side."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bf16: bool
    """Whether weights and activations are bf16. The log-probabilities are fp32 either way."""
    columns: tuple[int, ...] | None = None
    """The output for each class of the data; None if the outputs are the data's classes in the same order."""

    @property
    def model(self) -> Any:
        """The timm model."""
        return self.network.model

    @torch.inference_mode()
    def log_probs(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, S, S] on the teacher's device -> log-probabilities fp32 [B, C] at temperature 1.

        If the teacher has more outputs than the data has classes, the softmax covers only the data's classes. The
        result is conditional on these, which is what a student without the other classes has to learn.
        """
        return self.network(images)

    @torch.inference_mode()
    def with_pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probabilities, and the pooled vectors [B, D] in the model's precision. Needs a linear head."""
        return self.network.with_pooled(images)

    def check_linear_head(self, images: Tensor) -> int:
        """D. Raises BadInput unless the logits of these images, as in `log_probs`, are linear in the pooled vector."""
        return check_linear_head(self.model, self.network.normalize(images), f"teacher {self.name}")

    @property
    def classifier(self) -> Classifier:
        """The model's linear classifier for the classes of the data, on the CPU."""
        linear = self.model.get_classifier()
        weight = linear.weight.detach().float().cpu()
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float().cpu()
        rows = slice(None) if self.columns is None else list(self.columns)
        return Classifier(weight[rows], bias[rows])

    def describe(self) -> dict[str, Any]:
        """The teacher's entry in the header of a cache."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "image_size": self.image_size,
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
            "precision": PURE_BF16 if self.bf16 else "fp32",
            "num_features": self.model.num_features,
            **({} if self.columns is None else {"columns": list(self.columns)}),
        }


def open_teacher(
    name: str,
    classes: Sequence[str],
    checkpoint: Path | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    device: torch.device | None = None,
    bf16: bool = False,
    checkpoint_key: str | None = None,
) -> Teacher:
    """Open a teacher and try it on two black images.

    Args:
        name: a timm model with its tag ("convnext_tiny.in12k_ft_in1k"); a folder with config.json and weights, as
            written by `fastofa export` or timm, also as local-dir:FOLDER; hf-hub:OWNER/NAME; or a run's folder.
        classes: class names of the data; the teacher's outputs are matched with them (`fastofa.teacher.class_names`).
        checkpoint: a .safetensors or .pth file with weights to use instead of timm's. A config.json next to it, if it
            names the same architecture, supplies normalisation, input size and class names.
        image_size: side of the input in pixels; None for the teacher's own.
        mean: of RGB in 0..1, by which images are normalised; None for the teacher's own.
        std: standard deviation, as `mean`.
        device: where the teacher runs; None for the CPU.
        bf16: round the weights to bf16 and compute in bf16 (`round_to_bf16`).
        checkpoint_key: which weights to use if the file contains several.

    Raises:
        BadInput: unknown model, weights that are unavailable or do not match it, or classes that cannot be matched.
    """
    device = device or torch.device("cpu")
    folder = find_folder(name) if checkpoint is None else None
    if checkpoint is not None:
        architecture, model, names = _with_checkpoint(name, checkpoint, checkpoint_key, image_size)
    elif folder is not None and is_run(folder):
        architecture, model, names = _of_run(folder)
    elif folder is not None:
        model, config = open_model_folder(folder)
        architecture, names = config.architecture, _names(config)
    else:
        architecture, model, names = name, published_model(name, image_size), OutputNames(0)
    check_channels(model, f"teacher {name}")
    names = OutputNames(model.num_classes, names.names, names.descriptions)
    columns = match_classes(name, names, classes)
    kept = None if columns == list(range(model.num_classes)) else tuple(columns)
    own_mean, own_std = normalization(model)
    mean, std = tuple(mean or own_mean), tuple(std or own_std)
    sha256 = weights_sha256(model)
    model.eval().requires_grad_(False)
    if bf16:
        round_to_bf16(model)
    network = LogProbs(model, mean, std, kept, bf16).eval()
    teacher = Teacher(
        name=architecture,
        network=network.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        sha256=sha256,
        device=device,
        image_size=image_size or input_size(model),
        crop=min(float(model.pretrained_cfg.get("crop_pct") or 0.875), 1.0),  # VOLO's 1.15 would exceed the image
        mean=mean,
        std=std,
        bf16=bf16,
        columns=kept,
    )
    side = teacher.image_size
    try:
        log_probs = teacher.log_probs(torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device))
    except Exception as error:  # a model from an unusual config.json can fail in many ways
        remedy = "give another --image-size" + " or --precision fp32" * bf16
        raise BadInput(f"teacher {name}: does not run at {side} px ({first_line(error)}); {remedy}") from None
    if log_probs.shape != (2, len(classes)):
        raise BadInput(f"teacher {name}: expected logits [images, classes], got {list(log_probs.shape)} for two images")
    return teacher


def round_to_bf16(model: nn.Module) -> None:
    """Round parameters and buffers to bf16, except those of batch norms.

    A batch norm accepts bf16 activations with fp32 statistics, at no cost; rounding its variance would scale a channel.
    """
    for module in model.modules():
        if not isinstance(module, BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(torch.bfloat16)


def _with_checkpoint(
    name: str, checkpoint: Path, key: str | None, image_size: int | None
) -> tuple[str, Any, OutputNames]:
    if checkpoint.is_dir():
        raise BadInput(f"teacher-checkpoint: expected a file, got the folder {checkpoint}; give it as --teacher")
    weights = read_weights(checkpoint, key, "--teacher-checkpoint-key")
    architecture, config_file = resolve(name)[0].partition(".")[0], checkpoint.parent / CONFIG
    values = read_json(config_file) if config_file.is_file() else {}
    same = isinstance(values, dict) and values.get("architecture") == architecture
    config = read_model_config(config_file) if same else ModelConfig(config_file, architecture, 0)
    own_size = config.preprocessing.get("input_size")
    model = create_model(name, None, image_size or (own_size[-1] if own_size else None), init=weights)
    model.pretrained_cfg = {**model.pretrained_cfg, **config.preprocessing}
    return name, model, _names(config)


def _of_run(folder: Path) -> tuple[str, Any, OutputNames]:
    """The run's student, as `fastofa export` would write it."""
    run = open_run(folder)
    student = run.trained_student()
    model, side = student.backbone, student.image_size
    mean, std = (tuple(values.flatten().tolist()) for values in (student.mean, student.std))
    settings = {"input_size": (3, side, side), "mean": mean, "std": std, "crop_pct": run.config.eval_crop}
    model.pretrained_cfg = {**model.pretrained_cfg, **settings}
    return run.config.student, model, OutputNames(len(run.classes), dict(enumerate(run.classes)))


def _names(config: ModelConfig) -> OutputNames:
    return OutputNames(config.num_classes, config.label_names, config.label_descriptions)


def check_finite(teacher: str, log_probs: Tensor, view: str, samples: Sequence[str]) -> None:
    """Raises BadInput unless all log-probabilities are finite.

    Args:
        teacher: its name, for the message.
        log_probs: floating [B, K], before they are packed; float16 if K = C.
        view: description of the view, for the message.
        samples: names of the B samples, for the message.
    """
    bad = (~log_probs.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if not bad:
        return
    expected = f"teacher {teacher}: expected finite log-probabilities, in {view} it predicts"
    where = f"for {samples[bad[0]]} ({len(bad)} of {counted(len(samples), 'image')})"
    if log_probs[bad[0]].isnan().any():
        raise BadInput(
            f"{expected} NaN {where}; its weights are damaged or its activations overflow: try --precision fp32, or "
            "choose another teacher"
        )
    raise BadInput(
        f"{expected} minus infinity {where}: the probability is smaller than float16 can represent; lower --topk"
    )


def check_finite_vectors(teacher: str, vectors: Tensor, view: str, samples: Sequence[str]) -> None:
    """Raises BadInput unless float16 holds all pooled vectors [B, D]; the other arguments are as in `check_finite`."""
    bad = (~vectors.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise BadInput(
            f"teacher {teacher}: expected pooled vectors within float16's range, in {view} they exceed it for "
            f"{samples[bad[0]]} ({len(bad)} of {counted(len(samples), 'image')}); use --features pooled-int8"
        )


def report_accuracy(teacher: str, top1: float, num_classes: int, images: int) -> None:
    """Report the teacher's accuracy on the validation images, with a warning if it is near chance."""
    chance = 1 / num_classes
    near = (
        f": near chance ({chance:.2%}); check that its classes, their order, --mean and --std match the data"
        if top1 < chance + min(chance, 0.1)
        else ""
    )
    notice(f"teacher {teacher}: {top1:.2%} top-1 on {counted(images, 'validation image')}{near}")
