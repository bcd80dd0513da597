"""The ladder: images a second of one training job, a row per idea, beside the published code's way and two peers.

    python -m bench.bench_train                               a small ladder on a CPU
    python -m bench.bench_train --students resnet18 resnet50  on a GPU: 224 px, batch 256
    writes bench/results/train_{cpu,gpu}.json

Synthetic uint8 batches in device memory: what is measured is the step, not the loader.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import timm
import torch
import tyro
from rich.console import Console
from rich.table import Table
from timm.task import LogitDistillationTask
from torch import Tensor

from bench.record import write_record
from bench.timing import interleaved_ms, median_ratio
from fastofa import recipes
from fastofa.kernels import reference
from fastofa.losses import Objective
from fastofa.student import Student
from fastofa.teacher_cache import DeviceTargets, Targets, answers

TOPK = 16


@dataclass(frozen=True)
class Row:
    """One way to take the same step; each row of the ladder changes one thing."""

    name: str
    online_teacher: bool = False
    per_head_loss: bool = False
    """Each head's loss on its own, as softmax then log, fetched to the CPU at every step."""
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    exits: bool = True


LADDER = (
    Row("official way", online_teacher=True, per_head_loss=True),
    Row("official way, fp16 AMP", online_teacher=True, per_head_loss=True, precision="fp16"),
    Row("+ one loss, no syncs", online_teacher=True),
    Row("+ bf16", online_teacher=True, precision="bf16"),
    Row("+ channels-last", online_teacher=True, precision="bf16", channels_last=True),
    Row("+ compile", online_teacher=True, precision="bf16", channels_last=True, compile=True),
    Row("+ cached teacher", precision="bf16", channels_last=True, compile=True),
    Row("plain training", precision="bf16", channels_last=True, compile=True, exits=False),
)
TIMM = "timm, online logit distillation"


@dataclass(frozen=True)
class BenchConfig:
    """Images a second of a training step, idea by idea."""

    students: tuple[str, ...] = ("resnet18",)
    teachers: tuple[str, ...] = ("deit_tiny_patch16_224",)
    image_size: int | None = None
    """By default 224 on a GPU, 64 on a CPU."""
    batch_size: int | None = None
    """By default 256 on a GPU, 32 on a CPU."""
    num_classes: int = 1000
    rounds: int = 5
    calls: int | None = None
    """Steps a round; by default 20 on a GPU, 2 on a CPU."""


def make_step(row: Row, config: BenchConfig, student_name: str, teacher_name: str, device: torch.device) -> Any:
    """A training step on one synthetic batch: forward, loss, backward, update."""
    size, batch, classes = config.image_size, config.batch_size, config.num_classes
    assert size is not None
    assert batch is not None
    torch.manual_seed(0)
    settings = recipes.imagenet_cnn(data="", student=student_name, out=None, method="ofa" if row.exits else "scratch")
    teacher = timm.create_model(teacher_name, num_classes=classes, **_sized(teacher_name, size)).eval().to(device)
    student: Any = Student(student_name, classes, size, teacher.num_features, settings.exits).to(device)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    if row.channels_last:
        student, teacher = (model.to(memory_format=torch.channels_last) for model in (student, teacher))
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device=device)
    ids = torch.randperm(batch, device=device)
    table = DeviceTargets(*answers(torch.randn(batch, classes).log_softmax(dim=1), TOPK), device)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    objective = Objective(settings, device)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[row.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def ask(images: Tensor) -> Targets:
        with torch.no_grad(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            log_probs = teacher(student.normalize(images)).float().log_softmax(dim=1)
        every = torch.arange(classes, device=device, dtype=torch.int32).expand(batch, -1)
        return Targets(every, log_probs)

    def forward(images: Tensor, labels: Tensor, targets: Targets | None) -> Tensor:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = student(images)
        if not row.per_head_loss:
            return objective(logits, labels, targets)
        assert targets is not None
        one = torch.ones(1, device=device)
        heads = [
            reference.ofa_loss_dense(head[None].float(), labels, targets.log_probs.exp(), one)[0] for head in logits
        ]
        gt = torch.nn.functional.cross_entropy(logits[-1].float(), labels, label_smoothing=settings.smoothing)
        return torch.stack([gt + sum(heads), gt, *heads])

    if row.compile:
        forward, teacher = torch.compile(forward), torch.compile(teacher)

    def step() -> None:
        targets = ask(images) if row.online_teacher else table.lookup(ids) if row.exits else None
        parts = forward(images, labels, targets)
        scaler.scale(parts[0]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if row.per_head_loss:
            for part in parts:  # the published code fetches every loss at every step
                part.item()

    return step


def make_timm_step(config: BenchConfig, student_name: str, teacher_name: str, device: torch.device) -> Any:
    """timm's own distillation task (final logits only), bf16, channels-last, compiled."""
    size, batch, classes = config.image_size, config.batch_size, config.num_classes
    assert size is not None
    assert batch is not None
    torch.manual_seed(0)
    models = [timm.create_model(n, num_classes=classes, **_sized(n, size)) for n in (student_name, teacher_name)]
    student, teacher = (model.to(device, memory_format=torch.channels_last) for model in models)
    task: Any = LogitDistillationTask(student, teacher, torch.nn.CrossEntropyLoss(), device=device, verbose=False)
    task.train()
    task.compile()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device=device)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sized(name: str, size: int) -> dict[str, int]:
    config = timm.get_pretrained_cfg(name)
    return {"img_size": size} if config is not None and config.fixed_input_size else {}


def measure(config: BenchConfig, device: torch.device) -> list[dict[str, Any]]:
    """One record for each (student, teacher, row)."""
    found = []
    for student in config.students:
        for teacher in config.teachers:
            rows = [row for row in LADDER if row.precision != "fp16" or device.type == "cuda"]
            steps = {row.name: make_step(row, config, student, teacher, device) for row in rows}
            steps[TIMM] = make_timm_step(config, student, teacher, device)
            times = interleaved_ms(steps, device, config.rounds, config.calls or 1)
            for name in steps:
                ms = statistics.median(times[name])
                found.append(
                    {
                        "student": student,
                        "teacher": teacher,
                        "row": name,
                        "step_ms": ms,
                        "images_per_second": (config.batch_size or 0) / ms * 1e3,
                        "ratio_to_official_way": median_ratio(times, name, LADDER[0].name),
                        "rounds_ms": times[name],
                    }
                )
    return found


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = tyro.cli(BenchConfig, description=__doc__)
    defaults = (224, 256, 20) if device.type == "cuda" else (64, 32, 2)
    size, batch, calls = (
        given or default
        for given, default in zip((config.image_size, config.batch_size, config.calls), defaults, strict=True)
    )
    config = dataclasses.replace(config, image_size=size, batch_size=batch, calls=calls)
    found = measure(config, device)
    write_record("train_gpu" if device.type == "cuda" else "train_cpu", {**dataclasses.asdict(config), "rows": found})
    table = Table(title=f"{size} px, batch {batch}")
    for name in ("student", "teacher", "row", "ms", "images/s", "x official way"):
        table.add_column(name, justify="left" if name in ("student", "teacher", "row") else "right")
    for r in found:
        figures = (f"{r['step_ms']:.1f}", f"{r['images_per_second']:,.0f}", f"{r['ratio_to_official_way']:.2f}")
        table.add_row(r["student"], r["teacher"], r["row"], *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
