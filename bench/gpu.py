"""Run everything that needs a GPU, in one call of at most a quarter of an hour.

    python -m bench.gpu                       7 minutes; writes bench/results/gpu/*.json and *.log
    python -m bench.gpu --only resnet18 tests
    python -m bench.gpu --minutes 4           jobs that do not fit are left out, the least important first, and listed
    python -m bench.gpu --dry-run             every job at a tiny size, on any machine, without a time limit

It needs the checkout and its Python libraries; fastofa need not be installed. The tests also need tyro and hypothesis,
which may be in any folder of PYTHONPATH. Every job is a process of its own. All compile at the same time, since a GPU
idles while a compiler runs; then each measures alone, in the order of JOBS. The tests come last.
Exit code 1 if a job failed or was left out, 2 without a GPU.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bench.lib import command_line
from bench.lib.turns import VARIABLE

ROOT = Path(__file__).parent.parent
COMPILING = 0.6  # fraction of the time after which turns begin even if some jobs still compile
ALONE_S = 90.0  # time limit of a job's measurements, in seconds
COMPILE_PROCESSES = "5"  # per job


@dataclass(frozen=True)
class Job:
    """A command, run at full size or, in a dry run, at a tiny one."""

    name: str
    arguments: tuple[str, ...]
    tiny: tuple[str, ...]
    """The arguments of a dry run."""
    takes_turns: bool = True
    """Whether it waits for its turn; otherwise it runs while the others compile."""
    last: bool = False
    """Whether it starts only when all others have had their turns."""
    alone_s: float | None = None
    """Time limit of its measurements; None for ALONE_S."""
    after: str | None = None
    """Name of a job that must have ended before this one starts."""


def ladder(
    name: str, student: str, teacher: str, batch: int, *rows: str, profile: bool = True, after: str | None = None
) -> Job:
    """Rows of the ladder for one student."""
    common = ("bench.bench_train", "--name", name, "--rows", *rows)
    full = (*common, "--students", student, "--teachers", teacher, "--batch-size", str(batch), "--rounds", "3")
    return Job(
        name,
        (*full, "--calls", "8", *["--profile"] * profile),
        (
            *common, "--students", "test_resnet", "--teachers", "test_vit", "--image-size", "32", "--batch-size", "4",
            "--num-classes", "10", "--rounds", "1", "--calls", "1", *["--profile"] * profile,
        ),
        after=after,
    )  # fmt: skip


def choices(name: str, student: str, teacher_dim: int, batch: int) -> Job:
    """Chooses a student's kernels while other jobs compile, when the GPU is idle most of the time."""
    of = ("--student", student, "--teacher-dim", str(teacher_dim), "--batch-size", str(batch))
    tiny = ("bench.kernel_choice", "--name", name, "--dry-run")
    return Job(name, ("bench.kernel_choice", "--name", name, *of), tiny, takes_turns=False)


def chosen(name: str, student: str, teacher: str, batch: int) -> Job:
    """Rows with the kernels that were chosen by the job `NAME_choices`."""
    return ladder(f"{name}_auto", student, teacher, batch, AUTO, AUTO_GRAPHS, PLAIN_AUTO, after=f"{name}_choices")


SWIN = "swin_tiny_patch4_window7_224"
CACHED, PLAIN = "+ cached teacher", "plain training"
AUTO, PLAIN_AUTO = "+ kernels chosen by measuring", "plain training, kernels chosen by measuring"
AUTO_GRAPHS = "+ kernels chosen by measuring, CUDA graphs"
LOADERS = ("packed", "resident", "packed, gather only", "ffcv", "torchvision", "dali")

# The most important first: on a slow machine, the last ones are left out.
JOBS = (
    Job(
        "tests",
        ("pytest", "-m", "gpu or kernel", "-p", "no:cacheprovider", "-n", "8", "--tb=short", "--show-capture=no"),
        ("pytest", "-m", "gpu", "-p", "no:cacheprovider"),
        alone_s=240.0,
        last=True,
    ),
    ladder("resnet18", "resnet18", SWIN, 1024, CACHED, PLAIN, "+ loss kernel"),
    # Two rows per job: all jobs that warm up at the same time must fit into 80 GB, and one takes 13 GB at this size.
    ladder("resnet18_kernels", "resnet18", SWIN, 1024, "+ all kernels", "plain training, stem and norm kernels"),
    choices("resnet18_choices", "resnet18", 768, 1024),
    chosen("resnet18", "resnet18", SWIN, 1024),
    ladder("deit_tiny", "deit_tiny_patch16_224", "resnet50", 1024, CACHED, PLAIN),
    choices("deit_tiny_choices", "deit_tiny_patch16_224", 2048, 1024),
    chosen("deit_tiny", "deit_tiny_patch16_224", "resnet50", 1024),
    ladder("resnet18_stem", "resnet18", SWIN, 1024, "+ stem and norm kernels", "+ stem kernels"),
    ladder("resnet18_exits", "resnet18", SWIN, 1024, "+ norm kernels", "+ exits kernel"),
    ladder("resnet50", "resnet50", SWIN, 256, CACHED, PLAIN),
    choices("resnet50_choices", "resnet50", 768, 256),
    chosen("resnet50", "resnet50", SWIN, 256),
    ladder("mobilenetv2", "mobilenetv2_100", SWIN, 512, CACHED, PLAIN),
    choices("mobilenetv2_choices", "mobilenetv2_100", 768, 512),
    chosen("mobilenetv2", "mobilenetv2_100", SWIN, 512),
    ladder("deit_tiny_kernels", "deit_tiny_patch16_224", "resnet50", 1024, "+ token kernels", "+ layer norm kernels"),
    Job(
        "run",
        ("bench.bench_run", "--images", "100000"),
        ("bench.bench_run", "--images", "64", "--batch-size", "16", "--epochs", "1", "--rounds", "1", "--calls", "1"),
        alone_s=180.0,
    ),
    Job(
        "precompute",
        ("bench.bench_precompute", "--rounds", "3", "--images", "16384"),
        (
            "bench.bench_precompute", "--images", "32", "--batch-size", "16", "--image-size", "32", "--rounds", "1",
            "--rank-rounds", "0",
        ),
    ),
    Job(
        "loaders",
        ("bench.bench_loader", "--only", *LOADERS, "--count", "1024", "--rounds", "1", "--calls", "32"),
        (
            "bench.bench_loader", "--only", "torchvision", "resident", "--image-sizes", "32", "--batch-size", "4",
            "--count", "20", "--rounds", "1", "--calls", "2",
        ),
    ),
    Job(
        "kernels",
        ("bench.bench_kernels", "--quick", "--rounds", "3"),
        ("bench.bench_kernels", "--quick", "--rounds", "1"),
    ),
    ladder(
        "peers", "resnet18", SWIN, 1024, "+ compile", "timm, online logit distillation", "official code, fp32",
        "official code, fp16 AMP", profile=False,
    ),
    ladder("graphs_64", "resnet18", SWIN, 64, CACHED, "+ CUDA graphs", profile=False),
    ladder("resmlp_12", "resmlp_12_224", SWIN, 1024, CACHED, PLAIN),
    choices("resmlp_12_choices", "resmlp_12_224", 768, 1024),
    chosen("resmlp_12", "resmlp_12_224", SWIN, 1024),
    ladder("autotune", "deit_tiny_patch16_224", "resnet50", 1024, "+ max-autotune", profile=False),
    Job("augment", ("bench.augment",), ("bench.augment", "--batch-size", "16", "--rounds", "1")),
    Job(
        "optimizers",
        ("bench.optimizers",),
        ("bench.optimizers", "--student", "test_resnet", "--teacher", "test_vit", "--rounds", "1", "--calls", "1"),
    ),
)  # fmt: skip


@dataclass(eq=False)
class Running:
    """A job, its process once it has started, its log and its outcome."""

    job: Job
    dry_run: bool
    out: Path
    turn: Path
    process: subprocess.Popen[bytes] | None = None
    measured_s: float = 0.0
    status: str = ""
    _tee: threading.Thread = field(init=False)

    def start(self) -> None:
        """Start the job. Its output goes to OUT/NAME.log and, prefixed with its name, to the terminal."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": COMPILE_PROCESSES}
        own |= {"TORCHDYNAMO_DISABLE": "1"} if self.dry_run else {}
        own |= {VARIABLE: str(self.turn)} if self.job.takes_turns else {}
        self.process = subprocess.Popen(
            command(self.job, self.dry_run, self.out), cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        log, name = self.out / f"{self.job.name}.log", self.job.name
        self._tee = threading.Thread(target=_tee, args=(self.process.stdout, log, name), daemon=True)
        self._tee.start()

    def ready(self) -> bool:
        return self.turn.with_suffix(".ready").exists() or self.ended()

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def go(self) -> None:
        if self.process is None:
            self.start()
        self.turn.with_suffix(".go").touch()

    def wait(self, until: float) -> None:
        """Wait for the job to end; stop it if it runs out of time."""
        if self.process is None:
            self.status = "left out: no time"
            return
        began = time.monotonic()
        try:
            code = self.process.wait(max(until - began, 0.1))
            self.status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            self.stop("ran out of time")
        self.measured_s = time.monotonic() - began

    def stop(self, status: str) -> None:
        """Kill the job together with its workers and compilers, which are in its session."""
        self.status = status
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def command(job: Job, dry_run: bool, out: Path) -> list[str]:
    module, *arguments = job.tiny if dry_run else job.arguments
    if module == "pytest":
        marked = sorted(
            str(f) for f in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.(gpu|kernel)", f.read_text())
        )
        return [sys.executable, "-m", "pytest", *arguments, *marked]
    return [sys.executable, "-m", module, *arguments, "--out", str(out)]


def _tee(lines: IO[bytes] | None, log: Path, name: str) -> None:
    began = time.monotonic()
    with log.open("wb") as file:
        for line in lines or ():
            file.write(line)
            file.flush()
            text = line.decode(errors="replace").rstrip()
            if text:
                print(f"[{time.monotonic() - began:4.0f} s] {name}: {text}", flush=True)


def stop_all(jobs: list[Running]) -> None:
    """Stop the jobs that still run, because this process was interrupted."""
    for r in jobs:
        if r.process is not None and not r.ended():
            r.stop("interrupted")


def run(jobs: list[Job], dry_run: bool, out: Path, seconds: float) -> list[Running]:
    """Run all jobs; those that do not fit into the time are stopped and reported."""
    began = time.monotonic()
    until = began + seconds
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        all_ = [Running(job, dry_run, out, Path(folder) / job.name) for job in jobs]
        stack.callback(stop_all, all_)
        named = {r.job.name: r for r in all_}

        def start_due() -> None:
            for r in all_:
                before = named.get(r.job.after or "")
                if r.process is None and not r.job.last and (before is None or before.ended()):
                    r.start()

        start_due()
        while not all(r.job.last or r.ready() for r in all_) and time.monotonic() < began + COMPILING * seconds:
            time.sleep(0.1)
            start_due()
        waiting = [r for r in all_ if r.job.takes_turns]
        while waiting and time.monotonic() < until:
            start_due()
            turn = next((r for r in waiting if r.ready() or (r.job.last and waiting == [r])), None)
            if turn is None:
                time.sleep(0.1)
                continue
            waiting.remove(turn)
            turn.go()
            turn.wait(until if dry_run else min(until, time.monotonic() + (turn.job.alone_s or ALONE_S)))
        for r in waiting:
            r.stop("left out: no time")
        for r in all_:
            if not r.job.takes_turns:
                r.wait(until)
            if r.process is not None:
                r._tee.join(timeout=5)
    return all_


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__doc__, ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any machine, no time limit")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="these jobs")
    parser.add_argument("--minutes", type=float, default=7, help="for all jobs together")
    args = parser.parse_args(argv)
    if not args.dry_run and not _has_gpu():
        print("expected a GPU that PyTorch can use, found none; --dry-run tries every job without", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    chosen = [job for job in JOBS if not args.only or job.name in args.only]
    running = run(chosen, args.dry_run, out, float("inf") if args.dry_run else args.minutes * 60)
    print(f"\n{'job':16} {'':20} {'s alone':>8}   records in {out}")
    for r in running:
        print(f"{r.job.name:16} {r.status:20} {r.measured_s:8.0f}")
    print(f"{'all':16} {'':20} {time.monotonic() - began:8.0f}")
    return int(any(r.status != "ok" for r in running))


if __name__ == "__main__":
    sys.exit(main())
