"""Progress is a bar on a terminal and lines elsewhere; names in it are escaped."""

import io

import pytest
from rich.console import Console

from fastofa.system import progress
from fastofa.system.progress import progress_bar, track


@pytest.fixture
def output(monkeypatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=100))
    return file


def test_without_a_terminal_each_finished_unit_is_a_line(output, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar() as bar:
        task = bar.add_task("train\x1b[2J", total=30)
        for epoch in range(3):
            bar.update(task, note="loss 3")
            bar.advance(task, 10)
            bar.done(task, f"epoch {epoch + 1}/3 top-1 9.00% [red]")
    lines = output.getvalue().splitlines()
    assert [line.split(",")[:2] for line in lines] == [["train\\x1b[2J", f" {part}%"] for part in (33, 67, 100)]
    assert [f"epoch {epoch}/3 top-1 9.00% [red]" in line for epoch, line in enumerate(lines, 1)] == [True] * 3
    assert "\x1b" not in output.getvalue()


def test_without_a_terminal_there_is_a_line_per_minute(output, monkeypatch):
    """Only for work that takes longer than that."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for _ in track(range(100), 100, "indexing [b]photos"):
        now += 0.5
    assert output.getvalue() == ""
    for _ in track(range(100), 1000, "indexing [b]photos", lambda _: 10):
        now += 1.7
    assert [line.split(",")[:2] for line in output.getvalue().splitlines()] == [
        ["indexing [b]photos", " 36%"], ["indexing [b]photos", " 72%"]
    ]  # fmt: skip


def test_a_disabled_bar_prints_nothing(output):
    with progress_bar(enabled=False) as bar:
        bar.done(bar.add_task("train", total=1), "epoch 1/1")
    assert output.getvalue() == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress, "console", Console(file=Terminal(), force_terminal=True, width=100, _environ={}))
    with progress_bar() as bar:
        task = bar.add_task("train[red]", total=2)
        bar.advance(task, 2)
        bar.done(task, "epoch 1/1")
    shown = progress.console.file.getvalue()
    assert "━" in shown
    assert "train[red]" in shown
    assert "epoch 1/1" in shown
