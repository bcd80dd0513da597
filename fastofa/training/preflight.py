"""Checks before a run, so that errors are reported before anything is written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from fastofa.data.dataset import Dataset
from fastofa.methods.find_method import file_digests, method_class, own_options
from fastofa.methods.options import own_methods
from fastofa.models.timm_models import evaluation_view, resolve
from fastofa.pipelines import PIPELINES
from fastofa.runs import checkpoint
from fastofa.runs.config import Order, TrainConfig
from fastofa.runs.config_file import in_folder
from fastofa.runs.log import import_wandb
from fastofa.runs.quick_checks import check_vacant
from fastofa.runs.run import CONFIG, METHOD_FILES, Run, open_run, recorded
from fastofa.system.device import choose_device
from fastofa.system.errors import BadInput
from fastofa.system.memory import memory_bytes
from fastofa.system.progress import notice
from fastofa.teacher.cache import Table, TeacherCache
from fastofa.teacher.online import check_online_teacher
from fastofa.teacher.staged_cache import open_cache
from fastofa.training.distributed import World
from fastofa.training.epochs import check_divisible
from fastofa.training.step import check_device


def check_early(config: TrainConfig, world: World) -> tuple[torch.device, TeacherCache | None]:
    """The rank's device, and the opened cache if the run has one. Raises BadInput for every error that can be found
    before the dataset is indexed, which may take hours."""
    if world.local_size > 1 and ":" in config.device:
        raise BadInput(f"device: expected auto, cuda or cpu where a host has several processes, got {config.device}")
    device = choose_device(config.device, world.local_rank)
    check_device(config, device)
    if not config.plan:
        check_vacant(config)
        if config.wandb is not None:
            import_wandb()
    cache = None if config.cache is None else open_cache(config.cache)
    if cache is not None:
        check_needs(config.methods, cache)
    elif config.methods and config.online_teacher is None:
        raise BadInput(
            f"--method {config.method}: expected --cache, made by `fastofa precompute`, or --online-teacher; or "
            "--method scratch"
        )
    check_online_teacher(config)
    resolve(config.student, config.image_size)
    if config.init not in (None, "pretrained") and ":" not in config.init and not Path(config.init).exists():
        raise BadInput(f"{config.init}: expected a file with weights, found none; correct --init")
    if config.pipeline not in ("auto", *PIPELINES):
        raise BadInput(f"unknown pipeline {config.pipeline!r}: expected auto or one of {', '.join(PIPELINES)}")
    if config.workers is not None and config.workers < 0:
        raise BadInput(f"workers: expected at least 0, got {config.workers}")
    if config.batch_size is not None:
        check_divisible(config.batch_size, {"ranks": world.size, "parts": config.accumulate})
    return device, cache


def check_needs(methods: Sequence[str], cache: TeacherCache) -> None:
    """Raises BadInput unless the cache contains what each method needs from the teacher."""
    for name in methods:
        needs = method_class(name).needs
        if needs == "pooled vector" and not cache.pooled_dim:
            raise BadInput(
                f"method {name}: expected a cache with the teacher's pooled vectors, {cache.path} has only its top "
                f"{cache.topk} of {cache.num_classes} classes; run `fastofa precompute --features pooled` with another "
                "--out"
            )
        if needs == "stage features":
            raise BadInput(
                f"method {name}: expected the features of the teacher's stages, which a cache does not contain; give "
                f"--online-teacher instead of --cache {cache.path}"
            )


def spread_notice(methods: Sequence[str], cache: TeacherCache, table: Table) -> str:
    """What methods that need all classes lose on this cache, for a notice; empty if nothing.

    Args:
        table: that of view 0.
    """
    names = [name for name in methods if method_class(name).needs == "all classes"]
    if not names or cache.pooled_dim or cache.topk == cache.num_classes:
        return ""
    remedy = "a larger --topk of `fastofa precompute` reduces"
    if len(cache.header["teachers"]) == 1:
        remedy = "`fastofa precompute --features pooled` removes"
    kept = table.kept().mean().item()
    return (
        f"method {'+'.join(names)}: needs all classes; the {cache.topk} of {cache.num_classes} in the cache hold "
        f"{kept:.3%} of the teacher's probability (mean over view 0), and the rest is spread evenly over the others: a "
        f"total variation error of at most {1 - kept:.3%}, which {remedy}"
    )


def with_own_options(config: TrainConfig) -> TrainConfig:
    """Return `config` with every option of the methods in users' files, so that the run records their defaults, too."""
    options = {
        prefix: dataclasses.asdict(own_options(name, config.own_options.get(prefix, {})))
        for prefix, name in own_methods(config.method).items()
    }
    return dataclasses.replace(config, own_options=options)


def with_own_evaluation(config: TrainConfig) -> TrainConfig:
    """Return `config` with the student's own crop and filter for the evaluation where it leaves them unset."""
    if config.eval_crop is not None and config.eval_interpolation != "student":
        return config
    crop, interpolation = evaluation_view(config.student)
    return dataclasses.replace(
        config,
        eval_crop=crop if config.eval_crop is None else config.eval_crop,
        eval_interpolation=interpolation if config.eval_interpolation == "student" else config.eval_interpolation,
    )


def choose_order(config: TrainConfig, train_set: Dataset, world: World) -> Order:
    """The order of samples. `auto` selects the one the run started with, else pages if the file does not fit into
    memory.

    Rank 0 chooses for all ranks. Raises BadInput if a run started with pages and the dataset has none.
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
            notice(f"order pages: {train_set.file} has {size / 1e9:,.1f} GB, memory {memory / 1e9:,.1f} GB")
    orders = get_args(Order)
    chosen = orders[world.broadcast(orders.index(chosen))]
    if chosen == "pages" and train_set.page_ids is None:
        raise BadInput(
            f"{config.out}: the run reads its .beton page by page; expected that file as --data, got {config.data}"
        )
    return chosen


def views_begun_with(config: TrainConfig, world: World) -> int:
    """The number of cached views that a resumed run started with, according to rank 0; 0 for a new run.

    It is also 0 if the run is extended and had at least as many views as epochs, so that the additional epochs replay
    further views of the cache.
    """
    views = 0
    if world.is_main and config.resume and (config.out / CONFIG).exists():
        begun = open_run(config.out)
        unrepeated = config.epochs > begun.config.epochs and len(begun.view_digests) >= begun.config.epochs
        views = 0 if unrepeated else len(begun.view_digests)
    return world.broadcast(views)


def teacher_differences(run: Run, begun: Run) -> list[str]:
    """What differs between the online teachers of a resumed run and of the run as it began; its precision may."""
    own, other = run.teacher or {}, begun.teacher or {}
    here, there = (
        f"{r.config.online_teacher} with weights {r.teacher['sha256'][:12]}" if r.teacher else "none"
        for r in (run, begun)
    )
    if own.get("sha256") != other.get("sha256"):
        return [f"online-teacher: {here} here, {there} there (first digits of the sha256)"]
    changed = [name for name in own if name not in ("name", "precision", "crop") and own[name] != other.get(name)]
    return [f"online-teacher: {run.config.online_teacher} has another {' and '.join(changed)}"] if changed else []


def check_resumable(run: Run) -> None:
    """Raises BadInput if the run's folder contains another run, or this one with other arguments or data."""
    if not (run.path / CONFIG).exists():
        return
    if not run.config.resume:
        notice(f"{run.path}: contains a run without a checkpoint; starting it again")
        return
    begun = open_run(run.path)
    different = run.config.differences(in_folder(begun.config, begun.folder))
    if run.fingerprint != begun.fingerprint:
        different.append(f"data: the training images of {run.config.data} are not those the run started with")
    if run.val_fingerprint != begun.val_fingerprint:
        different.append(f"data: the validation images of {run.config.data} are not those the run started with")
    if (run.config.cache is None) != (begun.config.cache is None):
        different.append(f"cache: {run.config.cache} here, {begun.config.cache} there")
    elif run.view_digests[: len(begun.view_digests)] != begun.view_digests:
        pairs = enumerate(zip(run.view_digests, begun.view_digests, strict=False))
        views = [str(view) for view, (digest, begun_with) in pairs if digest != begun_with]
        different.append(
            f"cache: {run.config.cache} does not contain the predictions that the run started with"
            + (f" (view{'s' * (len(views) > 1)} {', '.join(views)} changed)" if views else "")
        )
    different += teacher_differences(run, begun)
    if run.config.order == begun.config.order and run.pages != begun.pages:
        different.append(f"data: the pages of {run.config.data} contain other samples than those the run started with")
    if different:
        new = "" if checkpoint.checkpoints(run.path) else "; it has no checkpoint yet: to start again, remove it"
        fewer = "; only more epochs are allowed" if run.config.epochs < begun.config.epochs else ""
        raise BadInput(
            f"{run.path}: --resume expects the run's own arguments, but these differ: "
            f"{'; '.join(different)}{fewer}{new}"
        )
    before = recorded(run.path, METHOD_FILES)
    for prefix, digest in file_digests(run.config.methods).items():
        if before.get(prefix, digest) != digest:
            notice(
                f"method {prefix}: its file has changed since the run was last started (sha256 {before[prefix]:.12} "
                f"then, {digest:.12} now); the run continues with the new one"
            )
