"""Estimate the time of an epoch and a whole training run on ImageNet from the three rates that can limit them.

    python -m bench.epoch                       writes bench/results/epoch_{cpu,gpu}.json

Extrapolated, not trained: 1,281,167 images divided by the rates of the step (OFA-KD from cached predictions), of the
loader, and of the teacher, which fills the cache with one view per epoch. Rates are read from records in bench/results/
if these match this student, teacher, image size and machine; the others are measured briefly. The teacher is the
program that `precompute` runs on this device by default. Processes and threads load images while the device computes,
so the slower of the two decides; pipeline `resident` runs on the device itself, so their times add up. Evaluation is
left out, and so are drawing and writing the views of the cache.
"""

import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.bench_precompute import write_teacher
from bench.lib import command_line, loader_step
from bench.lib.record import RESULTS, markdown_table, read_record, write_record
from bench.lib.steps import TOPK, Job, StepOptions, official_step, our_step
from bench.lib.timing import interleaved_ms
from fastofa.pipelines import PIPELINES, open_pipeline
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.system.device import choose_bf16, choose_compile, choose_workers
from fastofa.system.environment import environment
from fastofa.teacher.compiled_teacher import TopKProgram
from fastofa.teacher.model import open_teacher
from fastofa.training.schedule import image_size

IMAGES = 1_281_167
TEACHER_SIZE = 224
CONFIGS = (("imagenet_cnn", 224), ("imagenet_fast", 192))  # recipe, its full image size
BASELINE = "official code"


@dataclass(frozen=True)
class Rates:
    """Images per second, by image size; `source`: whether each was measured here or read from a record."""

    step: dict[int, float]
    official: dict[int, float]
    teacher: float
    loader: dict[int, float]
    rounds_ms: dict[str, list[float]]
    source: dict[str, str]


def from_records(folder: Path, kind: str, job: Job) -> dict[str, Any] | None:
    """The result of this machine's record, or None."""
    path = folder / f"{kind}_{'gpu' if job.device.type == 'cuda' else 'cpu'}.json"
    if not path.exists():
        return None
    record = read_record(path)
    here = environment()
    same = all(record["environment"].get(name) == here[name] for name in ("cpu", "cores", "gpu", "torch"))
    return record["result"] if same else None


def ladder_rates(folder: Path, job: Job) -> dict[str, float]:
    """Images per second of each row of the ladder for this student, teacher and size."""
    record = from_records(folder, "train", job)
    if record is None or record["image_size"] != job.image_size or record["batch_size"] != job.batch_size:
        return {}
    return {
        row["row"]: row["images_per_second"]
        for found in record["jobs"]
        if (found["student"], found["teacher"]) == (job.student, job.teacher)
        for row in found["rows"]
        if "step_ms" in row
    }


def loader_rates(folder: Path, job: Job, pipeline: str, sizes: list[int], calls: int) -> tuple[dict[int, float], str]:
    record = from_records(folder, "loaders", job)
    rows, workers = record["rows"] if record else [], choose_workers(None)
    fitting = [row for row in rows if (row["pipeline"], row["workers"]) == (pipeline, workers)]
    known = {row["image_size"]: row["images_per_second"] for row in fitting}
    if set(sizes) <= known.keys():
        return {size: known[size] for size in sizes}, "record"
    with tempfile.TemporaryDirectory() as temporary:
        dataset = loader_step.open_source(pipeline, Path(temporary), 4 * job.batch_size)
        found = {}
        for size in sizes:
            opened = open_pipeline(pipeline, dataset, size, job.batch_size, job.device, workers)
            ready = loader_step.made_ahead(pipeline, workers)
            found[size] = loader_step.rate(opened, dataset, job.device, ready, calls)
    return found, "measured here"


def measure(job: Job, sizes: list[int], pipeline: str, records: Path, rounds: int, calls: int) -> Rates:
    gpu = job.device.type == "cuda"
    options = StepOptions(precision="bf16", compile="on") if gpu else StepOptions()
    known = {size: ladder_rates(records, replace(job, image_size=size)) for size in sizes}
    steps: dict[str, Any] = {}
    for size in sizes:
        sized = replace(job, image_size=size)
        if "+ cached teacher" not in known[size]:
            steps[f"step {size}"] = our_step(sized, options)
        if "official code, fp32" not in known[size]:
            steps[f"official {size}"] = official_step(sized)
    program, images = teacher_program(job), replace(job, image_size=TEACHER_SIZE).batch().images
    steps["teacher"] = lambda: program(images)
    times = interleaved_ms(steps, job.device, rounds, calls)

    def rate(name: str, row: str, size: int) -> float:
        measured = times.get(f"{name} {size}")
        return job.batch_size * 1e3 / statistics.median(measured) if measured else known[size][row]

    loader, loader_source = loader_rates(records, job, pipeline, sizes, calls)
    return Rates(
        step={size: rate("step", "+ cached teacher", size) for size in sizes},
        official={size: rate("official", "official code, fp32", size) for size in sizes},
        teacher=job.batch_size * 1e3 / statistics.median(times["teacher"]),
        loader=loader,
        rounds_ms=times,
        source={
            **{f"step {size}": "measured here" if f"step {size}" in times else "record" for size in sizes},
            "teacher": "measured here",
            "loader": loader_source,
        },
    )


def teacher_program(job: Job) -> TopKProgram:
    """What `precompute` runs for a batch with its default precision and compilation; with random weights."""
    classes = tuple(map(str, range(job.num_classes)))
    with tempfile.TemporaryDirectory() as folder:
        path = write_teacher(job.teacher, TEACHER_SIZE, classes, Path(folder))
        teacher = open_teacher(path, classes, device=job.device, bf16=choose_bf16("auto", job.device))
    return TopKProgram(teacher, TOPK, job.batch_size, choose_compile("auto", job.device))


def together(step: float, loader: float, pipeline: str) -> float:
    """Images per second of a step together with its loader."""
    return 1 / (1 / step + 1 / loader) if pipeline == "resident" else min(step, loader)


def extrapolate(config: TrainConfig, full: int, rates: Rates, pipeline: str) -> dict[str, Any]:
    """The result for one recipe: its epochs by image size, the cache that it needs, and what takes longest."""
    sizes = Counter(image_size(config, epoch, full) for epoch in range(config.epochs))
    epochs: list[dict[str, Any]] = []
    limits: Counter[str] = Counter()
    for size, count in sorted(sizes.items()):
        step, loader = rates.step[size], rates.loader[size]
        seconds = IMAGES / together(step, loader, pipeline)
        limit = "step" if step <= loader else "loader"
        limits[limit] += round(count * seconds)
        official = IMAGES / min(rates.official[size], loader)
        epochs.append(
            {
                "image_size": size,
                "epochs": count,
                "step_images_per_second": step,
                "loader_images_per_second": loader,
                "epoch_s": seconds,
                "limit": limit,
                "official_code_epoch_s": official,
            }
        )
    training = sum(e["epochs"] * e["epoch_s"] for e in epochs)
    precompute = config.epochs * IMAGES / together(rates.teacher, rates.loader[TEACHER_SIZE], pipeline)
    limits["precompute"] = round(precompute)
    return {
        "recipe": config.recipe,
        "epochs": epochs,
        "training_s": training,
        "precompute_s": precompute,
        "precompute_images_per_second": rates.teacher,
        "total_s": training + precompute,
        "official_code_s": sum(e["epochs"] * e["official_code_epoch_s"] for e in epochs),
        "limit": limits.most_common(1)[0][0],
    }


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h"


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    parser = command_line.parser(__doc__)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="deit_tiny_patch16_224")
    parser.add_argument("--pipeline", choices=PIPELINES, default="torchvision")
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=20 if gpu else 1, help="steps a round")
    parser.add_argument("--records", type=Path, default=RESULTS, help="folder of records to read")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    configs = {recipes.recipe(name)(data="synthetic", student=args.student, out=Path()): full for name, full in CONFIGS}
    sizes = {image_size(c, epoch, full) for c, full in configs.items() for epoch in range(c.epochs)} | {TEACHER_SIZE}
    job = Job(args.student, args.teacher, TEACHER_SIZE, args.batch_size, 1000, device)
    rates = measure(job, sorted(sizes), args.pipeline, args.records, args.rounds, args.calls)
    found = [extrapolate(config, full, rates, args.pipeline) for config, full in configs.items()]
    settings = {name: getattr(args, name) for name in ("student", "teacher", "pipeline", "batch_size", "rounds")}
    settings |= {"images": IMAGES, "baseline": BASELINE, "source": rates.source, "rounds_ms": rates.rounds_ms}
    write_record(f"epoch_{'gpu' if gpu else 'cpu'}", {**settings, "recipes": found}, args.out)
    rows = [
        [
            f"{r['recipe']}, {e['epochs']} epochs of {e['image_size']} px",
            f"{e['step_images_per_second']:,.0f}",
            f"{e['loader_images_per_second']:,.0f}",
            e["limit"],
            f"{e['epoch_s']:,.0f} s",
            f"{e['official_code_epoch_s']:,.0f} s",
        ]
        for r in found
        for e in r["epochs"]
    ]
    print(markdown_table(["", "step, images/s", "loader, images/s", "limit", "epoch", "official code's epoch"], rows))
    print()
    rows = [
        [
            r["recipe"],
            hours(r["training_s"]),
            f"{r['precompute_images_per_second']:,.0f}",
            hours(r["precompute_s"]),
            hours(r["total_s"]),
            r["limit"],
            hours(r["official_code_s"]),
        ]
        for r in found
    ]
    print(
        markdown_table(
            ["", "training", "teacher, images/s", "precompute, once", "both", "longest", "official code's training"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
