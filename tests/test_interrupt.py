"""After Ctrl-C or SIGTERM the state is saved, the last line says how to continue, and the final bytes are the same."""

import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import fastofa.teacher.precompute
import fastofa.training.evaluate_in_training
import fastofa.training.job
import fastofa.training.live_report
from fastofa import cli
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.methods.objective import Objective
from fastofa.runs import recipes
from fastofa.system.files import load_tensors
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import view_file
from fastofa.teacher.model import Teacher
from fastofa.teacher.parts import PARTS, part_file
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train
from runs import CONTEXT, alive, children, command_line, newest, same_run

# A terminal and a cluster signal the decoding processes, too.
TO = pytest.mark.parametrize(
    ("signum", "to"), [(signal.SIGINT, "group"), (signal.SIGTERM, "group"), (signal.SIGTERM, "process")]
)
SIGNALS = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
DATA, IMAGES = "digits:100", 100


class Command:
    """`fastofa ...` in a process and a process group of its own; its standard error goes to a file."""

    def __init__(self, argv: list[str], error: Path, before: Callable[[Path], None] | None = None) -> None:
        self.error = error
        ready, theirs = CONTEXT.Pipe(duplex=False)
        self.process: BaseProcess = CONTEXT.Process(target=_command, args=(argv, error, theirs, before))
        self.process.start()
        theirs.close()
        ready.recv()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def wait(self, seconds: float | None = None) -> int | None:
        """Exit code (minus the signal that ended it), or None if it still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def children(self) -> set[int]:
        return children(self.pid)

    def last_line(self) -> str:
        text = self.error.read_text()
        assert "Traceback" not in text, text
        return text.splitlines()[-1]


def _command(argv: list[str], error: Path, ready: Connection, before: Callable[[Path], None] | None) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell inherit "ignore"
    for stream, name in ((1, os.devnull), (2, str(error))):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # decoding processes start as they do in a process of its own
    if before is not None:
        before(error.with_suffix(".reached"))
    ready.send(None)
    cli.main(argv)


def until(reached: Callable[[], Any], command: Command | None = None) -> None:
    end = time.monotonic() + 900  # which only what hangs uses up
    while not reached():
        assert time.monotonic() < end, "waited in vain"
        assert command is None or command.process.exitcode is None, command.error.read_text()
        time.sleep(0.005)


def _hold(reached: Path, call: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, but call number `number` writes the file `reached` and waits until it is removed."""
    number = itertools.count(1)

    def held(*args: Any, **options: Any) -> Any:
        if next(number) == call:
            reached.touch()
            while reached.exists():
                time.sleep(0.005)
        return original(*args, **options)

    return held


def _held_in_training(reached: Path) -> None:
    """Before the sixth of twenty steps."""
    Objective.forward = _hold(reached, 6, Objective.forward)  # type: ignore[method-assign]


def _held_in_precompute(reached: Path) -> None:
    """In the middle of the second view: after the teacher's trial batch, 10 batches held back, 60 of validation images
    and 10 of a view."""
    Teacher.log_probs = _hold(reached, 1 + 10 + 60 + 10 + 5, Teacher.log_probs)  # type: ignore[method-assign]


def interrupt(command: Command, signum: int, to: str = "process") -> set[int]:
    """Signal a command that is held, then release it; returns its decoding processes."""
    reached = command.error.with_suffix(".reached")
    until(reached.exists, command)
    children = command.children()
    os.killpg(command.pid, signum) if to == "group" else os.kill(command.pid, signum)
    reached.unlink()
    return children


def precompute_config(teacher: str, out: Path, **options: Any) -> PrecomputeConfig:
    values = {"views": 8, "topk": 3, "image_size": 48, "batch_size": 10, "workers": 2, **options}
    return PrecomputeConfig(DATA, teacher, out, **values)


@pytest.fixture(scope="module")
def cache(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made without an interruption."""
    return precompute(precompute_config(teacher, tmp_path_factory.mktemp("cache"))).path


def train_config(cache: Path, out: Path, **options: Any) -> Any:
    """Everything that has a state: exits, AdamW, moving average, stochastic depth; log intervals across checkpoints."""
    values = {
        "epochs": 2, "batch_size": 10, "image_size": 32, "stages": (2, 4), "ema": 0.9, "clip": 1.0, "drop_path": 0.3,
        "log_every": 2, "checkpoint_every": 7, "workers": 2, **options,
    }  # fmt: skip
    return recipes.digits(data=DATA, student="test_resnet", cache=cache, out=out, **values)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained without an interruption."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    train(train_config(cache, out))
    return out


def same_cache(a: Path, b: Path) -> None:
    """The files are the same, byte for byte; only the header may name another pipeline."""
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    for file in a.glob("*.safetensors"):
        assert file.read_bytes() == (b / file.name).read_bytes(), file


# --- Signals from outside ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@TO
def test_train_stops_and_resumes_to_the_same_weights(cache, run, tmp_path, signum, to):
    """The signal goes to the process alone, or also to its decoding processes, as from a terminal or a cluster."""
    pipeline = "torchvision" if to == "group" else "resident"
    config = train_config(cache, tmp_path / "run", pipeline=pipeline)
    command = Command(command_line("train", config), tmp_path / "stderr", _held_in_training)
    children = interrupt(command, signum, to)
    assert len(children) == (2 if to == "group" else 0)
    assert command.wait() == 128 + signum, command.error.read_text()
    place = re.escape(str(config.out))
    said = re.fullmatch(rf"fastofa: .*\b(\d+) of 20\b.*{place}\b.*--resume\b.*", command.last_line())
    assert said, command.last_line()
    assert load_tensors(newest(config.out))[1]["step"] == int(said[1]) == 6
    until(lambda: not any(map(alive, children)))

    resumed = Command([*command_line("train", config), "--resume"], tmp_path / "stderr")
    assert resumed.wait() == 0, resumed.error.read_text()
    same_run(config.out, run)


@pytest.mark.slow
@TO
def test_precompute_stops_and_resumes_to_the_same_bytes(teacher, cache, tmp_path, signum, to):
    """The signal goes to the process alone, or also to its decoding processes. The rows of the current
    view are kept.
    """
    pipeline = "torchvision" if to == "group" else "resident"
    config = precompute_config(teacher, tmp_path / "cache", pipeline=pipeline)
    command = Command(command_line("precompute", config), tmp_path / "stderr", _held_in_precompute)
    children = interrupt(command, signum, to)
    assert len(children) == (2 if to == "group" else 0)
    assert command.wait() == 128 + signum, command.error.read_text()
    assert command.last_line() == f"fastofa: saved in {config.out}; run the same command again to continue"
    assert 0 < len(load_tensors(config.out / part_file(1, 0))[0]["classes"]) < IMAGES
    assert [(config.out / view_file(view)).exists() for view in (0, 1)] == [True, False]
    until(lambda: not any(map(alive, children)))

    resumed = Command(command_line("precompute", config), tmp_path / "stderr")
    assert resumed.wait() == 0, resumed.error.read_text()
    same_cache(config.out, cache)


def _signals_for_new_workers(reached: Path) -> None:
    """Send both signals to each decoding process as soon as torch has installed its handlers there."""
    main, original = os.getpid(), torch.set_num_threads

    def set_num_threads(count: int) -> None:
        original(count)
        if os.getpid() != main:
            reached.touch()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    torch.set_num_threads = set_num_threads


@pytest.mark.slow
def test_decoding_processes_ignore_signals_from_the_start(cache, run, tmp_path):
    """If one were killed while it starts, training would end with an error of torch."""
    config = train_config(cache, tmp_path / "run", pipeline="torchvision")
    command = Command(command_line("train", config), tmp_path / "stderr", _signals_for_new_workers)
    assert command.wait() == 0, command.error.read_text()
    assert (tmp_path / "stderr.reached").exists()
    same_run(config.out, run)


def _stuck(reached: Path) -> None:
    """An evaluation that never ends, between two safe points; removes the file `reached` when a signal has arrived."""

    def predict(*_: Any, **__: Any) -> None:
        handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        reached.touch()
        while True:
            time.sleep(0.005)
            if handlers != [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]:
                reached.unlink(missing_ok=True)

    fastofa.training.evaluate_in_training.best_classes_each = predict  # type: ignore[assignment]


@pytest.mark.slow
@SIGNALS
def test_a_second_signal_ends_it_at_once(cache, run, tmp_path, signum):
    """The first one waits for a safe point that is never reached. What was saved before the evaluation is intact."""
    config = train_config(cache, tmp_path / "run", pipeline="resident")
    command = Command(command_line("train", config), tmp_path / "stderr", _stuck)
    reached = tmp_path / "stderr.reached"
    until(reached.exists, command)
    until((config.out / "checkpoints/step-00000020.safetensors").exists, command)  # a thread writes it
    os.kill(command.pid, signum)
    until(lambda: not reached.exists(), command)
    assert command.wait(0.1) is None
    os.kill(command.pid, signum)
    code = command.wait()
    if signum == signal.SIGINT:
        assert code == 130
        assert command.last_line() == "fastofa: interrupted; nothing else was saved"
    else:
        assert code == -signal.SIGTERM
        assert "Traceback" not in command.error.read_text()
    assert load_tensors(newest(config.out))[1]["step"] == 20

    resumed = Command([*command_line("train", config), "--resume"], tmp_path / "stderr")
    assert resumed.wait() == 0, resumed.error.read_text()
    same_run(config.out, run)


def _slow_start(reached: Path) -> None:
    """Opening the dataset never ends."""

    def open_dataset(*_: Any, **__: Any) -> None:
        reached.touch()
        time.sleep(600)

    fastofa.training.job.open_dataset = open_dataset  # type: ignore[assignment]


@pytest.mark.slow
def test_a_signal_before_the_work_begins(cache, tmp_path):
    config = train_config(cache, tmp_path / "run")
    command = Command(command_line("train", config), tmp_path / "stderr", _slow_start)
    until((tmp_path / "stderr.reached").exists, command)
    os.kill(command.pid, signal.SIGINT)
    assert command.wait() == 130
    assert command.error.read_text() == "fastofa: interrupted; nothing else was saved\n"
    assert not config.out.exists()


@pytest.mark.slow
def test_a_whole_process_from_its_start(cache, run, tmp_path):
    """Python, the command line, a signal, and the exit code that a shell sees, without a fork server."""
    config = train_config(cache, tmp_path / "run", pipeline="resident")
    reached = tmp_path / "reached"
    code = "import sys, pathlib, test_interrupt; from fastofa.cli import main\n"
    code += "test_interrupt._held_in_training(pathlib.Path(sys.argv.pop(1))); main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(reached), *command_line("train", config)],
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    until(lambda: reached.exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    reached.unlink()
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert "--resume" in error.splitlines()[-1]
    resumed = Command([*command_line("train", config), "--resume"], tmp_path / "stderr")
    assert resumed.wait() == 0, resumed.error.read_text()
    same_run(config.out, run)


# --- At every safe point ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_stopped_at_every_step(cache, run, tmp_path, monkeypatch):
    """After twenty interruptions, weights and log equal those of one run."""
    original = Objective.forward

    def call(self: Objective, *args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(Objective, "forward", call)
    monkeypatch.setattr(fastofa.training.live_report.LiveReport, "write", lambda *_: None)  # to be quick
    config = train_config(cache, tmp_path / "run", pipeline="resident", resume=True)
    for step in range(1, 20):
        with pytest.raises(Stopped, match=f"saved step {step} of 20"):
            train(config)
    train(config)  # stopped at its last step, it is finished
    same_run(config.out, run)


def test_precompute_stopped_at_every_batch_computes_no_prediction_twice(teacher, tmp_path, monkeypatch):
    """10 images held back, 599 validation images and 3 views of 100, whole or in parts; a part is removed once its
    table is written."""
    monkeypatch.setattr("fastofa.teacher.fidelity.IMAGES", 10)
    original, calls = Teacher.log_probs, []

    def log_probs(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if not started.pop(0):
            signal.raise_signal(signal.SIGTERM)
        return original(self, images)

    config = precompute_config(teacher, tmp_path / "cache", pipeline="resident", batch_size=50, views=3)
    monkeypatch.setattr(Teacher, "log_probs", log_probs)
    stops = 0
    while True:
        started = [True] + [False] * 100  # the first call is open_teacher's own trial
        try:
            precompute(config)
            break
        except Stopped:
            stops += 1
            assert any(config.out.glob(PARTS)) or stops == 1
    assert stops == 1 + 12 + 3 * 2
    TeacherCache.open(config.out).verify()
    assert calls.count(2) == stops + 1
    assert sum(calls) - 2 * calls.count(2) == 10 + 599 + 3 * IMAGES
    monkeypatch.setattr(Teacher, "log_probs", original)
    same_cache(config.out, precompute(dataclasses.replace(config, out=tmp_path / "reference")).path)


@pytest.mark.parametrize("first", ["digits", "beton"])
def test_precompute_resumes_from_another_form_in_another_order(teacher, tmp_path, monkeypatch, first):
    """Only predictions of the interrupted view are computed again."""
    beton = str(tmp_path / "x.beton")
    config = precompute_config(teacher, tmp_path / "cache", batch_size=50, views=1, scale=(0.6, 1.0), flip=0.0)
    write(WriteConfig(config.data, tmp_path / "x.beton", raw=True))
    original, calls = Teacher.log_probs, []

    def log_probs(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 1 + 2 + 12 + 1:  # a trial, the images held back, the validation images, half of the view
            signal.raise_signal(signal.SIGTERM)
        return original(self, images)

    monkeypatch.setattr(Teacher, "log_probs", log_probs)
    forms = {"digits": config, "beton": dataclasses.replace(config, data=beton)}
    with pytest.raises(Stopped):
        precompute(forms.pop(first))
    (other,) = forms.values()
    cache = precompute(other)
    assert sum(calls) == IMAGES + 599 + IMAGES + 50 + 2 * 2
    reference = precompute(dataclasses.replace(config, out=tmp_path / "reference"))
    for found, expected in zip(cache.targets(0)[1:], reference.targets(0)[1:], strict=True):
        assert torch.equal(found, expected)


def test_handlers_are_restored_and_a_second_signal_uses_the_previous_one():
    """`Interrupt` records only the first signal."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: seen.append(signum))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with Interrupt() as interrupt:
            assert interrupt.signum is None
            signal.raise_signal(signal.SIGTERM)
            assert (interrupt.signum, seen) == (signal.SIGTERM, [])
            signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
