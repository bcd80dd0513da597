"""The log of a run on disk, in TensorBoard and at Weights & Biases."""

import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastofa.runs.log import MetricsLog, _longest_increasing, damaged_lines, read_metrics
from fastofa.system.errors import BadInput
from fastofa.training.loop import train


class Wandb:
    """Stands in for the library and records its calls."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> SimpleNamespace:
        self.opened.append(arguments)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


# --- The log ----------------------------------------------------------------------------------------------------------


def write(run: Path, *lines: str) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(lines))


def row(step: int, **values: Any) -> str:
    return json.dumps({"kind": "step", "step": step, "epoch": 0, "loss": 1.0, **values}) + "\n"


def evaluated(step: int, **values: Any) -> str:
    return json.dumps({"kind": "epoch", "step": step, "epoch": 0, "top1": 0.5, "top5": 0.75, **values}) + "\n"


def test_rows_are_read_up_to_a_step(tmp_path):
    write(tmp_path, row(1), row(5), row(10))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 5, 10]
    assert [[r["step"] for r in read_metrics(tmp_path, step)] for step in (0, 5, 9)] == [[], [1, 5], [1, 5]]
    assert read_metrics(tmp_path / "nothing", 5) == []


def test_further_metrics_are_read(tmp_path):
    """Of any name and range; a finite number that the report can show."""
    write(tmp_path, evaluated(1, kappa=-0.5, top3=0.6), evaluated(2, kappa=7), evaluated(3, kappa=math.nan))
    assert [r.get("kappa") for r in read_metrics(tmp_path)] == [-0.5, 7]
    assert damaged_lines(tmp_path) == 1


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    write(tmp_path, row(1), row(5)[:-4])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_opening_a_log_at_a_step_removes_later_rows(tmp_path):
    write(tmp_path, row(1, loss=0.5), row(5), row(10)[:-4])
    log = MetricsLog(tmp_path, 1)
    log.add("step", 2, {"epoch": 0, "loss": 0.25})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == row(1, loss=0.5) + row(2, loss=0.25)
    assert not (tmp_path / "metrics.damaged.jsonl").exists()


BAD = {
    "bad UTF-8": b'{"kind": "step", "step": 3, "epoch": 0, "loss": 1.0, "x\xff": 1}',
    "not JSON": b'{"kind": "step", "step": 3, "epoch": 0, "loss" 1.0}',
    "deep JSON": b"[" * 100_000,
    "a list": b"[1, 2]",
    "another kind": row(3).strip().replace("step", "stap", 1).encode(),
    "no step": b'{"kind": "step", "stdp": 3, "epoch": 0, "loss": 1.0}',
    "no epoch": b'{"kind": "step", "step": 3, "loss": 1.0}',
    "no loss": b'{"kind": "step", "step": 3, "epoch": 0, "los3": 1.0}',
    "a step as text": row(3).strip().replace("3", '"3"', 1).encode(),
    "half a step": row(3).strip().replace("3", "3.5", 1).encode(),
    "a step that is true": row(3).strip().replace("3", "true", 1).encode(),
    "NaN": row(3, loss=math.nan).strip().encode(),
    "infinity": row(3, loss=math.inf).strip().encode(),
    "a value as text": row(3, lr="0.1").strip().encode(),
    "an accuracy above 1": evaluated(3, top1=8.5).strip().encode(),
    "half an accuracy": b'{"kind": "epoch", "step": 3, "epoch": 0, "top1": 0.5, "top4": 0.5}',
    "a step again": row(1).strip().encode(),
    "a step from before": row(0).strip().encode(),
    "a step far ahead": row(90).strip().encode(),
    "an empty line": b"",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_damaged_line_is_moved_aside_and_costs_no_other(tmp_path, bad, capsys):
    """Reading ignores it, whatever is wrong with it; resuming moves it, byte for byte, and reports it."""
    good = [row(1), row(2), evaluated(2), row(4), row(5)]
    before, after = "".join(good[:3]).encode(), "".join(good[3:]).encode()
    (tmp_path / "metrics.jsonl").write_bytes(before + bad + b"\n" + after)
    (tmp_path / "metrics.damaged.jsonl").write_bytes(b"an older one\n")
    assert read_metrics(tmp_path) == [json.loads(line) for line in good]
    assert damaged_lines(tmp_path) == 1
    MetricsLog(tmp_path, 5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before + after
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == b"an older one\n" + bad + b"\n"
    assert "could not read 1 line, moved to" in capsys.readouterr().err


def test_a_flipped_bit_costs_two_lines_at_most(tmp_path):
    """Any bit of the file: a newline damages the two lines around it, any other character its own line."""
    lines = [row(1, lr=0.1), evaluated(1), row(2, lr=0.2), row(3, lr=0.3), evaluated(3)]
    whole = "".join(lines).encode()
    rows = [json.loads(line) for line in lines]
    rng = random.Random(0)
    for bit in rng.sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        read = read_metrics(tmp_path)
        assert sum(r in read for r in rows) >= 3
        assert [r["step"] for r in read] == sorted(r["step"] for r in read)


def test_a_complete_last_line_without_newline_is_read(tmp_path):
    write(tmp_path, row(1), row(5).strip())
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 5]
    MetricsLog(tmp_path, 5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == row(1) + row(5)


@given(st.lists(st.integers(0, 12), max_size=12))
def test_as_few_lines_as_possible_count_as_damaged(keys):
    """The subsequence is increasing and as long as quadratic dynamic programming finds."""
    positions = _longest_increasing(keys)
    assert positions == sorted(positions)
    assert all(a < b for a, b in pairwise(keys[i] for i in positions))
    longest = [0] * len(keys)
    for i, key in enumerate(keys):
        longest[i] = 1 + max((longest[j] for j in range(i) if keys[j] < key), default=0)
    assert len(positions) == max(longest, default=0)


def test_a_failing_tensorboard_is_reported_once_and_logging_goes_on(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path, 0)
    monkeypatch.setattr(log.board, "add_scalar", lambda *_: 1 / 0)
    for step in (1, 2):
        log.add("step", step, {"epoch": 0, "loss": 0.5})
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    stderr = capsys.readouterr().err
    assert stderr.count("TensorBoard: could not log to it (division by zero)") == 1


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_every_row_is_sent_to_wandb(on_photos, wandb):
    """Under kind/name, at its step; the wandb run is opened once, with the run's name, and finished."""
    config = on_photos(wandb="mine")
    train(config)
    (opened,) = wandb.opened
    assert (opened["project"], opened["name"], opened["resume"]) == ("mine", "run", "allow")
    expected = [
        (r["step"], {f"{r['kind']}/{name}": value for name, value in r.items() if name not in ("kind", "step")})
        for r in read_metrics(config.out)
    ]
    assert wandb.logged == expected
    assert wandb.finished == 1


def test_a_resumed_run_keeps_its_wandb_run_and_another_run_has_its_own(on_photos, wandb, monkeypatch):
    """Also when resumed from another working directory."""
    config = on_photos(wandb="mine")
    train(config)
    monkeypatch.chdir(config.out.parent)
    train(on_photos(wandb="mine", out=Path("run"), resume=True))
    train(on_photos("other", wandb="mine"))
    ids = [opened["id"] for opened in wandb.opened]
    assert ids[0] == ids[1] != ids[2]
    assert wandb.finished == 3


def test_a_run_that_fails_finishes_its_wandb_run(on_photos, wandb, monkeypatch):
    def fail(*_: Any) -> None:
        raise BadInput("so it goes")

    monkeypatch.setattr("fastofa.training.loop.Loop._log_epoch", fail)
    with pytest.raises(BadInput, match="so it goes"):
        train(on_photos(wandb="mine"))
    assert wandb.finished == 1


def test_without_the_library_wandb_is_refused_and_nothing_is_written(on_photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = on_photos(wandb="mine")
    with pytest.raises(BadInput, match=r"^wandb: expected the package wandb, .*; pip install wandb, or omit --wandb$"):
        train(config)
    assert not config.out.exists()


def test_without_a_login_wandb_is_refused_in_one_line_and_nothing_is_written(on_photos, wandb, monkeypatch):
    config = on_photos(wandb="mine")

    def init(**arguments: Any) -> None:
        (Path(arguments["dir"]) / "wandb").mkdir()  # as the library does before it asks for the login
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(BadInput, match=r"^wandb: could not open a run \(api_key not .*\); run `wandb login`") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_a_failing_wandb_run_does_not_end_the_training(on_photos, wandb, monkeypatch, capsys):
    def log(_: dict[str, Any], step: int) -> None:
        raise OSError(f"no network at step {step}")

    monkeypatch.setattr(wandb, "log", log)
    config = on_photos(epochs=1, wandb="mine")
    train(config)
    assert len(read_metrics(config.out)) == 4
    assert "Weights & Biases: could not log to it (no network at step 1); the run" in capsys.readouterr().err


def test_wandb_is_not_imported_unless_requested(on_photos, monkeypatch):
    monkeypatch.setattr("fastofa.runs.log.import_wandb", lambda: pytest.fail("imported"))
    train(on_photos(epochs=1))
