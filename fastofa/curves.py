"""Curves of a run as one picture."""

import io
from pathlib import Path
from typing import Any

from fastofa.files import write_atomic
from fastofa.metrics import read_metrics

LABELS = {"loss": "sum", "gt": "labels", "kd": "teacher, final logits", "ofa": "teacher, exits (summed)"}


def draw_curves(run: Path) -> None:
    """RUN/curves.png from RUN/metrics.jsonl: the loss and its parts, and the accuracy."""
    rows = read_metrics(run)
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch" and "top1" in row]
    if steps or epochs:
        write_atomic(run / "curves.png", _picture(run.name, steps, epochs))


def _picture(title: str, steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> bytes:
    from matplotlib.figure import Figure  # no pyplot: it needs no display and keeps no state

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in LABELS.items():
        if any(row[name] for row in steps):
            left.plot([row["step"] for row in steps], [row[name] for row in steps], label=label, marker=_marker(steps))
    left.set(title="training loss", xlabel="step", ylabel="loss", yscale="log")
    if steps:
        left.legend(frameon=False)
    right.plot([row["epoch"] for row in epochs], [100 * row["top1"] for row in epochs], marker=_marker(epochs))
    right.set(title="validation accuracy", xlabel="epoch", ylabel="top-1 (%)")
    if epochs:
        last = epochs[-1]
        right.annotate(
            f"{100 * last['top1']:.2f}",
            (last["epoch"], 100 * last["top1"]),
            (-4, -14),
            textcoords="offset points",
            ha="right",
        )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _marker(rows: list[dict[str, Any]]) -> str:
    return "." if len(rows) < 40 else ""
