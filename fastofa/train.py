"""Train a student from a teacher cache.

    fastofa train --data photos --cache cache --student resnet18 --recipe imagenet_cnn --out run
    fastofa train ... --resume          the same command goes on after an interruption, mid-epoch, to the same weights

A step: pixels from the pipeline, the teacher's answers from a table on the device, a forward of student and exits, the
loss, backward, update. Nothing in it waits for the device; figures are fetched every `log_every` steps.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from timm.utils import ModelEmaV3
from torch import Tensor

from fastofa import checkpoint
from fastofa.config import TrainConfig
from fastofa.curves import draw_curves
from fastofa.dataset import Dataset, open_dataset
from fastofa.device import choose_bf16, choose_device, choose_workers
from fastofa.errors import BadInput
from fastofa.interrupt import Interrupt, Stopped
from fastofa.losses import PARTS, Objective
from fastofa.metrics import MetricsLog, accuracy, predict, read_metrics
from fastofa.optim import create_optimizer, learning_rate, set_learning_rate
from fastofa.pipelines import open_pipeline
from fastofa.progress import notice, progress_bar
from fastofa.recipes import default_policy, not_replayed, recipe
from fastofa.run import CONFIG, Run, open_run
from fastofa.teacher_cache import DeviceTargets, TeacherCache
from fastofa.views import ViewPolicy, Views, draw_views, epoch_order, epoch_rows, join_views


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    top1: float
    top5: float
    images_per_second: float
    """Of the training steps alone, evaluation left out."""
    seconds: float
    """Of this call, everything counted."""


def train(config: TrainConfig) -> Result:
    """Train, or with `config.resume` go on.

    Raises:
        BadInput: anything that does not fit, before something is written; a loss that is no longer finite.
        Stopped: by Ctrl-C or SIGTERM, after saving.
    """
    began = time.monotonic()
    train_set, val_set = open_dataset(config.data, "train"), open_dataset(config.data, "val")
    cache = _open_cache(config, train_set)
    policy = config.policy(default_policy(config.data, config.recipe) if cache is None else cache.policy)
    _check_batches(config, policy, len(train_set))
    run = Run(config.out, config, train_set.classes, 0 if cache is None else cache.teacher_dim, train_set.fingerprint)
    _check_place(run)
    job = _Job(run, train_set, val_set, cache, policy)
    job.load()
    run.save()
    if missing := not_replayed(config.recipe, policy):
        notice(f"recipe {config.recipe}: its published views have {missing}; `fastofa precompute --recipe` draws them")
    job.run_epochs()
    return dataclasses.replace(job.result(), seconds=time.monotonic() - began)


def _open_cache(config: TrainConfig, dataset: Dataset) -> TeacherCache | None:
    if len(dataset) < config.batch_size:
        raise BadInput(
            f"batch-size: expected at most the {len(dataset)} training images of {config.data}, got {config.batch_size}"
        )
    if config.cache is None:
        if config.method != "scratch":
            raise BadInput(
                f"--method {config.method}: expected --cache, made by `fastofa precompute`; or --method scratch"
            )
        return None
    cache = TeacherCache.open(config.cache)
    cache.check(dataset, config.policy(cache.policy))
    return cache


def _check_batches(config: TrainConfig, policy: ViewPolicy, size: int) -> None:
    """Raises BadInput if a batch would tear a pair apart, or an epoch of repeated views is smaller than a batch."""
    if policy.mixes and config.batch_size % 2:
        raise BadInput(f"batch-size: expected an even number, since these views mix pairs, got {config.batch_size}")
    if (rows := epoch_rows(policy, size)) < config.batch_size:
        raise BadInput(f"batch-size: expected at most the {rows} images of a repeated epoch, got {config.batch_size}")


def _check_place(run: Run) -> None:
    """Raises BadInput if another run lies there."""
    if not (run.path / CONFIG).exists():
        return
    if not run.config.resume:
        raise BadInput(f"{run.path}: holds a run already; go on with it by --resume or choose another --out")
    found = open_run(run.path)
    different = run.config.differences(found.config)
    if run.fingerprint != found.fingerprint:
        different.append(f"data: {run.config.data} is not the data set of {found.config.data} as it was then")
    if different:
        raise BadInput(f"{run.path}: --resume expects the run's own arguments, these differ: {'; '.join(different)}")


class _Job:
    """The objects of a run, made once, and the loop over them."""

    def __init__(
        self, run: Run, train_set: Dataset, val_set: Dataset, cache: TeacherCache | None, policy: ViewPolicy
    ) -> None:
        c = self.config = run.config
        self.run, self.train_set, self.val_set, self.cache, self.policy = run, train_set, val_set, cache, policy
        self.device = choose_device(c.device)
        self.bf16 = choose_bf16(c.precision, self.device)
        torch.manual_seed(c.seed)
        resumed = c.resume and (run.path / checkpoint.FILE).exists()
        student = run.build_student(None if resumed else c.init)
        self.student = student.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = create_optimizer(self.student, c)
        self.ema = None if c.ema is None else ModelEmaV3(self.student, decay=c.ema)
        self.objective = Objective(c, self.device)
        compiled = c.compile == "on" or (c.compile == "auto" and self.device.type == "cuda")
        self.forward = torch.compile(self._forward) if compiled else self._forward
        self.train_pipeline, self.val_pipeline = (
            open_pipeline(c.pipeline, d, self.student.image_size, c.batch_size, self.device, choose_workers(c.workers))
            for d in (train_set, val_set)
        )
        self.steps_per_epoch = epoch_rows(policy, len(train_set)) // c.batch_size
        self.step = 0  # steps taken
        self.sums = torch.zeros(len(PARTS), device=self.device)  # of the loss parts since the last log
        self.summed = 0
        self.targets: DeviceTargets | None = None
        self.shown: list[int] = []  # views that are loaded
        self.first_image = 0  # where this process began
        self.images, self.seconds = 0, 0.0  # of its training steps alone

    def _forward(
        self, images: Tensor, labels: Tensor, targets: Any, partner_labels: Tensor | None, mix: Tensor | None
    ) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.student(images)
        return self.objective(logits, labels, targets, partner_labels, mix)

    def load(self) -> None:
        """The checkpoint and the first view: damage is told before anything is written."""
        c = self.config
        if c.resume and (self.run.path / checkpoint.FILE).exists():
            self._restore()
        elif c.resume:
            notice(f"{self.run.path}: no checkpoint yet, starting from the beginning")
        if self.cache is not None and self.step < c.epochs * self.steps_per_epoch:
            self._load_view(self.step // self.steps_per_epoch)

    def run_epochs(self) -> None:
        c = self.config
        first, position = divmod(self.step, self.steps_per_epoch)
        self.log = MetricsLog(self.run.path, self.step)
        with Interrupt() as self.interrupt, progress_bar() as bar:
            images = self.steps_per_epoch * c.batch_size
            self.task = bar.add_task(
                f"train {c.student}", total=c.epochs * images, completed=self.step * c.batch_size, note=""
            )
            self.bar = bar
            try:
                for epoch in range(first, c.epochs):
                    self._epoch(epoch, position)
                    position = 0
            finally:
                self.log.close()
                draw_curves(self.run.path)

    def _epoch(self, epoch: int, position: int) -> None:
        c = self.config
        self.began = time.monotonic()
        views = self._load_view(epoch)
        order = epoch_order(len(self.train_set), c.seed, epoch, partner=views.partner, repeats=self.policy.repeats)[
            : self.steps_per_epoch * c.batch_size
        ]
        self.student.train()
        for batch in self.train_pipeline.epoch(views, order, start=position * c.batch_size):
            set_learning_rate(self.optimizer, learning_rate(c, self.step, self.steps_per_epoch))
            targets = None if self.targets is None else self.targets.lookup(batch.sample_ids)
            parts = self.forward(batch.images, batch.labels, targets, batch.partner_labels, batch.mix)
            parts[0].backward()
            if c.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.student.parameters(), c.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.ema is not None:
                self.ema.update(self.student, self.step)
            self.sums += parts.detach()
            self.summed += 1
            self.bar.advance(self.task, c.batch_size)
            self._after_step(epoch)

    def _after_step(self, epoch: int) -> None:
        """What is due at this step, the training clock stopped: log, evaluate, save, stop."""
        c, step, last = self.config, self.step, self.config.epochs * self.steps_per_epoch
        log, end, save = step % c.log_every == 0, step % self.steps_per_epoch == 0, step % c.checkpoint_every == 0
        stop = self.interrupt.signum
        if not (log or end or save or stop):
            return
        sums = self.sums.tolist()  # waits for the device
        self.images = step * c.batch_size - self.first_image
        self.seconds += time.monotonic() - self.began
        if not all(map(math.isfinite, sums)):
            raise BadInput(
                f"the loss is no longer finite between steps {step - self.summed} and {step}; lower --lr or set "
                f"--clip, then go on from the last checkpoint in {self.run.path} or anew"
            )
        if log:
            self._log_step(epoch, [value / self.summed for value in sums])
            self.sums.zero_()
            self.summed = 0
        if end:
            self._log_epoch(epoch)
        if save or stop or step == last:
            self._save()
        if stop and step < last:
            raise Stopped(
                f"saved step {step} of {last} in {self.run.path}; run the same command with --resume to go on", stop
            )
        self.began = time.monotonic()

    def _log_step(self, epoch: int, parts: list[float]) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        values = {"epoch": epoch, "lr": lr, "images_per_second": self._speed(), **dict(zip(PARTS, parts, strict=True))}
        self.log.add("step", self.step, values)
        self.bar.update(self.task, note=f"epoch {epoch + 1}/{self.config.epochs} loss {parts[0]:.4g} lr {lr:.2g}")

    def _log_epoch(self, epoch: int) -> None:
        c = self.config
        values = {"epoch": epoch, "images_per_second": self._speed()}
        if (epoch + 1) % c.eval_every == 0 or epoch + 1 == c.epochs:
            student = self.student if self.ema is None else self.ema.module
            best = predict(student, self.val_pipeline, self.val_set, c.eval_crop, self.bf16)
            values["top1"], values["top5"] = accuracy(best, self.val_set.labels)
            self.bar.update(self.task, note=f"epoch {epoch + 1}/{c.epochs} top-1 {values['top1']:.2%}")
        self.log.add("epoch", self.step, values)

    def _speed(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    def _save(self) -> None:
        position = {"step": self.step, "sums": self.sums.tolist(), "summed": self.summed}
        ema = None if self.ema is None else self.ema.module
        checkpoint.save_checkpoint(self.run.path / checkpoint.FILE, self.student, self.optimizer, ema, position)

    def _restore(self) -> None:
        ema = None if self.ema is None else self.ema.module
        position = checkpoint.load_checkpoint(self.run.path / checkpoint.FILE, self.student, self.optimizer, ema)
        self.step, self.summed = position["step"], position["summed"]
        self.sums = torch.tensor(position["sums"], device=self.device)
        self.first_image = self.step * self.config.batch_size

    def _load_view(self, epoch: int) -> Views:
        """The pixels' table of an epoch (of several views, if it repeats); the teacher's goes to the device."""
        c, repeats = self.config, self.policy.repeats
        shown = [epoch // repeats * repeats + number for number in range(repeats)]
        if self.cache is None:
            return join_views([draw_views(self.policy, self.train_set.sizes, c.seed, view) for view in shown])
        shown = [view % self.cache.views for view in shown]
        if self.shown != shown:
            self.shown = shown
            tables, classes, log_probs = zip(*map(self.cache.targets, shown), strict=True)
            self.views = join_views(tables)
            dense = self.cache.topk == self.cache.num_classes
            self.targets = (
                None
                if c.method == "scratch"
                else DeviceTargets(torch.cat(classes), torch.cat(log_probs), self.device, dense)
            )
        return self.views

    def result(self) -> Result:
        """From the log, so that a finished run that is resumed says the same again."""
        last = [row for row in read_metrics(self.run.path) if "top1" in row][-1]
        return Result(last["top1"], last["top5"], last["images_per_second"], 0.0)


def main(argv: list[str]) -> None:
    config = parse_config(argv)
    result = train(config)
    print(
        f"{config.out}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, {result.images_per_second:,.0f} images/s, "
        f"{result.seconds:,.0f} s"
    )


def parse_config(argv: list[str]) -> TrainConfig:
    """The recipe named in the arguments, changed by the other arguments. Raises BadInput without a known recipe."""
    name = "digits" if {"-h", "--help"} & set(argv) else ""
    for argument, value in zip(argv, [*argv, ""][1:], strict=True):
        if argument == "--recipe" or argument.startswith("--recipe="):
            name = argument.partition("=")[2] or value
    defaults = recipe(name)(data=tyro.MISSING, student=tyro.MISSING, out=tyro.MISSING)
    return tyro.cli(TrainConfig, args=argv, description=__doc__, default=defaults, prog="fastofa train")
