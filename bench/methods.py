"""Compare the distillation methods on handwritten digits: accuracy over several seeds, and what a step costs.

    python -m bench.methods              writes bench/results/methods.json

The setting is the demo's: a Transformer trained on all labelled digits teaches a small CNN that trains on 100 of them.
All students replay the same cache, with the defaults of each method; a seed sets initial weights and order. Steps are
timed on one batch of 32 px, interleaved, relative to `kd`.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from bench.lib.steps import Job, StepOptions, our_step
from bench.lib.timing import interleaved_ms, median_ratio
from fastofa.commands.demo import FEW_LABELS, STUDENT, TOPK, VIEWS, train_teacher
from fastofa.runs import recipes
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train

BASELINE = "kd"
METHODS = ("scratch", "kd", "bkd", "dkd", "dist", "lskd", "ofa")


def accuracy(method: str, cache: TeacherCache, out: Path, seeds: int) -> list[float]:
    """Top-1 of a run for each seed."""
    runs = [
        recipes.digits(
            data=FEW_LABELS, cache=cache.path, student=STUDENT, method=method, out=out / f"{method}-{seed}", seed=seed,
            eval_every=1000,
        )
        for seed in range(seeds)
    ]  # fmt: skip
    return [train(config).top1 for config in runs]


def step_times(methods: list[str], rounds: int, calls: int) -> dict[str, list[float]]:
    job = Job(STUDENT, "test_vit", 32, 32, 10, torch.device("cpu"))
    steps: dict[str, Callable[[], object]] = {m: our_step(job, StepOptions(method=m)) for m in methods}
    return interleaved_ms(steps, job.device, rounds, calls)


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10, help="steps a round")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = train_teacher(folder)
        cache = precompute(PrecomputeConfig(FEW_LABELS, str(folder / "teacher"), folder / "cache", VIEWS, TOPK))
        found = {method: accuracy(method, cache, folder, args.seeds) for method in args.methods}
    times = step_times(args.methods, args.rounds, args.calls)
    rows: dict[str, dict[str, Any]] = {
        method: {
            "top1": values,
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "step_over_baseline": 1 / median_ratio(times, method, BASELINE) if BASELINE in times else None,
        }
        for method, values in found.items()
    }
    settings = {"data": FEW_LABELS, "student": STUDENT, "seeds": args.seeds, "baseline": BASELINE}
    result = {**settings, "rounds": args.rounds, "teacher_top1": teacher.top1, "rows": rows, "rounds_ms": times}
    write_record("methods", result, args.out)
    cells = [
        [name, f"{row['mean']:.2%}", f"{row['sd']:.2%}", " ".join(f"{value:.2%}" for value in row["top1"]),
         "" if row["step_over_baseline"] is None else f"{row['step_over_baseline']:.2f}"]
        for name, row in rows.items()
    ]  # fmt: skip
    print(f"teacher: {teacher.top1:.2%}")
    print(markdown_table(["method", "mean", "sd", "each seed", f"step / {BASELINE}"], cells))


if __name__ == "__main__":
    main()
