"""The implementations of one training step that the benchmarks compare: ours, the published code's, timm's.

Each builder returns a function without arguments that takes one step on a synthetic batch, forward to update.

Shapes: B batch, S image side, C classes, K classes kept of the teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import Tensor

from bench.lib.timing import wait
from fastofa.methods.targets import Targets
from fastofa.pipelines import Batch
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.student.model import Student
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.packed_rows import packed
from fastofa.training.step import Step

TOPK = 16
TakeStep = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """The models, sizes and device of a training job, the same for every implementation."""

    student: str
    teacher: str
    image_size: int
    batch_size: int
    num_classes: int
    device: torch.device

    def batch(self, channels_last: bool = True) -> Batch:
        """Random uint8 images and labels in device memory."""
        torch.manual_seed(0)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        labels = torch.randint(0, self.num_classes, (self.batch_size,), device=self.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        ids = torch.arange(self.batch_size, device=self.device)
        return Batch(images.contiguous(memory_format=layout), labels, ids, ids)

    def build_student(self, exits: tuple[int, ...]) -> Student:
        dim = self.build_teacher().num_features if exits else 0
        torch.manual_seed(0)
        return Student(self.student, self.num_classes, self.image_size, dim, exits)

    def build_teacher(self) -> Any:
        return self._model(self.teacher).eval().requires_grad_(False)

    def build_plain_student(self) -> Any:
        return self._model(self.student)

    def _model(self, name: str) -> Any:
        config = get_pretrained_cfg(name)
        torch.manual_seed(0)
        sized: dict[str, Any] = {"img_size": self.image_size} if config is not None and config.fixed_input_size else {}
        return timm.create_model(name, num_classes=self.num_classes, **sized)


@dataclass(frozen=True)
class StepOptions:
    """The options of `our_step`: flags of `fastofa train`, and two for which it has no flags."""

    method: Any = "ofa"
    precision: Any = "fp32"
    compile: Any = "off"
    cuda_graphs: Any = "off"
    kernels: Any = ()
    channels_last: bool = True
    online_teacher: bool = False


# --- Ours -------------------------------------------------------------------------------------------------------------


def our_config(job: Job, options: StepOptions) -> TrainConfig:
    """The published recipe of a CNN (SGD with momentum, label smoothing), for every student."""
    return recipes.imagenet_cnn(
        data="synthetic",
        student=job.student,
        out=Path(),
        batch_size=job.batch_size,
        method=options.method,
        precision=options.precision,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
        kernels=options.kernels,
    )


def open_step(job: Job, options: StepOptions) -> tuple[Step, Any]:
    """The Step of `fastofa train` and its targets, which are None for the method without a teacher."""
    config = our_config(job, options)
    step = Step(job.build_student(config.exits), config, job.device)
    if not options.channels_last:
        step.student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    step.student.train()
    if options.method == "scratch":
        return step, None
    if options.online_teacher:
        return step, OnlineTeacher(job, options)
    log_probs = torch.randn(job.batch_size, job.num_classes).log_softmax(dim=1)
    return step, DeviceTargets(packed(topk_targets(log_probs, min(TOPK, job.num_classes)), job.num_classes), job.device)


def our_step(job: Job, options: StepOptions) -> TakeStep:
    (step, targets), batch = open_step(job, options), job.batch(options.channels_last)
    return lambda: step([batch], targets, lr=0.1)


class OnlineTeacher:
    """Replaces the cached predictions: runs the teacher on the batch at every step."""

    def __init__(self, job: Job, options: StepOptions) -> None:
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        model = job.build_teacher().to(job.device, memory_format=layout)
        mean, std = (
            torch.tensor(model.pretrained_cfg[name], device=job.device).view(1, 3, 1, 1) for name in ("mean", "std")
        )
        self.images = job.batch(options.channels_last).images
        every = torch.arange(job.num_classes, dtype=torch.int32, device=job.device)
        self.classes = every.expand(job.batch_size, -1)

        def log_probs(images: Tensor) -> Tensor:
            with torch.autocast(job.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                logits = model((images.float() / 255 - mean) / std)
            return logits.float().log_softmax(dim=1)

        self.log_probs = torch.compile(log_probs) if options.compile == "on" else log_probs

    @torch.no_grad()
    def of(self, batch: Batch) -> Targets:
        return Targets(self.classes, self.log_probs(self.images))


# --- The published code's ---------------------------------------------------------------------------------------------


def official_step(job: Job, fp16: bool = False) -> TakeStep:
    """The step of the published train.py: eager, channels first, the teacher run at every step, a loss per head
    computed as a softmax and then its logarithm, every loss fetched to the CPU, a synchronisation at the end.

    It runs on today's PyTorch, with our exits, which equal the published ones.
    """
    student = job.build_student((1, 2, 3, 4)).to(job.device).train()
    teacher = job.build_teacher().to(job.device)
    batch = job.batch(channels_last=False)
    criterion = LabelSmoothingCrossEntropy(0.1)
    optimizer = create_optimizer_v2(student, opt="sgd", lr=0.1, weight_decay=1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(job.device.type, enabled=fp16)

    def head_loss(logits: Tensor, teacher_probs: Tensor, target: Tensor, eps: float) -> Tensor:
        weights = (teacher_probs + target) ** eps - target
        return -(weights * F.softmax(logits, dim=1).log()).sum(dim=1).mean()

    def step() -> list[float]:
        images = student.normalize(batch.images)  # its loader does this on the device
        with torch.autocast(job.device.type, torch.float16, enabled=fp16):
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            target = F.one_hot(batch.labels, job.num_classes)
            heads = [head_loss(head, F.softmax(teacher_logits, dim=1), target, 1.0) for head in logits]
            losses = [criterion(logits[-1], batch.labels), heads[-1], torch.stack(heads[:-1]).sum()]
            loss = torch.stack(losses).sum()
        fetched = [value.item() for value in (loss, *losses)]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        wait(job.device)
        return fetched

    return step


# --- timm's -----------------------------------------------------------------------------------------------------------


def timm_step(job: Job, precision: str) -> TakeStep:
    """timm's own distillation task in the fastest form of its train script: autocast, channels-last, compiled.

    The teacher runs at every step; only the final logits are distilled (no exits).
    """
    layout = {"device": job.device, "memory_format": torch.channels_last}
    student, teacher = job.build_plain_student().to(**layout), job.build_teacher().to(**layout)
    loss = LabelSmoothingCrossEntropy(0.1)
    task: Any = LogitDistillationTask(student, teacher, loss, device=job.device, verbose=False)
    task.train()
    task.compile()
    batch = job.batch()
    mean, std = (
        torch.tensor(student.pretrained_cfg[name], device=job.device).view(1, 3, 1, 1) for name in ("mean", "std")
    )
    optimizer = create_optimizer_v2(student, opt="sgd", lr=0.1, weight_decay=1e-4, momentum=0.9)

    def step() -> None:
        images = (batch.images.float() / 255 - mean) / std
        with torch.autocast(job.device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = task(images, batch.labels)["loss"]
        optimizer.zero_grad()
        found.backward()
        optimizer.step()

    return step
