"""`--config FILE` and `--resume RUN`: a configuration from a file, changed by flags."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastofa.commands.arguments import CONFIGS
from fastofa.commands.parse import parse
from fastofa.commands.sections import SECTIONS
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.config_file import read_config
from fastofa.runs.run import Run, open_run
from fastofa.system.files import read_json
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_header import policy_to_json, read_header
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train
from fastofa.views.policy import ViewPolicy
from test_cli_bad_input import assert_one_line, fastofa, run_here

CHANGED: dict[str, Any] = {"lr": 0.3, "stages": (1, 4), "cache": "cache", "init": "weights.pth", "seed": 5}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, cache, weights and a run that was started in it; the tests work in another one."""
    folder = tmp_path / "there"
    for name in ("photos/train", "cache", "run", "digits"):
        (folder / name).mkdir(parents=True)
    (folder / "weights.pth").touch()
    config = recipes.imagenet_cnn(data="photos", student="resnet18", out=Path("run"), resume=True, **CHANGED)
    Run(folder / "run", config, ("a", "b"), 0, "data", folder=str(folder)).save()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


# --- Train ------------------------------------------------------------------------------------------------------------


# Options within options: those of the distillation methods.
NESTED = {f.name for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(f.default_factory)}


def test_a_runs_file_gives_every_default_and_flags_change_them(there):
    """Relative paths are relative to where the run was started. Whether it was resumed is not inherited."""
    file = there / "run" / "config.json"
    config = parse("train", ["--config", str(file)])
    expected = {"data": str(there / "photos"), "out": there / "run", "cache": str(there / "cache")}
    own = TrainConfig.from_json(read_json(file)["config"])
    whole = dataclasses.replace(own, **expected, init=str(there / "weights.pth"), resume=False)
    assert config == whole
    changed = parse("train", [f"--config={file}", "--out", "other", "--lr", "0.05", "--cache", "None", "--resume"])
    assert changed == dataclasses.replace(whole, out=Path("other"), lr=0.05, cache=None, resume=True)
    os.chdir(there)
    assert parse("train", ["--config", "run/config.json"]) == dataclasses.replace(own, resume=False)


@pytest.mark.parametrize("bare", [True, False])
def test_paths_of_a_plain_file_are_relative_to_the_working_directory(there, bare):
    values = read_json(there / "run" / "config.json")["config"]
    Path("mine.json").write_text(json.dumps(values if bare else {"config": values}))
    found = parse("train", ["--config", "mine.json"])
    assert (found.data, found.out, found.cache, found.lr) == ("photos", Path("run"), "cache", 0.3)


def test_digits_is_not_a_relative_path(there):
    values = read_json(there / "run" / "config.json")
    (there / "run" / "config.json").write_text(json.dumps({**values, "config": {**values["config"], "data": "digits"}}))
    assert parse("train", ["--config", str(there / "run" / "config.json")]).data == "digits"
    assert open_run(there / "run").data == "digits"


def test_resume_needs_only_the_runs_folder(there):
    """Also one that was moved. Alone, --resume remains a flag, wherever it stands."""
    moved = there.parent / "moved"
    shutil.move(there / "run", moved)
    whole = dataclasses.replace(read_config(TrainConfig, moved / "config.json"), out=moved, resume=True)
    assert whole.data == str(there / "photos")
    for argv in (["--resume", str(moved)], [f"--resume={moved}"], ["--out", str(moved), "--resume", f"{moved}/"]):
        assert parse("train", argv) == whole
    assert parse("train", ["--resume", str(moved), "--workers", "3"]) == dataclasses.replace(whole, workers=3)
    needed = ["--data", "photos", "--student", "resnet18", "--out", "run"]
    expected = recipes.photos(data="photos", student="resnet18", out=Path("run"), resume=True)
    for argv in ([*needed, "--resume"], ["--resume", *needed]):
        assert parse("train", argv) == expected


@pytest.mark.parametrize("argv", ["--resume RUN other", "--resume other RUN", "other --resume RUN"])
def test_resume_accepts_one_run(there, argv):
    argv = argv.replace("RUN", str(there / "run")).replace("other", str(there / "run"), 1)
    code, _, error = fastofa(f"train {argv}")
    assert code == 2
    assert str(there / "run") in "".join(line.strip("|│ ") for line in error.splitlines())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--config RUN/config.json --recipe digits", "recipe: expected none"),
        ("--resume RUN --recipe=digits", "recipe: expected none"),
        ("--resume RUN --config RUN/config.json", "config: expected none"),
        ("--resume RUN --out other", "out: expected none"),
        ("--resume nothing", "resume: expected a run made by `fastofa train`, found no config.json in nothing"),
        ("--config nothing", "could not read nothing"),
        ("--config RUN", "expected a file, got a folder"),
    ],
)
def test_contradictory_flags_are_one_line(there, argv, message):
    code, out, error = fastofa(f"train {argv}".replace("RUN", str(there / "run")))
    assert (code, out) == (2, "")
    assert_one_line(error, message)
    assert list(Path().iterdir()) == []


FILES: dict[str, tuple[str, str]] = {
    "empty": ("", "JSON"),
    "no JSON": ("lr: 0.1", "JSON"),
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deep"),
    "deep but readable": ('{"config": ' + "[" * 400 + "]" * 400 + "}", "expected an object as config"),
    "a list": ("[1]", "expected an object as config, got [1]"),
    "another object": ('{"a": 1}', "these differ: a, "),
    "another version's": ('{"config": {"lr": 0.1, "momentum": 0.9}}', "expected the fields of this version"),
    "a folder that is none": ('{"config": {}, "folder": 1}', "expected text as folder, got 1"),
}


@pytest.mark.parametrize("command", ["train", "precompute"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_one_line(there, command, name):
    text, message = FILES[name]
    Path("odd.json").write_text(text)
    code, _, error = fastofa(f"{command} --config odd.json --out new")
    assert code == 2
    assert_one_line(error, message)
    assert len(error) < 500
    assert not Path("new").exists()


def test_values_of_another_type_are_one_line(there):
    """Of each field, and values that the configuration itself refuses."""
    values = read_json(there / "run" / "config.json")["config"]
    for name in values:
        Path("odd.json").write_text(json.dumps({**values, name: {"a": 1}}))
        code, _, error = fastofa("train --config odd.json")
        assert code == 2
        assert_one_line(error, f"odd.json: ...expected ...{name if name not in NESTED else 'weight'}")
    Path("odd.json").write_text(json.dumps({**values, "lr": -1}))
    assert_one_line(fastofa("train --config odd.json")[2], "odd.json: lr: expected a number of at least 0, got -1")


def test_a_pipe_does_not_block(there):
    os.mkfifo("pipe")
    assert_one_line(fastofa("train --config pipe")[2], "pipe: expected a file, got a pipe")
    assert_one_line(fastofa("precompute --config pipe --out new")[2], "pipe: expected a file, got a pipe")


def test_a_run_is_repeated_from_its_file_and_resumed_from_its_folder(on_photos, tmp_path):
    """With --resume the finished run has nothing left to do; without it, its folder is refused."""
    first = on_photos()
    result = train(first)
    file = first.out / "config.json"
    again = parse("train", ["--config", str(file), "--out", str(tmp_path / "again")])
    assert train(again).top1 == result.top1
    resumed = parse("train", ["--resume", str(first.out)])
    assert resumed == dataclasses.replace(again, out=first.out, resume=True)
    assert train(resumed).top1 == result.top1
    code, _, error = run_here(["train", "--config", str(file)])
    assert code == 2
    assert_one_line(error, "already contains a run; continue it with --resume or choose another --out")


# --- Precompute -------------------------------------------------------------------------------------------------------


def test_a_cache_is_repeated_from_its_file(photo_cache: TeacherCache, tmp_path: Path):
    """It gives the same predictions in another folder; flags may change fields, and --out is required."""
    file = photo_cache.path / "cache.json"
    config = parse("precompute", ["--config", str(file), "--out", str(tmp_path / "cache")])
    own = json.loads(file.read_text())
    assert config.to_json() == own["config"]
    assert (config.data, config.views, config.topk) == (own["dataset"]["spec"], own["views"], own["topk"])
    assert precompute(config).digests(2) == photo_cache.digests(2)
    with pytest.raises(SystemExit) as ended:
        parse("precompute", ["--config", str(file)])
    assert ended.value.code == 2
    changed = parse("precompute", ["--config", str(file), "--out", "x", "--flip", "0", "--views", "5"])
    assert changed == dataclasses.replace(config, out=Path("x"), flip=0.0, views=5)


def test_a_caches_file_contains_its_recipes_views(photos: Path, photo_cache: TeacherCache, tmp_path: Path):
    """Although it names them by the recipe only; and views that were added later."""
    own = json.loads((photo_cache.path / "cache.json").read_text())
    values = {**own["config"], "recipe": "cifar_vit_mlp"}
    Path(tmp_path, "file.json").write_text(json.dumps({"config": values}))
    config = parse("precompute", ["--config", str(tmp_path / "file.json"), "--out", "x"])
    expected = dataclasses.asdict(recipes.VIEWS["cifar_vit_mlp"])
    assert dataclasses.asdict(config.policy()) == expected
    shutil.copytree(photo_cache.path, tmp_path / "cache")
    grown = dataclasses.replace(PrecomputeConfig(**_from(own)), out=tmp_path / "cache", views=3)
    precompute(grown)
    file = str(tmp_path / "cache" / "cache.json")
    assert parse("precompute", ["--config", file, "--out", "x"]).views == 3
    assert read_header(tmp_path / "cache")["policy"] == policy_to_json(ViewPolicy())


def _from(header: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a cache, from Python."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in header["config"].items()}
    return {**values, "out": Path(values["out"])}


# --- Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "precompute"])
def test_the_help_groups_every_field_under_a_title(command, capsys, monkeypatch):
    """The title is that of its section in the class, and the order is the class's."""
    monkeypatch.setenv("COLUMNS", "80")
    config = CONFIGS[command]
    names = [field.name for field in dataclasses.fields(config)]
    assert names[0] in SECTIONS[config]
    assert set(SECTIONS[config]) <= set(names)
    with pytest.raises(SystemExit):
        parse(command, ["--help"])
    title, shown = "", dict[str, list[str]]()
    for line in capsys.readouterr().out.partition("usage:")[2].splitlines():
        if found := re.fullmatch(r"\W*([a-z ]+) options\W*", line):
            title = found[1]
        if found := re.match(r"\W{2}--([a-z][a-z-]*)[ ,]", line):  # not the options within options
            shown.setdefault(title, []).append(found[1])
    title, expected = "", dict[str, list[str]]()
    for name in names:
        if name in NESTED or name == "own_options":  # the options of users' methods (see test_own_method.py)
            continue
        title = SECTIONS[config].get(name, title)
        expected.setdefault(title, []).append(name.replace("_", "-"))
    expected[SECTIONS[config][names[0]]].append("config")
    assert shown == expected
