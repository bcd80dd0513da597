"""Run the demo with several seeds and record its results: the first table of the README, and that of docs/cka.md.

    python -m bench.demo                         writes bench/results/demo.json and docs/demo-curves.png

The first seed is `fastofa demo`. For the others, its three students train again from its cache; a seed sets initial
weights and order, and the teacher is the same. The chart is that of the first seed.

CKA: every student is compared with the teacher on all validation digits in one batch, which gives the exact values.
"""

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from fastofa.commands.demo import ALL_LABELS, FEW_LABELS, METHODS, STUDENT, demo
from fastofa.runs import recipes
from fastofa.training.compare_networks import LOGITS, Comparison, compare_networks
from fastofa.training.loop import Result, train

CHART = Path(__file__).parent.parent / "docs" / "demo-curves.png"
DIGITS = 599  # images of the validation set


def train_students(out: Path, first: dict[str, Result], seeds: int) -> dict[str, list[Result]]:
    """The results of every student, by method and seed; those of seed 0 are the demo's in OUT."""
    found = {method: [first[method]] for method in METHODS}
    for seed in range(1, seeds):
        for method in METHODS:
            config = recipes.digits(
                data=FEW_LABELS, cache=out / "cache", student=STUDENT, method=method, out=folder(out, method, seed),
                seed=seed,
            )  # fmt: skip
            found[method].append(train(config))
    return found


def folder(out: Path, method: str, seed: int) -> Path:
    """The folder of a student's run."""
    return out / (f"{method}-{seed}" if seed else method)


def compare(out: Path, method: str, seed: int) -> Comparison:
    """The layers of the teacher (rows) and of a student (columns)."""
    return compare_networks(out / "teacher-run", folder(out, method, seed), ALL_LABELS, batch_size=DIGITS)


def with_teacher(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Mean CKA of the layers of each part of the student with the teacher's same part, and with its logits."""
    rows, columns, means = comparison.by_parts()
    same = {part: float(means[rows.index(part), columns.index(part)]) for part in rows}
    logits = {part: float(means[rows.index(LOGITS), column]) for column, part in enumerate(columns)}
    return {"same part": same, "teacher's logits": logits}


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "each": values,
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "demo"
        first = demo(out)
        CHART.parent.mkdir(exist_ok=True)
        shutil.copyfile(out / "curves.png", CHART)
        results = train_students(out, first, args.seeds)
        cka = {method: [with_teacher(compare(out, method, seed)) for seed in range(args.seeds)] for method in METHODS}
    students = {
        method: {
            "top1": spread([result.top1 for result in each]),
            "images_per_second": statistics.median(result.images_per_second for result in each),
        }
        for method, each in results.items()
    }
    similarities = {
        method: {
            kind: {part: spread([one[kind][part] for one in each]) for part in parts} for kind, parts in each[0].items()
        }
        for method, each in cka.items()
    }
    result = {
        "seeds": args.seeds,
        "teacher": vars(first["teacher"]),
        "students": students,
        "cka": similarities,
    }
    write_record("demo", result, args.out)
    cells = [
        [method, f"{row['top1']['mean']:.2%}", f"{row['top1']['sd']:.2%}", f"{row['images_per_second']:,.0f}"]
        for method, row in students.items()
    ]
    print(markdown_table(["student", "mean top-1", "sd", "images/s"], cells))
    lines = [
        [f"{method}, {kind}", " ".join(f"{part}: {v['mean']:.3f} ± {v['sd']:.3f}" for part, v in parts.items())]
        for method, kinds in similarities.items()
        for kind, parts in kinds.items()
    ]
    print(markdown_table(["CKA with the teacher", "part"], lines, left=2))


if __name__ == "__main__":
    main()
