"""The teacher: a timm model with its own normalisation and its own input size, giving log-probabilities.

Shapes: B batch, S image side, C classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastofa.errors import BadInput
from fastofa.files import read_json
from fastofa.models import (
    create_model,
    first_line,
    input_size,
    load_weights,
    normalization,
    open_model_folder,
    resolve,
    weights_sha256,
)


@dataclass(frozen=True)
class Teacher:
    """Made by `open_teacher`."""

    name: str
    model: Any
    device: torch.device
    image_size: int
    """S, in pixels."""
    crop: float
    """Side of the central square that it is evaluated on, as a share of the picture's shorter side."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bf16: bool
    """Does it compute in bf16? The log-probabilities are fp32 either way."""

    @torch.inference_mode()
    def log_probs(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on the teacher's device -> fp32 [B, C] at temperature 1."""
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        normalized = (images.float() / 255 - mean) / std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(normalized)
        return torch.log_softmax(logits.float(), dim=-1)

    def describe(self) -> dict[str, Any]:
        """What a cache remembers of it."""
        return {
            "name": self.name,
            "sha256": weights_sha256(self.model),
            "image_size": self.image_size,
            "crop": self.crop,
            "mean": list(self.mean),
            "std": list(self.std),
            "precision": "bf16" if self.bf16 else "fp32",
            "num_features": self.model.num_features,
        }


def open_teacher(
    name: str,
    num_classes: int,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    device: torch.device | None = None,
    bf16: bool = False,
) -> Teacher:
    """A teacher ready to answer.

    Args:
        name: a timm model with its tag ("convnext_tiny.in12k_ft_in1k"), or a folder with config.json and
            model.safetensors, as `fastofa export` and timm write it.
        num_classes: C of the data set; the teacher must have as many.
        checkpoint: weights from a .safetensors or .pth file instead of timm's; a config.json beside it that names the
            same architecture gives normalisation and input size.
        image_size, mean, std: instead of the teacher's own.

    Raises:
        BadInput: unknown model, weights that cannot be had or do not fit, another number of classes.
    """
    device = device or torch.device("cpu")
    if checkpoint is not None:
        model = _with_checkpoint(name, checkpoint, num_classes, image_size)
    elif Path(name).is_dir():
        model, config = open_model_folder(Path(name))
        name = config["architecture"]
    else:
        model = create_model(name, None, image_size, init="pretrained")
    if model.num_classes != num_classes:
        raise BadInput(
            f"teacher {name}: expected {num_classes} classes as in the data set, it has {model.num_classes}; train one "
            "on these images (`fastofa train --method scratch`, then `fastofa export`) or give --teacher-checkpoint"
        )
    own_mean, own_std = normalization(model)
    teacher = Teacher(
        name=name,
        model=model.eval().to(device, memory_format=torch.channels_last),
        device=device,
        image_size=image_size or input_size(model),
        crop=float(model.pretrained_cfg.get("crop_pct") or 0.875),
        mean=tuple(mean or own_mean),
        std=tuple(std or own_std),
        bf16=bf16,
    )
    try:
        teacher.log_probs(torch.zeros(2, 3, teacher.image_size, teacher.image_size, dtype=torch.uint8, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise BadInput(
            f"teacher {name}: does not run at {teacher.image_size} px ({first_line(error)}); give another --image-size"
        ) from None
    return teacher


def _with_checkpoint(name: str, checkpoint: Path, num_classes: int, image_size: int | None) -> Any:
    config_file = checkpoint.parent / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    if not isinstance(config, dict) or config.get("architecture") != resolve(name)[0].partition(".")[0]:
        config = {}
    own_size = (config.get("pretrained_cfg") or {}).get("input_size")
    model = create_model(name, num_classes, image_size or (own_size[-1] if own_size else None))
    load_weights(model, checkpoint)
    model.pretrained_cfg = {**model.pretrained_cfg, **(config.get("pretrained_cfg") or {})}
    return model
