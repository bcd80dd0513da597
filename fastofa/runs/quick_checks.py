"""Early checks that do not need torch: the output must not exist and packages must be installed."""

import os
from importlib.util import find_spec
from pathlib import Path

from fastofa.runs.config import TrainConfig
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


def check_onnx() -> None:
    """Raises BadInput unless the packages that PyTorch's ONNX exporter needs are installed."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise BadInput(
            f"onnx: expected the packages onnx and onnxscript, but found no {' and no '.join(missing)}; "
            "pip install 'fastofa[onnx]', or leave out --onnx"
        )
