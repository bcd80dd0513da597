"""The training loop: steps, logging, evaluation, checkpoints.

What it works on is built in job.py.
"""

import dataclasses
import math
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from fastofa.methods.find_method import file_digests
from fastofa.pipelines import Batch
from fastofa.runs.config import TrainConfig
from fastofa.runs.log import MetricsLog, read_metrics
from fastofa.runs.run import CONFIG, log_launch
from fastofa.system.errors import BadInput
from fastofa.system.files import filling
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.system.progress import progress_bar
from fastofa.training import rank_checkpoints
from fastofa.training.background_writer import Writer
from fastofa.training.clock import Clock
from fastofa.training.compile_notice import compiling
from fastofa.training.distributed import Vote, World, check_shared, connection_errors, join, was_restarted
from fastofa.training.divergence import diverged
from fastofa.training.evaluate_in_training import Evaluations
from fastofa.training.job import Job, open_job
from fastofa.training.live_report import LiveReport
from fastofa.training.schedule import image_size, learning_rate


@dataclass(frozen=True)
class Result:
    """The result of a finished run."""

    top1: float
    """Fraction of the validation images, 0 to 1, at the last evaluation; the same applies to top5."""
    top5: float
    images_per_second: float
    """Throughput of the training steps alone, without evaluation."""
    seconds: float
    """Duration of the whole call."""


def train(config: TrainConfig) -> Result:
    """Train a student, or resume its run if `config.resume`. Under torchrun, this process is one of several ranks.

    Raises:
        BadInput: the configuration, data and machine do not fit together (checked before anything is written), or the
            loss is no longer finite.
        Stopped: after Ctrl-C or SIGTERM on any rank, once a checkpoint is saved.
        LostContact: another rank is gone.
    """
    began = time.monotonic()
    with connection_errors():
        world = join(config.timeout_s)
        resume = config.resume or was_restarted()
        config = dataclasses.replace(config, resume=bool(world.broadcast(int(resume))))  # restart counts may differ
        with filling(config.out) if world.is_main else nullcontext():
            result = _train(config, world)
        world.leave()
    return dataclasses.replace(result, seconds=time.monotonic() - began)


def _train(config: TrainConfig, world: World) -> Result:
    job = open_job(config, world)
    job.load()
    if world.is_main:
        job.begin()
    world.barrier()
    check_shared(world, (job.run.path / CONFIG).exists(), str(job.run.path / CONFIG))
    job.announce(config)
    loop = Loop(job)
    loop.run_epochs()
    return loop.result()


class Loop:
    """The training loop over the epochs of a job."""

    def __init__(self, job: Job) -> None:
        self.job, self.run, self.config, self.step = job, job.run, job.config, job.step
        self.epochs, self.world, self.last_step = job.epochs, job.world, job.last_step
        self.vote = Vote(job.world)
        self.report = LiveReport(job.run.path)
        self.sizes_seen: set[int] = set()
        self.loading: Generator[Batch, None, None] | None = None
        self.epoch_began: float | None = None
        """When the current epoch began; None if it was not run from its beginning."""
        self.clock = Clock()
        self.logged = Clock()  # its state at the last log

    def run_epochs(self) -> None:
        c, main = self.config, self.world.is_main
        first, position = divmod(self.step.steps, self.epochs.steps)
        if main:
            records = self.step.kernels.record(), file_digests(c.methods)
            pixels = self.job.pixels and self.job.pixels.mean
            log_launch(self.run.path, self.step.steps, self.world.size, pixels, *records)
        self.evaluate = Evaluations(self.run, self.step, self.job.val_pipeline, self.job.val_set)
        self.log = MetricsLog(self.run.path, self.step.steps, self.job.wandb_run) if main else None
        rows = read_metrics(self.run.path, self.step.steps) if main else []
        logged = any(row["kind"] == "epoch" and row["step"] == self.step.steps for row in rows)
        # The checkpoint at an epoch's end is saved before the evaluation: a run that stopped in between evaluates now.
        unlogged = bool(self.world.broadcast(int(position == 0 and first > 0 and not logged)))
        log: Any = closing(self.log) if self.log else nullcontext()
        with Interrupt() as self.interrupt, progress_bar(enabled=main) as self.bar, log, Writer() as self.writer:
            self.task = self.bar.add_task(
                f"train {c.student}",
                total=self.last_step * c.batch_size,
                completed=self.step.steps * c.batch_size,
                note="",
            )
            try:
                if unlogged:
                    self._log_epoch(first - 1)
                for epoch in range(first, c.epochs):
                    self._epoch(epoch, position)
                    position = 0
                self.vote.finish()
            finally:
                if self.loading is not None:
                    self.loading.close()
        self.world.barrier()

    def _epoch(self, epoch: int, position: int) -> None:
        c = self.config
        if position == 0:
            self.epoch_began = self.epoch_began or time.monotonic()
        data = self.epochs.load(epoch)
        self.step.student.train()
        size = image_size(c, epoch, self.step.student.image_size)
        batches = self.loading = self.job.train_pipeline.epoch(
            data.views, data.order, start=position * self.epochs.rank_batch_size, image_size=size
        )
        before = dataclasses.replace(self.clock)
        self.clock.start()
        while parts := self.clock.timed_wait(lambda: list(islice(batches, c.accumulate))):
            first = size not in self.sizes_seen  # this step compiles or selects algorithms: not timed
            with compiling(self.step, f"training step at {size} px") if first else nullcontext():
                self.step(parts, data.targets, learning_rate(c, self.step.steps, self.epochs.steps))
                self.clock.steps += 1
                if first:
                    self.sizes_seen.add(size)
                    self.step.sums.tolist()  # waits for the device
                    self.clock = before
                    self.clock.start()
            self.bar.advance(self.task, c.batch_size)
            self._after_step(epoch)

    def _after_step(self, epoch: int) -> None:
        """Log, save, stop and evaluate if due at this step, while the clock is stopped. All ranks decide the same.

        The checkpoint is saved before the evaluation, so that the step is not lost if the evaluation fails or takes
        longer than a cluster waits between SIGTERM and SIGKILL, and so that only finite weights are evaluated.
        """
        c, step = self.config, self.step.steps
        log, end, save = step % c.log_every == 0, step % self.epochs.steps == 0, step % c.checkpoint_every == 0
        stop = self.vote(self.interrupt.signum or 0)
        self.writer.check()
        if not (log or end or save or stop):
            return
        each = self.world.gather(self.step.sums).tolist()  # waits for the device
        sums = rank_checkpoints.means(each)
        self.clock.stop()
        if not all(map(math.isfinite, sums)):
            self.writer.wait()
            what = "the gradient is" if all(map(math.isfinite, sums[:-1])) else "the loss is"
            raise diverged(self.run.path, self.step, what)
        if log:
            self._log_step(epoch, [value / self.step.summed for value in sums])
            self.step.reset_sums()
            each = [[0.0] * len(row) for row in each]
        scheduled = save or (end and self._is_evaluated(epoch))
        if scheduled or stop:
            rank_checkpoints.save(self.run.path, self.step, each, scheduled, self.writer)
        if stop and step < self.last_step:
            self.vote.finish()
            if self.log:
                self.report.write(self.writer)
            self.writer.wait()
            self.world.barrier()  # the first rank to exit would make the others fail
            raise Stopped(
                f"saved step {step} of {self.last_step} in {self.run.path}; run the same command with --resume to "
                "continue",
                stop,
            )
        if end:
            self._log_epoch(epoch)
        self.clock.start()

    def _is_evaluated(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs

    def _log_step(self, epoch: int, means: list[float]) -> None:
        if not self.log:
            return
        lr = self.step.optimizer.param_groups[0]["lr"]
        losses = dict(zip(self.step.names, means, strict=True))
        values = {"epoch": epoch, "lr": lr, **losses, **self._speed(since=self.logged)}
        self.logged = dataclasses.replace(self.clock)
        self.writer(partial(self.log.add, "step", self.step.steps, values))
        parts = " ".join(f"{name} {values[name]:.3g}" for name in self.step.names[1:-1])
        self.bar.update(
            self.task, note=f"epoch {epoch + 1}/{self.config.epochs} loss {means[0]:.4g} ({parts}) lr {lr:.2g}"
        )

    def _log_epoch(self, epoch: int) -> None:
        c = self.config
        values: dict[str, Any] = {"epoch": epoch, **self._speed(since=Clock())}
        if self._is_evaluated(epoch):
            began = time.monotonic()
            values |= self.evaluate(epoch, self.writer)
            values["eval_seconds"] = time.monotonic() - began
        ended = time.monotonic()
        if self.epoch_began is not None:
            values["epoch_seconds"] = ended - self.epoch_began
        self.epoch_began = ended  # the next epoch begins
        top1 = f" top-1 {values['top1']:.2%}" if "top1" in values else ""
        self.bar.done(self.task, f"epoch {epoch + 1}/{c.epochs}{top1}")
        if self.log:
            self.writer(partial(self.log.add, "epoch", self.step.steps, values))
            if self.report.is_due() or self.step.steps == self.last_step:
                self.report.write(self.writer)

    def _speed(self, since: Clock) -> dict[str, float]:
        """Speed of the training steps counted since a reading of the clock; empty if there were none."""
        steps, seconds = self.clock.steps - since.steps, self.clock.seconds - since.seconds
        if not steps:
            return {}
        waited = self.clock.waited - since.waited
        return {"images_per_second": steps * self.config.batch_size / seconds, "loader_share": waited / seconds}

    def result(self) -> Result:
        """The result according to the log, so that resuming a finished run returns it again."""
        evaluated = [row for row in read_metrics(self.run.path) if "top1" in row]
        if not evaluated:
            raise BadInput(
                f"{self.run.path}: expected evaluations in metrics.jsonl, found none; the file was edited, restore it"
            )
        last = evaluated[-1]
        return Result(last["top1"], last["top5"], last.get("images_per_second", 0.0), 0.0)
