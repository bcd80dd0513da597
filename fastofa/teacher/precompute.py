"""Run the teacher once on every view of every image, and write its predictions as a teacher cache.

An interrupted run continues where it stopped; more views can be added later.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import TaskID
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.methods.targets import TopK
from fastofa.models.timm_models import find_folder, resolve
from fastofa.pipelines import PIPELINES, Pipeline, choose, open_pipeline
from fastofa.system.device import choose_bf16, choose_device, choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import filling, read_info
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.system.progress import Bar, notice, progress_bar
from fastofa.teacher.cache import (
    PARTIAL,
    VAL,
    TeacherCache,
    check_origin,
    read_table,
    topk_targets,
    view_file,
    write_table,
)
from fastofa.teacher.cache_header import HEADER, identity, policy_to_json, read_header, write_header
from fastofa.teacher.model import Teacher, check_finite, open_teacher, report_accuracy
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.quick_checks import check_cache, other_cache
from fastofa.teacher.reference_images import save_teacher_images
from fastofa.teacher.table_checks import targets_fault
from fastofa.views.draw import draw_views
from fastofa.views.order import pair_order
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views, center_views

SAVE_EVERY_S = 300  # seconds between two saves of an unfinished view


def precompute(config: PrecomputeConfig) -> TeacherCache:
    """Write a teacher cache, or continue an unfinished one.

    Raises:
        BadInput: a value of the configuration is invalid, or --out contains a cache made with other arguments.
        Stopped: after Ctrl-C or SIGTERM; the predictions so far are saved.
    """
    device = _check_early(config)
    with filling(config.out):
        return _precompute(config, device)


def _precompute(config: PrecomputeConfig, device: torch.device) -> TeacherCache:
    train, val = (
        open_dataset(config.data, split, config.skip_corrupt, check=True, limits=config.limits())
        for split in ("train", "val")
    )
    if config.topk > len(train.classes):
        classes = counted(len(train.classes), "class")
        raise BadInput(f"topk: expected at most the {classes} of {config.data}, got {config.topk}")
    policy = config.policy()
    bf16 = choose_bf16(config.precision, device)
    teacher = open_teacher(
        config.teacher,
        train.classes,
        config.teacher_checkpoint,
        config.image_size,
        config.mean,
        config.std,
        device,
        bf16,
        config.teacher_checkpoint_key,
    )
    header: dict[str, Any] = {
        "dataset": {"spec": config.data, "train": train.fingerprint, "val": val.fingerprint},
        "num_samples": len(train),
        "num_val_samples": len(val),
        "num_classes": len(train.classes),
        "classes": list(train.classes),
        "topk": config.topk,
        "policy": policy_to_json(policy),
        "seed": config.seed,
        "views": config.views,
        "teachers": [teacher.describe()],
        "pipeline": choose(train, device)[0] if config.pipeline == "auto" else config.pipeline,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
        "config": config.to_json(),  # for `precompute --config`
        "folder": str(Path.cwd()),  # to which its relative paths refer
    }
    train_pipeline, val_pipeline = (
        open_pipeline(config.pipeline, d, teacher.image_size, config.batch_size, device, choose_workers(config.workers))
        for d in (train, val)
    )
    header = _begin(config.out, header)
    with Interrupt() as interrupt:
        job = _Job(config.out, header, teacher, config, interrupt)
        job.write_val(val, val_pipeline)
        todo = [view for view in range(config.views) if not job.is_finished(view_file(view), view)]
        if todo[:1] == [0]:  # written with view 0, because the images may change later
            with job.saving(0, []):
                save_teacher_images(config.out, train_pipeline, draw_views(policy, train.sizes, config.seed, 0))
        job.write_views(todo, train, train_pipeline, policy)
    cache = TeacherCache.open(config.out)
    if cache.views == header["views"]:
        (config.out / PARTIAL).unlink(missing_ok=True)  # left behind by a process that was killed
    return cache


def _check_early(config: PrecomputeConfig) -> torch.device:
    """The device. Raises BadInput for whatever can be checked before all images are decoded, which may take hours."""
    check_cache(config)
    if (config.out / HEADER).exists():
        read_header(config.out)
    config.policy()
    if config.teacher_checkpoint is not None and not config.teacher_checkpoint.exists():
        raise BadInput(f"{config.teacher_checkpoint}: expected a file with weights, but it does not exist")
    if config.teacher_checkpoint is not None or find_folder(config.teacher) is None:
        resolve(config.teacher)
    if config.pipeline not in ("auto", *PIPELINES):
        raise BadInput(f"unknown pipeline {config.pipeline!r}: expected auto or one of {', '.join(PIPELINES)}")
    return choose_device(config.device)


def _begin(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Write the header, or compare it with an existing one. Returns the header that is now in cache.json."""
    if not (out / HEADER).exists():
        write_header(out, header)
        return header
    existing = read_header(out)
    new, old = identity(header), identity(existing)
    different = [key for key in new if new[key] != old[key]]
    if different and not _may_start_over(out, different):
        raise other_cache(out, [f"{key} ({_short(old[key])} there, {_short(new[key])} here)" for key in different])
    if different:
        notice(f"{out}: starts over, because {' and '.join(different)} changed and no view was finished")
        for file in (VAL, PARTIAL):
            (out / file).unlink(missing_ok=True)
        write_header(out, header)
        return header
    if header["views"] > existing["views"]:
        existing = {**existing, **{name: header[name] for name in ("views", "config", "folder")}}
        write_header(out, existing)
    elif header["views"] < existing["views"]:
        notice(f"{out}: was started with --views {existing['views']}; --views {header['views']} removes none of them")
    return existing


def _may_start_over(out: Path, different: list[str]) -> bool:
    """Whether no finished work would be lost: no view, and no validation predictions unless only the data changed."""
    data_only = set(different) <= {"dataset", "classes"}
    return not any(out.glob("view-*.safetensors")) and (data_only or not (out / VAL).exists())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


@dataclass(frozen=True)
class _Job:
    out: Path
    header: dict[str, Any]
    teacher: Teacher
    config: PrecomputeConfig
    interrupt: Interrupt

    def is_finished(self, file: str, table: int | str) -> bool:
        """Whether this table of the cache is finished, and not truncated. Raises BadInput if it is another cache's."""
        if not (self.out / file).is_file():
            return False
        try:
            info, _ = read_info(self.out / file)
        except BadInput as error:
            notice(f"{error}: it is computed again now")
            return False
        check_origin(self.out / file, info, self.header, table)
        return True

    def write_val(self, dataset: Dataset, pipeline: Pipeline) -> None:
        """Write the teacher's predictions for the validation images, and report its accuracy."""
        if self.is_finished(VAL, VAL):
            return
        views = center_views(dataset.sizes, self.teacher.crop)
        with progress_bar() as bar:
            task = bar.add_task("validation", total=len(dataset), note="")
            targets = self._predict(dataset, pipeline, views, VAL, bar, task)
        self._commit(VAL, targets._asdict(), VAL)
        correct = targets.classes[:, 0].to(torch.int64) == torch.from_numpy(dataset.labels)
        top1 = float(correct.float().mean())
        report_accuracy(self.teacher.name, top1, len(dataset.classes), len(dataset))

    def write_views(self, todo: list[int], dataset: Dataset, pipeline: Pipeline, policy: ViewPolicy) -> None:
        if not todo:
            return
        total = self.config.views
        with progress_bar() as bar:
            done = (total - len(todo)) * len(dataset)
            task = bar.add_task("precompute", total=total * len(dataset), completed=done, note="")
            for view in todo:
                bar.update(task, note=f"view {view + 1} of {total}")
                views = draw_views(policy, dataset.sizes, self.config.seed, view)
                targets = self._predict(dataset, pipeline, views, view, bar, task)
                columns = {name: torch.from_numpy(column) for name, column in views.columns().items()}
                self._commit(view_file(view), {**columns, **targets._asdict()}, view)
                bar.done(task, f"view {view + 1} of {total} done")

    def _predict(
        self, dataset: Dataset, pipeline: Pipeline, views: Views, table: int | str, bar: Bar, task: TaskID
    ) -> TopK:
        """The teacher's predictions for every row of a table, in the order of sample ids."""
        # In file order, for sequential reads; mixed images follow each other, so that each is read once.
        order = pair_order(views, None if dataset.spans is None else dataset.spans[:, 0])
        partial = f"first rows of {table} in the order {hashlib.sha256(order.tobytes()).hexdigest()}"
        parts = self._read_partial(partial, len(order))
        done = sum(len(part.classes) for part in parts)
        bar.advance(task, done)
        saved_at = time.monotonic()
        with self.saving(table, parts, partial), closing(pipeline.epoch(views, order, start=done)) as batches:
            for batch in batches:
                targets = topk_targets(self.teacher.log_probs(batch.images), self.header["topk"])
                names = [dataset.names[i] for i in batch.sample_ids.tolist()]
                which = f"view {table}" if isinstance(table, int) else "the validation view"
                check_finite(self.teacher.name, targets.log_probs, which, names)
                parts.append(targets)
                bar.advance(task, len(batch.labels))
                if self.interrupt.signum is not None:
                    raise Stopped(f"saved in {self.out}; run the same command again to continue", self.interrupt.signum)
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    self._save(parts, partial)
                    saved_at = time.monotonic()
        joined, place = _joined(parts), np.argsort(order)
        return TopK(*(torch.from_numpy(values.numpy()[place]) for values in joined))

    @contextmanager
    def saving(self, table: int | str, parts: list[TopK], partial: str = "") -> Iterator[None]:
        """Save the predictions of an unfinished table if an exception occurs. A BadInput then names the table."""
        try:
            yield
        except Stopped:
            self._save(parts, partial)
            raise
        except Exception as error:
            with suppress(BadInput):  # such as a full disk; the first error is the one to report
                self._save(parts, partial)
            if not isinstance(error, BadInput):
                raise
            name = table if isinstance(table, str) else view_file(table)
            raise BadInput(f"{name}: {error}{self._how_to_continue(parts)}") from None

    def _how_to_continue(self, parts: list[TopK]) -> str:
        """The end of an error message: what was saved, and how to continue."""
        views, predicted = len(list(self.out.glob("view-*.safetensors"))), sum(len(part.classes) for part in parts)
        if not views and not predicted:
            return ""
        otherwise = "give another --out" if views else "it starts over"
        return (
            f"; saved in {self.out}: {counted(views, 'view')} and {counted(predicted, 'prediction')} of the next; the "
            f"same command continues with the same images, with others (--skip-corrupt) {otherwise}"
        )

    def _save(self, parts: list[TopK], partial: str) -> None:
        if parts:
            write_table(self.out / PARTIAL, _joined(parts)._asdict(), self.header, partial)

    def _read_partial(self, partial: str, rows: int) -> list[TopK]:
        """The predictions that an interrupted run saved of this table, which has `rows` rows."""
        if not (self.out / PARTIAL).is_file():
            return []
        try:
            tensors = read_table(self.out / PARTIAL, self.header, partial)
        except BadInput:
            return []  # of another table, which was finished after all, or in another order
        count = min(rows, len(tensors.get("classes", ())))
        if targets_fault(tensors, count, self.header["topk"], self.header["num_classes"]):
            return []
        return [TopK(tensors["classes"], tensors["log_probs"])]

    def _commit(self, file: str, tensors: dict[str, Tensor], table: int | str) -> None:
        write_table(self.out / file, tensors, self.header, table)
        (self.out / PARTIAL).unlink(missing_ok=True)


def _joined(parts: list[TopK]) -> TopK:
    return TopK(torch.cat([p.classes for p in parts]), torch.cat([p.log_probs for p in parts]))
