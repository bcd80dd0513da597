"""Compare the distillation methods on handwritten digits: accuracy over several seeds, and training speed.

    python -m bench.methods                                                 writes bench/results/methods.json
    python -m bench.methods --methods scratch cc crd --weights 0.01 0.1 1 10                 methods_weights.json

The setting is the demo's: a Transformer trained on all labelled digits teaches a small CNN that trains on 100 of them.
All students replay the same cache, which also holds pooled vectors, with the defaults of each method (crd: 64
negatives, since there are only 90 images of other classes). Only `fitnet` runs the teacher online, on new views in
every epoch. A seed sets initial weights and order. Speed is that of the training steps; the methods take turns, seed by
seed, and the ratio to `kd` is the median over the seeds.

`--weights` replaces the weight of each method's loss by each of these in turn.
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from fastofa.commands.demo import FEW_LABELS, STUDENT, TOPK, VIEWS, train_teacher
from fastofa.methods.find_method import method_class
from fastofa.methods.options import CRDOptions
from fastofa.runs import recipes
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import Result, train

BASELINE, LABELS_ONLY = "kd", "scratch"
METHODS = ("scratch", "kd", "bkd", "dkd", "dist", "lskd", "ofa", "cc", "rkd", "crd", "rsd", "ofa+dkd", "ofa+rsd",
           "fitnet")  # fmt: skip
OPTIONS: dict[str, Any] = {"crd": CRDOptions(negatives=64)}


def rows_of(methods: list[str], weights: list[float]) -> dict[str, dict[str, Any]]:
    """The rows to train, by name, as values of the configuration."""
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        given = {"method": method, **OPTIONS}
        if not weights or method == LABELS_ONLY:
            rows[method] = given
            continue
        options = OPTIONS.get(method, method_class(method).Options())
        for weight in weights:
            rows[f"{method}, weight {weight:g}"] = given | {method: dataclasses.replace(options, weight=weight)}
    return rows


def run(name: str, values: dict[str, Any], seed: int, cache: TeacherCache, out: Path) -> Result:
    online = values["method"] == "fitnet"
    teacher = {"online_teacher": str(out / "teacher")} if online else {"cache": cache.path}
    return train(
        recipes.digits(
            data=FEW_LABELS, student=STUDENT, out=out / f"{name}-{seed}", seed=seed, eval_every=1000, **teacher,
            **values,
        )
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--weights", nargs="+", type=float, default=[])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    rows = rows_of(args.methods, args.weights)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = train_teacher(folder)
        cache = precompute(
            PrecomputeConfig(FEW_LABELS, str(folder / "teacher"), folder / "cache", VIEWS, TOPK, features="pooled")
        )
        results: dict[str, list[Result]] = {name: [] for name in rows}
        for seed in range(args.seeds):
            for name, values in rows.items():
                results[name].append(run(name, values, seed, cache, folder))
    baseline = BASELINE if BASELINE in rows else next(iter(rows))
    speeds = {name: [result.images_per_second for result in each] for name, each in results.items()}
    found: dict[str, dict[str, Any]] = {
        name: {
            "top1": [result.top1 for result in each],
            "mean": statistics.mean(result.top1 for result in each),
            "sd": statistics.stdev([result.top1 for result in each]) if args.seeds > 1 else 0.0,
            "images_per_second": speeds[name],
            "step_over_baseline": statistics.median(
                b / own for b, own in zip(speeds[baseline], speeds[name], strict=True)
            ),
        }
        for name, each in results.items()
    }
    settings = {"data": FEW_LABELS, "student": STUDENT, "seeds": args.seeds, "baseline": baseline}
    result = {**settings, "rounds": args.seeds, "teacher_top1": teacher.top1, "rows": found}
    write_record("methods_weights" if args.weights else "methods", result, args.out)
    cells = [
        [name, f"{row['mean']:.2%}", f"{row['sd']:.2%}", " ".join(f"{value:.2%}" for value in row["top1"]),
         f"{row['step_over_baseline']:.2f}"]
        for name, row in found.items()
    ]  # fmt: skip
    print(f"teacher: {teacher.top1:.2%}")
    print(markdown_table(["method", "mean", "sd", "each seed", f"step / {baseline}"], cells))


if __name__ == "__main__":
    main()
