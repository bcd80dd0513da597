"""Run the teacher once on every view of every image, and write its predictions as a teacher cache.

An interrupted run continues where it stopped; more views can be added later. This file opens and checks everything;
cache_job.py does the work.
"""

import dataclasses
from contextlib import closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.models.timm_models import check_published, find_folder, resolve
from fastofa.pipelines import PIPELINES, choose, open_pipeline
from fastofa.system.device import choose_compile, choose_device, choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import filling
from fastofa.system.interrupt import Interrupt
from fastofa.system.progress import notice
from fastofa.teacher.begin_cache import begin, compare_with_main
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_header import HEADER, identity, policy_to_json, read_header
from fastofa.teacher.cache_job import CacheJob, Source
from fastofa.teacher.ensemble import Ensemble, open_teachers
from fastofa.teacher.fidelity import Sample, held_back, smallest_topk
from fastofa.teacher.model import Teacher
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.quick_checks import check_cache
from fastofa.teacher.shares import Shares, shares_of_ranks
from fastofa.views.table import center_views


def precompute(config: PrecomputeConfig) -> TeacherCache:
    """Write a teacher cache, or continue an unfinished one. Under torchrun, all ranks return when it is finished.

    Raises:
        BadInput: a value of the configuration is invalid, or --out contains a cache made with other arguments.
        Stopped: after Ctrl-C or SIGTERM; the predictions so far are saved.
        LostContact: another rank is gone, and with it the store that all share; the predictions so far are saved.
    """
    with shares_of_ranks() as shares:
        device = check_early(config, shares.place.local_rank)
        with filling(config.out) if shares.is_main else nullcontext():
            train, val = open_images(config)
            with Interrupt() as interrupt:
                begun(open_job(config, train, val, device, interrupt, shares)).run()
            cache = TeacherCache.open(config.out, part=config.first_view > 0)
    return cache


def open_images(config: PrecomputeConfig) -> tuple[Dataset, Dataset]:
    """The training and the validation images, each decoded once to find damaged ones."""
    train, val = (
        open_dataset(config.data, split, config.skip_corrupt, check=True, limits=config.limits())
        for split in ("train", "val")
    )
    return train, val


def open_job(
    config: PrecomputeConfig,
    train: Dataset,
    val: Dataset,
    device: torch.device,
    interrupt: Interrupt,
    shares: Shares,
) -> CacheJob:
    """Open the teacher and the pipelines. Writes nothing.

    Raises:
        BadInput: see `precompute`.
    """
    if config.topk != "auto" and config.topk > len(train.classes):
        classes = counted(len(train.classes), "class")
        raise BadInput(f"topk: expected at most the {classes} of {config.data}, got {config.topk}")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    teachers = open_teachers(config, train.classes, device)
    header: dict[str, Any] = {
        "dataset": {
            "spec": config.data,
            "train": train.fingerprint,
            "val": val.fingerprint,
            "train_samples": train.samples_fingerprint,
        },
        "num_samples": len(train),
        "num_val_samples": len(val),
        "num_classes": len(train.classes),
        "classes": list(train.classes),
        "topk": config.topk,
        "policy": policy_to_json(config.policy()),
        "seed": config.seed,
        "views": config.views,
        **({"first_view": config.first_view} if config.first_view else {}),
        **teachers.describe(),
        "pipeline": choose(train, device)[0] if config.pipeline == "auto" else config.pipeline,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
        "config": config.to_json(),  # for `precompute --config`
        "folder": str(Path.cwd()),  # to which its relative paths refer
    }
    workers = choose_workers(config.workers, shares.place.local_size)
    train_source, val_source = (
        Source(
            data,
            open_pipeline(config.pipeline, data, teachers.image_size, config.batch_size, device, workers),
        )
        for data in (train, val)
    )
    if config.features != "none":
        header["features"] = {"kind": config.features, "width": _vector_width(teachers.only, train_source)}
    sample = None
    if config.topk == "auto":
        sample = _choose_topk(config, header, teachers, train_source, interrupt, shares)
    compile_ = choose_compile(config.compile, device)
    program = teachers.program(header["topk"], config.batch_size, compile_, config.features)
    return CacheJob(config, header, teachers, program, train_source, val_source, interrupt, shares, sample)


def _choose_topk(
    config: PrecomputeConfig,
    header: dict[str, Any],
    teachers: Ensemble,
    source: Source,
    interrupt: Interrupt,
    shares: Shares,
) -> Sample | None:
    """Set `topk` in the header: that of the cache to be continued, or else the smallest K that is faithful to a sample
    of predictions. Returns the sample, if there is one. Rank 0 chooses for all."""
    header["topk_chosen"], sample = "auto", None
    if not shares.is_main:
        header["topk"] = shares.wait_for("topk", lambda: interrupt.check("run the same command again to continue"))
        return None
    existing = read_header(config.out) if (config.out / HEADER).exists() and not config.plan else {}
    header["topk"] = existing.get("topk")
    if "topk_chosen" not in existing or identity(header) != identity(existing):
        sample = held_back(teachers, *source, config.policy(), config.seed)
        header["topk"] = smallest_topk(sample, config.eps())
        notice(f"topk auto: {header['topk']} of {counted(header['num_classes'], 'class')}")
    shares.announce("topk", header["topk"])
    return sample


def begun(job: CacheJob) -> CacheJob:
    """The job with the header of its cache, which rank 0 begins or compares with the existing one; other ranks compare
    their own header with rank 0's. Raises BadInput if two differ."""
    out, shares = job.config.out, job.shares
    if shares.is_main:
        header = begin(out, job.header)
        shares.announce("begun")
    else:
        shares.wait_for("begun", job.stop_if_interrupted)
        header = compare_with_main(out, job.header, shares.place.rank)
    return dataclasses.replace(job, header=header)


def _vector_width(teacher: Teacher, source: Source) -> int:
    """D, from the first batch. Raises BadInput unless the teacher's logits are linear in its pooled vectors."""
    views = center_views(source.dataset.sizes, teacher.crop)
    with closing(source.pipeline.epoch(views, np.arange(len(views)))) as batches:
        try:
            return teacher.check_linear_head(next(batches).images)
        except BadInput as error:
            raise BadInput(f"{error}; leave --features out, or choose another teacher") from None


def check_early(config: PrecomputeConfig, local_rank: int) -> torch.device:
    """The device. Raises BadInput for whatever can be checked before all images are decoded, which may take hours."""
    if not config.plan:
        check_cache(config)
        if (config.out / HEADER).exists():
            read_header(config.out)
    config.policy()
    if config.teacher_checkpoint is not None and not config.teacher_checkpoint.exists():
        raise BadInput(
            f"{config.teacher_checkpoint}: expected a file with weights, but it does not exist; correct "
            "--teacher-checkpoint"
        )
    for teacher in config.teachers:
        if config.teacher_checkpoint is not None:
            resolve(teacher)
        elif find_folder(teacher) is None:
            check_published(teacher)
    if config.pipeline not in ("auto", *PIPELINES):
        raise BadInput(f"unknown pipeline {config.pipeline!r}: expected auto or one of {', '.join(PIPELINES)}")
    device = choose_device(config.device, local_rank)
    choose_compile(config.compile, device)
    return device
