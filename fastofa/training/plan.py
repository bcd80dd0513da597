"""Estimate the hours and disk space of a training run from steps and a loader timed on this machine.

fastofa train --data photos --cache cache --student resnet18 --recipe imagenet_fast --out run --plan
"""

import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch

from fastofa.pipelines import Pipeline
from fastofa.runs.config import TrainConfig
from fastofa.system.progress import notice
from fastofa.training.distributed import connection_errors, join
from fastofa.training.epochs import Epoch, Epochs
from fastofa.training.job import open_job
from fastofa.training.schedule import image_size
from fastofa.training.step import Step
from fastofa.training.validate import logits_of

SECONDS = 3.0  # per measurement


@dataclass(frozen=True)
class Rates:
    """Images per second at one image size, all ranks together."""

    size: int
    epochs: int
    step: float
    """Images/s of the training step alone: the rate that the loader has to supply."""
    loader: float
    """Images/s of the pipeline alone."""


@dataclass(frozen=True)
class Plan:
    rates: list[Rates]
    images: int
    """Training images per epoch."""
    evaluated: int
    """Images in all evaluations together."""
    evaluation: float
    """Images/s of an evaluation."""
    run_bytes: int
    cache_bytes: int

    @property
    def seconds(self) -> float:
        training = sum(r.epochs * self.images / min(r.step, r.loader) for r in self.rates)
        return training + self.evaluated / self.evaluation


def measure(step: Step, pipeline: Pipeline, epochs: Epochs, val_images: int) -> Plan:
    """Time steps on training images of each size that the run will use. Changes the student; writes nothing."""
    config, full, first = step.config, step.student.image_size, epochs.load(0)
    rates = []
    compiles = " (the first one compiles, which can take minutes)" if step.compiled else ""
    for size, count in sorted(Counter(image_size(config, epoch, full) for epoch in range(config.epochs)).items()):
        _announce(step, f"timing training steps at {size} px{compiles}")
        step_rate = _step_rate(step, pipeline, first, size)
        _announce(step, f"timing the pipeline at {size} px")
        rates.append(Rates(size, count, step_rate, _loader_rate(step, pipeline, first, size)))
    _announce(step, "timing evaluation")
    evaluations = -(-config.epochs // config.eval_every)
    models = 1 if step.ema is None else 2  # weights and average are evaluated on the same images
    return Plan(
        rates=rates,
        images=len(first.order) * step.world.size,
        evaluated=evaluations * val_images * (2 if config.eval_flip else 1),
        evaluation=min(_evaluation_rate(step, pipeline, first) / models, rates[-1].loader),
        run_bytes=_run_bytes(step),
        cache_bytes=0 if epochs.cache is None else sum(f.stat().st_size for f in epochs.cache.path.iterdir()),
    )


def _announce(step: Step, activity: str) -> None:
    if step.world.is_main:
        notice(f"plan: {activity}")


def _step_rate(step: Step, pipeline: Pipeline, epoch: Epoch, size: int) -> float:
    with closing(pipeline.epoch(epoch.views, epoch.order, image_size=size)) as batches:
        parts = list(islice(batches, step.config.accumulate))
    lr = step.config.lr * 1e-3  # an untrained student may diverge at the full rate

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step(parts, epoch.targets, lr)
        step.sums.tolist()  # waits for the device
        return time.perf_counter() - began

    seconds(2)  # compiles, or lets cuDNN choose its algorithms
    steps = step.world.broadcast(_repetitions(seconds(1)))
    return steps * step.config.batch_size / seconds(steps)


def _loader_rate(step: Step, pipeline: Pipeline, epoch: Epoch, size: int) -> float:
    """The rate after the first batch, which waits for the workers to start."""
    with closing(pipeline.epoch(epoch.views, epoch.order, image_size=size)) as batches:
        next(batches)
        began, images = time.perf_counter(), 0
        for batch in batches:
            images += len(batch.labels)
            if time.perf_counter() - began > SECONDS:
                break
        seconds = time.perf_counter() - began
    if not images:  # there is only one batch: time it from the start
        began = time.perf_counter()
        images = sum(len(batch.labels) for batch in pipeline.epoch(epoch.views, epoch.order, image_size=size))
        seconds = time.perf_counter() - began
    return step.world.size * images / seconds


@torch.inference_mode()
def _evaluation_rate(step: Step, pipeline: Pipeline, epoch: Epoch) -> float:
    size = step.config.eval_size or step.student.image_size
    with closing(pipeline.epoch(epoch.views, epoch.order, image_size=size)) as batches:
        batch = next(batches)
    step.student.eval()

    compute = torch.compile(logits_of, fullgraph=True, dynamic=False) if step.compiled else logits_of

    def seconds(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            logits = compute(step.student.classify, batch.images, step.bf16, flip=False)
        logits.sum().item()  # waits for the device
        return time.perf_counter() - began

    seconds(1)
    calls = _repetitions(seconds(1))
    return step.world.size * calls * len(batch.labels) / seconds(calls)


def _repetitions(seconds: float) -> int:
    """Number of calls, 2 to 50, that take about SECONDS in total if one takes `seconds`."""
    return min(max(int(SECONDS / seconds), 2), 50)


def _run_bytes(step: Step) -> int:
    """Size of the checkpoints: weights, moving average, optimiser state (SGD one tensor per weight, others two)."""
    weights = sum(t.numel() * t.element_size() for t in step.student.state_dict().values())
    copies = 1 + (1 if "sgd" in step.config.optimizer else 2) + (step.ema is not None)
    return weights * (copies * step.config.keep + 1)


def plan(config: TrainConfig) -> tuple[Plan, TrainConfig] | None:
    """Estimate the cost of a run; writes nothing.

    Returns:
        The estimate and the configuration with the values chosen by dataset size; None on all ranks but the first.

    Raises:
        BadInput: as `train`.
    """
    with connection_errors():
        world = join(config.timeout_s)
        job = open_job(config, world)
        estimate = measure(job.step, job.train_pipeline, job.epochs, len(job.val_set))
        result = (estimate, job.config) if world.is_main else None
        del job
        world.leave()
    return result
