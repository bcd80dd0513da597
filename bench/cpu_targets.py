"""Check three targets for training on a CPU: channels-last and compilation never slow it down, and exits cost little.

    python -m bench.cpu_targets                       writes bench/results/cpu_targets.json
    python -m bench.cpu_targets --students resnet18 mobilenetv2_100 deit_tiny_patch16_224

1. channels-last is at least 0.95 times as fast as channels-first;
2. a compiled step is at least 0.95 times as fast as an eager one;
3. for ResNet-18, a step of OFA-KD from cached predictions (exits, loss, lookup) takes at most 25 % longer than a plain
   one.
"""

import gc
import statistics
from typing import Any

import torch

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from bench.lib.steps import Job, StepOptions, our_step
from bench.lib.timing import interleaved_ms, median_ratio

NEVER_SLOWER, OVERHEAD = 0.95, 0.25
STEPS = {
    f"{name}, {layout}, {method}": StepOptions(method=method, compile=compiled, channels_last=layout == "channels-last")
    for name, compiled in (("eager", "off"), ("compiled", "on"))
    for layout in ("channels-last", "channels-first")
    for method in ("ofa", "scratch")
    if method == "ofa" or layout == "channels-last"
}
STEPS |= {f"eager, bf16, {method}": StepOptions(method=method, precision="bf16") for method in ("ofa", "scratch")}
PAIRS = {
    "channels-last over channels-first, eager": ("eager, channels-last, ofa", "eager, channels-first, ofa"),
    "channels-last over channels-first, compiled": ("compiled, channels-last, ofa", "compiled, channels-first, ofa"),
    "compiled over eager, OFA": ("compiled, channels-last, ofa", "eager, channels-last, ofa"),
    "compiled over eager, plain": ("compiled, channels-last, scratch", "eager, channels-last, scratch"),
}
# Not a target: whether bf16 pays on this CPU.
REPORTED = {
    "bf16 over fp32, OFA": ("eager, bf16, ofa", "eager, channels-last, ofa"),
    "bf16 over fp32, plain": ("eager, bf16, scratch", "eager, channels-last, scratch"),
}
OVERHEADS = {
    f"OFA over plain training, {name}": (f"{name}, channels-last, ofa", f"{name}, channels-last, scratch")
    for name in ("eager", "compiled")
}


def check(job: Job, rounds: int, calls: int) -> list[dict[str, Any]]:
    """One row per target. Only two steps take turns at a time, since a training run has the CPU's caches to itself."""
    steps = {name: our_step(job, options) for name, options in STEPS.items()}
    found = []
    for name, (ours, baseline) in {**PAIRS, **OVERHEADS, **REPORTED}.items():
        two = {name: steps[name] for name in (ours, baseline)}
        times = interleaved_ms(two, job.device, rounds, calls, warmup=1)
        ratio = median_ratio(times, ours, baseline)
        figure, target, met = ratio, None, None
        if name in PAIRS:
            target, met = NEVER_SLOWER, ratio >= NEVER_SLOWER
        elif name in OVERHEADS:
            figure = 1 / ratio - 1
            if job.student == "resnet18":
                target, met = OVERHEAD, figure <= OVERHEAD
        found.append(
            {
                "student": job.student,
                "what": name,
                "figure": figure,
                "target": target,
                "met": met,
                "ms": statistics.median(times[ours]),
                "baseline": baseline,
                "baseline_ms": statistics.median(times[baseline]),
                "rounds_ms": {"ours": times[ours], "baseline": times[baseline]},
            }
        )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--students", nargs="+", default=["resnet18"])
    parser.add_argument("--teacher", default="deit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=4, help="steps a round")
    args = parser.parse_args(argv)
    found = []
    for student in args.students:
        job = Job(student, args.teacher, args.image_size, args.batch_size, args.num_classes, torch.device("cpu"))
        found += check(job, args.rounds, args.calls)
        torch.compiler.reset()
        gc.collect()
    settings = {name: getattr(args, name) for name in ("image_size", "batch_size", "num_classes", "rounds", "calls")}
    settings |= {"precision": "fp32", "baseline": "named in each row"}
    write_record("cpu_targets", {**settings, "rows": found}, args.out)
    verdicts = {True: "yes", False: "NO", None: ""}
    rows = []
    for r in found:
        target = "" if r["target"] is None else f"{r['target']:.2f}"
        rows.append([r["student"], r["what"], f"{r['figure']:.2f}", target, verdicts[r["met"]]])
    print(markdown_table(["student", "what", "figure", "target", "met"], rows, left=2))


if __name__ == "__main__":
    main()
