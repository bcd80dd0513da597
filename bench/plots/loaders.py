"""The chart of bench_loader: a bar per loader, with one worker per core; a sweep adds lines over numbers of workers."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from bench.lib.loaders import GATHER, IMPLEMENTATIONS
from bench.plots import charts

OURS, PEERS = charts.VIOLET, charts.RED
GROUPS = {"JPEGs, decoded": ("folder", "beton"), "pixels, as they are": ("raw", "pack")}
SWEEP = 3  # minimum number of worker counts for which lines are drawn


def draw(record: dict[str, Any], out: Path) -> None:
    """Draw the chart of the record's first image size."""
    result, made = record["result"], record["environment"]
    size = result["rows"][0]["image_size"]
    rows = [row for row in result["rows"] if row["image_size"] == size]
    counts = sorted({row["workers"] for row in rows})
    workers = max((count for count in counts if count <= made["cores"]), default=counts[0])
    drawn = [row for row in rows if row["workers"] == workers and row["pipeline"] != GATHER]  # its bar dwarfs others
    drawn.sort(key=lambda row: row["images_per_second"])
    groups = {
        title: group
        for title, forms in GROUPS.items()
        if (group := [row for row in drawn if IMPLEMENTATIONS[row["pipeline"]].form in forms])
    }
    sizes, shown = [len(group) for group in groups.values()], [row for group in groups.values() for row in group]
    names, positions = [row["pipeline"] for row in shown], charts.in_groups(sizes)

    is_sweep = len(counts) >= SWEEP
    height = 1.6 + 0.42 * positions[-1]
    figure, panels = plt.subplots(
        1 + is_sweep, figsize=(10, height + 5.5 * is_sweep), height_ratios=[height, 4.2][: 1 + is_sweep], squeeze=False
    )
    axes = panels[0, 0]
    charts.bars(
        axes,
        positions,
        names,
        [row["images_per_second"] for row in shown],
        [row["ratio_to_baseline"] for row in shown],
        [colour(row) for row in shown],
    )
    for title, first in zip(groups, np.cumsum([0, *sizes]), strict=False):
        beside = {"textcoords": "offset points", "va": "bottom"}
        axes.annotate(title, (0, positions[first] - 0.36), (0, 3), fontsize=10.5, style="italic", **beside)
    title = f"Loading images/s: {size} px, {workers} worker{'s' * (workers > 1)}"
    charts.head(axes, title, {"peer": PEERS, "fastofa": OURS})
    charts.foot(
        axes,
        f"{charts.hardware(made)}, batch {result['batch_size']}.\n"
        f"{charts.TIMES} {result['baseline']} in the same run, median of {result['rounds']} rounds.",
        made,
    )
    if is_sweep:
        figure.subplots_adjust(hspace=0.3)
        lines(panels[1, 0], rows, counts)
    charts.save(figure, out)


def colour(row: dict[str, Any]) -> str:
    return OURS if IMPLEMENTATIONS[row["pipeline"]].ours else PEERS


def lines(axes: Axes, rows: list[dict[str, Any]], counts: list[int]) -> None:
    """Draw images/s over workers, both logarithmic; each line is labelled at its end, without overlap."""
    by_name = {row["pipeline"]: [r for r in rows if r["pipeline"] == row["pipeline"]] for row in rows}
    rates = {name: [row["images_per_second"] for row in points] for name, points in by_name.items()}
    for name, points in by_name.items():
        axes.plot(
            [row["workers"] for row in points], rates[name], "o-", color=colour(points[0]), linewidth=2, clip_on=False
        )
    axes.margins(x=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.tick_params(length=0, colors=charts.TEXT, labelsize=10.5, pad=8)
    axes.grid(axis="y", color=charts.TEXT, alpha=0.25)
    axes.spines[:].set_visible(False)
    axes.set_title("The same by number of workers", fontsize=12, weight="bold", loc="left", x=0)

    low, high = np.log(axes.get_ylim())
    by_end = sorted(by_name, key=lambda name: rates[name][-1])
    ends = [(np.log(rates[name][-1]) - low) / (high - low) for name in by_end]
    for name, end, place in zip(by_end, ends, apart(ends, 0.055), strict=True):
        axes.annotate(
            name, (1, end), (1.05, place), xycoords="axes fraction", textcoords="axes fraction", va="center",
            fontsize=10.5, arrowprops={"arrowstyle": "-", "color": charts.TEXT, "relpos": (0, 0.5), "shrinkB": 5},
        )  # fmt: skip


def apart(places: list[float], gap: float) -> list[float]:
    """Ascending positions, moved up just enough to be a gap apart, then centred again."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    shift = np.mean(moved) - np.mean(places)
    return [place - shift for place in moved]
