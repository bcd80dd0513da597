"""Early checks: before torch is imported, which takes seconds, and before a dataset is opened, which may take hours.

Every command runs them first. Errors that cannot be determined yet are left to the command.
"""

import os
from pathlib import Path
from typing import Any

from fastofa.commands.arguments import CkaConfig, EvaluateConfig, ExportConfig, PredictConfig
from fastofa.data.quick_checks import SPLITS, check_data, check_written
from fastofa.data.write_config import WriteConfig
from fastofa.runs.config import TrainConfig
from fastofa.runs.quick_checks import check_checkpoint, check_new, check_onnx, check_vacant
from fastofa.system import torchrun
from fastofa.system.errors import BadInput
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.quick_checks import check_cache


def check(config: Any) -> None:
    """Check the configuration of any command. Raises BadInput."""
    if torchrun.is_rank() or "TORCHELASTIC_RUN_ID" in os.environ:
        return  # a rank reports its error to the others, and a restarted rank resumes the existing run
    match config:
        case TrainConfig():
            if not config.plan:
                check_vacant(config)
            check_data(config.data, SPLITS)
        case PrecomputeConfig():
            if not config.plan:
                check_cache(config)
            check_data(config.data, SPLITS)
        case WriteConfig():
            check_written(config)
            check_data(config.data, ())
        case EvaluateConfig():
            _check_file(config.json)
            check_checkpoint(config.model, config.student, config.mean, config.std, config.eval_crop, config.weights)
            if config.data is not None:
                check_data(config.data, ("val",))
        case PredictConfig():
            _check_file(config.csv)
        case CkaConfig():
            check_data(config.data, ("val",))
            if config.out.exists() and not config.out.is_dir():
                raise BadInput(f"{config.out}: expected a folder for the results, got a file; choose another --out")
        case ExportConfig():
            check_new(config.out)
            check_checkpoint(config.run, config.student, config.mean, config.std, config.eval_crop, config.weights)
            if config.onnx:
                check_onnx()


def _check_file(path: Path | None) -> None:
    """Raises BadInput if the path of a file to write is a folder."""
    if path is not None and path.is_dir():
        raise BadInput(f"{path}: expected a file name, got a folder; give the name of a file in it")
