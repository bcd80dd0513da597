"""Open a file of weights as a classifier: a student or teacher of the official code, or of another trainer."""

from pathlib import Path

import torch

from fastofa.models.normalized import Normalized
from fastofa.models.timm_models import check_channels, create_model, input_size, normalization
from fastofa.models.weights import read_weights
from fastofa.system.device import choose_bf16
from fastofa.training.predict_files import Classifier


def open_checkpoint(
    checkpoint: Path,
    architecture: str,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    eval_crop: float | None = None,
    device: torch.device | None = None,
) -> Classifier:
    """The model with the checkpoint's weights and as many outputs as its classifier, which have no class names.

    Args:
        checkpoint: a .safetensors or torch file.
        architecture: a timm name, or swin_nano_patch4_window7_224 / swin_pico_patch4_window7_224.
        mean, std: normalisation of RGB in 0..1; None: timm's for the architecture. A file of weights names none.
        eval_crop: side of the central square, as a fraction of the image's shorter side; None: timm's.
        device: where it computes; None for the CPU.

    Raises:
        BadInput: the file is missing, damaged or contains code; its weights do not match the architecture.
    """
    device = device or torch.device("cpu")
    model = create_model(architecture, None, init=read_weights(checkpoint))
    check_channels(model, str(checkpoint))
    own_mean, own_std = normalization(model)
    mean_std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean or own_mean, std or own_std))
    return Classifier(
        name=f"{checkpoint} as {architecture}",
        model=Normalized(model, *mean_std).eval().to(device),
        device=device,
        classes=tuple(map(str, range(model.num_classes))),
        image_size=input_size(model),
        crop=eval_crop or min(float(model.pretrained_cfg.get("crop_pct") or 0.875), 1.0),
        bicubic=model.pretrained_cfg.get("interpolation") == "bicubic",
        flip=False,
        bf16=choose_bf16("auto", device),
    )
