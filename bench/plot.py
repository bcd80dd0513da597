"""The ladder as a picture: docs/ladder.png from bench/results/train_{gpu,cpu}.json.

python -m bench.plot                                       the GPU's record where there is one, else the CPU's
python -m bench.plot RECORD.json OUT.png
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from bench.record import RESULTS, read_record

PICTURE = Path(__file__).parent.parent / "docs" / "ladder.png"
# Middle tones on a transparent ground: readable on GitHub's white and on its near-black.
TEXT = "#7d8590"
TIMES = "\N{MULTIPLICATION SIGN}"
COLOURS = {
    "published code": "#8b949e",
    "arithmetic": "#d29922",
    "compiler": "#3b82d6",
    "cached teacher": "#2ea043",
    "kernel": "#1f9e9e",
    "with a loader": "#8f6fe0",
    "peer": "#d1577a",
}
LEGEND = {"peer": "peer: no exits, less to do"}


def draw(record: dict[str, Any], out: Path, number: int = 0) -> None:
    """The ladder of one student and teacher of a record."""
    result, made = record["result"], record["environment"]
    job = result["jobs"][number]
    rows = [row for row in job["rows"] if "step_ms" in row]
    ladder = [row for row in rows if row["idea"] != "peer"]
    peers = [row for row in rows if row["idea"] == "peer"]
    positions = [*range(len(ladder)), *(len(ladder) + 0.6 + i for i in range(len(peers)))]  # a gap before the peers
    rows = ladder + peers
    speeds = [row["images_per_second"] for row in rows]

    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": TEXT})
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.42 * positions[-1]))
    bars = axes.barh(positions, speeds, height=0.72, color=[COLOURS[row["idea"]] for row in rows])
    for bar, row in zip(bars, rows, strict=True):
        ratio = row["ratio_to_official_way"]
        middle = bar.get_y() + bar.get_height() / 2
        label = f"{row['images_per_second']:,.0f}"
        axes.annotate(
            label,
            (bar.get_width(), middle),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
            weight="bold",
        )
        if ratio is not None:
            offset = 16 + 8.4 * len(label)
            axes.annotate(
                f"{ratio:.2f}{TIMES}", (bar.get_width(), middle), (offset, 0), textcoords="offset points", va="center",
                fontsize=11,
            )  # fmt: skip
    axes.set_yticks(positions, [row["row"] for row in rows], fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, max(speeds) * 1.16)
    axes.tick_params(axis="y", length=0, colors=TEXT, pad=6)
    axes.xaxis.set_visible(False)  # every bar has its figure
    for side in axes.spines.values():
        side.set_visible(False)

    hardware = made["gpu"] or f"{made['cores']} cores of {made['cpu']}"
    axes.set_title(
        f"Training images/s: {job['student']} from {job['teacher'].partition('_patch')[0]}",
        fontsize=15, weight="bold", loc="left", pad=30, x=0,
    )  # fmt: skip
    shown = [idea for idea in COLOURS if any(row["idea"] == idea for row in rows)]
    axes.legend(
        [Patch(color=COLOURS[idea]) for idea in shown],
        [LEGEND.get(idea, idea) for idea in shown],
        loc="lower left", bbox_to_anchor=(-0.01, 1.0),
        ncols=len(shown), frameon=False, fontsize=10.5, handlelength=1, handleheight=1, columnspacing=1.4,
        handletextpad=0.5, borderpad=0.2,
    )  # fmt: skip
    axes.text(
        0,
        -0.02,
        f"{hardware}, {result['image_size']} px, batch {result['batch_size']}, {_precision(job)}."
        f"\n{TIMES} the published code's way in the same run, median of {result['rounds']} rounds. "
        f"{made['date']}, commit {made['commit']}.",
        transform=axes.transAxes,
        fontsize=10,
        va="top",
        linespacing=1.5,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, transparent=True, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def _precision(job: dict[str, Any]) -> str:
    return "fp32" if job["precision"] == "fp32" else "bf16 from its row on and for the peers"


def main(argv: list[str]) -> None:
    records = [RESULTS / "gpu" / "train_gpu.json", RESULTS / "train_gpu.json", RESULTS / "train_cpu.json"]
    source = Path(argv[0]) if argv else next((path for path in records if path.exists()), records[-1])
    out = Path(argv[1]) if len(argv) > 1 else PICTURE
    draw(read_record(source), out)
    print(f"{out} from {source}")


if __name__ == "__main__":
    main(sys.argv[1:])
