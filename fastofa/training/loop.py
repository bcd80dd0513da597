"""The training loop: epochs, logging, evaluation, checkpoints.

The step is in step.py, the data of an epoch in epochs.py, the checks before a run in preflight.py.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.kernels.comparison import Chooses
from fastofa.methods.find_method import file_digests, needs_of
from fastofa.methods.method import Sizes
from fastofa.models.normalized import in_words
from fastofa.pipelines import Batch, open_pipeline
from fastofa.reports.curves import draw_curves, import_plotting
from fastofa.reports.metrics import measure
from fastofa.reports.page import write_report
from fastofa.runs import checkpoint
from fastofa.runs.config import SIZED, TrainConfig
from fastofa.runs.log import MetricsLog, open_wandb, read_metrics
from fastofa.runs.predictions import save_predictions
from fastofa.runs.recipes import augmentation_differences
from fastofa.runs.run import CONFIG, KERNELS, Run, log_launch, open_run, recorded
from fastofa.student.choose_kernels import measures_kernels
from fastofa.student.stages import channels
from fastofa.system.device import choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import filling
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.system.progress import notice, progress_bar
from fastofa.system.urls import is_url
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.fidelity import FIDELITY, read_fidelity, write_fidelity
from fastofa.teacher.online import open_online_teacher
from fastofa.teacher.reference_images import IMAGES, Difference, compare_teacher_images
from fastofa.training.background_writer import Writer
from fastofa.training.clock import Clock
from fastofa.training.distributed import (
    Vote,
    World,
    check_same,
    check_shared,
    connection_errors,
    join,
    statistics,
    was_restarted,
)
from fastofa.training.epochs import Epochs
from fastofa.training.preflight import (
    check_early,
    check_resumable,
    choose_order,
    spread_notice,
    views_begun_with,
    with_own_evaluation,
    with_own_options,
)
from fastofa.training.schedule import cautions, image_size, learning_rate, lengthened, summary
from fastofa.training.step import Step
from fastofa.training.try_methods import try_methods
from fastofa.training.validate import best_classes_each

BatchNorm = torch.nn.modules.batchnorm._BatchNorm
REPORT_EVERY_S = 60  # minimum number of seconds between two reports during a run


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
    if world.is_main:
        notice(summary(job.config, job.epochs.steps))
        chosen = [name for name in SIZED if getattr(config, name) is None]
        if chosen:
            flags = " ".join(f"--{name.replace('_', '-')} {getattr(job.config, name):g}" for name in chosen)
            notice(f"chosen by the number of training images: {flags}")
        notice(job.normalization())
        if job.epochs.teacher is not None:
            notice(job.epochs.teacher.describe(job.step.student.image_size))
        if line := job.step.kernels.line():
            notice(line)
        for caution in cautions(job.config, job.epochs.steps):
            notice(caution)
    if job.pixels is not None:
        notice(f"pixels of {IMAGES} images, compared with {config.cache}: {job.pixels}")
    if job.spread:
        notice(job.spread)
    if world.is_main and (missing := augmentation_differences(config.recipe, job.epochs.policy)):
        notice(f"recipe {config.recipe}: its published views have {missing}; precompute --recipe draws such views")
    job.run_epochs()
    return job.result()


def open_job(config: TrainConfig, world: World) -> "Job":
    """Build and check everything that a run needs, without writing anything."""
    device, cache = check_early(config, world)
    if config.resume and (config.out / CONFIG).exists():  # keep the values chosen by dataset size
        begun = open_run(config.out).config
        unset = [name for name in SIZED if getattr(config, name) is None]
        config = dataclasses.replace(config, **{name: getattr(begun, name) for name in unset})
    with world.no_timeout():  # opening a folder for the first time opens every image
        train_set, val_set = (
            open_dataset(config.data, split, config.skip_corrupt, limits=config.limits()) for split in ("train", "val")
        )
    config = dataclasses.replace(config, order=choose_order(config, train_set, world))
    config = with_own_options(with_own_evaluation(config))
    online = open_online_teacher(config, train_set.classes, device)
    epochs = Epochs(config, train_set, world, device, cache, views_begun_with(config, world), online)
    config = epochs.config
    data, val, pages = train_set.fingerprint, val_set.fingerprint, epochs.pages_fingerprint
    teacher = None if online is None else online.teacher.describe()
    run = Run(config.out, config, train_set.classes, epochs.teacher_dim, data, epochs.view_digests, val, pages, teacher)
    views = hashlib.sha256("".join(epochs.view_digests).encode()).hexdigest()
    methods = hashlib.sha256("".join(file_digests(config.methods).values()).encode()).hexdigest()
    for digest, name in (
        (methods, f"the files of --method {config.method}"),
        (data, config.data),
        (val, f"the validation images of {config.data}"),
        (pages, f"the pages of {config.data}"),
        (views, f"the {counted(len(epochs.view_digests), 'view')} of {config.cache}"),
        ("" if teacher is None else teacher["sha256"], f"the weights of {config.online_teacher}"),
    ):
        check_same(world, digest, name)
    if world.is_main and not config.plan:
        check_resumable(run)
    world.barrier()
    return Job(run, train_set, val_set, epochs, world, device)


class Job:
    """The objects of a run, built once, and the training loop."""

    def __init__(
        self, run: Run, train_set: Dataset, val_set: Dataset, epochs: Epochs, world: World, device: torch.device
    ) -> None:
        c = self.config = run.config
        self.run, self.val_set, self.epochs, self.world, self.device = run, val_set, epochs, world, device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(c.seed)
        student = run.build_student(None if c.resume and checkpoint.checkpoints(run.path) else c.init)
        needs = needs_of(c.methods)
        needs_pooled = "pooled vector" in needs
        sizes = Sizes(
            len(train_set.classes),
            student.pooled_dim() if needs_pooled else 0,
            epochs.pooled_dim,
            tuple(np.bincount(train_set.labels, minlength=len(train_set.classes)).tolist()),
            channels(student.find_stages()) if "stage features" in needs else {},
            {} if epochs.teacher is None else channels(epochs.teacher.stages),
        )
        kernels = recorded(run.path, KERNELS) if c.resume else None
        self.step = Step(student, c, self.device, world, sizes, kernels)
        self.last_step = c.epochs * epochs.steps
        full = student.image_size
        workers = choose_workers(c.workers, world.local_size)
        part = epochs.rank_batch_size // c.accumulate
        self.train_pipeline, self.val_pipeline = (
            open_pipeline(c.pipeline, data, size, batch_size, self.device, workers)
            for data, size, batch_size in (
                (train_set, full, part),
                (val_set, c.eval_size or full, self._eval_batch_size(part)),
            )
        )
        if measures_kernels(c.kernels, self.device) and isinstance(self.train_pipeline, Chooses):
            found = self.train_pipeline.comparisons()
            self.step.kernels.choose((self.train_pipeline, *each) for each in found.items())
        needs_two = any(isinstance(m, BatchNorm) for m in student.modules())
        if epochs.rank_batch_size == c.accumulate and (needs_two or needs_pooled):
            reason = f"{c.student} has batch norm" if needs_two else f"{c.method} compares images"
            raise BadInput(
                f"batch-size: expected at least two images in each part of a step, because {reason}, got one; raise "
                "--batch-size or lower --accumulate"
            )
        if c.start_size is not None and c.start_size > full:
            raise BadInput(f"start-size: expected at most the full {full} pixels, got {c.start_size}")
        student.check_sizes([image_size(c, epoch, full) for epoch in range(c.epochs)] + [c.eval_size or full])
        self.vote = Vote(world)
        self.reported = time.monotonic()
        self.sizes_seen: set[int] = set()
        self.loading: Generator[Batch, None, None] | None = None
        self.pixels: Difference | None = None
        self.spread = ""
        self.wandb_run: Any = None
        self.report_failed = False
        self.evaluated_before = False
        self.epoch_began: float | None = None
        """When the current epoch began; None if it was not run from its beginning."""
        self.clock = Clock()
        self.logged = Clock()  # its state at the last log

    def _eval_batch_size(self, part: int) -> int:
        """On a GPU twice the images of a part of a step, since evaluation keeps no activations; at most all images."""
        share = -(-len(self.val_set) // self.world.size)
        return min(2 * part, max(share, 1)) if self.device.type == "cuda" else part

    def load(self) -> None:
        """Load the newest checkpoint, the first epoch and some images, so that corruption is reported before anything
        is written."""
        if self.config.resume and checkpoint.checkpoints(self.run.path):
            self._restore()
        elif self.config.resume and self.world.is_main:
            notice(f"{self.run.path}: no checkpoint yet, starting from the beginning")
        if self.config.init is not None and not self.step.is_finite():
            raise BadInput(f"{self.config.init}: expected finite weights, got NaN or infinity; give another --init")
        if self.step.steps < self.last_step:
            try_methods(self.step, self.train_pipeline, self.epochs.load(self.step.steps // self.epochs.steps))
        if self.world.is_main and (cache := self.epochs.cache) is not None:
            table = cache.table(0)
            self.pixels = compare_teacher_images(cache.path, self.train_pipeline, table.views)
            if self.pixels is not None and self.config.allow_mismatch != "pixels":
                self.pixels.check(cache.path, self.config.data)
            self.spread = spread_notice(self.config.methods, cache, table)

    def normalization(self) -> str:
        """One line with the normalisation of the student's input and, with a teacher, of the teacher's."""
        student = self.step.student
        line = f"normalisation: student {in_words(student.mean.flatten().tolist(), student.std.flatten().tolist())}"
        return "; ".join([line, *(f"teacher {in_words(t['mean'], t['std'])}" for t in self.epochs.teacher_headers)])

    def begin(self) -> None:
        """Write the run's configuration, once everything has been checked. It is the first file written."""
        c, folder = self.config, self.run.path
        if c.resume and (folder / CONFIG).exists() and (before := open_run(folder).config).epochs < c.epochs:
            notice(lengthened(before, c, self.step.steps, self.epochs.steps, self.step.student.image_size))
        if c.wandb is not None:
            self.wandb_run = open_wandb(folder, c.wandb)
        self.run.save()
        if self.epochs.cache is not None and is_url(str(c.cache)):
            self._keep_fidelity(self.epochs.cache)

    def _keep_fidelity(self, cache: TeacherCache) -> None:
        """Keep the fidelity of a cache at a URL for the report, since the local copy is removed with the process."""
        fidelity = None
        try:
            fidelity = read_fidelity(cache.path, cache.header)
        except BadInput as error:
            notice(str(error).replace(str(cache.path), str(self.config.cache)))
        if fidelity is None:
            (self.run.path / FIDELITY).unlink(missing_ok=True)
        else:
            write_fidelity(self.run.path, cache.header, fidelity)

    def run_epochs(self) -> None:
        c, main = self.config, self.world.is_main
        first, position = divmod(self.step.steps, self.epochs.steps)
        if main:
            records = self.step.kernels.record(), file_digests(c.methods)
            log_launch(self.run.path, self.step.steps, self.world.size, self.pixels and self.pixels.mean, *records)
            self.best = {
                file: checkpoint.best_top1(self.run.path, self.step.steps, file)
                for file in (checkpoint.BEST, checkpoint.BEST_EMA)
            }
        self.log = MetricsLog(self.run.path, self.step.steps, self.wandb_run) if main else None
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
        batches = self.loading = self.train_pipeline.epoch(
            data.views, data.order, start=position * self.epochs.rank_batch_size, image_size=size
        )
        before = dataclasses.replace(self.clock)
        self.clock.start()
        while parts := self.clock.timed_wait(lambda: list(islice(batches, c.accumulate))):
            first = size not in self.sizes_seen  # this step compiles or selects algorithms: not timed
            with self._compiling(f"training step at {size} px") if first else nullcontext():
                self.step(parts, data.targets, learning_rate(c, self.step.steps, self.epochs.steps))
                self.clock.steps += 1
                if first:
                    self.sizes_seen.add(size)
                    self.step.sums.tolist()  # waits for the device
                    self.clock = before
                    self.clock.start()
            self.bar.advance(self.task, c.batch_size)
            self._after_step(epoch)

    @contextmanager
    def _compiling(self, what: str) -> Iterator[None]:
        """Report that the body compiles a program and runs it for the first time, and the seconds it took."""
        began, reports = time.monotonic(), self.world.is_main and self.step.compiled
        if reports:
            notice(f"{what}: compiling, which can take minutes unless the compiler's cache contains it")
        yield
        if reports:
            notice(f"{what}: compiled and run for the first time in {time.monotonic() - began:.0f} s")

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
        sums = _means(each)
        self.clock.stop()
        if not all(map(math.isfinite, sums)):
            self._refuse_infinity("the gradient is" if all(map(math.isfinite, sums[:-1])) else "the loss is")
        if log:
            self._log_step(epoch, [value / self.step.summed for value in sums])
            self.step.reset_sums()
            each = [[0.0] * len(row) for row in each]
        scheduled = save or (end and self._is_evaluated(epoch))
        if scheduled or stop:
            self._save(each, scheduled)
        if stop and step < self.last_step:
            self.vote.finish()
            if self.log:
                self._report()
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

    def _refuse_infinity(self, what: str) -> None:
        self.writer.wait()
        step, saved = self.step.steps, checkpoint.checkpoints(self.run.path)
        retry = f"; or retry from {saved[0]} with --resume" if saved else ""
        raise BadInput(
            f"{what} no longer finite between steps {step - self.step.summed} and {step}; start again with a lower "
            f"--lr or --clip and another --out{retry}"
        )

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
            values |= self._evaluate(epoch)
            values["eval_seconds"] = time.monotonic() - began
        ended = time.monotonic()
        if self.epoch_began is not None:
            values["epoch_seconds"] = ended - self.epoch_began
        self.epoch_began = ended  # the next epoch begins
        top1 = f" top-1 {values['top1']:.2%}" if "top1" in values else ""
        self.bar.done(self.task, f"epoch {epoch + 1}/{c.epochs}{top1}")
        if self.log:
            self.writer(partial(self.log.add, "epoch", self.step.steps, values))
            if time.monotonic() - self.reported > REPORT_EVERY_S or self.step.steps == self.last_step:
                self._report()

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Every metric of the student; with a moving average, those of the better of the two by top-1, and of each.

        Saves the predictions, and the weights if they are the best so far.
        """
        c, step = self.config, self.step
        students = {"raw": step.student} if step.ema is None else {"raw": step.student, "ema": step.ema.module}
        with nullcontext() if self.evaluated_before else self._compiling("evaluation"):
            predictions = best_classes_each(
                list(students.values()),
                self.val_pipeline,
                self.val_set,
                c.eval_crop,
                step.bf16,
                flip=c.eval_flip,
                bicubic=c.eval_interpolation == "bicubic",
                world=self.world,
                compiled=step.compiled,
            )
        self.evaluated_before = True
        by_name = dict(zip(students, predictions, strict=True))
        scores = {name: measure(best, self.val_set.labels) for name, best in by_name.items()}
        better = max(reversed(scores), key=lambda name: scores[name]["top1"])  # the average on a tie
        values = dict(scores[better])
        if len(scores) > 1:
            values |= {f"{metric}_{name}": scores[name][metric] for metric in scores[better] for name in scores}
        if self.log:
            info = {"step": step.steps, "epoch": epoch}
            best, labels, about = by_name[better], self.val_set.labels, {**info, **values}
            self.writer(lambda: save_predictions(self.run.path, best, labels, about))
            for name, file in (("raw", checkpoint.BEST), ("ema", checkpoint.BEST_EMA)):
                if name in scores and scores[name]["top1"] > self.best[file]:
                    self.best[file] = scores[name]["top1"]
                    checkpoint.save_best(
                        self.run.path, students[name], {**info, **scores[name]}, file, when=self.writer
                    )
        return values

    def _speed(self, since: Clock) -> dict[str, float]:
        """Speed of the training steps counted since a reading of the clock; empty if there were none."""
        steps, seconds = self.clock.steps - since.steps, self.clock.seconds - since.seconds
        if not steps:
            return {}
        waited = self.clock.waited - since.waited
        return {"images_per_second": steps * self.config.batch_size / seconds, "loader_share": waited / seconds}

    def _report(self) -> None:
        """Let the writer draw the curves and write the report. If that fails, the run continues without them."""
        import_plotting()
        self.writer(self._draw)
        self.reported = time.monotonic()

    def _draw(self) -> None:
        try:
            draw_curves(self.run.path)
            write_report(self.run.path)
        except Exception as error:  # from files, matplotlib or jinja
            if not self.report_failed:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                notice(f"{self.run.path}: could not write the report and curves ({reason}); the run continues")
            self.report_failed = True

    def _save(self, sums: list[list[float]], scheduled: bool) -> None:
        """Save a checkpoint, with the logged sums of each rank.

        A checkpoint at an interruption stores each rank's own batch statistics, so that the resumed run equals one that
        was not interrupted. A scheduled checkpoint averages them over the ranks.
        """
        s = self.step
        self.writer.wait()  # so that the host holds one copy of the state
        ema = None if s.ema is None else s.ema.module
        by_rank: dict[str, Tensor] = {}
        for part, model in (("student", s.student), ("ema", ema)):
            if model is not None and scheduled:
                self.world.average_statistics(model)
            elif model is not None:
                by_rank |= {f"{part}.{name}": self.world.gather(own) for name, own in statistics(model).items()}
        if self.world.sum(torch.tensor(int(not s.is_finite()))):
            self._refuse_infinity("the weights are")
        if self.world.is_main:
            position: dict[str, Any] = {"sums": _means(sums), "summed": s.summed}
            if any(own != sums[0] for own in sums):
                position["sums_by_rank"] = sums
            checkpoint.save_checkpoint(
                self.run.path,
                s.steps,
                s.student,
                s.optimizer,
                ema,
                position,
                self.config.keep,
                by_rank,
                when=self.writer,
            )

    def _restore(self) -> None:
        s = self.step
        ema = None if s.ema is None else s.ema.module
        rank, ranks = self.world.rank, self.world.size
        s.steps, position = checkpoint.load_newest(self.run.path, s.student, s.optimizer, ema, rank, ranks)
        newest = self.world.broadcast(s.steps)
        check_shared(
            self.world, s.steps == newest, f"the checkpoint of step {newest} (its newest is of step {s.steps})"
        )
        each = position.get("sums_by_rank", [])
        sums = each[rank] if len(each) == ranks else position["sums"]
        s.sums, s.summed = torch.tensor(sums, device=self.device), position["summed"]

    def result(self) -> Result:
        """The result according to the log, so that resuming a finished run returns it again."""
        evaluated = [row for row in read_metrics(self.run.path) if "top1" in row]
        if not evaluated:
            raise BadInput(
                f"{self.run.path}: expected evaluations in metrics.jsonl, found none; the file was edited, restore it"
            )
        last = evaluated[-1]
        return Result(last["top1"], last["top5"], last.get("images_per_second", 0.0), 0.0)


def _means(by_rank: list[list[float]]) -> list[float]:
    """The mean of each sum over the ranks."""
    return [math.fsum(values) / len(by_rank) for values in zip(*by_rank, strict=True)]
