"""Plots of a run's metrics.jsonl. curves.png and report.html use the same functions."""

import io
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from fastofa.runs.log import read_metrics
from fastofa.system.files import write_atomic

Row = dict[str, Any]

LABELS = {"loss": "sum", "gt": "labels", "kd": "teacher, final logits", "ofa": "teacher, exits (summed)"}
# The logged values of a step that are not losses.
OTHERS = {"kind", "step", "epoch", "lr", "grad_norm", "images_per_second", "loader_share"}
# Readable on white and on black; each part of the loss also has its own dash pattern.
COLORS = ("#2f7fd1", "#d9691f", "#2a9d5c", "#a35fd0")
DASHES = ("-", "--", "-.", ":")
MAX_POINTS = 400
"""Maximum number of points in a line; the rows of a longer run are averaged in groups."""


def draw_curves(run: Path) -> None:
    """Draw the loss with its parts and the accuracy from RUN/metrics.jsonl to RUN/curves.png.

    Writes nothing if nothing has been logged.
    """
    from matplotlib.figure import Figure  # unlike pyplot it needs no display and keeps no global state

    steps, epochs = split_rows(read_metrics(run))
    if not steps and not epochs:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_loss(left, steps)
    plot_accuracy(right, epochs)
    figure.suptitle(run.name, parse_math=False)  # the folder's name may contain a dollar sign
    _write(figure, run / "curves.png")


def draw_comparison(runs: dict[str, Path], path: Path) -> None:
    """Draw the validation accuracy of several runs in one plot; the keys of `runs` are their names in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, run in runs.items():
        _, epochs = split_rows(read_metrics(run))
        _plot_top1(axes, epochs, f"{label}: {100 * epochs[-1]['top1']:.2f}%")
    axes.legend(frameon=False, loc="lower right")
    _write(figure, path)


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the logged steps, and the rows of the evaluated epochs."""
    return [r for r in rows if r["kind"] == "step"], [r for r in rows if r["kind"] == "epoch" and "top1" in r]


def column(rows: list[Row], name: str) -> np.ndarray:
    """One value of each row, float64 [rows]; NaN where a row does not have it."""
    return np.array([np.nan if row.get(name) is None else row[name] for row in rows], np.float64)


def import_plotting() -> None:
    """Import matplotlib, which takes a second, before a thread draws.

    A process that is forked while a thread imports a module waits for it forever if it imports the module, too;
    matplotlib imports Pillow's modules, and so do the forked processes that decode images.
    """
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg  # noqa: F401


# --- One plot each ----------------------------------------------------------------------------------------------------


def plot_loss(axes: Any, rows: list[Row]) -> None:
    """Plot the total loss and its parts; a single part equals the total and is not drawn again."""
    logged = dict.fromkeys(name for row in rows for name in row if name not in OTHERS)
    names = ["loss", *(name for name in logged if name != "loss" and np.nan_to_num(column(rows, name)).any())]
    for name, color, dashes in zip(names if len(names) > 2 else ["loss"], cycle(COLORS), cycle(DASHES), strict=False):
        _plot_column(axes, rows, name, color=color, linestyle=dashes, label=LABELS.get(name, f"teacher, {name}"))
    axes.set(title="training loss", xlabel="step", ylabel="loss", ylim=(0, None))
    if len(axes.lines) > 1:
        axes.legend(frameon=False, loc="best")


def plot_accuracy(axes: Any, rows: list[Row]) -> None:
    """Plot top-1 by epoch, of the weights and of their moving average where there is one."""
    if any("top1_ema" in row for row in rows):
        averaged = [row for row in rows if "top1_ema" in row]
        _plot_top1(axes, averaged, "weights", "top1_raw")
        _plot_top1(axes, averaged, "moving average", "top1_ema")
        axes.legend(frameon=False, loc="lower right")
    else:
        _plot_top1(axes, rows)
    if rows:
        point = (rows[-1]["epoch"] + 1, 100 * rows[-1]["top1"])
        axes.annotate(f"{point[1]:.2f}", point, (-2, 5), textcoords="offset points", ha="right")


def plot_steps(
    axes: Any,
    rows: list[Row],
    name: str,
    unit: str,
    scale: float = 1,
    level: float | None = None,
    marks: Sequence[float] = (),
) -> None:
    """Plot one column of the log times `scale`, from zero up.

    Args:
        level: draw a dashed horizontal line here.
        marks: draw dotted vertical lines at these steps.
    """
    _plot_column(axes, rows, name, scale, color=COLORS[0])
    if level is not None:
        axes.axhline(level, color="black", linestyle="--", linewidth=0.8)
    for step in marks:
        axes.axvline(step, color="black", linestyle=":", linewidth=0.8)
    axes.set(xlabel="step", ylabel=unit, ylim=(0, None))


def _plot_column(axes: Any, rows: list[Row], name: str, scale: float = 1, **style: Any) -> None:
    """Plot the means of groups of rows as a line, with a band from each group's minimum to its maximum."""
    steps, values = _groups(column(rows, "step")), _groups(scale * column(rows, name))
    x = steps.mean(axis=1)
    if steps.shape[1] > 1:
        axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=style["color"], alpha=0.25, linewidth=0)
    axes.plot(x, values.mean(axis=1), marker=_marker(rows), **style)


def group_size(rows: Sequence[Any] | np.ndarray) -> int:
    """Number of log rows that one point of a line averages."""
    return max(1, -(-len(rows) // MAX_POINTS))


def _groups(values: np.ndarray) -> Any:
    """Consecutive values in at most MAX_POINTS groups, [groups, size]. Values that are not finite are masked."""
    size = group_size(values)
    groups = np.ma.masked_all((-(-len(values) // size), size))
    groups.flat[: len(values)] = np.ma.masked_invalid(values)
    return groups


def _plot_top1(axes: Any, epochs: list[Row], label: str | None = None, name: str = "top1") -> None:
    x, y = [row["epoch"] + 1 for row in epochs], [100 * row[name] for row in epochs]
    color = COLORS[len(axes.lines) % len(COLORS)]  # one line per run
    axes.plot(x, y, marker=_marker(epochs), color=color, label=label)
    axes.set(title="validation accuracy", xlabel="epoch", ylabel="top-1 (%)")
    axes.margins(y=0.1)


def _marker(rows: Sequence[Any]) -> str:
    return "." if len(rows) < 40 else ""


# --- Files ------------------------------------------------------------------------------------------------------------


def _finish(figure: Any) -> None:
    for axes in figure.axes:
        axes.grid(color="black", alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)  # steps and epochs are integers
        axes.xaxis.set_major_formatter("{x:,.0f}")


def _write(figure: Any, path: Path) -> None:
    _finish(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def draw_svg(name: str, plot: Callable[[Any], None]) -> str:
    """Draw one plot as an <svg> element for a page, in the page's font and text colour and without a title.

    The same data give the same bytes. `name` makes the ids unique within the page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8}):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set_title("")
        _finish(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")  # black becomes the page's text colour
    svg = re.sub("<style.*?</style>", "", svg)  # its rule would apply to the whole page
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
