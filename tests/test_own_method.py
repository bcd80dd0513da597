"""A method of the user's, in a file: the documentation's example, its options, its weights and its errors."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastofa.commands.parse import parse
from fastofa.reports.page import write_report
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.config_file import read_config
from fastofa.runs.log import read_metrics
from fastofa.runs.run import open_run
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, read_json
from fastofa.teacher.cache import TeacherCache
from fastofa.training.evaluate import evaluate
from fastofa.training.export import export
from fastofa.training.loop import train
from fastofa.training.plan import plan
from runs import make_cache
from test_cli_bad_input import assert_one_line, run_here

pytestmark = pytest.mark.usefixtures("no_report")
ROOT = Path(__file__).parent.parent
WITH_WEIGHTS = """
import torch
from torch import nn
from fastofa.methods import Method

class Scaled(Method):
    def __init__(self, options, sizes):
        super().__init__(options, sizes)
        self.scale = nn.Linear(1, 1)

    def loss(self, outputs, targets, labels):
        away = outputs.logits.float().softmax(1) - targets.probs(outputs.logits.shape[1])
        return self.scale(away.square().sum(1, keepdim=True)).mean()
"""
WITH_OPTIONS = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal, Optional
from fastofa.methods import Method

class Powers(Method):
    """A power of the
    difference.

    Not in the help.
    """

    @dataclass(frozen=True)
    class Options:
        weight: float = 1.0
        soft_power: int = 2
        """Exponent of the
        difference."""
        form: Literal["mean", "sum"] = "mean"
        scales: tuple[float, ...] = (1.0,)
        cut: Optional[float] = None

    def loss(self, outputs, targets, labels):
        o = self.options
        away = outputs.logits.float().softmax(1) - targets.probs(outputs.logits.shape[1])
        return sum(o.scales) * getattr(away.abs().pow(o.soft_power).sum(1), o.form)()
'''


@pytest.fixture(scope="module")
def digit_cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return make_cache("digits:100", 10, tmp_path_factory.mktemp("digits"), topk=4)


def config(method: str, cache: Path, out: Path, **values) -> TrainConfig:
    return recipes.digits(
        data="digits:100", student="test_resnet", cache=cache, out=out, method=method,
        **{"epochs": 2, "batch_size": 20, "log_every": 1, **values},
    )  # fmt: skip


def code_in(page: str) -> str:
    (code,) = re.findall(
        r"^<!-- tests/test_own_method.py .*-->\n```python\n(.*?)^```$",
        (ROOT / page).read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert len(code.splitlines()) < 30
    return code


def test_the_documented_methods_train_alone_and_beside_others(digit_cache, tmp_path):
    file = tmp_path / "my_method.py"
    file.write_text(code_in("README.md"))
    train(config(f"{file}:Squares", digit_cache.path, tmp_path / "alone", epochs=1))
    row = read_metrics(tmp_path / "alone")[0]
    assert row["loss"] == pytest.approx(row["gt"] + row["squares"])
    assert 0 < row["squares"] <= 2
    file.write_text(code_in("docs/methods.md"))
    given = {"squares": {"weight": 2.0, "temperature": 4.0}}
    train(config(f"ofa+{file}:Squares", digit_cache.path, tmp_path / "both", epochs=1, own_options=given))
    row = read_metrics(tmp_path / "both")[0]
    assert row["loss"] == pytest.approx(row["gt"] + row["kd"] + row["ofa"] + 2 * row["squares"])


def test_a_methods_weights_are_trained_resumed_and_not_exported(digit_cache, tmp_path):
    file = tmp_path / "scaled.py"
    file.write_text(WITH_WEIGHTS)
    whole = config(f"{file}:Scaled", digit_cache.path, tmp_path / "whole", ema=0.9)
    train(whole)
    half = dataclasses.replace(whole, out=tmp_path / "half", epochs=1, schedule="step")
    straight = dataclasses.replace(whole, out=tmp_path / "straight", schedule="step")
    train(straight)
    train(half)
    train(dataclasses.replace(half, epochs=2, resume=True))
    states = []
    for run in (straight, half):
        checkpoint = max((run.out / "checkpoints").glob("step-*.safetensors"))
        states.append(load_tensors(checkpoint)[0])
    own = [name for name in states[0] if "methods." in name and not name.startswith("optimizer.")]
    assert sorted(own) == ["student.methods.0.scale.bias", "student.methods.0.scale.weight"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    best = load_tensors(whole.out / "checkpoints" / "best.safetensors")[0]
    assert not [name for name in best if "methods" in name]
    export(whole.out, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == open_run(whole.out).build_student().backbone.state_dict().keys()


# --- Options ----------------------------------------------------------------------------------------------------------

ARGUMENTS = ["--data", "digits:100", "--student", "test_resnet", "--out", "run"]


@pytest.fixture
def powers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a method that has options, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "powers.py").write_text(WITH_OPTIONS)
    return tmp_path / "powers.py"


def test_options_are_flags_with_their_types_and_docstrings(powers, capsys, monkeypatch):
    flags = ["--powers.weight", "2", "--powers.soft-power", "3", "--powers.scales", "1", "2", "--powers.cut", "0.5"]
    found = parse("train", [*ARGUMENTS, "--method", "kd+powers.py:Powers", *flags, "--powers.form", "sum"])
    expected = {"weight": 2.0, "soft_power": 3, "form": "sum", "scales": (1.0, 2.0), "cut": 0.5}
    assert found.own_options == {"powers": expected}
    assert found.to_json()["powers"] == expected
    assert "own_options" not in found.to_json()
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        parse("train", ["--method", "powers.py:Powers", "--help"])
    text = " ".join(re.sub("[│─╭╮╰╯]|-{3,}", " ", capsys.readouterr().out).split())
    assert "A power of the difference. --powers.weight FLOAT" in text
    assert "--powers.soft-power INT Exponent of the difference. (default: 2) --powers.form {mean,sum}" in text
    assert "Not in the help" not in text


@pytest.mark.parametrize("flags", ["--powers.weight x", "--powers.soft-power 1.5", "--powers.form max", "--powers.x 1"])
def test_values_of_another_type_and_unknown_options_are_refused(powers, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("train", [*ARGUMENTS, "--method", "powers.py:Powers", *flags.split()])
    assert ended.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"own_options": {"powers": {"weight": -1.0}}}, r"powers.weight: expected a number of at least 0, got -1.0"),
        ({"own_options": {"powers": {"cut": float("inf")}}}, "powers.cut: expected finite numbers, .* got inf"),
        ({"own_options": {"powers": {"form": ["sum"]}}}, r"powers.form: expected .* got \['sum'\]"),
        ({"own_options": {"squares": {}}}, "squares: expected options of a method in --method, got"),
        ({"method": "a.py:Lr"}, "a.py:Lr: expected another class name, --lr is a flag"),
        ({"method": "a.py:DKD"}, "a.py:DKD: expected another class name, --dkd is a flag"),
        ({"method": "a.py:A+b.py:a"}, "expected each name once, got 'a.py:A.b.py:a'; rename a class"),
        ({"method": "powers.py:Powers+"}, "expected some of"),
    ],
)
def test_options_that_cannot_be_stored_or_told_apart_are_refused(values, message):
    with pytest.raises(BadInput, match=message):
        recipes.digits(**{"data": "d", "student": "s", "out": Path("o"), "method": "powers.py:Powers", **values})


def test_a_path_may_contain_a_plus():
    for method, names in {
        "kd+a+b/c.py:D+rsd": ("kd", "a+b/c.py:D", "rsd"),
        "/kd+ofa/c.py:D": ("/kd+ofa/c.py:D",),
        "c.py:D+/a++b/c.py:E": ("c.py:D", "/a++b/c.py:E"),
    }.items():
        assert recipes.digits(data="d", student="s", out=Path("o"), method=method).methods == names


def test_a_run_records_every_option_and_finds_its_file_from_another_folder(powers, digit_cache, monkeypatch):
    """Resumed, repeated with another value, evaluated without the file, and reported."""
    given = {"powers": {"scales": (0.5, 0.25)}}
    first = config("powers.py:Powers", digit_cache.path, Path("run"), epochs=1, own_options=given)
    train(first)
    file = powers.parent / "run" / "config.json"
    defaults = {"weight": 1.0, "soft_power": 2, "form": "mean", "scales": [0.5, 0.25], "cut": None}
    assert read_json(file)["config"]["powers"] == defaults
    (powers.parent / "elsewhere").mkdir()
    monkeypatch.chdir(powers.parent / "elsewhere")
    resumed = parse("train", ["--resume", "../run", "--epochs", "2"])
    assert resumed.method == f"{powers}:Powers"
    assert resumed.own_options == {"powers": {**defaults, "scales": (0.5, 0.25)}}
    train(resumed)
    repeated = parse("train", ["--config", str(file), "--out", "other", "--powers.form", "sum"])
    assert repeated.own_options == {"powers": {**resumed.own_options["powers"], "form": "sum"}}
    other = parse("train", ["--config", str(file), "--out", "other", "--method", "kd"])
    assert other.own_options == {}
    with pytest.raises(BadInput, match=r"these differ: powers.form: sum here, mean there"):
        train(parse("train", ["--resume", "../run", "--powers.form", "sum"]))
    moved = powers.rename(powers.parent / "elsewhere" / "moved.py")
    code, _, error = run_here(["train", "--resume", "../run"])
    assert code == 2
    assert_one_line(error, f"{powers}: expected a Python file, found none")
    assert train(parse("train", ["--resume", "../run", "--method", "moved.py:Powers"])).top1 >= 0
    moved.unlink()
    assert evaluate("../run", "digits:100").images == 599
    assert "--powers.scales" in write_report(Path("../run")).read_text()
    assert read_config(TrainConfig, file).own_options == resumed.own_options


def test_a_changed_file_is_reported_and_changed_options_are_refused(powers, digit_cache, capsys):
    """Both hashes are named, and each start of the run records its own."""
    first = config("powers.py:Powers", digit_cache.path, Path("run"), epochs=1)
    train(first)
    hashes = [hashlib.sha256(powers.read_bytes()).hexdigest()]
    resume = ["--resume", "run"]
    train(parse("train", resume))
    assert "has changed" not in capsys.readouterr().err
    powers.write_text(WITH_OPTIONS + "# a comment\n")
    hashes.append(hashlib.sha256(powers.read_bytes()).hexdigest())
    train(parse("train", resume))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "has changed" in line]
    assert all(digest[:12] in line for digest in hashes)
    recorded = [launch["method_sha256"]["powers"] for launch in json.loads(Path("run/environment.json").read_text())]
    assert recorded == [hashes[0], hashes[0], hashes[1]]
    powers.write_text(WITH_OPTIONS.replace("weight: float = 1.0", "weight: float = 1.0\n        extra: int = 3"))
    with pytest.raises(BadInput, match=r"these differ: powers.extra: 3 here, nothing there"):
        train(parse("train", resume))
    powers.write_text(WITH_OPTIONS.replace("soft_power", "power"))
    with pytest.raises(BadInput, match=r"expected values of weight, power, .* got soft_power"):
        parse("train", resume)


def test_the_file_of_an_earlier_content_is_not_used_again(powers, digit_cache):
    """In one process, as in a notebook."""
    losses = []
    for number in (1, 2):
        powers.write_text(WITH_OPTIONS.replace("return sum", f"return {number} * sum"))
        train(config("powers.py:Powers", digit_cache.path, Path(f"run{number}"), epochs=1))
        losses.append(read_metrics(Path(f"run{number}"))[0]["powers"])
    assert losses[1] == pytest.approx(2 * losses[0])


# --- Errors -----------------------------------------------------------------------------------------------------------

HEAD = """from fastofa.methods import Method

class Wrong(Method):
"""
LOSS = "    def loss(self, outputs, targets, labels):\n"
SHAPES = LOSS + "        gap = outputs.logits[:, :7] - targets.probs(10)\n        return gap.square().mean()\n"
CREATED = "    def __init__(self, options, sizes):\n        self.lookup = {}['a']\n" + SHAPES
WRONG: dict[str, tuple[str, str, str]] = {
    "shapes": (SHAPES, "off", "line 5, `gap = ...`: RuntimeError: ...size of tensor a (7) must match ...(10)..."),
    "shapes, compiled": (SHAPES, "on", "line 5, `gap = ...`: RuntimeError: ...(7) must match ...(10)..."),
    "created": (CREATED, "off", "line 5, `self.lookup = {}['a']`: KeyError: 'a'; correct the file"),
    "not defined": (LOSS + "        return nothing\n", "off", "line 5, `return nothing`: NameError: ..."),
    "no gradient": (LOSS + "        return labels.float().mean()\n", "off", "depends on the student's outputs"),
    "branch, compiled": (
        LOSS + "        total = outputs.logits.float().sum()\n        return total if total > 0 else -total\n",
        "on",
        "line 6, `return total if total > 0 else -total`: torch.compile cannot compile it: ...--compile off",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_in_the_file_is_one_line_and_nothing_is_written(digit_cache, tmp_path, name):
    body, compile_, message = WRONG[name]
    (tmp_path / "wrong.py").write_text(HEAD + body)
    argv = [*ARGUMENTS[:-1], str(tmp_path / "run"), "--cache", str(digit_cache.path), "--batch-size", "20"]
    code, _, error = run_here(["train", *argv, "--method", f"{tmp_path}/wrong.py:Wrong", "--compile", compile_])
    assert code == 2
    (line,) = [line for line in error.splitlines(keepends=True) if line.startswith("fastofa: error")]
    assert_one_line(line, f"{tmp_path}/wrong.py:Wrong: ...{message}")
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


LATE = LOSS + (
    "        self.calls = getattr(self, 'calls', 0) + 1\n"
    "        if self.calls > 3:\n            raise ValueError('too late\\nfor this')\n"
    "        return outputs.logits.float().mean()\n"
)


@pytest.mark.parametrize("start", [train, plan])
def test_an_error_in_a_later_step_is_one_line_too(digit_cache, tmp_path, start: Callable[[TrainConfig], Any]):
    (tmp_path / "late.py").write_text(HEAD + LATE)
    with pytest.raises(BadInput, match=r"late.py:Wrong: line 7, `raise .*`: ValueError: too late; correct the file$"):
        start(config(f"{tmp_path}/late.py:Wrong", digit_cache.path, tmp_path / "run", epochs=1))


def test_a_missing_method_is_reported_before_anything_is_written(digit_cache, tmp_path):
    with pytest.raises(BadInput, match="expected a Python file, found none"):
        train(config(f"{tmp_path / 'none.py'}:Squares", digit_cache.path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
