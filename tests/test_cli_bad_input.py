"""Bad input ends a command with exit code 2 and one line: what was expected, what came and what to do.

There is no traceback, and no file is changed or left half-written.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from fastofa import cli
from fastofa.cli import COMMANDS
from fastofa.commands.arguments import CONFIGS
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.log import read_metrics
from fastofa.system.errors import Failed, LostContact, counted
from fastofa.system.files import load_tensors, save_tensors
from fastofa.system.progress import notice
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.cache_header import HEADER
from runs import CONTEXT, same_run

CHECKPOINT = "checkpoints/step-00000006.safetensors"


PRECOMPUTE = "precompute --data digits:20 --teacher teacher --views 2 --topk 3 --image-size 32"
OTHER_TEACHER = f"{PRECOMPUTE.replace('teacher teacher', 'teacher test_vit')} --out new"
TRAIN = (
    "train --recipe digits --data digits:20 --cache cache --student test_resnet --stages 4 --image-size 32 --epochs 3"
    " --batch-size 10 --eval-every 3 --checkpoint-every 4 --keep 1 --ema 0.9 --log-every 1"
)
PHOTO_TRAIN = (
    "train --recipe digits --data photos --student test_resnet --stages 4 --image-size 32 --epochs 1 --batch-size 10"
    " --workers 0 --scale 0.08 1 --flip 0.5"
)
PHOTO_PRECOMPUTE = "precompute --data photos --teacher teacher2 --views 1 --topk 2 --image-size 32 --workers 0"


def make_teacher(folder: Path, classes: int) -> None:
    torch.manual_seed(classes)
    names = ["china", "flower"] if classes == 2 else [str(i) for i in range(classes)]
    model = timm.create_model("test_efficientnet", num_classes=classes)
    save_for_hf(model, str(folder), {"label_names": names}, safe_serialization=True)


def fastofa(argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, run in this process."""
    return run_here(argv.split())


def run_here(argv: list[str]) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.main(argv)
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), error.getvalue()


def succeeds(argv: str) -> str:
    """Run a command that must succeed; returns its standard error."""
    code, _, error = fastofa(argv)
    assert code == 0, error
    return error


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name, hidden ones included, except indexes of images, which a refused command may extend."""
    files = [f for f in folder.rglob("*") if ".fastofa" not in f.parts]
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in files}


def refused(argv: str, message: str) -> None:
    """Exit code 2, one line that contains `message` (literally, with `...` for any text), and nothing written."""
    before = contents(Path.cwd())
    code, out, error = fastofa(argv)
    assert (code, out) == (2, ""), error
    assert_one_line(error, message)
    after = contents(Path.cwd())
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []


def assert_one_line(error: str, message: str) -> None:
    assert error.startswith("fastofa: error: "), error
    assert error.count("\n") == 1, error
    assert error.endswith("\n")
    assert len(error) < 800, error
    place = 0
    for part in message.split("..."):
        assert part in error[place:], error
        place = error.index(part, place) + len(part)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """Teachers of ten and of two classes, caches and runs of digits and photographs. Tests must not change them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_teacher(Path("teacher"), 10)
        make_teacher(Path("teacher2"), 2)
        shutil.copytree(photos, "photos", ignore=shutil.ignore_patterns(".fastofa"))
        for split in ("train", "val"):
            (folder / "empty" / split / "china").mkdir(parents=True)
        succeeds(f"{PRECOMPUTE} --out cache")
        succeeds(f"{PHOTO_PRECOMPUTE} --out photo-cache")
        succeeds(f"{TRAIN} --out run")
        (folder / "begun").mkdir()
        shutil.copy("run/config.json", "begun")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in that folder, in which nothing must be written."""
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of that folder, which the test may damage."""
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    monkeypatch.chdir(folder)
    return folder


REFUSED = {
    # names
    "no such command": ("frobnicate", "'frobnicate'...demo, write, precompute, train"),
    "no such student": (f"{TRAIN} --out new --student resnet1888", "'resnet1888'...resnet18"),
    "no such teacher": (f"{PRECOMPUTE} --out new --teacher convnext_tinny", "'convnext_tinny'...convnext_tiny"),
    "student's tag": (f"{TRAIN} --out new --student test_resnet.best", "'test_resnet.best'...best"),
    "teacher's tag": (f"{PRECOMPUTE} --out new --teacher test_vit.best", "'test_vit.best'...best"),
    "train's data": (f"{TRAIN} --out new --data digit", "'digit'...digits:N"),
    "precompute's data": (f"{PRECOMPUTE} --out new --data digit", "'digit'...digits:N"),
    "evaluate's data": ("evaluate run --data digit", "'digit'...digits:N"),
    "digits by count": (f"{TRAIN} --out new --data digits:15", "digits...10...'15'"),
    "recipe": (f"{TRAIN} --out new --recipe imagenet", "recipe...expected...imagenet_cnn...imagenet"),
    "no recipe, no cache": ("train --data digits:20 --student test_resnet --out new", "ofa...--cache"),
    "train's pipeline": (f"{TRAIN} --out new --pipeline ffvc", "'ffvc'...auto...resident"),
    "precompute's pipeline": (f"{PRECOMPUTE} --out new --pipeline ffvc", "'ffvc'...auto...resident"),
    "evaluate's pipeline": ("evaluate run --data digits --pipeline ffvc", "'ffvc'...auto...resident"),
    "train's device": (f"{TRAIN} --out new --device gpu", "device...'gpu'...auto, cpu"),
    "precompute's device": (f"{PRECOMPUTE} --out new --device cuda:99", "device...'cuda:99'...auto, cpu"),
    "evaluate's device": ("evaluate run --data digits --device gpu", "device...'gpu'...auto, cpu"),
    # images
    "no folders": (f"{PRECOMPUTE} --out new --data teacher", "teacher: ...train/...val/"),
    "no images": (f"{PRECOMPUTE} --out new --data empty", "china...images...jpg"),
    "many sizes": (
        f"{PHOTO_PRECOMPUTE} --out new --pipeline resident",
        "resident...size...--pipeline auto",
    ),
    # caches
    "no teacher": (
        "precompute --data photos --teacher runs/none --views 1 --topk 2 --out new",
        "unknown model 'runs/none': ...; there is no folder runs/none either",
    ),
    "no online teacher": (
        "train --data photos --online-teacher runs/none --student test_resnet --out new",
        "unknown model 'runs/none': ...; there is no folder runs/none either",
    ),
    "no cache": (f"{TRAIN} --out new --cache nowhere", "nowhere: ...no such folder"),
    "no cache named": (TRAIN.replace("--cache cache", "--out new"), "ofa...--cache"),
    "of other data": (
        f"{TRAIN} --out new --data digits:30",
        "digits:30...30...digits:20...20",
    ),
    "of other classes": (f"{TRAIN} --out new --data photos", "2 classes...photos...10"),
    "other crops": (
        f"{TRAIN} --out new --scale 0.5 1",
        "scale=(0.5, 1.0)...precompute",
    ),
    "other ratio": (f"{TRAIN} --out new --ratio 1 1", "ratio=(1.0, 1.0)...precompute"),
    "other flips": (f"{TRAIN} --out new --flip 0.5", "flip=0.5...precompute"),
    "other top-K": (f"{PRECOMPUTE} --out cache --topk 2", "cache...topk (cached: 3, given: 2"),
    "other seed": (f"{PRECOMPUTE} --out cache --seed 1", "cache...seed (cached: 0, given: 1"),
    "other size": (f"{PRECOMPUTE} --out cache --image-size 48", "cache...teacher...--out"),
    "other digits": (f"{PRECOMPUTE} --out cache --data digits:30", "cache...dataset...--out"),
    "no place for a cache": (
        f"{PRECOMPUTE} --out run",
        "run: ...folder...cache...--out",
    ),
    "K above C": (f"{PRECOMPUTE} --out new --topk 11", "topk...10 classes...digits:20...11"),
    "no views": (f"{PRECOMPUTE} --out new --views 0", "views: expected at least 1, got 0"),
    "info on a run": (
        "cache info run",
        "run: ...fastofa precompute",
    ),
    "verify nothing": ("cache verify nowhere", "nowhere: ...fastofa precompute"),
    # teachers
    "teacher of two": (f"{PRECOMPUTE} --out new --teacher teacher2", "teacher2...10 classes...2"),
    "teacher of ten": (f"{PHOTO_PRECOMPUTE} --out new --teacher teacher", "teacher...2 classes...10"),
    "no teacher in it": (f"{PRECOMPUTE} --out new --teacher photos", "photos/config.json"),
    "no weights": (f"{OTHER_TEACHER} --teacher-checkpoint no.pth", "no.pth"),
    "half a normalisation": (f"{PRECOMPUTE} --out new --mean 0.5 0.5 0.5", "--mean...--std"),
    # students and runs
    "two stages": (
        f"{TRAIN} --out new --student levit_128s --image-size 224 --stages 1 2 3 4",
        "levit_128s...1 2 3 4...3, 4...stages 3 4",
    ),
    "batch": (f"{TRAIN} --out new --batch-size 21", "batch-size...20...21"),
    "run is there": (
        f"{TRAIN} --out run",
        "run: ...--resume...--out",
    ),
    "other arguments": (
        f"{TRAIN} --out run --resume --lr 0.5 --epochs 2",
        "--resume...epochs: 2...3...lr: 0.5...0.002...more epochs",
    ),
    "export over a folder": ("export run teacher", "teacher: ...exists"),
    "export no run": ("export cache new", "cache: ...fastofa train...config.json"),
    "export a model": ("export teacher new", "teacher/config.json: ...fastofa train"),
    "export what is only begun": ("export begun new", "begun: ...checkpoint...--resume"),
    "evaluate no run": ("evaluate nowhere --data digits", "nowhere: ...fastofa train"),
    "evaluate a cache": ("evaluate cache --data digits", "cache: ...fastofa train"),
    "evaluate what is only begun": ("evaluate begun --data digits", "begun: ...checkpoint...--resume"),
    "evaluate other classes": (
        "evaluate run --data photos",
        "10 classes...run...2...0, 1, 2, ...china, flower",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(here, name):
    refused(*REFUSED[name])


# Beside this smallest one another value is wanted.
NO_ZERO = {"write": {"workers"}, "precompute": {"image_size", "batch_size", "views", "topk", "repeats"}}
NO_ZERO["evaluate"] = {"batch_size"}
NO_ZERO["train"] = {"image_size", "start_size", "eval_size", "epochs", "batch_size", "accumulate", "clip", "ema"}
NO_ZERO["train"] |= {"log_every", "eval_every", "checkpoint_every", "keep", "timeout_s", "temperature"}
NUMBERS = (int, float, int | None, float | None)
START = {
    "write": "write digits new.pack", "precompute": f"{PRECOMPUTE} --out new", "train": f"{TRAIN} --out new",
    "evaluate": "evaluate run --data digits", "export": "export run new", "cache": "cache info cache",
}  # fmt: skip


@pytest.mark.parametrize("command", NO_ZERO)
def test_zero_is_not_taken_for_a_missing_value(here, command, monkeypatch):
    """0, a negative number or text is refused by the option's name, or reaches the command."""
    arrived = []

    def main(config: Any) -> None:
        if command == "precompute":
            config.policy()
        arrived.append(config)

    monkeypatch.setattr(f"fastofa.commands.{command}.main", main)
    for name, hint in get_type_hints(CONFIGS[command]).items():
        for value in ("0", "-1", "nan") if hint in NUMBERS else ():
            flag = f"--{name.replace('_', '-')}"
            code, _, error = fastofa(f"{START[command]} {flag} {value}")
            if code == 0:
                assert str(getattr(arrived.pop(), name)).startswith(value), name
                assert (name, value) not in {(no_zero, "0") for no_zero in NO_ZERO[command]}
                assert value != "nan", name
            elif value != "nan" or "float" in str(hint):  # the parser refuses it as no whole number
                assert code == 2
                assert_one_line(error, "")
                assert re.search(rf"\b{name.replace('_', '.')}\b", error), error


WITHOUT_TORCH = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError
sys.meta_path.insert(0, Finder())
from fastofa.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        REFUSED["run is there"],
        REFUSED["train's data"],
        REFUSED["precompute's data"],
        REFUSED["evaluate's data"],
        REFUSED["no folders"],
        REFUSED["other top-K"],
        REFUSED["other seed"],
        (
            f"{PRECOMPUTE} --out cache --flip 0.25 --scale 0.5 1",
            "scale (cached: 0.6 1, given: 0.5 1)...flip (cached: 0, given: 0.25",
        ),
        REFUSED["no place for a cache"],
        REFUSED["export over a folder"],
        ("write nowhere new.pack", "'nowhere'...digits:N"),
        (
            "write digits taken.pack",
            "taken.pack: ...exists...--verify",
        ),
    ],
)
def test_paths_are_checked_before_torch_is_imported(copied, argv, message):
    Path("taken.pack").mkdir()
    command = [sys.executable, "-c", WITHOUT_TORCH, *argv.split()]
    ended = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert_one_line(ended.stderr, message)


@pytest.mark.parametrize(
    "wrong", ["--teacher convnext_tinny", "--teacher local-dir:nowhere", "--device gpu", "--pipeline ffvc"]
)
def test_names_are_checked_before_images_are_decoded(copied, wrong):
    """Decoding takes an hour for ImageNet. The damaged image is not what is reported."""
    shutil.rmtree("photos/.fastofa")
    Path("photos/train/china/001.jpg").write_text("not an image")
    refused(f"{PHOTO_PRECOMPUTE} --out new {wrong}", wrong.rpartition(":")[2].split()[-1])
    assert not Path("photos/.fastofa").exists()


def test_a_restarted_rank_resumes_the_existing_run(copied, monkeypatch):
    """torchrun restarts it without --resume."""
    for name, value in (("RUN_ID", "1"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert "already contains a run" not in succeeds(f"{TRAIN} --out run")


# --- The command line itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command):
    code, out, error = fastofa(f"{command} --help")
    assert (code, error) == (0, "")
    for field in dataclasses.fields(CONFIGS[command]):
        positional = field.name.upper() in out or "{info,verify" in out
        if field.name == "own_options":  # flags of the methods in users' files
            continue
        end = r"\." if dataclasses.is_dataclass(field.default_factory) else "[ ,]"  # options within options
        assert re.search(rf"--{field.name.replace('_', '-')}{end}", out) or positional, field.name


def test_help_of_an_action_is_that_of_cache():
    """With --help after it, its usage would name neither the action nor the others."""
    assert fastofa("cache push --help") == fastofa("cache --help")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command, width, monkeypatch):
    """Text is wrapped at its width; each example has a line, and nothing else is longer than a line."""
    monkeypatch.setenv("COLUMNS", str(width))
    lines = fastofa(f"{command} --help")[1].splitlines()
    examples = [line for line in lines if re.match(r" {4}(fastofa|torchrun|python) ", line)]
    assert len(examples) == len(re.findall(r"^ {4}(?:fastofa|torchrun|python) ", _source(command), re.MULTILINE)) > 0
    assert all(line.count("fastofa") <= 1 + line.count("torchrun") for line in examples)
    assert [line for line in lines if len(line) > width and not line.startswith(("usage:", *examples))] == []
    assert "\n\n\n" not in "\n".join(lines)
    flowing = " ".join(" ".join(lines).replace("│", " ").replace("|", " ").split())
    for field in dataclasses.fields(CONFIGS[command]):
        assert not re.search(rf"--{field.name.replace('_', '-')} [^-]*[Bb]y default[^-]*default: None", flowing)


def _source(command: str) -> str:
    return Path(cli.__file__).with_name("commands").joinpath(f"{command}.py").read_text()


def test_help_names_every_command():
    for argv in ("--help", "-h"):
        code, out, error = fastofa(argv)
        assert (code, error) == (0, "")
        assert all(f"\n  {command} " in out for command in COMMANDS)
    assert fastofa("")[0] == 2


@pytest.mark.parametrize(
    "argv",
    [
        "precompute",
        "train",
        "evaluate",
        "export",
        "cache",
        *(f"{command} --frobnicate" for command in COMMANDS),
        f"{TRAIN} --out new --epochs many",
        f"{TRAIN} --out new --method magic",
        f"{TRAIN} --out new --lr",
        f"{TRAIN} --out new --recipe",
        f"{PRECOMPUTE} --out new --topk 2.5",
        f"{PRECOMPUTE} --out new --precision fp64",
        "export run",
        "cache mend cache",
    ],
)
def test_arguments_that_cannot_be_parsed(here, argv):
    """The parser prints several lines, but the exit code is the same and nothing is written."""
    before = contents(here).keys()
    code, _, error = fastofa(argv)
    assert code == 2
    assert error
    assert "Traceback" not in error
    assert contents(here).keys() == before


@pytest.mark.parametrize(
    "argv",
    [
        "write photos new.pack", "evaluate run --data digits:20", "export run new",
        "cache verify cache", "demo --out new", "doctor",
    ],
)  # fmt: skip
def test_other_commands_than_train_and_precompute_refuse_several_ranks(here, argv, monkeypatch):
    """Each rank of another command would do all of the work and overwrite the others' files."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("WORLD_SIZE", "8")
    refused(argv, f"{argv.split()[0]}...8...WORLD_SIZE...torchrun")


def test_the_loss_of_another_rank_is_one_line(monkeypatch):
    """Exit code 1, so that torchrun restarts it; no traceback, and no "error", since nothing here was wrong."""

    def lose(config: TrainConfig) -> None:
        raise LostContact("rank 1: lost the other ranks")

    monkeypatch.setattr("fastofa.commands.train.main", lose)
    assert fastofa(f"{TRAIN} --out new") == (1, "", "fastofa: rank 1: lost the other ranks\n")


@pytest.mark.parametrize(
    "argv",
    [
        f"{TRAIN} --out s3://bucket/run", f"{TRAIN} --out=gs://bucket/run", f"{TRAIN} --out new --init https://x/w.pth",
        f"{TRAIN} --out new --cache file:///cache", f"{PRECOMPUTE} --out new --data cifar100:S3://photos", "cache info hdfs://c",
        f"{PRECOMPUTE} --out new --teacher-checkpoint http://x/w", "write cifar100:gs://c x.pack", "demo --out s3://b",
        "write digits s3://b/x.beton", "export s3://b/run new", "export run s3://b", "evaluate gs://b --data digits",
        "cache merge cache s3://b/part --out new", "cache merge cache cache --out s3://b", "cache push s3://b cache",
        "cache diff cache cache --json s3://b/x.json", "predict model s3://b/x.jpg",
    ],
)  # fmt: skip
def test_urls_are_refused(here, argv):
    """Otherwise a local folder `s3:` would be created."""
    (url,) = [part.partition("=")[2] or part.removeprefix("cifar100:") for part in argv.split() if "://" in part]
    refused(argv, url)


def test_urls_in_a_file_are_refused(copied):
    """Of --config, where a path would lose one of its slashes."""
    config = recipes.digits(data="digits", student="test_vit", out=Path("new"), method="scratch").to_json()
    for name, value in (("out", "s3://b/run"), ("init", "s3://w")):
        Path("file.json").write_text(json.dumps({"config": {**config, name: value}}))
        refused("train --config file.json", f"{name}: expected a path on this machine, got the URL {value}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("info a b", "cache info: expected one cache, got 2"),
        ("merge cache --out new", "cache merge: expected at least two caches, got 1"),
        ("merge cache cache", "cache merge: expected --out"),
        ("diff cache", "cache diff: expected two caches, got 1"),
        ("push cache there", "cache push: expected CACHE URL, got 'there' where the URL belongs; ...file:///"),
        ("verify s3://b/x", "cache verify: ...got the URL s3://b/x; run `fastofa cache pull s3://b/x FOLDER`"),
        ("extend cache file:///x", "cache extend: ...; run `fastofa cache pull file:///x FOLDER` and give the folder"),
        ("push s3://b/x cache", "cache push: ...; run `fastofa cache pull s3://b/x FOLDER`"),
        (
            "pull s3://b/x s3://b/y",
            "cache pull: ...; pull into a folder, then run `fastofa cache push FOLDER s3://b/y`",
        ),
        ("pull cache there", "cache pull: expected URL CACHE, got 'cache' where the URL belongs"),
        ("info cache --out new", "out: expected only with `fastofa cache merge`"),
        ("extend cache cache --json x.json", "json: expected only with `fastofa cache diff`"),
        ("pull memory://nothing/here new", "memory://nothing/here: expected a teacher cache, but found no cache.json"),
        ("push cache nosuch://b/x", "nosuch://b/x: expected a URL that fsspec opens"),
        ("push nowhere memory://b/x", "nowhere: expected a teacher cache made by `fastofa precompute`"),
    ],
)
def test_arguments_of_cache(here, argv, message):
    refused(f"cache {argv}", message)


def test_control_characters_in_names_are_escaped(copied, capsys):
    """An escape sequence, a second line, right-to-left text, a byte that is not UTF-8."""
    name = "x\x1b]0;title\x07\n\u202efastofa: error: forged\udcff[red]"
    Path(name).mkdir()
    shown = r"x\x1b]0;title\x07\n\u202efastofa: error: forged\udcff[red]"
    code, _, error = run_here(["cache", "verify", name])
    assert code == 2
    assert_one_line(error, f"{shown}: ")
    shutil.copytree("cache", name, dirs_exist_ok=True)
    code, _, error = run_here(["cache", "info", name])
    assert code == 2
    assert_one_line(error, f"{shown}/val.safetensors: ...UTF-8")
    name, shown = name.replace("\udcff", ""), shown.replace(r"\udcff", "")
    shutil.copytree("cache", name)
    code, out, _ = run_here(["cache", "info", name])
    assert code == 0
    assert "".join(out.splitlines()[0].split()) == "".join(shown.split())
    assert "\x1b" not in out
    notice(f"left out {name}")
    assert capsys.readouterr().err == f"left out {shown}\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
            1,
            "CUDA out of memory...--accumulate",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory...--batch-size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            1,
            "DefaultCPUAllocator...--workers",
        ),
        (MemoryError(), 1, "MemoryError...--batch-size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "Cannot allocate memory...--batch-size"),
        (OSError(errno.EMFILE, "Too many open files", "x.jpg"), 2, "ulimit -n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "photos/train"),
            2,
            "photos/train...Permission denied",
        ),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), 2, "a: Too many levels"),
        (RuntimeError("fatal error: Python.h: No such file"), 2, "compile: ...Python...--compile off"),
        (Failed("a process that decodes images ended"), 1, "a process that decodes images ended"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_missing_resources_are_one_line(monkeypatch, error, code, message):
    """Wherever they are noticed."""

    def fail(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr("fastofa.commands.train.main", fail)
    found, out, said = fastofa(f"{TRAIN} --out new")
    assert (found, out) == (code, "")
    assert_one_line(said.replace("fastofa: ", "fastofa: error: ") if code == 1 else said, message)


def test_an_unexpected_exception_shows_a_traceback(monkeypatch):
    monkeypatch.setattr("fastofa.commands.train.main", lambda _: {}["a fault"])
    code, _, error = fastofa(f"{TRAIN} --out new")
    assert code == 1
    assert error.startswith("Traceback")
    assert error.endswith("KeyError: 'a fault'\n")


STUCK = """
import sys, threading
from fastofa import cli
from fastofa.commands import doctor
def main(config):
    threading.Thread(target=threading.Event().wait).start()
    raise {error}
doctor.main = main
sys.argv = ["fastofa", "doctor"]
cli.main()
"""


@pytest.mark.parametrize(("error", "code"), [("KeyError('a fault')", 1), ("cli.BadInput('no')", 2)])
def test_a_command_ends_although_a_thread_does_not(error, code):
    """For example, one that waits for a disk."""
    command = [sys.executable, "-c", STUCK.format(error=error)]
    ended = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == {1: "KeyError: 'a fault'", 2: "fastofa: error: no"}[code]


IMPORTING = """
import os, signal, sys, types
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fastofa.training.loop":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(10**6): pass
            except KeyboardInterrupt:
                raise ImportError("what some libraries make of it")
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastofa.cli import main
sys.argv = ["fastofa", *"train --data digits --student s --recipe digits --out o".split()]
main()
"""


def test_ctrl_c_while_it_imports():
    ended = subprocess.run([sys.executable, "-c", IMPORTING], timeout=60, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "fastofa: interrupted; nothing else was saved\n")


# --- Damaged and edited files -----------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def edit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


DAMAGE = pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged"),
        (edit, "checksum"),
        (Path.unlink, "missing"),
    ],
    ids=["truncated", "edited", "missing"],
)


@DAMAGE
def test_damaged_cache(copied, damage, message):
    """Each file, by `cache verify`; the first view and the validation predictions, by training. Precompute replaces a
    removed file. Without its last view, a cache counts as unfinished.
    """
    for file in (view_file(0), view_file(1), VAL):
        kept = Path("cache", file).read_bytes()
        damage(Path("cache", file))
        if file == view_file(1) and damage == Path.unlink:
            assert "1 of 2 views" in fastofa("cache verify cache")[1]
        else:
            refused("cache verify cache", f"{file}...{message}")
        if file != view_file(1):
            refused(f"{TRAIN} --out new", f"{file}...{message}")
        Path("cache", file).unlink(missing_ok=True)
        succeeds(f"{PRECOMPUTE} --out cache")
        assert Path("cache", file).read_bytes() == kept


def test_a_view_damaged_during_a_run(copied):
    """The second view is read after the first epoch: the error is the last line, and the run can be resumed."""
    truncate(Path("cache", view_file(1)))
    code, _, error = fastofa(f"{TRAIN} --out new")
    *progress, last = error.splitlines()
    assert code == 2
    assert_one_line(f"{last}\n", f"{view_file(1)}...damaged")
    assert "error" not in " ".join(progress)
    Path("cache", view_file(1)).unlink()
    succeeds(f"{PRECOMPUTE} --out cache")
    succeeds(f"{TRAIN} --out new --resume")
    same_run(Path("new"), Path("run"))


def edits(value: Any) -> Any:
    """`value` (JSON) with one entry removed or replaced by one of another type."""
    if isinstance(value, dict):
        for key in value:
            yield f"no {key}", {k: v for k, v in value.items() if k != key}
            for what, edited in edits(value[key]):
                yield f"{key}: {what}", {**value, key: edited}
    if isinstance(value, list) and value:
        for what, edited in edits(value[0]):
            yield f"[0] {what}", [edited, *value[1:]]
    for other in (None, "x", -1, []):
        yield repr(other), other


def test_edited_header_of_a_cache(copied):
    """Whatever is changed in cache.json, every command gives its result or one line."""
    header = json.loads(Path("cache", HEADER).read_text())
    del header["config"]  # only --config reads it
    count = 0
    for what, edited in edits(header):
        Path("cache", HEADER).write_text(json.dumps(edited))
        for argv in ("cache info cache", "cache verify cache", f"{TRAIN} --out new --student nothing"):
            code, _, error = fastofa(argv)
            assert code in (0, 2), (what, argv)
            if code:
                assert_one_line(error, "")
                count += HEADER in error
                break  # train opens it in the same way
    assert count > 80
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        ({"schema": 2}, "schema 4...2"),
        ({"policy": {"scale": [0.1, 1], "ratio": [1, 1], "flip": 0, "auto_augment": 9}}, "cache.json: ...precompute"),
        ({"topk": 4}, "val.safetensors: ...cache...another"),
        ({"seed": 1}, "val.safetensors: ...cache...another"),
        ({"views": "2"}, "cache.json: ...precompute"),
        ({"teachers": []}, "cache.json: ...precompute"),
        ({"policy": {}}, "cache.json: ...precompute"),
    ],
)
def test_edited_field_of_a_cache(copied, edited, message):
    header = json.loads(Path("cache", HEADER).read_text())
    Path("cache", HEADER).write_text(json.dumps({**header, **edited}))
    refused("cache verify cache", message)
    refused(f"{TRAIN} --out new", message)


def test_header_that_is_not_json(copied):
    Path("cache", HEADER).write_text(Path("cache", HEADER).read_text()[:-30])
    for argv in ("cache info cache", f"{TRAIN} --out new", f"{PRECOMPUTE} --out cache"):
        refused(argv, "cache/cache.json...JSON")


def test_edited_configuration_of_a_run(copied):
    """A required field is missing (others have defaults), or classes or the teacher's width are of another type."""
    values = json.loads(Path("run", "config.json").read_text())
    count = 0
    for what, edited in edits(values):
        if re.match("(config: )?no |classes|teacher_dim", what):
            Path("run", "config.json").write_text(json.dumps(edited))
            code, _, error = fastofa("evaluate run --data photos")  # other classes: refused at the latest here
            assert code == 2, what
            assert_one_line(error, "")
            count += "config.json: expected" in error
    assert count > 12
    Path("run", "config.json").write_text("{")
    refused("export run new", "run/config.json...JSON")


READERS = (f"{TRAIN} --out run --resume", "evaluate run --data digits:20", "export run new")


@DAMAGE
def test_damaged_checkpoint(copied, damage, message):
    damage(Path("run", CHECKPOINT))
    if damage == Path.unlink:
        for argv in READERS[1:]:
            refused(argv, "run: ...checkpoint...--resume")
    else:
        for argv in READERS:
            refused(argv, f"run/{CHECKPOINT}...{message}")


def test_damaged_newest_checkpoint_of_several(copied):
    """Training resumes from the one before; evaluate and export refuse, and use no other weights unasked."""
    succeeds(f"{TRAIN} --out run3 --checkpoint-every 4 --keep 2")
    truncate(Path("run3", CHECKPOINT))
    for argv in ("evaluate run3 --data digits:20", "export run3 new"):
        refused(argv, f"run3/{CHECKPOINT}...damaged")
    error = succeeds(f"{TRAIN} --out run3 --resume --keep 2")
    assert f"run3/{CHECKPOINT}: " in error
    assert "checkpoint before" in error
    same_run(Path("run3"), Path("run"))


STUDENT, EMA, ADAM = "student.backbone.bn1.weight", "ema.backbone.bn1.weight", "optimizer.exits.0.head.bias.exp_avg"


@pytest.mark.parametrize(
    ("change", "message", "readers"),
    [
        ({STUDENT: None}, "student...missing backbone.bn1.weight", READERS[:1]),
        ({EMA: None}, "ema...missing backbone.bn1.weight", READERS),
        (
            {"student.more": torch.zeros(2)},
            "student...unexpected more",
            READERS[:1],
        ),
        ({"ema.more": torch.zeros(2)}, "ema...unexpected more", READERS),
        ({STUDENT: torch.zeros(2)}, "student...shape backbone.bn1.weight", READERS[:1]),
        ({ADAM: None}, "optimizer...exits.0.head.bias.exp_avg (missing", READERS[:1]),
        ({ADAM: torch.zeros(3)}, "optimizer...exits.0.head.bias.exp_avg", READERS[:1]),
        ({"optimizer.more.exp_avg": torch.zeros(2)}, "optimizer...more.exp_avg", READERS[:1]),
        ({"position": None}, "fastofa train...position", READERS[:1]),
        ({"step": None}, "fastofa train...step", READERS[:1]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_checkpoint_with_other_keys(copied, change, message, readers):
    """It is intact with a correct checksum, but is not what this run saves."""
    tensors, info = load_tensors(Path("run", CHECKPOINT))
    for name, value in change.items():
        if value is not None:
            tensors[name] = value
        else:
            del (info if name in info else tensors)[name]
    save_tensors(Path("run", CHECKPOINT), tensors, info)
    for argv in readers:
        refused(argv, f"run/{CHECKPOINT}: ...{message}")


# --- Pickles ----------------------------------------------------------------------------------------------------------


class Code:
    """Creates the folder `executed` when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize(
    ("file", "commands"),
    [
        (f"run/{CHECKPOINT}", READERS),
        (f"cache/{view_file(0)}", ("cache verify cache", f"{TRAIN} --out new")),
        (f"cache/{VAL}", ("cache verify cache", f"{TRAIN} --out new")),
        ("teacher/model.safetensors", (f"{PRECOMPUTE} --out new",)),
    ],
)
def test_a_pickle_in_place_of_tensors_is_not_opened(copied, file, commands, how):
    tensors = {"weight": torch.zeros(2), "code": Code()}
    if how == "pickle":
        Path(file).write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, file)
    for argv in commands:
        refused(argv, f"{file}: ...safetensors...pickle")
    assert not Path("executed").exists()
    torch.load(file, weights_only=False) if how == "torch.save" else pickle.loads(Path(file).read_bytes())
    assert Path("executed").exists()  # so it would have shown


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_code_in_weights_is_not_executed(copied, suffix):
    file = f"weights.{suffix}"
    torch.save({"state_dict": {"head.weight": torch.zeros(2), "code": Code()}}, file)
    refused(
        f"{OTHER_TEACHER} --teacher-checkpoint {file}",
        f"{file}: ...mkdir",
    )
    refused(f"{TRAIN} --out new --init {file}", f"{file}: ...mkdir")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "image", "1 image"), (0, "view", "0 views"), (2000, "class", "2,000 classes"), (1, "class", "1 class")],
)
def test_counted_uses_the_singular_for_one(number, noun, text):
    assert counted(number, noun) == text


def test_messages_use_the_singular_for_one(tmp_path, monkeypatch):
    """With one image, one class and one view: all messages of all commands up to a trained student."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "red" / "below").mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "photos" / split / "red" / "below" / "1.png")
        (tmp_path / "photos" / split / "red" / "notes.txt").write_text("")
    model = timm.create_model("test_efficientnet", num_classes=1)
    save_for_hf(model, "teacher", {"label_names": ["red"]}, safe_serialization=True)
    common = "--data photos --image-size 32 --flip 0 --workers 0"
    train = f"train {common} --student test_vit --epochs 1 --batch-size 1"
    commands = [
        "write photos photos.pack", "write photos photos.beton", f"{train} --method scratch --out run",
        f"precompute {common} --teacher teacher --views 1 --topk 1 --out cache",
        f"{train} --stages 4 --cache cache --out run2", "cache info cache", "cache verify cache",
        "evaluate run2 --workers 0", "export run student", f"{train} --method scratch --plan --out new",
    ]  # fmt: skip
    said = [fastofa(argv) for argv in commands]
    assert [one for one in said if one[0]] == []
    words = " ".join(out + error for _, out, error in said)
    plurals = "images|classes|views|files|samples|predictions|epochs|steps|others"
    assert re.findall(rf"(?<![\d.,])1 (?:[a-z]+ )?(?:{plurals})\b", words) == []


# --- Unreadable images ------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_can_be_skipped(copied):
    """Text, an empty file and half an image; then the same with --skip-corrupt, up to a student."""
    shutil.rmtree("photos/.fastofa")
    text, empty, half = (Path("photos", "train", name) for name in ("china/001.jpg", "flower/002.jpg", "china/003.jpg"))
    text.write_text("not an image")
    empty.write_bytes(b"")
    refused(f"{PHOTO_PRECOMPUTE} --out new", f"2 unreadable...{text}...{empty}...--skip-corrupt")
    half.write_bytes(half.read_bytes()[:1000])
    error = succeeds(f"{PHOTO_PRECOMPUTE} --out new --skip-corrupt")
    assert re.search(r"photos/train: .*\b3 unreadable", error)
    assert all(f"{file.parent.name}/{file.name}" in error for file in (text, empty, half))
    assert len(load_tensors(Path("new", view_file(0)))[0]["classes"]) == 24 - 3
    error = succeeds(f"{PHOTO_TRAIN} --cache new --out student")
    assert "3 unreadable" in error
    assert any("top1" in row for row in read_metrics(Path("student")))


def test_an_image_with_only_its_header_intact(copied):
    """It is found before the teacher runs, since all images are decoded once; nothing is written."""
    Path("photos", "train", "flower", "007.jpg").write_bytes(Path("photos/train/flower/007.jpg").read_bytes()[:2000])
    code, _, error = fastofa(f"{PHOTO_PRECOMPUTE} --out new")
    assert code == 2
    assert_one_line(error.splitlines()[-1] + "\n", "1 unreadable...photos/train/flower/007.jpg...--skip-corrupt")
    assert "Traceback" not in error
    assert not Path("new").exists()
    assert fastofa(f"{PHOTO_PRECOMPUTE} --out new --skip-corrupt")[0] == 0  # as the line says


# --- A full disk ------------------------------------------------------------------------------------------------------


def with_space(argv: str, size: int) -> tuple[int, str]:
    """Exit code and standard error in a process that cannot write a file larger than `size` bytes."""
    mine, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_with_space, args=(argv, size, theirs))
    process.start()
    theirs.close()
    code, error = mine.recv()
    process.join()
    return code, error


def _with_space(argv: str, size: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then such a write fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    code, _, error = fastofa(argv)
    sender.send((code, error))


def full(argv: str, size: int, message: str, out: str) -> None:
    """The last line reports it, and the files in the folder `out` are intact."""
    code, error = with_space(argv, size)
    assert code == 2, error
    assert "Traceback" not in error
    *before, last = error.splitlines()
    assert_one_line(f"{last}\n", message)
    assert "error" not in " ".join(before)
    for file in Path(out).rglob("*"):
        assert not file.name.endswith(".tmp")
        if file.suffix == ".safetensors":
            load_tensors(file)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "file"), [(300, HEADER), (3000, "seen.png"), (12_000, view_file(0))])
def test_full_disk_while_precomputing(copied, size, file):
    """Once there is space, the same command resumes."""
    argv = f"{PRECOMPUTE} --out new --data digits:1000"
    full(argv, size, f"new/{file}...free space", "new")
    succeeds(argv)
    succeeds(argv.replace("new", "new2"))
    assert contents(Path("new")) == contents(Path("new2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (300, "new/config.json"),
        (2000, "new...free space"),  # the log
        (100_000, "new/checkpoints/...free space"),
    ],
    ids=["configuration", "log", "checkpoint"],
)
def test_full_disk_while_training(copied, size, message):
    """Once there is space, the same command with --resume reaches the same weights."""
    full(f"{TRAIN} --out new", size, message, "new")
    succeeds(f"{TRAIN} --out new --resume")
    same_run(Path("new"), Path("run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "size", "file", "out"),
    [
        ("export run new", 100, "new", "new"),
        ("export run new", 100_000, "new", "new"),
        ("evaluate run --data digits:20", 50, "run/evaluation.json", "run"),
    ],
    ids=["export's first file", "export's weights", "evaluation"],
)
def test_full_disk_while_exporting_and_evaluating(copied, argv, size, file, out):
    before = contents(copied)
    full(argv, size, file, out)
    assert contents(copied) == before
    succeeds(argv)
