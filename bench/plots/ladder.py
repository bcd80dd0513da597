"""The ladder of bench_train: a bar for every row, coloured by its idea."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bench.plots import charts

COLOURS = {
    "published code": charts.GREY,
    "arithmetic": charts.YELLOW,
    "compiler": charts.BLUE,
    "cached teacher": charts.GREEN,
    "kernel": charts.TEAL,
    "with a loader": charts.VIOLET,
    "peer": charts.RED,
}
LEGEND = {"peer": "peer: no exits, less to do"}


def draw(record: dict[str, Any], out: Path, number: int = 0) -> None:
    """Draw the ladder of one student and teacher of a record."""
    result, made = record["result"], record["environment"]
    job = result["jobs"][number]
    measured = [row for row in job["rows"] if "step_ms" in row]
    groups = [[row for row in measured if (row["idea"] == "peer") == peers] for peers in (False, True)]
    positions, rows = charts.in_groups([len(group) for group in groups]), groups[0] + groups[1]
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.42 * positions[-1]))
    charts.bars(
        axes,
        positions,
        [row["row"] for row in rows],
        [row["images_per_second"] for row in rows],
        [row["ratio_to_official_code"] for row in rows],
        [COLOURS[row["idea"]] for row in rows],
    )
    ideas = {row["idea"] for row in rows}
    charts.head(
        axes,
        f"Training images/s: {job['student']} from {job['teacher'].partition('_patch')[0]}",
        {LEGEND.get(idea, idea): colour for idea, colour in COLOURS.items() if idea in ideas},
    )
    precision = "fp32" if job["precision"] == "fp32" else "bf16 from its row on and for the peers"
    charts.foot(
        axes,
        f"{charts.hardware(made)}, {result['image_size']} px, batch {result['batch_size']}, {precision}."
        f"\n{charts.TIMES} the published code in the same run, median of {result['rounds']} rounds.",
        made,
    )
    charts.save(figure, out)
