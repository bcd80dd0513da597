"""The predictions of a run's newest evaluation, in its folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastofa.system.files import save_tensors

PREDICTIONS = "val_predictions.safetensors"


def save_predictions(run: Path, best: np.ndarray, labels: np.ndarray, info: dict[str, Any]) -> None:
    """The answers of the last evaluation, as `best_classes` gives them, beside the right ones."""
    tensors = {"best": torch.from_numpy(best).to(torch.int32), "labels": torch.from_numpy(labels)}
    save_tensors(run / PREDICTIONS, tensors, info)
