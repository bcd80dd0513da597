"""What is refused before torch is imported, which takes seconds, and before a data set is opened, which may take hours.

Commands begin with these checks. Whatever is not certain here is left to the command itself.
"""

import os
from typing import Any

from fastofa.commands.arguments import EvaluateConfig, ExportConfig
from fastofa.data.quick_checks import SPLITS, check_data, check_written
from fastofa.data.write_config import WriteConfig
from fastofa.runs.config import TrainConfig
from fastofa.runs.quick_checks import check_new, check_vacant
from fastofa.system import torchrun
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
        case EvaluateConfig() if config.data is not None:
            check_data(config.data, ("val",))
        case ExportConfig():
            check_new(config.out)
