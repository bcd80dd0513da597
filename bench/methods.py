"""Compare the distillation methods on handwritten digits: accuracy over several seeds, and training speed.

    python -m bench.methods              writes bench/results/methods.json

The setting is the demo's: a Transformer trained on all labelled digits teaches a small CNN that trains on 100 of them.
All students replay the same cache, which also holds pooled vectors, with the defaults of each method (crd: 64
negatives, since there are only 90 images of other classes). Only `fitnet` runs the teacher online, on new views in
every epoch. A seed sets initial weights and order. Speed is that of the training steps; the methods take turns, seed by
seed, and the ratio to `kd` is the median over the seeds.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from fastofa.commands.demo import FEW_LABELS, STUDENT, TOPK, VIEWS, train_teacher
from fastofa.methods.options import CRDOptions
from fastofa.runs import recipes
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import Result, train

BASELINE = "kd"
METHODS = ("scratch", "kd", "bkd", "dkd", "dist", "lskd", "ofa", "cc", "rkd", "crd", "rsd", "ofa+dkd", "ofa+rsd",
           "fitnet")  # fmt: skip


def run(method: str, seed: int, cache: TeacherCache, out: Path) -> Result:
    teacher = {"online_teacher": str(out / "teacher")} if method == "fitnet" else {"cache": cache.path}
    return train(
        recipes.digits(
            data=FEW_LABELS, student=STUDENT, method=method, out=out / f"{method}-{seed}", seed=seed,
            eval_every=1000, crd=CRDOptions(negatives=64), **teacher,
        )
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = train_teacher(folder)
        cache = precompute(
            PrecomputeConfig(FEW_LABELS, str(folder / "teacher"), folder / "cache", VIEWS, TOPK, features="pooled")
        )
        found: dict[str, list[Result]] = {method: [] for method in args.methods}
        for seed in range(args.seeds):
            for method in args.methods:
                found[method].append(run(method, seed, cache, folder))
    speeds = {method: [result.images_per_second for result in results] for method, results in found.items()}
    rows: dict[str, dict[str, Any]] = {
        method: {
            "top1": [result.top1 for result in results],
            "mean": statistics.mean(result.top1 for result in results),
            "sd": statistics.stdev([result.top1 for result in results]) if args.seeds > 1 else 0.0,
            "images_per_second": speeds[method],
            "step_over_baseline": statistics.median(
                b / own for b, own in zip(speeds.get(BASELINE, speeds[method]), speeds[method], strict=True)
            ),
        }
        for method, results in found.items()
    }
    settings = {"data": FEW_LABELS, "student": STUDENT, "seeds": args.seeds, "baseline": BASELINE}
    result = {**settings, "rounds": args.seeds, "teacher_top1": teacher.top1, "rows": rows}
    write_record("methods", result, args.out)
    cells = [
        [name, f"{row['mean']:.2%}", f"{row['sd']:.2%}", " ".join(f"{value:.2%}" for value in row["top1"]),
         f"{row['step_over_baseline']:.2f}"]
        for name, row in rows.items()
    ]  # fmt: skip
    print(f"teacher: {teacher.top1:.2%}")
    print(markdown_table(["method", "mean", "sd", "each seed", f"step / {BASELINE}"], cells))


if __name__ == "__main__":
    main()
