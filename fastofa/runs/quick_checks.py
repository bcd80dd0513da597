"""Early checks that do not need torch: the output must not exist and packages must be installed."""

import os
from importlib.util import find_spec
from pathlib import Path

from fastofa.runs.config import TrainConfig, Weights
from fastofa.system.errors import BadInput

RUN, CHECKPOINTS = "config.json", "checkpoints/step-*.safetensors"  # in a run's folder


def check_vacant(config: TrainConfig) -> None:
    """Raises BadInput if --out contains a run that is not to be resumed."""
    begun = any(config.out.glob(CHECKPOINTS))
    if begun and not (config.out / RUN).exists():
        raise BadInput(f"{config.out}: contains checkpoints of a run without its {RUN}; choose another --out")
    if begun and not config.resume:
        raise BadInput(f"{config.out}: already contains a run; continue it with --resume or choose another --out")


def check_new(out: Path) -> None:
    """Raises BadInput if the path exists."""
    if os.path.lexists(out):
        raise BadInput(f"{out}: already exists; choose another path or remove it")


def check_checkpoint(
    path: Path,
    student: str | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    eval_crop: float | None,
    weights: Weights = "last",
) -> None:
    """Raises BadInput unless a file of weights comes with its architecture, and anything else without these
    settings."""
    if path.is_file():
        if student is None:
            raise BadInput(f"{path}: expected --student with a file of weights, got none; give its architecture's name")
        if weights != "last":
            raise BadInput(f"weights: only a run has {weights} weights, but {path} is a file; leave --weights out")
        if eval_crop is not None and not 0 < eval_crop <= 1:
            raise BadInput(f"eval-crop: expected a fraction above 0, at most 1, got {eval_crop:g}")
        if std is not None and min(std) <= 0:
            raise BadInput(f"std: expected numbers above 0, got {' '.join(map(str, std))}")
        return
    settings = {"student": student, "mean": mean, "std": std, "eval-crop": eval_crop}
    if given := [name for name, value in settings.items() if value is not None]:
        problem = "is a folder, which names its own" if path.is_dir() else "is no file"
        raise BadInput(f"{given[0]}: expected only with a file of weights, but {path} {problem}; leave it out")


def check_onnx() -> None:
    """Raises BadInput unless the packages that PyTorch's ONNX exporter needs are installed."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise BadInput(
            f"onnx: expected the packages onnx and onnxscript, but found no {' and no '.join(missing)}; "
            "pip install 'fastofa[onnx]', or leave out --onnx"
        )
