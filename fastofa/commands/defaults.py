"""The default values of flags that come from a file or a recipe: --resume, --config and --recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from fastofa.commands.flag_values import flag_value
from fastofa.runs.config import TrainConfig
from fastofa.runs.config_file import read_config
from fastofa.runs.quick_checks import RUN
from fastofa.runs.recipes import default_recipe, recipe
from fastofa.system.errors import BadInput
from fastofa.teacher.precompute_config import PrecomputeConfig

FILE = "config"  # the flag that names a file with a configuration


def _train_defaults(argv: list[str]) -> dict[str, Any]:
    """The values of the run to resume, of the --config file, or of the recipe: the named one, or the default for the
    data."""
    run, file, out = flag_value(argv, "--resume"), flag_value(argv, f"--{FILE}"), flag_value(argv, "--out")
    if not run and not file:
        name = flag_value(argv, "--recipe")
        of_recipe = recipe(default_recipe(flag_value(argv, "--data") or "") if name is None else name)
        return vars(of_recipe(data=tyro.MISSING, student=tyro.MISSING, out=tyro.MISSING))
    _refuse_recipe(argv)
    if not run:
        assert file is not None
        return {**vars(read_config(TrainConfig, Path(file))), "resume": False, "plan": False}
    if file is not None:
        raise BadInput(
            f"config: expected none with --resume {run}, which takes its configuration from {run}/{RUN}; leave it out"
        )
    if out is not None and Path(out) != Path(run):
        raise BadInput(f"out: expected none with --resume {run}, which continues in {run}, got {out}; leave it out")
    if not (Path(run) / RUN).exists():
        raise BadInput(f"resume: expected a run made by `fastofa train`, found no {RUN} in {run}")
    return {**vars(read_config(TrainConfig, Path(run) / RUN)), "out": Path(run), "plan": False}


def _precompute_defaults(argv: list[str]) -> dict[str, Any]:
    """The values of the --config file except --out, which must differ; empty without a file."""
    file = flag_value(argv, f"--{FILE}")
    if not file:
        return {}
    _refuse_recipe(argv)
    return {**vars(read_config(PrecomputeConfig, Path(file))), "out": tyro.MISSING}


def _refuse_recipe(argv: list[str]) -> None:
    """Raises BadInput for --recipe, which would change the recipe's name but not the values from the file."""
    if flag_value(argv, "--recipe") is not None:
        raise BadInput("recipe: expected none with a configuration from a file; give only the flags that change")


DEFAULTS: dict[type, Callable[[list[str]], dict[str, Any]]] = {
    TrainConfig: _train_defaults,
    PrecomputeConfig: _precompute_defaults,
}
