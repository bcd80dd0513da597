"""Time `fastofa precompute` against the bare forward pass of the same teacher, and on two ranks against one.

    python -m bench.bench_precompute                  writes bench/results/precompute_{cpu,gpu}.json

The rows of `precompute` run its real code on images in memory: they draw a view, crop, run the teacher, keep the top K,
check them and write the view's file. A bare forward pass normalises one batch that stays on the device and computes its
logits, nothing else. All have the same weights, which are random, in the same precision. Every row runs in every round;
a round is one view. Opening and compiling are left out. The target is 0.95 of the compiled forward pass.

On a CPU, one rank and then two, each with one thread, make a new cache in every round. The time is from the moment at
which all ranks are ready until the cache is complete.

Shapes: B images in a batch, S image side.
"""

import argparse
import itertools
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, save_for_hf
from torch import Tensor

from bench.lib import command_line
from bench.lib.photographs import in_memory
from bench.lib.record import markdown_table, write_record
from bench.lib.timing import interleaved_ms, median_ratio
from bench.lib.turns import wait_for_turn
from fastofa.data.dataset import Dataset
from fastofa.system.interrupt import Interrupt
from fastofa.teacher.model import Teacher, open_teacher
from fastofa.teacher.parts import Range
from fastofa.teacher.precompute import begun, open_job
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.shared_bar import shared_bar
from fastofa.teacher.shares import Shares, Work, shares_of_ranks

TOPK, SIDE = 16, 160  # pixels of a side of the images in memory
COMPILED, EAGER = "bare forward, compiled", "bare forward, eager"
TARGET = 0.95
RANKS, VIEWS = (1, 2), 4  # of the comparison of ranks
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastofa.teacher.precompute", "bench.lib.photographs"])


def write_teacher(name: str, image_size: int, classes: Sequence[str], folder: Path) -> str:
    """Write a timm model with random weights and these classes as a folder for `--teacher`."""
    config = get_pretrained_cfg(name)
    sized: dict[str, Any] = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(classes), **sized)
    data_config = {"input_size": (3, image_size, image_size)}
    save_for_hf(model, str(folder), {"label_names": list(classes)}, safe_serialization=True, data_config=data_config)
    return str(folder)


def forward(teacher: Teacher, batch_size: int, compiled: bool) -> Callable[[], Tensor]:
    """A function that computes the logits of one batch, uint8 [B, 3, S, S], which stays on the device."""
    network, size = teacher.network, teacher.image_size
    shape = (batch_size, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=teacher.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def logits(pixels: Tensor) -> Tensor:
        return network.model(((pixels.float() / 255 - network.mean) / network.std).to(network.dtype))

    run = torch.compile(logits, dynamic=False) if compiled else logits

    @torch.no_grad()
    def call() -> Tensor:
        return run(images)

    return call


def views_of(config: PrecomputeConfig, data: tuple[Dataset, Dataset], device: torch.device) -> Callable[[], None]:
    """A function that writes the next view of a new cache, as `precompute` does."""
    job, rows = begun(open_job(config, *data, device, Interrupt(), Shares())), len(data[0])
    work, indices = Work([Range(view, 0, rows) for view in range(config.views)], []), itertools.count()

    def view() -> None:
        with shared_bar(job.shares, config.views * rows, 0, config.views, 0) as bar:
            job.compute(work, next(indices), bar)

    return view


def times_of(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, list[float]]:
    """Milliseconds per view of each row, one figure per round."""
    data = in_memory(args.images, SIDE), in_memory(args.batch_size, SIDE)
    path = write_teacher(args.teacher, args.image_size, data[0].classes, folder / "teacher")
    batches = args.images // args.batch_size
    bf16 = device.type == "cuda"

    def bare(compiled: bool) -> Callable[[], None]:
        teacher = open_teacher(path, data[0].classes, device=device, bf16=bf16)
        call = forward(teacher, args.batch_size, compiled)

        def view() -> None:
            for _ in range(batches):
                call()

        return view

    def product(compile_: Any) -> Callable[[], None]:
        config = PrecomputeConfig(
            data[0].spec, path, folder / f"compile-{compile_}", views=10_000, topk=min(TOPK, len(data[0].classes)),
            batch_size=args.batch_size, device=str(device), compile=compile_, pipeline="resident",
        )  # fmt: skip
        return views_of(config, data, device)

    steps = {COMPILED: bare(True), EAGER: bare(False)}
    steps |= {row(compile_): product(compile_) for compile_ in ("on", "off")}
    for step in steps.values():
        step()  # compiles
    wait_for_turn()
    return interleaved_ms(steps, device, args.rounds, calls=1, warmup=0)


def ranks_times(args: argparse.Namespace, folder: Path) -> dict[int, list[float]]:
    """Milliseconds per cache for each number of ranks, one figure per round."""
    path = write_teacher(args.teacher, args.image_size, in_memory(1, SIDE).classes, folder / "ranks-teacher")
    times: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    for number in range(args.rank_rounds):
        for ranks in RANKS:
            times[ranks].append(_cache_ms(args, path, folder / f"ranks-{ranks}-{number}", ranks))
    return times


def _cache_ms(args: argparse.Namespace, teacher: str, out: Path, ranks: int) -> float:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": found.getsockname()[1]}
    result, theirs = CONTEXT.Pipe(duplex=False)
    processes = [CONTEXT.Process(target=_rank, args=(args, teacher, out, place, rank, theirs)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    return result.recv()


def _rank(args: argparse.Namespace, teacher: str, out: Path, place: dict[str, Any], rank: int, result: Any) -> None:
    """One rank, with one thread; rank 0 sends the milliseconds."""
    os.environ |= {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
    torch.set_num_threads(1)
    data = in_memory(args.images, SIDE), in_memory(args.batch_size, SIDE)
    config = PrecomputeConfig(
        data[0].spec, teacher, out, VIEWS, topk=min(TOPK, len(data[0].classes)), batch_size=args.batch_size,
        device="cpu", pipeline="resident", workers=1,
    )  # fmt: skip
    with shares_of_ranks() as shares:
        job = begun(open_job(config, *data, torch.device("cpu"), Interrupt(), shares))
        job.program(torch.zeros(args.batch_size, 3, args.image_size, args.image_size, dtype=torch.uint8))
        if shares.is_main:
            job.write_others()  # of which the fidelity takes as long for a small cache as for a large one
        shares.announce(f"ready {rank}")
        for other in range(shares.place.size):
            shares.wait_for(f"ready {other}", lambda: None)
        began = time.perf_counter()
        job.run()
        if shares.is_main:
            result.send((time.perf_counter() - began) * 1e3)


def row(compile_: str) -> str:
    """The name of the row of `precompute` with this --compile."""
    return f"precompute --compile {compile_}"


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = command_line.parser(__doc__)
    parser.add_argument("--teacher", default="swin_tiny_patch4_window7_224" if gpu else "test_vit")
    parser.add_argument("--image-size", type=int, default=224 if gpu else 160)
    parser.add_argument("--batch-size", type=int, default=512 if gpu else 64)
    parser.add_argument("--images", type=int, default=64 * 512 if gpu else 512, help="images of a view")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank-rounds", type=int, default=0 if gpu else 5, help="rounds of one rank and of two")
    args = parser.parse_args(argv)
    args.images -= args.images % args.batch_size
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder:
        times = times_of(args, device, Path(folder))
        of_ranks = ranks_times(args, Path(folder))
    rows = {
        name: {
            "images_per_second": args.images * 1e3 / statistics.median(ms),
            "of_compiled": median_ratio(times, name, COMPILED),
            "of_eager": median_ratio(times, name, EAGER),
            "rounds_ms": ms,
        }
        for name, ms in times.items()
    }
    settings = {name: getattr(args, name) for name in ("teacher", "image_size", "batch_size", "images", "rounds")}
    settings |= {"precision": "bf16" if gpu else "fp32", "default": row("on" if gpu else "off"), "target": TARGET}
    one, images = RANKS[0], VIEWS * args.images + args.batch_size
    ranks = {
        str(number): {
            "images_per_second": images * 1e3 / statistics.median(ms),
            "of_one_rank": statistics.median(a / b for a, b in zip(of_ranks[one], ms, strict=True)),
            "rounds_ms": ms,
        }
        for number, ms in of_ranks.items()
        if ms
    }
    result = {**settings, "rows": rows, "ranks": {"views": VIEWS, "threads": 1, "rows": ranks}}
    write_record(f"precompute_{'gpu' if gpu else 'cpu'}", result, args.out)
    cells = [
        [name, f"{r['images_per_second']:,.0f}", f"{r['of_compiled']:.3f}", f"{r['of_eager']:.3f}"]
        for name, r in rows.items()
    ]
    print(markdown_table(["", "images/s", "of the compiled forward", "of the eager forward"], cells))
    cells = [[name, f"{r['images_per_second']:,.0f}", f"{r['of_one_rank']:.2f}"] for name, r in ranks.items()]
    print(f"\n{markdown_table(['ranks of one thread', 'images/s', 'of one rank'], cells)}")


if __name__ == "__main__":
    main()
