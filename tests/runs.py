"""Helpers that several tests use to make runs and caches and to inspect a run's folder."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from fastofa.methods.options import BUILT_IN
from fastofa.runs.checkpoint import BEST, FOLDER, checkpoints
from fastofa.runs.config import USED_BY
from fastofa.runs.log import read_metrics
from fastofa.system.files import load_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.step import Step

# A forked server that has everything imported makes a new process a matter of milliseconds. One list for all tests: a
# process has one such server, and the list that was set last counts.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "fastofa.training.loop", "fastofa.teacher.precompute", "fastofa.data.write", "torch.utils.tensorboard",
        "matplotlib.figure", "sklearn.datasets", "pytest",
    ]
)  # fmt: skip
SIZE = 32  # px
TIMES = {"images_per_second", "loader_share", "epoch_seconds", "eval_seconds"}


@contextmanager
def float64() -> Iterator[None]:
    """Models that are created here compute in float64.

    For comparisons over several steps: in fp32 the last bits, which differ between processors and between two ways to
    compute the same, grow at every step until the results have little in common.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_teacher(folder: Path, classes: int, name: str = "test_efficientnet") -> str:
    """The folder of a small CNN whose random weights are large enough for predictions that differ."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=classes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    save_for_hf(model, str(folder), safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})
    return str(folder)


def make_cache(data: str, classes: int, folder: Path, **given: Any) -> TeacherCache:
    """Two views of a dataset, with the predictions of a small CNN."""
    teacher = make_teacher(folder / "teacher", classes)
    return precompute(PrecomputeConfig(data, teacher, folder / "cache", 2, workers=0, **given))


def command_line(command: str, config: Any) -> list[str]:
    """The command line that gives this configuration."""
    argv, methods = [command], getattr(config, "methods", ())
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        users = (field.name,) if field.name in BUILT_IN else USED_BY.get(field.name, methods)
        if field.name == "own_options" or (users and not {*users} & {*methods}):  # refused if they are given
            continue
        if dataclasses.is_dataclass(value):
            for option, own in vars(value).items():
                argv += [f"{flag}.{option}", *map(str, own if isinstance(own, tuple) else [own])]
        elif isinstance(value, bool):
            argv += [flag] if value else []
        elif value is not None:
            argv += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return argv


def children(pid: int | None = None) -> set[int]:
    """The processes that a process, by default this one, has started."""
    files = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
    return {int(child) for file in files for child in file.read_text().split()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return checkpoints(run)[0]


def log_of(run: Path) -> list[dict[str, Any]]:
    """Every logged value except the speed."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run)]


def same_run(a: Path, b: Path) -> None:
    """Weights of student and moving average, optimiser, position, log and best weights are equal, and `a` contains no
    temporary file.
    """
    for x, y in ((newest(a), newest(b)), (a / FOLDER / BEST, b / FOLDER / BEST)):
        assert x.name == y.name
        (tensors, info), (others, other_info) = load_tensors(x), load_tensors(y)
        assert tensors.keys() == others.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
        assert {**info, **dict.fromkeys(TIMES)} == {**other_info, **dict.fromkeys(TIMES)}
    assert log_of(a) == log_of(b)
    assert [file.name for file in a.rglob(".*.tmp")] == []


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM arrives during this step, counted from 1."""
    original, steps = Step.__call__, iter(range(1, 1000))

    def call(self: Step, *args: Any) -> None:
        if next(steps) == number:
            signal.raise_signal(signal.SIGTERM)
        original(self, *args)

    monkeypatch.setattr(Step, "__call__", call)
