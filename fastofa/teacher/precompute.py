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
from fastofa.methods.targets import Targets
from fastofa.models.timm_models import find_folder, resolve
from fastofa.pipelines import PIPELINES, Pipeline, choose, open_pipeline
from fastofa.system.device import choose_bf16, choose_device, choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import filling, read_info
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.system.progress import Bar, notice, progress_bar
from fastofa.teacher.cache import PARTIAL, VAL, TeacherCache, answers, check_origin, read_table, view_file, write_table
from fastofa.teacher.early import check_cache, other_cache
from fastofa.teacher.header import HEADER, identity, policy_to_json, read_header, write_header
from fastofa.teacher.model import Teacher, check_answers, open_teacher, report_accuracy
from fastofa.teacher.pixels import save_seen
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.table_checks import answers_fault
from fastofa.views.draw import draw_views
from fastofa.views.order import pair_order
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views, center_views

SAVE_EVERY_S = 300  # seconds between two saves of an unfinished view


def precompute(config: PrecomputeConfig) -> TeacherCache:
    """Write or go on with the cache.

    Raises:
        BadInput: see the fields of the configuration; a cache with other arguments in the same place.
        Stopped: by Ctrl-C or SIGTERM, after saving.
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
        "folder": str(Path.cwd()),  # where its relative paths begin
    }
    train_pipeline, val_pipeline = (
        open_pipeline(config.pipeline, d, teacher.image_size, config.batch_size, device, choose_workers(config.workers))
        for d in (train, val)
    )
    header = _begin(config.out, header)
    with Interrupt() as interrupt:
        job = _Job(config.out, header, teacher, config, interrupt)
        job.write_val(val, val_pipeline)
        todo = [view for view in range(config.views) if not job.is_made(view_file(view), view)]
        if todo[:1] == [0]:  # later, the images could be others than those of the answers
            with job.keeping(0, []):
                save_seen(config.out, train_pipeline, draw_views(policy, train.sizes, config.seed, 0))
        job.write_views(todo, train, train_pipeline, policy)
    cache = TeacherCache.open(config.out)
    if cache.views == header["views"]:
        (config.out / PARTIAL).unlink(missing_ok=True)  # of a process that was killed
    return cache


def _check_early(config: PrecomputeConfig) -> torch.device:
    """The device; raises BadInput for what is known before all pictures are decoded, which may take hours."""
    check_cache(config)
    if (config.out / HEADER).exists():
        read_header(config.out)
    config.policy()
    if config.teacher_checkpoint is not None and not config.teacher_checkpoint.exists():
        raise BadInput(f"{config.teacher_checkpoint}: expected a file with weights, found none")
    if config.teacher_checkpoint is not None or find_folder(config.teacher) is None:
        resolve(config.teacher)
    if config.pipeline not in ("auto", *PIPELINES):
        raise BadInput(f"unknown pipeline {config.pipeline!r}: expected auto or one of {', '.join(PIPELINES)}")
    return choose_device(config.device)


def _begin(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Write the header, or find the same one there; returns the one that holds."""
    if not (out / HEADER).exists():
        write_header(out, header)
        return header
    found = read_header(out)
    mine, theirs = identity(header), identity(found)
    different = [key for key in mine if mine[key] != theirs[key]]
    if different and not _may_begin_anew(out, different):
        raise other_cache(out, [f"{key} ({_short(theirs[key])} there, {_short(mine[key])} here)" for key in different])
    if different:
        notice(f"{out}: begins anew, as {' and '.join(different)} changed and no view was finished")
        for file in (VAL, PARTIAL):
            (out / file).unlink(missing_ok=True)
        write_header(out, header)
        return header
    if header["views"] > found["views"]:
        found = {**found, **{name: header[name] for name in ("views", "config", "folder")}}
        write_header(out, found)
    elif header["views"] < found["views"]:
        notice(
            f"{out}: is to hold {counted(found['views'], 'view')} already; with --views {header['views']} none of them "
            "is removed"
        )
    return found


def _may_begin_anew(out: Path, different: list[str]) -> bool:
    """Is nothing finished that took long? With other data (--skip-corrupt, say) validation answers do not count."""
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

    def is_made(self, file: str, table: int | str) -> bool:
        """Is this table of the cache finished? One that is cut short is not. Raises BadInput for another cache's."""
        if not (self.out / file).is_file():
            return False
        try:
            info, _ = read_info(self.out / file)
        except BadInput as error:
            notice(f"{error}: this is done now")
            return False
        check_origin(self.out / file, info, self.header, table)
        return True

    def write_val(self, dataset: Dataset, pipeline: Pipeline) -> None:
        """The teacher's answers for the validation pictures, which also say how good it is."""
        if self.is_made(VAL, VAL):
            return
        views = center_views(dataset.sizes, self.teacher.crop)
        with progress_bar() as bar:
            task = bar.add_task("validation", total=len(dataset), note="")
            found = self._ask(dataset, pipeline, views, VAL, bar, task)
        self._commit(VAL, found._asdict(), VAL)
        correct = found.classes[:, 0].to(torch.int64) == torch.from_numpy(dataset.labels)
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
                found = self._ask(dataset, pipeline, views, view, bar, task)
                columns = {name: torch.from_numpy(column) for name, column in views.columns().items()}
                self._commit(view_file(view), {**columns, **found._asdict()}, view)
                bar.done(task, f"view {view + 1} of {total} done")

    def _ask(
        self, dataset: Dataset, pipeline: Pipeline, views: Views, table: int | str, bar: Bar, task: TaskID
    ) -> Targets:
        """The teacher's answers for every row of a table, in sample order."""
        # As a disk reads the file, and a picture that is mixed with another is read once.
        order = pair_order(views, None if dataset.spans is None else dataset.spans[:, 0])
        partial = f"first rows of {table} in the order {hashlib.sha256(order.tobytes()).hexdigest()}"
        parts = self._read_partial(partial, len(order))
        done = sum(len(part.classes) for part in parts)
        bar.advance(task, done)
        saved_at = time.monotonic()
        with self.keeping(table, parts, partial), closing(pipeline.epoch(views, order, start=done)) as batches:
            for batch in batches:
                found = answers(self.teacher.log_probs(batch.images), self.header["topk"])
                seen = [dataset.names[i] for i in batch.sample_ids.tolist()]
                where = f"view {table}" if isinstance(table, int) else "the validation view"
                check_answers(self.teacher.name, found.log_probs, where, seen)
                parts.append(found)
                bar.advance(task, len(batch.labels))
                if self.interrupt.signum is not None:
                    raise Stopped(f"saved in {self.out}; run the same command again to go on", self.interrupt.signum)
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    self._save(parts, partial)
                    saved_at = time.monotonic()
        in_order, place = _joined(parts), np.argsort(order)
        return Targets(*(torch.from_numpy(values.numpy()[place]) for values in in_order))

    @contextmanager
    def keeping(self, table: int | str, parts: list[Targets], partial: str = "") -> Iterator[None]:
        """Saves the answers of a table whatever ends the work on it; bad input is reported with the table's name."""
        try:
            yield
        except Stopped:
            self._save(parts, partial)
            raise
        except Exception as error:
            with suppress(BadInput):  # a full disk, say: the error that came first counts
                self._save(parts, partial)
            if not isinstance(error, BadInput):
                raise
            name = table if isinstance(table, str) else view_file(table)
            raise BadInput(f"{name}: {error}{self._kept(parts)}") from None

    def _kept(self, parts: list[Targets]) -> str:
        """What an error leaves, and how to go on from it."""
        views, answered = len(list(self.out.glob("view-*.safetensors"))), sum(len(part.classes) for part in parts)
        if not views and not answered:
            return ""
        others = "give another --out" if views else "it begins anew"
        return (
            f"; {self.out} keeps {counted(views, 'view')} and {counted(answered, 'answer')} of the next: the same "
            f"command goes on with the same images, with others (--skip-corrupt) {others}"
        )

    def _save(self, parts: list[Targets], partial: str) -> None:
        if parts:
            write_table(self.out / PARTIAL, _joined(parts)._asdict(), self.header, partial)

    def _read_partial(self, partial: str, most: int) -> list[Targets]:
        """What an interrupted run had of this table, of `most` rows."""
        if not (self.out / PARTIAL).is_file():
            return []
        try:
            tensors = read_table(self.out / PARTIAL, self.header, partial)
        except BadInput:
            return []  # of another table, whose view was finished after all, or from a file of another order
        count = min(most, len(tensors.get("classes", ())))
        if answers_fault(tensors, count, self.header["topk"], self.header["num_classes"]):
            return []
        return [Targets(tensors["classes"], tensors["log_probs"])]

    def _commit(self, file: str, tensors: dict[str, Tensor], table: int | str) -> None:
        write_table(self.out / file, tensors, self.header, table)
        (self.out / PARTIAL).unlink(missing_ok=True)


def _joined(parts: list[Targets]) -> Targets:
    return Targets(torch.cat([p.classes for p in parts]), torch.cat([p.log_probs for p in parts]))
