"""Curves of a run as one picture."""

import io
from pathlib import Path
from typing import Any

from fastofa.files import write_atomic
from fastofa.metrics import read_metrics

LABELS = {"loss": "sum", "gt": "labels", "kd": "teacher, final logits", "ofa": "teacher, exits (summed)"}


def draw_curves(run: Path) -> None:
    """RUN/curves.png from RUN/metrics.jsonl: the loss and its parts, and the accuracy. Needs a logged row."""
    from matplotlib.figure import Figure  # no pyplot: it needs no display and keeps no state

    steps, epochs = _rows(run)
    if not steps and not epochs:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in LABELS.items():
        if any(row[name] for row in steps):
            left.plot([row["step"] for row in steps], [row[name] for row in steps], label=label, marker=_marker(steps))
    left.set(title="training loss", xlabel="step", ylabel="loss", ylim=(0, None))
    if steps:
        left.legend(frameon=False)
    _plot_accuracy(right, epochs)
    if epochs:
        last = epochs[-1]
        place = (last["epoch"] + 1, 100 * last["top1"])
        right.annotate(f"{place[1]:.2f}", place, (-2, 5), textcoords="offset points", ha="right")
    figure.suptitle(run.name)
    _write(figure, run / "curves.png")


def draw_comparison(runs: dict[str, Path], path: Path) -> None:
    """Validation accuracy of several runs in one picture; keys are what the legend says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, run in runs.items():
        epochs = _rows(run)[1]
        _plot_accuracy(axes, epochs, f"{label}: {100 * epochs[-1]['top1']:.2f}%")
    axes.legend(frameon=False, loc="lower right")
    _write(figure, path)


def _rows(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = read_metrics(run)
    return [r for r in rows if r["kind"] == "step"], [r for r in rows if r["kind"] == "epoch" and "top1" in r]


def _plot_accuracy(axes: Any, epochs: list[dict[str, Any]], label: str | None = None) -> None:
    x, y = [row["epoch"] + 1 for row in epochs], [100 * row["top1"] for row in epochs]
    axes.plot(x, y, marker=_marker(epochs), label=label)
    axes.set(title="validation accuracy", xlabel="epoch", ylabel="top-1 (%)")
    axes.margins(y=0.1)


def _write(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def _marker(rows: list[dict[str, Any]]) -> str:
    return "." if len(rows) < 40 else ""
