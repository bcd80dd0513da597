"""What is refused before torch is imported, which takes seconds, and before a data set is opened, which may take hours.

Commands begin with these checks. Whatever is not certain here is left to the command itself.
"""

import os
from pathlib import Path
from typing import Any

from fastofa.commands.arguments import EvaluateConfig, ExportConfig, PredictConfig
from fastofa.data.quick_checks import SPLITS, check_data, check_written
from fastofa.data.write_config import WriteConfig
from fastofa.runs.config import TrainConfig
from fastofa.runs.quick_checks import check_new, check_onnx, check_vacant
from fastofa.system import torchrun
from fastofa.system.errors import BadInput
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.quick_checks import check_cache


def check(config: Any) -> None:
    """Of any command. Raises BadInput."""
    if torchrun.is_rank() or "TORCHELASTIC_RUN_ID" in os.environ:
        return  # a rank that is refused tells the others, and one that is restarted goes on with what is there
    match config:
        case TrainConfig():
            if not config.plan:
                check_vacant(config)
            check_data(config.data, SPLITS)
        case PrecomputeConfig():
            check_cache(config)
            check_data(config.data, SPLITS)
        case WriteConfig():
            check_written(config)
            check_data(config.data, ())
        case EvaluateConfig():
            _check_file(config.json)
            if config.data is not None:
                check_data(config.data, ("val",))
        case PredictConfig():
            _check_file(config.csv)
        case ExportConfig():
            check_new(config.out)
            if config.onnx:
                check_onnx()


def _check_file(path: Path | None) -> None:
    """Raises BadInput for a folder in the place of a file that is to be written."""
    if path is not None and path.is_dir():
        raise BadInput(f"{path}: expected the name of a file, got a folder; give a name in it")
