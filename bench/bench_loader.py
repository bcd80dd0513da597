"""Images per second of every pipeline alone, and of other loaders of the same images.

    python -m bench.bench_loader                     writes bench/results/loaders_{cpu,gpu}.json
    python -m bench.bench_loader --workers 1 2 4 8   a sweep
    python -m bench.bench_loader --data photos       your own folder; its other forms are written temporarily

By default it makes photographs with the statistics of real ones (1/f noise) as JPEGs of quality 90, with sizes and
bytes like ImageNet's. The record states both. lib/loaders.py contains the implementations. Each measurement runs in a
process of its own. The time before the first batches (such as FFCV's compilation) and the memory of mapped files are
not counted. The implementations take turns, round by round.
"""

import itertools
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.lib import command_line
from bench.lib.loaders import BASELINE, IMPLEMENTATIONS, Task
from bench.lib.photographs import SIZES, write_folder
from bench.lib.record import markdown_table, write_record
from bench.lib.sources import write_form
from bench.lib.timing import wait
from bench.lib.turns import wait_for_turn
from fastofa.data.open import open_dataset
from fastofa.system.device import choose_workers


def measure(task: Task) -> dict[str, float]:
    """Measure in a new process: images per second, CPU seconds per 1,000 images, memory in MB, including workers."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(task, sender))
    process.start()
    sender.close()
    try:
        measured = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{task.name} ended with {process.exitcode}") from None
    process.join()
    return measured


def _measured(task: Task, sender: Any) -> None:
    """Measure a loader so that as many batches are ready when the clock starts as when it stops.

    Memory is measured over some batches afterwards, since measuring it slows a process down.
    """
    torch.set_num_threads(1)
    sizes = IMPLEMENTATIONS[task.name].run(task)
    for _ in range(2 * task.workers + 4):
        next(sizes)
    wait(torch.device(task.device))
    began, cpu = time.perf_counter(), sum(_cpu_s(pid) for pid in _tree(os.getpid()))
    images = sum(itertools.islice(sizes, task.calls))
    wait(torch.device(task.device))
    seconds, cpu = time.perf_counter() - began, sum(_cpu_s(pid) for pid in _tree(os.getpid())) - cpu
    memory_mb = max(sum(_memory_mb(pid) for pid in _tree(os.getpid())) for _ in itertools.islice(sizes, 8))
    sender.send({"images_per_second": images / seconds, "cpu_s_per_1000": cpu / images * 1000, "memory_mb": memory_mb})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # or PyTorch reports the end of the workers as a failure
    for pid in _tree(os.getpid())[1:]:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # some peers do not end by themselves if they are stopped early


def _tree(pid: int | None) -> list[int]:
    """A process and all its descendants."""
    try:
        children = [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return [int(pid or 0), *(p for child in children for p in _tree(int(child)))]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_mb(pid: int) -> float:
    """The process's own memory and its part of shared memory, without mapped files."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem"))) / 1024


def describe(folder: str) -> dict[str, Any]:
    """Quantiles of the images' sides and bytes."""
    dataset = open_dataset(folder)
    file_bytes = [dataset.path(i).stat().st_size for i in range(len(dataset))]
    shares = [0, 0.1, 0.5, 0.9, 1]
    return {
        "images": len(dataset),
        "quantiles": shares,
        "shorter_side": np.quantile(dataset.sizes.min(axis=1), shares).tolist(),
        "longer_side": np.quantile(dataset.sizes.max(axis=1), shares).tolist(),
        "file_kb": (np.quantile(file_bytes, shares) / 1e3).round(1).tolist(),
        "mean_file_kb": round(statistics.mean(file_bytes) / 1e3, 1),
    }


def main(argv: list[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    parser = command_line.parser(__doc__)
    parser.add_argument("--data", type=Path, help="an image folder with train/; by default synthetic images")
    names = f"some of: {'; '.join(IMPLEMENTATIONS)}"
    parser.add_argument(
        "--only", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", default=list(IMPLEMENTATIONS), help=names
    )
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 64)
    parser.add_argument("--workers", type=int, nargs="+", default=[choose_workers(None)])
    parser.add_argument("--count", type=int, default=4096 if gpu else 512, help="synthetic images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=64 if gpu else 16, help="batches a round")
    args = parser.parse_args(argv)
    for name in ("batch_size", "count", "rounds", "calls"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.data is not None and not (args.data / "train").is_dir():
        parser.error(f"--data: expected an image folder with train/, got {args.data}")
    skipped = {name: reason for name in args.only if (reason := IMPLEMENTATIONS[name].skip_reason(device))}
    names = [name for name in args.only if name not in skipped]
    baseline = BASELINE if BASELINE in names else names[0]
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary) / "photographs"
        if args.data is None:
            write_folder(data, args.count, SIZES)
        forms = {"folder", *(IMPLEMENTATIONS[name].form for name in names)}
        sources = {form: write_form(form, data, Path(temporary)) for form in sorted(forms)}
        data_sizes = describe(sources["folder"])
        wait_for_turn()
        for _ in range(args.rounds):
            for size, workers, name in itertools.product(args.image_sizes, args.workers, names):
                task = Task(name, sources, size, args.batch_size, workers, args.calls, device)
                found.setdefault((name, size, workers), []).append(measure(task))

    def ratio(key: tuple[str, int, int], to: str | None) -> float | None:
        if to not in names:
            return None
        pairs = zip(found[key], found[(to, *key[1:])], strict=True)
        return statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in pairs)

    rows: list[dict[str, Any]] = [
        {
            "pipeline": key[0],
            "image_size": key[1],
            "workers": key[2],
            **{name: statistics.median(one[name] for one in rounds) for name in rounds[0]},
            "ratio_to_baseline": ratio(key, baseline),
            "ratio_to_peer": ratio(key, IMPLEMENTATIONS[key[0]].peer),
            "rounds": rounds,
        }
        for key, rounds in found.items()
    ]
    result = {
        "batch_size": args.batch_size, "calls": args.calls, "rounds": args.rounds, "data": data_sizes,
        "baseline": baseline, "skipped": skipped, "rows": rows,
    }  # fmt: skip
    write_record(f"loaders_{device.replace('cuda', 'gpu')}", result, args.out)
    for setting, group in itertools.groupby(rows, key=lambda row: (row["image_size"], row["workers"])):
        print("\n{} px, workers: {}\n\n{}".format(*setting, table(list(group), baseline)))
    for name, reason in skipped.items():
        print(f"{name}: left out, {reason}")


def table(rows: list[dict[str, Any]], baseline: str) -> str:
    """The rows of one image size and one number of workers as a table."""
    header = ["implementation", "images/s", f"x {baseline}", "x stock", "CPU s/1000", "memory MB"]
    lines = [
        [
            r["pipeline"], f"{r['images_per_second']:,.0f}",
            f"{r['ratio_to_baseline']:.2f}", f"{r['ratio_to_peer']:.2f}" if r["ratio_to_peer"] else "",
            f"{r['cpu_s_per_1000']:.2f}", f"{r['memory_mb']:,.0f}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
