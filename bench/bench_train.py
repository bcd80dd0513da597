"""The ladder: images per second of one training job, a row per idea, with the published code and two peers.

    python -m bench.bench_train                                   on a CPU: 64 px, batch 32 (5 min on 2 cores)
    python -m bench.bench_train --loaders                         also with real loaders in front of the step
    python -m bench.bench_train --students resnet18 resnet50 deit_tiny_patch16_224 resmlp_12_224 mobilenetv2_100 \
        --teachers swin_tiny_patch4_window7_224 deit_tiny_patch16_224 mixer_b16_224 --batch-size 1024
                                                                  on a GPU (by default 224 px, batch 256)
    python -m bench.bench_train --rows "+ cached teacher" "plain training" --profile
                                                                  only some rows, and where the first one's time goes
    python -m bench.bench_train --rows "+ cached teacher" --start
                                                                  also the seconds to compile, cold and warm
    writes bench/results/train_{cpu,gpu}.json, which bench.plot draws

The batches are synthetic uint8 images in device memory, except in the rows with a loader, so only the step is timed.
From "+ one loss, no syncs" on, it is the Step of `fastofa train`. Every row of a job is timed in every round.
"""

import dataclasses
import gc
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import profile_step, roofline
from bench.lib import command_line, machine
from bench.lib.loader_step import LoaderStep
from bench.lib.loaders import installed
from bench.lib.record import markdown_table, write_record
from bench.lib.start import start_seconds
from bench.lib.steps import Job, StepOptions, TakeStep, official_step, open_step, timm_step
from bench.lib.timing import interleaved_ms, median_ratio
from bench.lib.turns import is_out_of_memory, patiently, wait_for_turn
from fastofa.training.step import Step


@dataclass(frozen=True)
class Row:
    """One implementation of the step; each further idea is one more row."""

    name: str
    idea: str
    """The kind of idea, which determines its colour in the chart."""
    options: StepOptions | None = None
    """Options of our step; None for another project's step."""
    loader: str | None = None
    """A pipeline in front of the step."""
    gpu_only: str | None = None
    """Why the row is skipped on a CPU; None if it is not."""


ONLINE = StepOptions(online_teacher=True, channels_last=False)
BF16 = replace(ONLINE, precision="bf16")
CHANNELS_LAST = replace(BF16, channels_last=True)
COMPILED = replace(CHANNELS_LAST, compile="on")
CACHED = replace(COMPILED, online_teacher=False)
START = CACHED if torch.cuda.is_available() else replace(CACHED, precision="fp32")

ALL_KERNELS = ("loss", "exits", "stem", "norms", "tokens", "layer_norms")
NEEDS_GPU = "Triton kernels need a GPU"
OFFICIAL, OFFICIAL_FP16, TIMM = "official code, fp32", "official code, fp16 AMP", "timm, online logit distillation"
LADDER = (
    Row(OFFICIAL, "published code"),
    Row(OFFICIAL_FP16, "published code", gpu_only="fp16 convolutions are too slow on a CPU"),
    Row("+ one loss, no syncs", "arithmetic", ONLINE),
    Row("+ bf16", "arithmetic", BF16),
    Row("+ channels-last", "arithmetic", CHANNELS_LAST),
    Row("+ compile", "compiler", COMPILED),
    Row("+ cached teacher", "cached teacher", CACHED),
    Row("+ CUDA graphs", "compiler", replace(CACHED, cuda_graphs="on"), gpu_only="CUDA graphs need CUDA"),
    Row("+ loss kernel", "kernel", replace(CACHED, kernels=("loss",)), gpu_only=NEEDS_GPU),
    Row("+ exits kernel", "kernel", replace(CACHED, kernels=("exits",)), gpu_only=NEEDS_GPU),
    Row("+ stem kernels", "kernel", replace(CACHED, kernels=("stem",)), gpu_only=NEEDS_GPU),
    Row("+ norm kernels", "kernel", replace(CACHED, kernels=("norms",)), gpu_only=NEEDS_GPU),
    Row("+ stem and norm kernels", "kernel", replace(CACHED, kernels=("stem", "norms")), gpu_only=NEEDS_GPU),
    Row("+ token kernels", "kernel", replace(CACHED, kernels=("tokens",)), gpu_only=NEEDS_GPU),
    Row("+ layer norm kernels", "kernel", replace(CACHED, kernels=("layer_norms",)), gpu_only=NEEDS_GPU),
    Row("+ max-autotune", "compiler", replace(CACHED, compile="max-autotune"), gpu_only="it tunes for GPUs"),
    Row("+ kernels chosen by measuring", "kernel", replace(CACHED, kernels=("auto",)), gpu_only=NEEDS_GPU),
    Row(
        "+ kernels chosen by measuring, CUDA graphs",
        "kernel",
        replace(CACHED, kernels=("auto",), cuda_graphs="on"),
        gpu_only=NEEDS_GPU,
    ),
    Row("+ all kernels", "kernel", replace(CACHED, kernels=ALL_KERNELS), gpu_only=NEEDS_GPU),
    Row("cached, resident loader", "with a loader", CACHED, loader="resident"),
    Row("cached, packed loader", "with a loader", CACHED, loader="packed"),
    Row("cached, ffcv loader", "with a loader", CACHED, loader="ffcv"),
    Row("cached, dali loader", "with a loader", CACHED, loader="dali"),
    Row("cached, torchvision loader", "with a loader", CACHED, loader="torchvision"),
    Row("plain training", "peer", replace(CACHED, method="scratch")),
    Row(
        "plain training, stem and norm kernels",
        "kernel",
        replace(CACHED, method="scratch", kernels=("stem", "norms")),
        gpu_only=NEEDS_GPU,
    ),
    Row(
        "plain training, kernels chosen by measuring",
        "kernel",
        replace(CACHED, method="scratch", kernels=("auto",)),
        gpu_only=NEEDS_GPU,
    ),
    Row("KD only, cached", "peer", replace(CACHED, method="kd")),
    Row(TIMM, "peer"),
)


def skip_reason(row: Row, device: torch.device, bf16: bool, loaders: bool) -> str | None:
    """Why a row is not measured here; None if it is."""
    if row.gpu_only and device.type == "cpu":
        return row.gpu_only
    if row.name == "+ bf16" and not bf16:
        return f"bf16 multiplies matrices less than {machine.BF16_PAYS} times as fast as fp32 here: all rows are fp32"
    if row.loader and not loaders:
        return "left out: give --loaders"
    if row.loader == "dali" and not installed("nvidia.dali"):
        return "DALI is not installed"
    return None


def build(row: Row, job: Job, precision: str, folder: Path, opened: dict[StepOptions, tuple[Step, Any]]) -> TakeStep:
    """Build a row's step. `opened` keeps our steps, so that rows that differ only in the loader share one."""
    if row.options is None:
        return timm_step(job, precision) if row.name == TIMM else official_step(job, fp16=row.name == OFFICIAL_FP16)
    options = row.options if precision == "bf16" else replace(row.options, precision="fp32")
    if options not in opened:
        opened[options] = open_step(job, options)
    if row.loader is not None:
        return LoaderStep(job, *opened[options], row.loader, folder)
    (step, targets), batch = opened[options], job.batch(options.channels_last)
    return lambda: step([batch], targets, lr=0.1)


def warm_up(
    rows: list[Row], job: Job, precision: str, loaders: bool, folder: Path
) -> tuple[dict[str, TakeStep], dict[str, dict[str, str]]]:
    """The steps of the rows that run here, compiled and warm, and the reasons why the others do not.

    Rows compile before the job's turn, while other jobs compile, too; cuDNN times and chooses its algorithms during the
    turn. The published code compiles nothing and takes much memory, so it starts during the turn.
    """
    steps: dict[str, TakeStep] = {}
    missing: dict[str, dict[str, str]] = {}
    opened: dict[StepOptions, tuple[Step, Any]] = {}

    def warm(row: Row) -> None:
        if reason := skip_reason(row, job.device, precision == "bf16", loaders):
            missing[row.name] = {"skipped": reason}
            return
        began = time.monotonic()
        try:
            steps[row.name] = step = patiently(lambda: build(row, job, precision, folder, opened))
            _take(step, job.device)
            print(f"{row.name}: compiled and warm in {time.monotonic() - began:.0f} s", flush=True)
            if job.device.type == "cuda":
                torch.cuda.empty_cache()  # other jobs may be short of memory
        except Exception as error:  # such as one from a compiler: the other rows are still measured
            if is_out_of_memory(error):
                missing[row.name] = {"skipped": f"does not fit in the GPU's memory at batch {job.batch_size}"}
                torch.cuda.empty_cache()
                return
            traceback.print_exc()
            missing[row.name] = {"failed": f"{type(error).__name__}: {error}"[:300]}

    first = [row for row in rows if row.name not in (OFFICIAL, OFFICIAL_FP16)]
    # A CUDA graph keeps the algorithms that were chosen when it was recorded.
    torch.backends.cudnn.benchmark = any(row.options is not None and row.options.cuda_graphs == "on" for row in first)
    for row in first:
        warm(row)
    wait_for_turn()
    torch.backends.cudnn.benchmark = True
    for row in rows:
        if row not in first:
            warm(row)
    steps = {row.name: steps[row.name] for row in rows if row.name not in missing}
    for step in steps.values():
        _take(step, job.device)
    return steps, missing


def _take(step: TakeStep, device: torch.device) -> None:
    """Run a step until it is warm."""
    calls = 3 if device.type == "cuda" else 1  # CUDA graphs are recorded in the second and third step
    patiently(lambda: interleaved_ms({"": step}, device, rounds=0, calls=0, warmup=calls))


def climb(
    job: Job, rows: list[Row], rounds: int, calls: int, loaders: bool, folder: Path, profiled: bool
) -> dict[str, Any]:
    """Measure these rows for one student and teacher."""
    gpu = job.device.type == "cuda"
    precision = "bf16" if gpu or machine.best(job.device).dtype == "bfloat16" else "fp32"
    steps, missing = warm_up(rows, job, precision, loaders, folder)
    peak = machine.measure(job.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    times = interleaved_ms(steps, job.device, rounds, calls, warmup=0)
    floors = {
        exits: roofline.floor_ms(job.student, job.image_size, job.batch_size, job.num_classes, exits, peak)
        for exits in (True, False)
    }
    found: list[dict[str, Any]] = []

    def sum_of_kernels(step: TakeStep) -> float:
        """Milliseconds of the step's kernels. If they are far fewer than those of the step, launches limit it."""
        return sum(kernel["ms"] for kernel in profile_step.kernels(step, job.device, 2, peak))

    for row in rows:
        if row.name in missing:
            found.append({"row": row.name, "idea": row.idea, **missing[row.name]})
            continue
        ms = statistics.median(times[row.name])
        has_exits = row.options.method == "ofa" if row.options else row.name != TIMM
        found.append(
            {
                "row": row.name,
                "idea": row.idea,
                "step_ms": ms,
                "images_per_second": job.batch_size / ms * 1e3,
                "ratio_to_official_code": median_ratio(times, row.name, OFFICIAL) if OFFICIAL in times else None,
                "share_of_roofline": floors[has_exits] / ms,
                "kernels_ms": sum_of_kernels(steps[row.name]) if gpu else None,
                "rounds_ms": times[row.name],
            }
        )
    ran = [row for row in rows if row.name in steps]
    top = profile_step.kernels(steps[ran[0].name], job.device, 2, peak) if profiled and ran else None
    return {
        "student": job.student,
        "teacher": job.teacher,
        "precision": precision,
        "machine": dataclasses.asdict(peak),
        "floor_ms": {"with_exits": floors[True], "without": floors[False]},
        "rows": found,
        **({"profile": {"row": ran[0].name, "kernels": top}} if top else {}),
    }


def table(job: dict[str, Any]) -> str:
    rows = []
    for r in job["rows"]:
        if "step_ms" not in r:
            rows.append([r["row"], "", "", "", "", r.get("skipped") or f"FAILED: {r['failed'][:80]}"])
            continue
        ratio, kernels = r["ratio_to_official_code"], r.get("kernels_ms")
        figures = f"{r['step_ms']:.1f}", f"{kernels:.1f}" if kernels else "", f"{r['images_per_second']:,.0f}"
        rows.append([r["row"], *figures, f"{ratio:.2f}" if ratio else "", f"{r['share_of_roofline']:.0%}"])
    header = ["row", "ms", "ms of kernels", "images/s", "x official code", "share of roofline"]
    start = job.get("start_seconds")
    started = f"\n\nfirst step: {start['cold']:.0f} s, with a warm cache {start['warm']:.0f} s" if start else ""
    return f"\n{job['student']} from {job['teacher']}\n\n{markdown_table(header, rows)}{started}"


def main(argv: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = command_line.parser(__doc__)
    parser.add_argument("--students", nargs="+", default=["resnet18"])
    parser.add_argument("--teachers", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--image-size", type=int, default=224 if gpu else 64)
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 32)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in LADDER], metavar="ROW", help="only these")
    parser.add_argument("--profile", action="store_true", help="also report the kernels that take the first row's time")
    parser.add_argument("--start", action="store_true", help="also time the start of the row '+ cached teacher'")
    parser.add_argument("--loaders", action="store_true", help="rows with a real loader, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20 if gpu else 2, help="steps a round")
    parser.add_argument("--name", default="train", help="of the record")
    args = parser.parse_args(argv)
    # The default of PyTorch 1.10, which the published code used; both also let cuDNN benchmark (warm_up).
    torch.set_float32_matmul_precision("high")
    settings = {name: getattr(args, name) for name in ("image_size", "batch_size", "num_classes", "rounds", "calls")}
    jobs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for student in args.students:
            for teacher in args.teachers:
                job = Job(student, teacher, args.image_size, args.batch_size, args.num_classes, device)
                rows = [row for row in LADDER if not args.rows or row.name in args.rows]
                # First, while the GPU's memory is free.
                start = {"start_seconds": start_seconds(job, START)} if args.start else {}
                measured = climb(job, rows, args.rounds, args.calls, args.loaders, Path(folder), args.profile)
                jobs.append({**measured, **start})
                print(table(jobs[-1]), flush=True)
                # After each job, since a later one may run into a time limit.
                write_record(
                    f"{args.name}_{'gpu' if gpu else 'cpu'}", {**settings, "baseline": OFFICIAL, "jobs": jobs}, args.out
                )
                torch.compiler.reset()
                gc.collect()
                torch.cuda.empty_cache()
    return int(any("failed" in row for job in jobs for row in job["rows"]))


if __name__ == "__main__":
    sys.exit(main())
