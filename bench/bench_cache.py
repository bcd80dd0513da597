"""Measure a teacher cache at scale, with made-up predictions: write, open, load a view, look rows up, find damage.

    python -m bench.bench_cache            writes bench/results/cache.json

For each number of rows, a view of K = 16 with crop and flip is written as `precompute` writes it (packed, checksum,
flushed to the disk). Another process opens the cache and loads the view from the page cache: checksum, all values
checked, predictions on the device (here the CPU). Then a bit is flipped in each of 200 copies of a view's file:
`cache verify` reads the cache, and training opens the view.

Shapes: N rows of a view, C classes, K classes kept.
"""

import math
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from fastofa.methods.targets import TopK
from fastofa.system.errors import BadInput
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import VAL, view_file, write_table
from fastofa.teacher.cache_header import policy_to_json, read_header, write_header
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.packed_rows import RowFormat
from fastofa.views.policy import ViewPolicy

TOPK, BATCH, BLOCK, FLIPS = 16, 1024, 1 << 16, 200
VAL_IMAGES = 50_000
MANY = 5_000_000  # rows; larger views are measured in fewer rounds
SIZES = (
    (10_000, 1000), (100_000, 1000), (1_000_000, 1000), (1_281_167, 1000), (10_000_000, 1000), (14_200_000, 21_841),
    (30_000_000, 1000),
)  # fmt: skip


def predictions(rows: int, num_classes: int) -> TopK:
    """Made-up predictions as `precompute` holds them: classes uint16 and log_probs fp32 [N, K], which sum to .95.

    The log-probabilities repeat after 65,536 rows.
    """
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(num_classes, (rows, 1), generator=draw, dtype=torch.int32)
    classes = ((first + 7 * torch.arange(TOPK, dtype=torch.int32)) % num_classes).to(torch.uint16)
    gaps = torch.empty(min(rows, BLOCK), TOPK).exponential_(1.5, generator=draw)
    log_probs = (-gaps.cumsum(dim=1)).log_softmax(dim=1) + math.log(0.95)
    return TopK(classes, log_probs.repeat(-(-rows // BLOCK), 1)[:rows])


def view_columns(rows: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    corners, sides = rng.integers(0, 20_000, (rows, 2)), rng.integers(1, 40_000, (rows, 2))
    crop = np.concatenate([corners, sides], axis=1).astype(np.uint16)
    return {"crop": torch.from_numpy(crop), "flip": torch.from_numpy(rng.random(rows) < 0.5)}


def begin(path: Path, rows: int, num_classes: int) -> None:
    """Write the header and the validation predictions."""
    colour = [0.5, 0.5, 0.5]
    teacher = {"name": "made-up", "sha256": "0" * 64, "precision": "fp32", "image_size": 224, "num_features": 768}
    header = {
        "dataset": {"spec": "made-up", "train": "0" * 64, "val": "1" * 64},
        "num_samples": rows,
        "num_val_samples": VAL_IMAGES,
        "num_classes": num_classes,
        "classes": [f"n{i:08d}" for i in range(num_classes)],
        "topk": TOPK,
        "policy": policy_to_json(ViewPolicy()),
        "seed": 0,
        "views": 1,
        "teachers": [{**teacher, "mean": colour, "std": colour}],
        "pipeline": "packed",
        "versions": {},
    }
    path.mkdir(parents=True)
    write_header(path, header)
    write_table(path / VAL, predictions(VAL_IMAGES, num_classes)._asdict(), header, VAL)


def timed(call: Callable[[], Any], rounds: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds of each round, by the clock and of this process's CPU time; and what the last call returned."""
    times: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    found = None
    for _ in range(rounds):
        found = None  # so that two results are never held at once
        began, cpu = time.perf_counter(), time.process_time()
        found = call()
        times["seconds"].append(time.perf_counter() - began)
        times["cpu_seconds"].append(time.process_time() - cpu)
    return times, found


def write(path: Path, rows: int, num_classes: int, rounds: int) -> dict[str, Any]:
    begin(path, rows, num_classes)
    header, targets = read_header(path), predictions(rows, num_classes)
    columns, file = {**view_columns(rows), **targets._asdict()}, path / view_file(0)
    packing, _ = timed(lambda: RowFormat(TOPK, num_classes).pack(targets), rounds)
    writing, _ = timed(lambda: write_table(file, columns, header, 0), rounds)
    return {"bytes_per_row": file.stat().st_size / rows, "pack": packing, "write": writing}


def read(path: Path, rounds: int) -> dict[str, Any]:
    """Runs in a process of its own, whose memory is measured."""
    torch.set_num_threads(1)
    opening, cache = timed(lambda: TeacherCache.open(path), rounds)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    loading, table = timed(lambda: DeviceTargets(cache.table(0).predictions, torch.device("cpu")), rounds)
    peak = resident_bytes("VmHWM")
    rows = torch.randint(len(table), (BATCH,))
    looking_up, _ = timed(lambda: table.lookup(rows), 10 * rounds)
    return {"open": opening, "load": loading, "load_peak_bytes": peak - before, "lookup": looking_up}


def resident_bytes(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def found_damage(path: Path, flips: int) -> dict[str, int]:
    """Flip one bit of a view's file at a time: how often `verify` and opening the view for training raise."""
    file, rng = path / view_file(0), random.Random(0)
    whole, cache = file.read_bytes(), TeacherCache.open(path)
    found = {"flipped": flips, "found_by_verify": 0, "found_by_training": 0}
    for _ in range(flips):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        for name, use in (("found_by_verify", cache.verify), ("found_by_training", lambda: cache.table(0))):
            try:
                use()
            except BadInput:
                found[name] += 1
    file.write_bytes(whole)
    return found


def cells(size: dict[str, Any]) -> list[str]:
    cpu = [f"{1e9 * min(size[name]['cpu_seconds']) / size['rows']:.0f}" for name in ("pack", "write", "load")]
    clock = [f"{min(size[name]['seconds']):.3f}" for name in ("open", "load")]
    rows = [f"{size['rows']:,}", f"{size['classes']:,}", f"{size['bytes_per_row']:.2f}"]
    return [*rows, *cpu, *clock, f"{size['load_peak_bytes'] / 1e6:.0f}", f"{1e3 * min(size['lookup']['seconds']):.2f}"]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = command_line.parser(__doc__)
    parser.add_argument("--rows", type=int, default=SIZES[-1][0], help="leave out larger views")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flips", type=int, default=FLIPS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rows, num_classes in (size for size in SIZES if size[0] <= args.rows):
            path = Path(folder) / "cache"
            rounds = max(1, min(args.rounds, MANY // rows))
            written = write(path, rows, num_classes, rounds)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
                loaded = other.submit(read, path, rounds).result()
            found.append({"rows": rows, "classes": num_classes, **written, **loaded})
            shutil.rmtree(path)
            print(found[-1])
        begin(Path(folder) / "damaged", 1000, 1000)
        header, few = read_header(Path(folder) / "damaged"), predictions(1000, 1000)._asdict()
        write_table(Path(folder) / "damaged" / view_file(0), {**view_columns(1000), **few}, header, 0)
        damage = found_damage(Path(folder) / "damaged", args.flips)
    result = {"topk": TOPK, "threads": 1, "batch": BATCH, "sizes": found, "damage": damage}
    titles = ["rows", "classes", "bytes/row", "pack", "write", "load", "open s", "load s", "peak MB", "lookup ms"]
    print(markdown_table(titles, [cells(size) for size in found]))
    print(f"pack, write, load: ns of CPU time per row; open, load: seconds by the clock\n{damage}")
    write_record("cache", result, args.out)
    return result


if __name__ == "__main__":
    main()
