"""Compare a training step that looks the teacher's predictions up with one that runs the teacher.

    python -m bench.bench_online              writes bench/results/online.json

A CNN learns digits at 32 px from a Transformer. Both are the demo's networks, with random weights. The figures are the
processor time of whole steps on one thread, which depends little on other processes. The jobs take turns, step by step.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from fastofa.commands.demo import FEW_LABELS, STUDENT, TEACHER, TOPK
from fastofa.runs import recipes
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.distributed import World
from fastofa.training.job import open_job

METHODS, SIZE = ("kd", "ofa"), 32
WARM_UP = 2  # steps that are not counted


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = folder / "teacher"
        model = timm.create_model(TEACHER, num_classes=10)
        save_for_hf(model, str(teacher), safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})
        cache = precompute(PrecomputeConfig(FEW_LABELS, str(teacher), folder / "cache", views=1, topk=TOPK))
        sources: dict[str, dict[str, Any]] = {
            "cache": {"cache": cache.path}, "online": {"online_teacher": str(teacher)},
        }  # fmt: skip
        steps = {}
        for method in METHODS:
            for source, given in sources.items():
                config = recipes.digits(data=FEW_LABELS, student=STUDENT, method=method, out=folder / "run", **given)
                job = open_job(config, World())
                epoch = job.epochs.load(0)
                steps[method, source] = (
                    job.step,
                    [next(job.train_pipeline.epoch(epoch.views, epoch.order))],
                    epoch.targets,
                )
        torch.set_num_threads(1)
        times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
        for _ in range(WARM_UP + args.steps):
            for name, (step, parts, targets) in steps.items():
                step.student.train()
                began = time.process_time()
                step(parts, targets, 1e-4)
                times[name].append(1000 * (time.process_time() - began))
    rows = {}
    for method in METHODS:
        cached, online = (times[method, source][WARM_UP:] for source in sources)
        ratio = statistics.median(b / a for a, b in zip(cached, online, strict=True))
        rows[method] = {"cache_ms": statistics.median(cached), "online_ms": statistics.median(online), "ratio": ratio}
    settings = {"student": STUDENT, "teacher": TEACHER, "image_size": SIZE, "batch_size": 50, "steps": args.steps}
    write_record("online", {**settings, "processor_time": rows}, args.out)
    cells = [[m, f"{r['cache_ms']:.1f}", f"{r['online_ms']:.1f}", f"{r['ratio']:.2f}"] for m, r in rows.items()]
    print(markdown_table(["method", "from a cache, ms", "teacher online, ms", "ratio"], cells))


if __name__ == "__main__":
    main()
