"""The log of a run, on the disk and at Weights & Biases; what a student answers, and to whom that is told."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastofa import metrics
from fastofa.errors import BadInput
from fastofa.metrics import MetricsLog, read_metrics
from fastofa.train import train


class Wandb:
    """Stands in for the library: notes what it is asked to do."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **given: Any) -> SimpleNamespace:
        self.begun.append(given)
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
    return json.dumps({"kind": "step", "step": step, **values}) + "\n"


def test_rows_are_read_up_to_a_step(tmp_path):
    write(tmp_path, row(1), row(5), row(10))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 5, 10]
    assert [[r["step"] for r in read_metrics(tmp_path, step)] for step in (0, 5, 9)] == [[], [1, 5], [1, 5]]
    assert read_metrics(tmp_path / "nothing", 5) == []


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    write(tmp_path, row(1), row(5)[:-4])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_a_log_opened_at_a_step_forgets_what_came_after(tmp_path):
    write(tmp_path, row(1, loss=0.5), row(5), row(10)[:-4])
    log = MetricsLog(tmp_path, 1)
    log.add("step", 2, {"loss": 0.25})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == row(1, loss=0.5) + row(2, loss=0.25)


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_every_row_goes_to_wandb_too(on_photos, wandb):
    """Under kind/name, at its step; begun once, with the run's name, and finished."""
    config = on_photos(wandb="mine")
    train(config)
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["resume"]) == ("mine", "run", "allow")
    expected = [
        (r["step"], {f"{r['kind']}/{name}": value for name, value in r.items() if name not in ("kind", "step")})
        for r in read_metrics(config.out)
    ]
    assert wandb.logged == expected
    assert wandb.finished == 1


def test_a_run_that_goes_on_keeps_its_page_and_another_has_its_own(on_photos, wandb, monkeypatch):
    """Wherever it is started from."""
    config = on_photos(wandb="mine")
    train(config)
    monkeypatch.chdir(config.out.parent)
    train(on_photos(wandb="mine", out=Path("run"), resume=True))
    train(on_photos("other", wandb="mine"))
    ids = [begun["id"] for begun in wandb.begun]
    assert ids[0] == ids[1] != ids[2]
    assert wandb.finished == 3


def test_a_run_that_fails_finishes_its_page(on_photos, wandb, monkeypatch):
    def fail(*_: Any) -> None:
        raise BadInput("so it goes")

    monkeypatch.setattr("fastofa.train.Job._log_epoch", fail)
    with pytest.raises(BadInput, match="so it goes"):
        train(on_photos(wandb="mine"))
    assert wandb.finished == 1


def test_without_the_library_it_says_what_to_install_and_writes_nothing(on_photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = on_photos(wandb="mine")
    with pytest.raises(BadInput, match=r"^wandb: expected Weights & Biases; pip install wandb, or leave --wandb out$"):
        train(config)
    assert not config.out.exists()


def test_without_a_login_it_says_so_in_one_line(tmp_path, wandb, monkeypatch):
    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(BadInput, match=r"^wandb: could not begin \(api_key not .*\); `wandb login`") as error:
        MetricsLog(tmp_path, 0, "mine")
    assert "\n" not in str(error.value)


def test_nobody_is_told_unless_asked(on_photos, monkeypatch):
    monkeypatch.setattr(metrics, "import_wandb", lambda: pytest.fail("imported"))
    train(on_photos(epochs=1))
