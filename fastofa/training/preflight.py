"""Checks before a run: what is wrong is reported before anything is written."""

from pathlib import Path
from typing import get_args

import torch

from fastofa.data.dataset import Dataset
from fastofa.models.timm_models import resolve
from fastofa.pipelines import PIPELINES
from fastofa.runs import checkpoint
from fastofa.runs.config import Order, TrainConfig
from fastofa.runs.log import import_wandb
from fastofa.runs.quick_checks import check_vacant
from fastofa.runs.run import CONFIG, Run, open_run
from fastofa.system.device import choose_device
from fastofa.system.errors import BadInput
from fastofa.system.memory import memory_bytes
from fastofa.system.progress import notice
from fastofa.teacher.cache import TeacherCache
from fastofa.training.distributed import World
from fastofa.training.epochs import check_divisible
from fastofa.training.step import check_device


def check_early(config: TrainConfig, world: World) -> torch.device:
    """The device; raises BadInput for what is known to be wrong before the data are indexed, which may take long."""
    if world.local_size > 1 and ":" in config.device:
        raise BadInput(f"device: expected auto, cuda or cpu where a host has several processes, got {config.device}")
    device = choose_device(config.device, world.local_rank)
    check_device(config, device)
    if not config.plan:
        check_vacant(config)
        if config.wandb is not None:
            import_wandb()
    if config.cache is not None:
        TeacherCache.open(config.cache)
    elif config.method != "scratch":
        raise BadInput(f"--method {config.method}: expected --cache, made by `fastofa precompute`; or --method scratch")
    resolve(config.student, config.image_size)
    if config.init not in (None, "pretrained") and ":" not in config.init and not Path(config.init).exists():
        raise BadInput(f"{config.init}: expected a file with weights, found none")
    if config.pipeline not in ("auto", *PIPELINES):
        raise BadInput(f"unknown pipeline {config.pipeline!r}: expected auto or one of {', '.join(PIPELINES)}")
    if config.workers is not None and config.workers < 0:
        raise BadInput(f"workers: expected at least 0, got {config.workers}")
    if config.batch_size is not None:
        check_divisible(config.batch_size, {"ranks": world.size, "parts": config.accumulate})
    return device


def choose_order(config: TrainConfig, train_set: Dataset, world: World) -> Order:
    """What `auto` means in this run, as rank 0 finds it: as the run began, else by the memory, which ranks share.

    Raises BadInput where a run that began by pages finds none.
    """
    if config.order != "auto":
        return config.order
    chosen: Order = "random"
    if world.is_main and config.resume and (config.out / CONFIG).exists():
        chosen = open_run(config.out).config.order
    elif world.is_main and train_set.file is not None and train_set.page_ids is not None:
        size, memory = train_set.file.stat().st_size, memory_bytes()
        if size > memory:
            chosen = "pages"
            notice(f"order pages: {train_set.file} has {size / 1e9:,.1f} GB, the memory {memory / 1e9:,.1f} GB")
    orders = get_args(Order)
    chosen = orders[world.broadcast(orders.index(chosen))]
    if chosen == "pages" and train_set.page_ids is None:
        raise BadInput(
            f"{config.out}: the run goes by the pages of its .beton; expected that as --data, got {config.data}"
        )
    return chosen


def views_begun_with(config: TrainConfig, world: World) -> int:
    """How many views of the cache a resumed run replays, as rank 0 finds it; 0 where that is still to be chosen.

    Chosen anew for a run that gets more epochs and has shown each of its views once: it takes those that follow.
    """
    views = 0
    if world.is_main and config.resume and (config.out / CONFIG).exists():
        begun = open_run(config.out)
        once = config.epochs > begun.config.epochs and len(begun.answers) >= begun.config.epochs
        views = 0 if once else len(begun.answers)
    return world.broadcast(views)


def check_place(run: Run) -> None:
    """Raises BadInput if another run lies there."""
    if not (run.path / CONFIG).exists():
        return
    if not run.config.resume:
        notice(f"{run.path}: the run there has no checkpoint; beginning anew")
        return
    found = open_run(run.path)
    different = run.config.differences(found.config)
    if run.fingerprint != found.fingerprint:
        different.append(f"data: {run.config.data} is not the data set of {found.config.data} as it was then")
    if run.val_fingerprint != found.val_fingerprint:
        different.append(f"data: {run.config.data} has other validation images than {found.config.data} had then")
    if (run.config.cache is None) != (found.config.cache is None):
        different.append(f"cache: {run.config.cache} here, {found.config.cache} there")
    elif run.answers[: len(found.answers)] != found.answers:
        pairs = enumerate(zip(run.answers, found.answers, strict=False))
        views = [str(view) for view, (mine, theirs) in pairs if mine != theirs]
        different.append(
            f"cache: {run.config.cache} does not hold the answers of {found.config.cache} that the run began with"
            + (f" (view{'s' * (len(views) > 1)} {', '.join(views)} changed)" if views else "")
        )
    if run.config.order == found.config.order and run.pages != found.pages:
        different.append(f"data: the pages of {run.config.data} hold other samples than those the run began with")
    if different:
        new = "" if checkpoint.checkpoints(run.path) else "; it has no checkpoint yet, to begin anew remove it"
        fewer = "; only more epochs are allowed" if run.config.epochs < found.config.epochs else ""
        raise BadInput(
            f"{run.path}: --resume expects the run's own arguments, these differ: {'; '.join(different)}{fewer}{new}"
        )
