"""Time whole epochs as a user runs them: write a pack, precompute a cache, train and evaluate, with fastofa's code.

    python -m bench.bench_run        writes bench/results/run_{cpu,gpu}.json
                                     GPU: ResNet-18 with exits, 200,000 images of 160 px, 3 epochs (needs 16 GB of disk)
                                     CPU: a tiny student on 512 images of 32 px

An epoch's seconds are those from its start to the start of the next: training steps, waiting for the loader, logging,
checkpoints and evaluation. The first epoch also compiles. The baseline is the bare step on one batch that stays in
device memory, timed in the same process after the run. The images are synthetic photographs (64 different ones,
repeated), so accuracies mean nothing. The teacher has random weights.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from bench.lib import command_line
from bench.lib.photographs import CLASSES, in_memory
from bench.lib.record import markdown_table, write_record
from bench.lib.steps import Job, StepOptions, our_step
from bench.lib.timing import interleaved_ms
from bench.lib.turns import wait_for_turn
from fastofa.data.write import write_pack
from fastofa.data.write_config import WriteConfig
from fastofa.runs import recipes
from fastofa.runs.log import read_metrics
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train


def write_images(pack: Path, count: int, side: int) -> None:
    """Write a pack of `count` training images, and a twentieth as many for validation."""
    sources = [in_memory(count, side), in_memory(max(count // 20, CLASSES), side, "val")]
    write_pack(WriteConfig("photographs", pack, size=side), sources)


def save_teacher(folder: Path, name: str, side: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    save_for_hf(model, str(folder), safe_serialization=True, data_config={"input_size": (3, side, side)})


def run_product(folder: Path, args: Any, count: int, epochs: int) -> dict[str, Any]:
    """Write, precompute and train in FOLDER; the seconds of each, and what the run logged for each epoch."""
    folder.mkdir()
    pack, cache, run = folder / "images.pack", folder / "cache", folder / "run"
    clock = [time.perf_counter()]
    write_images(pack, count, args.image_size)
    clock.append(time.perf_counter())
    teacher = str(folder.parent / "teacher")
    precompute(PrecomputeConfig(str(pack), teacher, cache, views=1, topk=min(16, CLASSES), batch_size=args.batch_size))
    clock.append(time.perf_counter())
    train(
        recipes.imagenet_cnn(
            data=str(pack),
            student=args.student,
            cache=cache,
            out=run,
            epochs=epochs,
            warmup_epochs=0,
            batch_size=args.batch_size,
            image_size=args.image_size,
        )
    )
    clock.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in itertools.pairwise(clock)]
    return {
        **dict(zip(("write_s", "precompute_s", "train_s"), seconds, strict=True)),
        "logged": [row for row in read_metrics(run) if row["kind"] == "epoch"],
    }


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = command_line.parser(__doc__)
    parser.add_argument("--student", default="resnet18" if gpu else "test_resnet")
    parser.add_argument("--teacher", default="resnet50" if gpu else "test_resnet")
    parser.add_argument("--images", type=int, default=200_000 if gpu else 512)
    parser.add_argument("--image-size", type=int, default=160 if gpu else 32)
    parser.add_argument("--batch-size", type=int, default=1024 if gpu else 32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=8, help="steps a round, of the bare step")
    parser.add_argument("--folder", type=Path, help="where the images are written; by default the temporary folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        save_teacher(Path(temporary) / "teacher", args.teacher, args.image_size)
        if gpu:  # compile once at the same shapes, before the measurement
            run_product(Path(temporary) / "warm", args, 4 * args.batch_size, epochs=1)
        wait_for_turn()
        result = run_product(Path(temporary) / "measured", args, args.images, args.epochs)
    job = Job(args.student, args.teacher, args.image_size, args.batch_size, CLASSES, device)
    options = StepOptions(precision="auto", compile="auto", kernels=("auto",))
    times = interleaved_ms({"bare step": our_step(job, options)}, device, args.rounds, args.calls)
    bare = args.batch_size * 1e3 / statistics.median(times["bare step"])
    for epoch in result["logged"]:
        epoch["share_of_bare_step"] = args.images / epoch["epoch_seconds"] / bare
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "folder")}
    result |= {**settings, "bare_images_per_second": bare, "rounds_ms": times, "baseline": "bare step"}
    write_record(f"run_{'gpu' if gpu else 'cpu'}", result, args.out)
    header = [
        "epoch",
        "seconds",
        "evaluation, s",
        "images/s of the steps",
        "waiting",
        "images/s of the epoch / bare step",
    ]
    rows = [
        [
            f"{epoch['epoch'] + 1}",
            f"{epoch['epoch_seconds']:.1f}",
            f"{epoch['eval_seconds']:.1f}",
            f"{epoch['images_per_second']:,.0f}",
            f"{epoch['loader_share']:.0%}",
            f"{epoch['share_of_bare_step']:.2f}",
        ]
        for epoch in result["logged"]
    ]
    print(markdown_table(header, rows))
    print(
        f"writing {result['write_s']:.1f} s, precompute {result['precompute_s']:.1f} s "
        f"({args.images / result['precompute_s']:,.0f} images/s), training {result['train_s']:.1f} s; "
        f"bare step {bare:,.0f} images/s"
    )


if __name__ == "__main__":
    main()
