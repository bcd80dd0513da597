"""After kill -9 at any moment, the same command continues and ends with the same bytes.

Real processes are killed: at random moments, and at every step of every file operation.
"""

import dataclasses
import fnmatch
import functools
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import DropPath

import fastofa.teacher.cache_job
import fastofa.training.live_report
from fastofa.data.open import open_dataset
from fastofa.pipelines import workers
from fastofa.runs import recipes
from fastofa.runs.checkpoint import checkpoints
from fastofa.runs.config import TrainConfig
from fastofa.runs.log import FILE as METRICS
from fastofa.runs.log import read_metrics
from fastofa.runs.run import open_run
from fastofa.system.files import load_tensors
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.parts import PARTS
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train
from fastofa.training.step import Step
from runs import CONTEXT, alive, children, newest, same_run

pytestmark = pytest.mark.slow

KILLS, IN_A_ROW = 20, 5
STRIDE = 3  # of the file operations that a job is killed at
FAR = 10**9


class Job:
    """A call of `train` or `precompute` in a process of its own, whose output goes to a file."""

    def __init__(self, command: Callable[[Any], Any], config: Any, die_at: int = FAR) -> None:
        self.out, self.log = config.out, config.out.with_name(f"{config.out.name}.log")
        ready, theirs = CONTEXT.Pipe(duplex=False)
        self.process: BaseProcess = CONTEXT.Process(target=_work, args=(command, config, self.log, theirs, die_at))
        self.process.start()
        theirs.close()
        self.before: float = ready.recv()

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit code (minus the signal that ended it), or None if it still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def work(self, seconds: float) -> float:
        """Wait until it ends or has computed for so many seconds, which a busy machine does not change."""
        done = 0.0
        with suppress(OSError):  # it is gone
            while self.wait(0.002) is None and done < seconds:
                fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
                done = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") - self.before
        return done

    def reach(self, step: int) -> None:
        """Wait until it has logged a step, or ends."""
        while self.wait(0.002) is None and not any(row["step"] >= step for row in read_metrics(self.out)):
            pass

    def finish(self) -> float:
        """Wait for its end, which must be a good one; returns the seconds it computed."""
        seconds = self.work(FAR)
        assert self.wait() == 0, f"exit code {self.process.exitcode}: {self.log.read_text()}"
        return seconds

    def kill(self) -> bool:
        """False if it had ended before."""
        self.process.kill()
        code = self.wait()
        assert code in (0, -signal.SIGKILL), f"exit code {code}: {self.log.read_text()}"
        return code != 0


def _work(command: Callable[[Any], Any], config: Any, log: Path, ready: Connection, die_at: int) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # decoding processes start as they do in a process of its own
    fastofa.teacher.cache_job.SAVE_EVERY_S = 0  # an unfinished view is saved at every batch
    fastofa.training.live_report.LiveReport.write = lambda *_: None  # type: ignore[method-assign]  # half of such a run's time
    _die_at(die_at)
    ready.send(time.process_time())
    command(config)


def _die_at(moment: int) -> None:
    """Kill this process at the n-th moment, counted over all file operations: before, in the middle of and
    after each.
    """
    count = itertools.count(1)
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def here(file: int | None = None) -> None:
        if next(count) == moment:
            if file is not None:
                os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def around(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            here()
            result = operation(*args, **options)
            here()
            return result

        return wrapped

    def half_written(file: int) -> None:
        here(file)
        fsync(file)

    os.fsync, os.replace, Path.unlink = half_written, around(replace), around(unlink)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digits as PNG files: 60 for training, 20 for validation, six and two of each class."""
    root = tmp_path_factory.mktemp("data") / "digits"
    digits = open_dataset("digits:100")
    for label in range(10):
        for i, row in enumerate(np.flatnonzero(digits.labels == label)[:8]):
            file = root / ("train" if i < 6 else "val") / f"class{label}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.pixels[row]).save(file)
    return str(root)


def precompute_config(data: str, teacher: str, out: Path, **options: Any) -> PrecomputeConfig:
    values = {"views": 4, "topk": 3, "image_size": 32, "batch_size": 12, "pipeline": "resident", **options}
    return PrecomputeConfig(data, teacher, out, **values)


def train_config(data: str, cache: Path, out: Path, **options: Any) -> TrainConfig:
    """Everything that has a state: exits, AdamW, moving average, stochastic depth; log intervals across checkpoints."""
    values = {
        "epochs": 2, "batch_size": 10, "image_size": 32, "ema": 0.9, "clip": 1.0, "drop_path": 0.3, "log_every": 2,
        "checkpoint_every": 3, "eval_every": 1, "warmup_epochs": 1, "stages": (2, 4), "pipeline": "resident",
        "resume": True, **options,
    }  # fmt: skip
    return recipes.digits(data=data, student="test_resnet", cache=cache, out=out, **values)


def undisturbed(command: Callable[[Any], Any], config: Any) -> tuple[Path, float]:
    """The folder of an undisturbed run, and the seconds it computed."""
    return config.out, Job(command, config).finish()


def same_cache(a: Path, b: Path) -> None:
    """The files are the same, byte for byte."""
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file


def killed_at_random(
    command: Callable[[Any], Any], config: Any, wait: Callable[[Job, random.Random, int], Any], kills: int, seed: int
) -> Iterator[tuple[bool, Path]]:
    """Start, wait, kill, repeat: yields (finished?, folder) after every kill and every end.

    A job is killed a few times in a row. After one has finished, another starts in a new folder, until there are
    enough.
    """
    rng = random.Random(seed)
    killed = 0
    for attempt in range(2 * kills):  # some are finished before they are killed
        out = config.out.with_name(f"{config.out.name}-{attempt}")
        finished, turn = False, 0
        while not finished:
            job = Job(command, dataclasses.replace(config, out=out))
            if killed < kills and turn < IN_A_ROW:
                wait(job, rng, turn)
                job.wait(rng.uniform(0, 0.02))
                finished = not job.kill()
            else:
                job.finish()
                finished = True
            killed, turn = killed + (not finished), turn + 1
            yield finished, out
        if killed >= kills:
            return
    raise AssertionError(f"only {killed} kills hit a living process")


@pytest.mark.parametrize(("views_of", "kills"), [("", KILLS), ("imagenet_vit_mlp", KILLS // 2)])
def test_precompute_reaches_the_same_bytes_after_random_kills(folder, teacher, tmp_path, views_of, kills):
    """Also with mixed views, whose samples are processed in pairs."""
    config = precompute_config(folder, teacher, tmp_path / "cache", recipe=views_of)
    reference, seconds = undisturbed(precompute, config)

    def wait(job: Job, rng: random.Random, turn: int) -> None:
        job.work(rng.uniform(0, seconds * (0.5 if turn else 1)))  # it has less to do in later turns

    found = []
    for finished, out in killed_at_random(precompute, config, wait, kills, seed=1):
        if finished:
            same_cache(out, reference)
        else:
            found.append(frozenset(file.name for file in out.glob("*")) if out.exists() else frozenset())
    working = [names for names in found if HEADER in names]
    inside = [names for names in working if fnmatch.filter(names, PARTS)]
    print(f"{len(found)} kills: {len(working)} at work, {len(inside)} inside a view, {len(set(found))} states found")
    assert len(found) >= kills
    assert len(working) >= kills // 3
    assert inside
    assert len(set(found)) >= 3


def test_train_reaches_the_same_weights_after_random_kills(folder, teacher, tmp_path):
    cache, _ = undisturbed(precompute, precompute_config(folder, teacher, tmp_path / "cache"))
    config = train_config(folder, cache, tmp_path / "run", log_every=1)
    reference, seconds = undisturbed(train, config)
    assert any(isinstance(m, DropPath) for m in open_run(reference).build_student().modules())  # random numbers matter

    def wait(job: Job, rng: random.Random, turn: int) -> None:
        """One in five while it starts, the others after a step: the first half of the run's in the first turns."""
        if rng.random() < 0.2:
            job.work(rng.uniform(0, seconds / 2))
        else:
            job.reach(rng.randint(1 + turn, 2 + 2 * (turn + 1)))

    found = []
    for finished, out in killed_at_random(train, config, wait, KILLS, seed=2):
        if finished:
            same_run(out, reference)
        else:
            step = load_tensors(newest(out))[1]["step"] if checkpoints(out) else 0
            found.append((step, len(read_metrics(out))))
    at_work = [state for state in found if state[1]]
    resumable = [state for state in found if state[0]]
    print(f"{len(found)} kills: {len(at_work)} with steps logged, {len(resumable)} with a checkpoint, {set(found)}")
    assert len(found) >= KILLS
    assert len(at_work) >= KILLS // 2
    assert len(resumable) >= KILLS // 3
    assert len(set(found)) >= 3


def test_precompute_resumes_after_a_kill_at_any_file_operation(folder, teacher, tmp_path):
    config = precompute_config(folder, teacher, tmp_path / "cache", views=2, batch_size=30)
    reference, _ = undisturbed(precompute, config)
    moments = 0
    for moment, out in killed_at_file_operations(precompute, config):
        Job(precompute, dataclasses.replace(config, out=out)).finish()
        same_cache(out, reference)
        moments = moment
    print(f"killed at {moments} moments")
    assert moments >= 25  # header, validation, two views of two batches


def test_train_resumes_after_a_kill_at_any_file_operation(folder, teacher, tmp_path):
    """Also with a line of the log cut off, as after a kill while it is written."""
    cache, _ = undisturbed(precompute, precompute_config(folder, teacher, tmp_path / "cache"))
    config = train_config(folder, cache, tmp_path / "run", epochs=1, batch_size=15, checkpoint_every=2, keep=1)
    reference, _ = undisturbed(train, config)
    moments = 0
    for moment, out in killed_at_file_operations(train, config):
        if moment % 2 and (out / METRICS).exists():
            with open(out / METRICS, "a") as log:
                log.write('{"kind": "step", "step": 4, "ep')
        Job(train, dataclasses.replace(config, out=out)).finish()
        same_run(out, reference)
        moments = moment
    print(f"killed at {moments} moments")
    assert (
        moments >= 22
    )  # configuration, launches, log, best and last predictions, two checkpoints, one of them removed


def killed_at_file_operations(command: Callable[[Any], Any], config: Any) -> Iterator[tuple[int, Path]]:
    """(n, folder) of a job that was killed at its n-th moment, for every third n."""
    for moment in itertools.count(1, STRIDE):
        out = config.out.with_name(f"{config.out.name}-{moment}")
        job = Job(command, dataclasses.replace(config, out=out), die_at=moment)
        if job.wait() == 0:
            return
        assert job.process.exitcode == -signal.SIGKILL, job.log.read_text()
        yield moment, out


def test_train_with_decoding_processes_survives_kills(folder, teacher, tmp_path):
    """Order and random numbers do not depend on the decoding processes; orphaned ones end by themselves."""
    cache, _ = undisturbed(precompute, precompute_config(folder, teacher, tmp_path / "cache"))
    reference, _ = undisturbed(train, train_config(folder, cache, tmp_path / "reference"))
    config = train_config(folder, cache, tmp_path / "run", pipeline="torchvision", workers=2)
    every: set[int] = set()
    for step in (1, 4, 7, 10):  # the next one starts at once: orphans do not hold the lock
        job = Job(functools.partial(_train_until, step), config)
        assert job.wait() == -signal.SIGKILL, job.log.read_text()
        orphans = {int(pid) for pid in orphans_of(config).read_text().split()}
        assert len(orphans) == 2
        every |= orphans
    Job(train, config).finish()
    wait_until(lambda: not any(map(alive, every)))
    same_run(config.out, reference)


def _train_until(step: int, config: TrainConfig) -> None:
    """Record the decoding processes, and die when the next step begins."""
    call = Step.__call__

    def dying(self: Step, *arguments: Any) -> None:
        if self.steps == step:
            orphans_of(config).write_text(" ".join(map(str, children())))
            os.kill(os.getpid(), signal.SIGKILL)
        call(self, *arguments)

    Step.__call__ = dying  # type: ignore[method-assign]
    train(config)


def orphans_of(config: TrainConfig) -> Path:
    return config.out.with_suffix(".orphans")


@pytest.mark.parametrize("parent_is_here", [True, False])
def test_a_decoding_process_whose_parent_is_gone_ends(parent_is_here):
    """The parent was killed before the worker had requested to be killed with it."""
    parent = os.getpid() if parent_is_here else os.getppid()
    process = multiprocessing.get_context("fork").Process(target=workers._begin, args=(parent,))
    process.start()
    process.join()
    assert process.exitcode == (0 if parent_is_here else 1)


def wait_until(reached: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
