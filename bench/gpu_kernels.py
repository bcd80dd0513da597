"""Tests of the kernels, their timings, and a training step with every switch of --kernels, in one call of 5 minutes.

    python -m bench.gpu_kernels --out DIR             on a GPU
    python -m bench.gpu_kernels --out DIR --dry-run   every part at a tiny size, on any machine: does it run at all?

All steps compile side by side while the tests run, wait for one another, and are then measured alone. Each figure is
printed and written as soon as it exists. What does not fit into the time is left out.
"""

import argparse
import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SWIN = "swin_tiny_patch4_window7_224"

# Name: student, batch, method, kernels.
JOBS: dict[str, tuple[str, int, str, tuple[str, ...]]] = {
    "off": ("resnet18", 1024, "ofa", ()),
    "exits": ("resnet18", 1024, "ofa", ("exits",)),
    "norms": ("resnet18", 1024, "ofa", ("norms",)),
    "stem": ("resnet18", 1024, "ofa", ("stem",)),
    "stem norms": ("resnet18", 1024, "ofa", ("stem", "norms")),
    "all": ("resnet18", 1024, "ofa", ("loss", "exits", "stem", "norms")),
    "plain, off": ("resnet18", 1024, "scratch", ()),
    "plain, stem norms": ("resnet18", 1024, "scratch", ("stem", "norms")),
    "resnet50, off": ("resnet50", 256, "ofa", ()),
    "resnet50, all": ("resnet50", 256, "ofa", ("loss", "exits", "stem", "norms")),
    "mobilenetv2, off": ("mobilenetv2_100", 512, "ofa", ()),
    "mobilenetv2, all": ("mobilenetv2_100", 512, "ofa", ("loss", "exits", "stem", "norms")),
}
FIRST = ("off", "exits", "norms", "stem", "stem norms", "all")


# --- One job, in a process of its own ---------------------------------------------------------------------------------


class Clock:
    """Of all processes: seconds since the call began; who is ready; whose turn it is."""

    def __init__(self, out: Path, began: float, waiting_for: int, latest_s: float) -> None:
        self.out, self.began, self.waiting_for, self.latest_s = out, began, waiting_for, latest_s

    def say(self, *what: object) -> None:
        print(f"[{time.time() - self.began:4.0f} s]", *what, flush=True)

    def wait_for_turn(self, name: str) -> Any:
        """Until all are ready, or it is late; then alone for as long as what is returned is open."""
        ready = self.out / "ready"
        ready.mkdir(exist_ok=True)
        (ready / name).touch()
        while time.time() - self.began < self.latest_s and len(list(ready.iterdir())) < self.waiting_for:
            time.sleep(0.3)
        lock = (self.out / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock


def run_step(name: str, clock: Clock, dry_run: bool) -> None:
    import torch

    from bench.steps import Job, Way, open_step

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, batch_size, method, kernels = JOBS[name]
    job = Job(student, SWIN, 224, batch_size, 1000, device)
    if dry_run:
        job = Job("test_resnet", "test_vit", 32, 2, 10, device)
    gpu = device.type == "cuda"
    way = Way(method=method, precision="bf16" if gpu else "fp32", compile="on" if gpu else "off", kernels=kernels)

    def sync() -> None:
        if gpu:
            torch.cuda.synchronize()

    began = time.time()
    for attempt in range(3):
        try:
            step, batch = open_step(job, way), job.batch()
            for _ in range(2):
                step([batch], lr=0.1)
            sync()
            break
        except torch.OutOfMemoryError:  # others are warming up, too
            clock.say(name, "out of memory, attempt", attempt)
            step = batch = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
            time.sleep(10)
    losses = [round(v, 5) for v in (step.sums / step.summed).tolist()]
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    clock.say(f"{name}: compiled and warm in {time.time() - began:.0f} s, {peak:.1f} GiB, means of two steps {losses}")
    if gpu:
        torch.cuda.empty_cache()
    with clock.wait_for_turn(name):
        step([batch], lr=0.0)
        sync()
        rounds, calls = [], 8 if gpu else 1
        for _ in range(3):
            at = time.perf_counter()
            for _ in range(calls):
                step([batch], lr=0.0)
            sync()
            rounds.append((time.perf_counter() - at) / calls * 1e3)
        ms = statistics.median(rounds)
        row = {"job": name, "student": job.student, "batch_size": job.batch_size, "method": method}
        row |= {"kernels": list(kernels), "ms": ms, "rounds_ms": rounds, "images_per_second": job.batch_size / ms * 1e3}
        row |= {"peak_gib": peak, "losses": losses}
        clock.say(
            f"STEP {name}: {ms:.2f} ms = {row['images_per_second']:,.0f} images/s {[round(r, 2) for r in rounds]}"
        )
        (clock.out / f"step_{_file(name)}.json").write_text(json.dumps(row, indent=1))
        if gpu:
            row["profile"] = profile(lambda: step([batch], lr=0.0))
            (clock.out / f"step_{_file(name)}.json").write_text(json.dumps(row, indent=1))


def profile(step: Any, calls: int = 2) -> list[tuple[float, int, str]]:
    """Milliseconds a step, launches, and name of each kernel, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if str(e.device_type).endswith("CUDA")]
    rows = [(round(e.self_device_time_total / calls / 1e3, 4), e.count // calls, e.key[:160]) for e in events]
    return sorted(rows, reverse=True)[:80]


def run_kernels(clock: Clock, steps: int) -> None:
    """The cases of bench_kernels, and the statistics with other tiles."""
    import torch

    from bench import bench_kernels as b
    from bench import machine
    from fastofa.kernels import triton_norm_act

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    if gpu:
        for make in (b.norm_cases, b.stem_cases):  # fills Triton's cache
            for case in make(device, True, 16):
                if "compiled" not in case.candidates:
                    b.gate(case)
        torch.cuda.empty_cache()
    clock.say("kernels: ready")
    with clock.wait_for_turn("kernels") as turn:
        fcntl.flock(turn, fcntl.LOCK_UN)  # steps are worth more: all of them first
        while time.time() - clock.began < clock.latest_s + 60 and len(list(clock.out.glob("step_*.json"))) < steps:
            time.sleep(0.3)
        fcntl.flock(turn, fcntl.LOCK_EX)
        copy = machine.measure(device, torch.bfloat16 if gpu else torch.float32)
        clock.say(f"COPY {copy.gb_per_second:,.0f} GB/s, {copy.tflops:.0f} TFLOP/s")
        rows: list[dict[str, Any]] = []

        def measure(cases: Any, label: str) -> None:
            for case in cases:
                try:
                    found = b.measure(case, device, 3 if gpu else 1, copy.gb_per_second)
                except Exception as error:
                    traceback.print_exc()
                    clock.say("FAILED", label, case.size, f"{type(error).__name__}: {error}"[:200])
                    continue
                for row in found:
                    row["label"] = label
                    rows.append(row)
                    if "ms" in row:
                        clock.say(
                            f"KERNEL {label} {row['size']} | {row['candidate']} | {row['ms']:.4f} ms, "
                            f"{row['of_copy']:.0%} of a copy, {row['times_baseline']:.2f} x"
                        )
                    else:
                        clock.say(f"KERNEL {label} {row['size']} | {row['candidate']} | {row.get('red')}")
                (clock.out / "kernels.json").write_text(json.dumps(rows, indent=1))
                if gpu:
                    torch.cuda.empty_cache()

        measure(b.stem_cases(device, not gpu), "")
        measure(b.norm_cases(device, not gpu), "")
        if gpu:
            tiles = ((4096, 528, 2112), (2048, 1056, 4224), (4096, 1056, 8448), (8192, 528, 1056))
            for elements, summing, programs in tiles:
                triton_norm_act.ELEMENTS, triton_norm_act.SUMMING = elements, summing
                triton_norm_act.PROGRAMS = programs
                for number in (0, 1, 5, 6):
                    channels, side, batch, residual, activation = b.NORMS[number]
                    parts = ("statistics", "apply", "sums", "gradient")
                    measure(
                        (b.norm_case(device, work, batch, channels, side, residual, activation) for work in parts),
                        f"{elements}/{summing}/{programs}",
                    )


def _file(name: str) -> str:
    return re.sub(r"\W+", "_", name)


# --- All of them ------------------------------------------------------------------------------------------------------


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


TESTS = (
    "norm_act_kernel", "fused_norms", "depthwise", "fused_depthwise", "ofa_loss_kernel", "crop_resize_kernel", "step",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--steps", nargs="*", choices=JOBS, default=FIRST, help="steps to time")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--latest", type=float, default=170, help="second at which measuring begins at the latest")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(out, args.began or time.time(), len(args.steps) + 2, args.latest)
    if args.run == "kernels":
        run_kernels(clock, len(args.steps))
        return 0
    if args.run:
        run_step(args.run, clock, args.dry_run)
        return 0

    common = ["--out", str(out), "--began", str(clock.began), "--latest", str(args.latest), "--steps", *args.steps]
    common += ["--dry-run"] if args.dry_run else []
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if args.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    running = {}
    for name in (*args.steps, "kernels"):
        running[name] = start(["bench.gpu_kernels", "--run", name, *common], out / f"{_file(name)}.log", **environment)
    marked = "not slow and kernel" if args.dry_run else "gpu or kernel"
    files = [f"tests/test_{name}.py" for name in TESTS if (ROOT / f"tests/test_{name}.py").exists()]
    tests = ["pytest", "-q", "-rf", "--tb=short", "-m", marked, "-p", "no:cacheprovider", "-n", "5", *files]
    if args.dry_run:
        tests = ["pytest", "--version"]
    running["tests"] = start(tests, out / "tests.log")
    printed = dict.fromkeys(running, 0)

    def show() -> None:
        for name in running:
            log = out / f"{_file(name)}.log"
            lines = log.read_text(errors="replace").splitlines(keepends=True)
            complete = [line for line in lines if line.endswith("\n")]
            for line in complete[printed[name] :]:
                if line.startswith("["):
                    print(line, end="", flush=True)
            printed[name] = len(complete)

    while time.time() - clock.began < args.seconds and any(p.poll() is None for p in running.values()):
        time.sleep(0.5)
        show()
        if running["tests"].poll() is not None and not (out / "ready" / "tests").exists():
            (out / "ready").mkdir(exist_ok=True)
            (out / "ready" / "tests").touch()
            clock.say("tests:", "".join((out / "tests.log").read_text().splitlines(keepends=True)[-25:]))
    failed = 0
    for name, process in running.items():
        code = process.poll()
        if code is None:
            process.kill()
        if code != 0:
            failed = 1
            clock.say(name, "did not end" if code is None else f"FAILED ({code})")
            print("".join((out / f"{_file(name)}.log").read_text(errors="replace").splitlines(keepends=True)[-15:]))
    clock.say("done")
    return failed


if __name__ == "__main__":
    sys.exit(main())
