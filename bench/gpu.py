"""Everything that wants a GPU, in one call of less than nine minutes: for whoever has one for half an hour.

    python -m bench.gpu                       writes bench/results/gpu/*.json and *.log, a table of what happened last
    python -m bench.gpu --only ladder tests
    python -m bench.gpu --dry-run             every part at a tiny size, on any machine: does it run at all?

Needs the checkout and its Python libraries, nothing installed. Every part is a process with a time limit of its own, so
that one that fails or hangs costs no more than itself; a dry run, which may be on a slow machine, has no limits. Ends
with 1 if a part failed or hung, with 2 without a GPU.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOTAL_S = 530  # of all parts


@dataclass(frozen=True)
class Part:
    """A command and its limit."""

    name: str
    arguments: tuple[str, ...]
    limit_s: int
    tiny: tuple[str, ...]
    """The arguments of a dry run."""


TINY = ("--image-size", "32", "--batch-size", "4", "--num-classes", "10")
TINY_MODELS = ("--students", "test_resnet", "--teachers", "test_vit")

# In order of worth: what comes last is what a slow machine loses.
PARTS = (
    Part("tests", ("pytest", "-m", "gpu or kernel", "-p", "no:cacheprovider"), 100, ("pytest", "-m", "gpu")),
    Part(
        "ladder",
        ("bench.bench_train", "--rounds", "3", "--loaders"),
        220,
        ("bench.bench_train", *TINY_MODELS, *TINY, "--rounds", "1", "--calls", "1", "--loaders"),
    ),
    Part(
        "profile",
        ("bench.profile_step", "--students", "resnet18", "mobilenetv2_100", "resnet50"),
        120,
        ("bench.profile_step", "--students", "test_resnet", "--teacher", "test_vit", *TINY, "--calls", "1"),
    ),
    Part(
        "kernels",
        ("bench.bench_kernels", "--quick", "--rounds", "5"),
        100,
        ("bench.bench_kernels", "--quick", "--rounds", "1"),
    ),
    Part("roofline", ("bench.roofline",), 20, ("bench.roofline", "--students", "test_resnet", *TINY)),
    Part(
        "optimizers",
        ("bench.optimizers",),
        30,
        ("bench.optimizers", "--student", "test_resnet", "--teacher", "test_vit", "--rounds", "1", "--calls", "1"),
    ),
    Part(
        "loaders",
        ("bench.bench_loader", "--count", "2048", "--rounds", "1", "--calls", "32"),
        180,
        (
            "bench.bench_loader",
            "--only",
            "torchvision",
            "resident",
            "--image-sizes",
            "32",
            "--batch-size",
            "4",
            "--count",
            "20",
            "--rounds",
            "1",
            "--calls",
            "2",
        ),
    ),
    Part(
        "epoch",
        ("bench.epoch", "--rounds", "2", "--calls", "10"),
        60,
        ("bench.epoch", "--student", "test_resnet", "--teacher", "test_vit", "--batch-size", "2", "--rounds", "1"),
    ),
)


def command(part: Part, dry_run: bool, out: Path) -> list[str]:
    module, *arguments = part.tiny if dry_run else part.arguments
    if module == "pytest":
        marked = sorted(
            str(f) for f in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.(gpu|kernel)", f.read_text())
        )
        # Without a file to look into, pytest would collect all of them.
        return (
            [sys.executable, "-m", "pytest", *arguments, *marked] if marked else [sys.executable, "-c", "print('none')"]
        )
    records = ["--records", str(out)] if module == "bench.epoch" else []
    return [sys.executable, "-m", module, *arguments, "--out", str(out), *records]


def environment(dry_run: bool) -> dict[str, str]:
    """Of the parts: this checkout's code, and in a dry run nothing compiled."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **({"TORCHDYNAMO_DISABLE": "1"} if dry_run else {})}


def run(part: Part, dry_run: bool, out: Path, limit_s: float | None) -> tuple[str, float]:
    """Run a part to its end or its limit, if it has one; "ok", "failed (CODE)" or "timed out", and the seconds."""
    began = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        # A session of its own, so that its loaders' workers end with it.
        process = subprocess.Popen(
            command(part, dry_run, out),
            cwd=ROOT,
            env=environment(dry_run),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"\n--- {part.name}: {status}\n{_tail(log, 40 if status == 'ok' else 25)}", flush=True)
    return status, time.monotonic() - began


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="folder of the records")
    args = parser.parse_args(argv)
    if not args.dry_run and not _has_gpu():
        print("expected a GPU that PyTorch can use, found none; --dry-run tries every part without", file=sys.stderr)
        return 2
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = []
    for part in PARTS:
        if args.only and part.name not in args.only:
            continue
        limit_s = None if args.dry_run else min(part.limit_s, TOTAL_S - (time.monotonic() - began))
        late = limit_s is not None and limit_s < 1
        status, seconds = ("no time left", 0.0) if late else run(part, args.dry_run, out, limit_s)
        rows.append((part.name, status, seconds))
    print(f"\n{'part':12} {'':14} {'s':>6}   records in {out}")
    for name, status, seconds in rows:
        print(f"{name:12} {status:14} {seconds:6.0f}")
    print(f"{'all':12} {'':14} {time.monotonic() - began:6.0f}")
    return int(any(status != "ok" for _, status, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
