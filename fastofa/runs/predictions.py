"""The file with the predictions of a run's newest evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastofa.system.files import save_tensors

PREDICTIONS = "val_predictions.safetensors"


def save_predictions(run: Path, best: np.ndarray, labels: np.ndarray, info: dict[str, Any]) -> None:
    """Write predictions and labels of the validation images to RUN/val_predictions.safetensors.

    Args:
        best: int64 [N, K], the best classes of each image, best first.
        labels: int64 [N].
        info: JSON; step, epoch and accuracy of the evaluation.
    """
    tensors = {"best": torch.from_numpy(best).to(torch.int32), "labels": torch.from_numpy(labels)}
    save_tensors(run / PREDICTIONS, tensors, info)
