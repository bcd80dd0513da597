"""Run the teacher once on every view of every image, and write its predictions as a teacher cache.

An interrupted run continues where it stopped; more views can be added later. On a GPU, the CPU only queues work: the
pixels of the next batches are uploaded and the predictions of the last ones are fetched while the teacher computes.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import TaskID
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.methods.targets import TopK
from fastofa.models.normalized import in_words
from fastofa.models.timm_models import find_folder, resolve
from fastofa.pipelines import PIPELINES, Pipeline, choose, open_pipeline
from fastofa.system.device import choose_bf16, choose_compile, choose_device, choose_workers
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import filling, read_info
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.system.progress import Bar, notice, progress_bar
from fastofa.teacher.cache import (
    CLASSIFIER,
    PARTIAL,
    VAL,
    TeacherCache,
    as_stored,
    check_origin,
    predictions_fault,
    read_table,
    view_file,
    write_table,
)
from fastofa.teacher.cache_header import HEADER, identity, policy_to_json, read_header, united, write_header
from fastofa.teacher.compiled_teacher import TopKProgram
from fastofa.teacher.downloads import Columns, Downloads
from fastofa.teacher.model import Teacher, check_finite, check_finite_vectors, open_teacher, report_accuracy
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.quick_checks import check_cache, other_cache
from fastofa.teacher.reference_images import save_teacher_images
from fastofa.views.draw import draw_views
from fastofa.views.order import pair_order
from fastofa.views.table import Views, center_views, samples_of

SAVE_EVERY_S = 300  # seconds between two saves of an unfinished view


def precompute(config: PrecomputeConfig) -> TeacherCache:
    """Write a teacher cache, or continue an unfinished one.

    Raises:
        BadInput: a value of the configuration is invalid, or --out contains a cache made with other arguments.
        Stopped: after Ctrl-C or SIGTERM; the predictions so far are saved.
    """
    device = _check_early(config)
    with filling(config.out):
        train, val = (
            open_dataset(config.data, split, config.skip_corrupt, check=True, limits=config.limits())
            for split in ("train", "val")
        )
        with Interrupt() as interrupt:
            open_job(config, train, val, device, interrupt).run()
        cache = TeacherCache.open(config.out, part=config.first_view > 0)
        if cache.first + cache.views == cache.header["views"]:
            (config.out / PARTIAL).unlink(missing_ok=True)  # left behind by a process that was killed
    return cache


def open_job(
    config: PrecomputeConfig, train: Dataset, val: Dataset, device: torch.device, interrupt: Interrupt
) -> "CacheJob":
    """Open the teacher and the pipelines, and begin the cache or compare it with the existing one.

    Raises:
        BadInput: see `precompute`.
    """
    if config.topk > len(train.classes):
        classes = counted(len(train.classes), "class")
        raise BadInput(f"topk: expected at most the {classes} of {config.data}, got {config.topk}")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    mean, std = config.normalization()
    teacher = open_teacher(
        config.teacher,
        train.classes,
        config.teacher_checkpoint,
        config.image_size,
        mean,
        std,
        device,
        choose_bf16(config.precision, device),
        config.teacher_checkpoint_key,
    )
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
        "teachers": [teacher.describe()],
        "pipeline": choose(train, device)[0] if config.pipeline == "auto" else config.pipeline,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
        "config": config.to_json(),  # for `precompute --config`
        "folder": str(Path.cwd()),  # to which its relative paths refer
    }
    train_source, val_source = (
        Source(
            data,
            open_pipeline(
                config.pipeline, data, teacher.image_size, config.batch_size, device, choose_workers(config.workers)
            ),
        )
        for data in (train, val)
    )
    if config.features != "none":
        header["features"] = {"kind": config.features, "width": _vector_width(teacher, train_source)}
    compile_ = choose_compile(config.compile, device)
    program = TopKProgram(teacher, config.topk, config.batch_size, compile_, config.features)
    return CacheJob(config, _begin(config.out, header), program, train_source, val_source, interrupt)


def _vector_width(teacher: Teacher, source: "Source") -> int:
    """D, from the first batch. Raises BadInput unless the teacher's logits are linear in its pooled vectors."""
    views = center_views(source.dataset.sizes, teacher.crop)
    with closing(source.pipeline.epoch(views, np.arange(len(views)))) as batches:
        try:
            return teacher.check_linear_head(next(batches).images)
        except BadInput as error:
            raise BadInput(f"{error}; leave --features out, or choose another teacher") from None


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
    device = choose_device(config.device)
    choose_compile(config.compile, device)
    return device


def _begin(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Write the header, or compare it with an existing one. Returns the header that is now in cache.json."""
    if not (out / HEADER).exists():
        write_header(out, header)
        return header
    existing = read_header(out)
    new, old = identity(header), identity(existing)
    different = [key for key in {**new, **old} if new.get(key) != old.get(key)]
    if different and not _may_start_over(out, different):
        pairs = [(key, _short(old.get(key, "none")), _short(new.get(key, "none"))) for key in different]
        raise other_cache(out, [f"{key} (cached: {cached}, given: {given})" for key, cached, given in pairs])
    if different:
        notice(f"{out}: starts over, because {' and '.join(different)} changed and no view was finished")
        for file in (VAL, PARTIAL, CLASSIFIER):
            (out / file).unlink(missing_ok=True)
        write_header(out, header)
        return header
    if header["views"] < existing["views"]:
        notice(f"{out}: was started with --views {existing['views']}; --views {header['views']} removes none of them")
    grown = united(existing, header)
    if grown != existing:
        write_header(out, grown)
    return grown


def _may_start_over(out: Path, different: list[str]) -> bool:
    """Whether starting over loses no work: no view is finished, nor validation predictions unless only data changed."""
    data_only = set(different) <= {"dataset", "classes"}
    return not any(out.glob("view-*.safetensors")) and (data_only or not (out / VAL).exists())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


class Source(NamedTuple):
    """Images, and the pipeline that reads them."""

    dataset: Dataset
    pipeline: Pipeline


@dataclass(frozen=True)
class CacheJob:
    """A cache that is being written; see `open_job`."""

    config: PrecomputeConfig
    header: dict[str, Any]
    program: TopKProgram
    train: Source
    val: Source
    interrupt: Interrupt

    @property
    def out(self) -> Path:
        return self.config.out

    def run(self) -> None:
        """Write all tables that are missing."""
        teacher = self.program.teacher
        notice(f"teacher {teacher.name}: input normalised with {in_words(teacher.mean, teacher.std)}")
        if self.config.features != "none" and not self.is_finished(CLASSIFIER, CLASSIFIER):
            write_table(self.out / CLASSIFIER, teacher.classifier._asdict(), self.header, CLASSIFIER)
        self.write_val()
        views = range(self.config.first_view, self.config.views)
        todo = [view for view in views if not self.is_finished(view_file(view), view)]
        if todo[:1] == [0]:  # written with view 0, because the images may change later
            with self.saving(0, []):
                save_teacher_images(self.out, self.train.pipeline, self._draw(0))
        self.write_views(todo)

    def is_finished(self, file: str, table: int | str) -> bool:
        """Whether this table of the cache is finished, and not truncated. Raises BadInput if it is another cache's."""
        if not (self.out / file).is_file():
            return False
        try:
            info, _ = read_info(self.out / file)
        except BadInput as error:
            notice(f"{error}; this file is computed again")
            return False
        check_origin(self.out / file, info, self.header, table)
        return True

    def write_val(self) -> None:
        """Write the teacher's predictions for the validation images, and report its accuracy."""
        if self.is_finished(VAL, VAL):
            return
        dataset, teacher = self.val.dataset, self.program.teacher
        views = center_views(dataset.sizes, teacher.crop)
        with progress_bar() as bar:
            task = bar.add_task("validation", total=len(dataset), note="")
            targets = self._predict(self.val, views, VAL, bar, task)
        self._commit(VAL, {name: targets[name] for name in TopK._fields}, VAL)
        correct = targets["classes"][:, 0].to(torch.int64) == torch.from_numpy(dataset.labels)
        report_accuracy(teacher.name, float(correct.float().mean()), len(dataset.classes), len(dataset))

    def write_views(self, todo: list[int]) -> None:
        """Write these views of the training images."""
        if not todo:
            return
        total, images = self.config.views, len(self.train.dataset)
        with progress_bar() as bar:
            done = (total - len(todo)) * images
            task = bar.add_task("precompute", total=total * images, completed=done, note="")
            for view in todo:
                bar.update(task, note=f"view {view + 1} of {total}")
                views = self._draw(view)
                targets = self._predict(self.train, views, view, bar, task)
                columns = {name: torch.from_numpy(column) for name, column in views.columns().items()}
                self._commit(view_file(view), {**columns, **targets}, view)
                bar.done(task, f"view {view + 1} of {total} done")

    def _draw(self, view: int) -> Views:
        return draw_views(self.config.policy(), self.train.dataset.sizes, self.config.seed, view)

    def _predict(self, source: Source, views: Views, table: int | str, bar: Bar, task: TaskID) -> Columns:
        """The teacher's predictions for every row of a table, in the order of sample ids."""
        dataset, pipeline = source
        # In file order, for sequential reads; mixed images follow each other, so that each is read once.
        order = pair_order(views, None if dataset.spans is None else dataset.spans[:, 0])
        partial = f"first rows of {table} in the order {hashlib.sha256(order.tobytes()).hexdigest()}"
        parts = self._read_partial(partial, len(order))
        bar.advance(task, _rows(parts))
        saved_at = time.monotonic()
        teacher, downloads = self.program.teacher, Downloads(self.program.teacher.device)

        def keep(arrived: list[Columns]) -> None:
            """Check predictions that follow those in `parts`, and add them."""
            for targets in map(as_stored, arrived):
                first = _rows(parts)
                rows = order[first : first + _rows([targets])]
                names = [dataset.names[i] for i in samples_of(rows, len(dataset)).tolist()]
                which = f"view {table}" if isinstance(table, int) else "the validation view"
                check_finite(teacher.name, targets["log_probs"], which, names)
                if self.config.features == "pooled":
                    check_finite_vectors(teacher.name, targets["pooled"], which, names)
                parts.append(targets)
                bar.advance(task, len(rows))

        with self.saving(table, parts, partial):
            try:
                with closing(pipeline.epoch(views, order, start=_rows(parts))) as batches:
                    for batch in batches:
                        keep(downloads.add(self.program(batch.images)))
                        if self.interrupt.signum is not None:
                            message = f"saved in {self.out}; run the same command again to continue"
                            raise Stopped(message, self.interrupt.signum)
                        if time.monotonic() - saved_at > SAVE_EVERY_S:
                            self._save(parts, partial)
                            saved_at = time.monotonic()
            finally:  # also after an error, since what was computed is saved
                keep(downloads.finish())
        place = np.argsort(order)
        return {name: torch.from_numpy(values.numpy()[place]) for name, values in _joined(parts).items()}

    @contextmanager
    def saving(self, table: int | str, parts: list[Columns], partial: str = "") -> Iterator[None]:
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

    def _how_to_continue(self, parts: list[Columns]) -> str:
        """The end of an error message: what was saved, and how to continue."""
        views, predicted = len(list(self.out.glob("view-*.safetensors"))), _rows(parts)
        if not views and not predicted:
            return ""
        skip = "requires another --out" if views else "starts over"
        return (
            f"; saved in {self.out}: {counted(views, 'view')} and {counted(predicted, 'prediction')} of the next; "
            f"repeat the command to continue; with --skip-corrupt, it {skip} if that changes the images"
        )

    def _save(self, parts: list[Columns], partial: str) -> None:
        if parts:
            write_table(self.out / PARTIAL, _joined(parts), self.header, partial)

    def _read_partial(self, partial: str, rows: int) -> list[Columns]:
        """The predictions that an interrupted run saved of this table, which has `rows` rows."""
        if not (self.out / PARTIAL).is_file():
            return []
        try:
            tensors = read_table(self.out / PARTIAL, self.header, partial)
        except BadInput:
            return []  # of another table, which was finished after all, or in another order
        count = min(rows, len(tensors.get("classes", ())))
        return [] if predictions_fault(tensors, self.header, count) else [tensors]

    def _commit(self, file: str, tensors: dict[str, Tensor], table: int | str) -> None:
        write_table(self.out / file, tensors, self.header, table)
        (self.out / PARTIAL).unlink(missing_ok=True)


def _rows(parts: list[Columns]) -> int:
    return sum(len(part["classes"]) for part in parts)


def _joined(parts: list[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
