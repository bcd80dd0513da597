"""Shared code of the charts: medium tones on a transparent background, readable on white and on near-black."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

TEXT = "#7d8590"
GREY, YELLOW, BLUE, GREEN, TEAL, VIOLET, RED = (
    "#8b949e", "#d29922", "#3b82d6", "#2ea043", "#1f9e9e", "#8f6fe0", "#d1577a",
)  # fmt: skip
TIMES = "\N{MULTIPLICATION SIGN}"

plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": TEXT})


def in_groups(sizes: Sequence[int]) -> list[float]:
    """Positions of bars, with a gap between groups of these sizes."""
    return [sum(sizes[:group]) + 0.6 * group + i for group, size in enumerate(sizes) for i in range(size)]


def bars(
    axes: Axes, positions: Sequence[float], names: Sequence[str], rates: Sequence[float],
    ratios: Sequence[float | None], colours: Sequence[str],
) -> None:  # fmt: skip
    """Draw bars from top to bottom, each with its images/s and its ratio at the end."""
    drawn = axes.barh(positions, rates, height=0.72, color=colours)
    for bar, rate, ratio in zip(drawn, rates, ratios, strict=True):
        end, label = (bar.get_width(), bar.get_y() + bar.get_height() / 2), f"{rate:,.0f}"
        beside = {"textcoords": "offset points", "va": "center"}
        axes.annotate(label, end, (6, 0), fontsize=12, weight="bold", **beside)
        if ratio is not None:
            axes.annotate(f"{ratio:.2f}{TIMES}", end, (16 + 8.4 * len(label), 0), fontsize=11, **beside)
    axes.set_yticks(positions, names, fontsize=12)
    axes.set_ylim(positions[-1] + 0.9, -0.9)  # the first bar on top, with room for the text above it
    axes.set_xlim(0, max(rates) * 1.16)
    axes.tick_params(axis="y", length=0, colors=TEXT, pad=6)
    axes.xaxis.set_visible(False)  # every bar is labelled with its value
    axes.spines[:].set_visible(False)


def head(axes: Axes, title: str, legend: dict[str, str]) -> None:
    """Draw a title and the legend below it."""
    axes.set_title(title, fontsize=15, weight="bold", loc="left", pad=30, x=0)
    axes.legend(
        [Patch(color=colour) for colour in legend.values()], list(legend),
        loc="lower left", bbox_to_anchor=(-0.01, 1.0),
        ncols=len(legend), frameon=False, fontsize=10.5, handlelength=1, handleheight=1, columnspacing=1.4,
        handletextpad=0.5, borderpad=0.2,
    )  # fmt: skip


def foot(axes: Axes, text: str, made: dict[str, Any]) -> None:
    """Write how it was measured, with date and commit."""
    axes.annotate(
        f"{text} {made['date']}, commit {made['commit']}.", (0, 0), (0, -8), xycoords="axes fraction",
        textcoords="offset points", fontsize=10, va="top", linespacing=1.5,
    )  # fmt: skip


def hardware(made: dict[str, Any]) -> str:
    return made["gpu"] or f"{made['cores']} cores of {made['cpu']}"


def save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, dpi=150, transparent=True, bbox_inches="tight", pad_inches=0.15, format="png")
    temporary.replace(out)
    plt.close(figure)
