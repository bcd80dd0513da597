"""Compute and write the tables of a cache: the validation images, and every view.

Under torchrun, this process is one of several ranks, which share the work (shares.py) and write into one folder. A rank
that takes a whole table writes it. A rank that takes a range of its rows writes a part, and the rank that finishes the
last part joins them. On a GPU, the CPU only queues work: while the teacher computes, the pixels of the next batches are
uploaded and the predictions of the last ones are fetched.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastofa.data.dataset import Dataset
from fastofa.models.normalized import in_words
from fastofa.pipelines import Pipeline
from fastofa.system.errors import BadInput, LostContact, counted
from fastofa.system.files import read_info
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.system.progress import notice
from fastofa.teacher.cache_columns import as_stored, targets_only
from fastofa.teacher.cache_files import CLASSIFIER, VAL, check_origin, view_file, write_table
from fastofa.teacher.downloads import Columns, Downloads
from fastofa.teacher.ensemble import Ensemble, Program, kept
from fastofa.teacher.fidelity import (
    FIDELITY,
    Sample,
    held_back,
    in_one_line,
    measure,
    read_fidelity,
    warning,
    write_fidelity,
)
from fastofa.teacher.model import check_finite_vectors, report_accuracy
from fastofa.teacher.parts import Parts, Range, concatenated, has_parts, remove_parts, rows_in, saved_rows
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.reference_images import save_teacher_images
from fastofa.teacher.shared_bar import SharedBar, shared_bar
from fastofa.teacher.shares import Shares, Work, deal
from fastofa.views.draw import draw_views
from fastofa.views.order import pair_order
from fastofa.views.table import Views, samples_of

SAVE_EVERY_S = 300  # seconds between two saves of an unfinished range of rows


class Source(NamedTuple):
    """Images, and the pipeline that reads them."""

    dataset: Dataset
    pipeline: Pipeline


@dataclass(frozen=True)
class CacheJob:
    """This rank's part in writing a cache; see `open_job`."""

    config: PrecomputeConfig
    header: dict[str, Any]
    teachers: Ensemble
    program: Program
    train: Source
    val: Source
    interrupt: Interrupt
    shares: Shares
    sample: Sample | None = None
    """The predictions for the images held back (fidelity.py), if they are known already."""

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def views(self) -> range:
        """The views to write."""
        return range(self.config.first_view, self.config.views)

    def run(self) -> None:
        """Write all tables that are missing, together with the other ranks."""
        if self.shares.is_main:
            self.write_others()
            self.shares.announce_work(self.missing_work())
        work = self.shares.wait_for_work(self.stop_if_interrupted)
        tables = {VAL, *self.views}
        todo = {part.table for part in work.ranges}
        rows = sum(map(self._count, tables))
        computed = rows - sum(part.stop - part.start for part in work.ranges)
        finished = len(tables - todo - {VAL})
        with shared_bar(self.shares, rows, computed, len(self.views), finished) as bar:
            for index in self.shares.take(work):
                self.compute(work, index, bar)
            if not self.shares.is_main:
                self.shares.wait_for_end(self.stop_if_interrupted)
                return
            if not self.shares.wait_for_others(lambda: self._wait(bar)):
                self.compute_lost(work, bar)
            bar.advance()  # shows what others have finished
        remove_parts(self.out, list(todo))  # ranks that count as lost may have written some after all
        self.shares.announce_end()

    def write_others(self) -> None:
        """Write the files that are not tables of predictions."""
        for name, teacher in zip(self.teachers.names, self.teachers.teachers, strict=True):
            notice(f"teacher {name}: input normalised with {in_words(teacher.mean, teacher.std)}")
        if self.config.features != "none" and not self.is_finished(CLASSIFIER):
            write_table(self.out / CLASSIFIER, self.teachers.only.classifier._asdict(), self.header, CLASSIFIER)
        if 0 in self.views and not self.is_finished(0):  # written with view 0, because the images may change later
            with self.naming(0):
                save_teacher_images(self.out, self.train.pipeline, self._draw(0))
        self.write_fidelity()

    def write_fidelity(self) -> None:
        """Measure how exactly the top K represent the teacher's predictions, before the time is spent on the views."""
        config, topk = self.config, self.header["topk"]
        fidelity = read_fidelity(self.out, self.header)
        if fidelity is None:
            with self.naming(FIDELITY):
                sample = self.sample or held_back(self.teachers, *self.train, config.policy(), config.seed)
            fidelity = measure(sample, topk, config.eps())
            write_fidelity(self.out, self.header, fidelity)
            notice(f"fidelity: {in_one_line(fidelity, topk)}")
            self.stop_if_interrupted()
        if line := warning(fidelity, topk):
            notice(f"fidelity: {line}")

    def missing_work(self) -> Work:
        """What is missing, cut into ranges for all ranks."""
        tables: list[int | str] = [VAL, *self.views]
        todo = [table for table in tables if not self.is_finished(table)]
        remove_parts(self.out, [table for table in tables if table not in set(todo)])  # left behind by a killed process
        missing: list[Range] = []
        saved: list[Range] = []
        for table in todo:
            if not has_parts(self.out, table):
                missing.append(Range(table, 0, self._count(table)))
                continue
            _, _, parts = self.open_table(table)
            found = parts.saved()
            saved += found
            missing += parts.missing(found)
        return Work(deal(missing, self.shares.place.size, self.config.batch_size), saved)

    def is_finished(self, table: int | str) -> bool:
        """Whether this table is finished and not truncated. Raises BadInput if it belongs to another cache."""
        path = self.out / table_file(table)
        if not path.is_file():
            return False
        try:
            info, _ = read_info(path)
        except BadInput as error:
            notice(f"{error}; this file is computed again")
            return False
        check_origin(path, info, self.header, table)
        return True

    def compute(self, work: Work, index: int, bar: SharedBar) -> None:
        """Compute one range of the work, and finish its table if no other range is missing."""
        table, start, stop = work.ranges[index]
        source, views, parts = self.open_table(table)
        whole = stop - start == len(views[0])
        columns = self._predict(source, views, parts, work, index, bar) if start < stop else []
        if whole:
            self._commit(views, table, parts.by_sample(columns), bar)
        elif columns:
            parts.save(start, concatenated(columns))
        if self.shares.finish(work, index) and not whole:
            self.join(work, table, views, parts, bar)
        elif self.is_finished(table):
            remove_parts(self.out, [table])

    def join(self, work: Work, table: int | str, views: list[Views], parts: Parts, bar: SharedBar) -> None:
        """Join the parts of a table, all of which are saved, and write it."""
        with self.naming(table):
            columns = parts.joined(work.starts(table))
        self._commit(views, table, columns, bar)
        remove_parts(self.out, [table])

    def compute_lost(self, work: Work, bar: SharedBar) -> None:
        """Compute the ranges that other ranks had taken and not finished when they died."""
        lost = [index for index in range(len(work.ranges)) if not self.shares.is_done(index)]
        if lost:
            notice(
                f"some ranks no longer respond; rank 0 computes the {counted(len(lost), 'range')} that they had taken"
            )
        for index in lost:
            self.compute(work, index, bar)
        for table in dict.fromkeys(part.table for part in work.ranges):
            if not self.is_finished(table):  # the rank that was to join it died
                _, views, parts = self.open_table(table)
                self.join(work, table, views, parts, bar)

    def open_table(self, table: int | str) -> tuple[Source, list[Views], Parts]:
        """The images of a table, its views for each teacher, and its parts in the order in which the images are
        read."""
        source = self.train if isinstance(table, int) else self.val
        views = self._views(table)
        # In file order, for sequential reads; mixed images follow each other, so that each is read once.
        spans = source.dataset.spans
        order = pair_order(views[0], None if spans is None else spans[:, 0])
        return source, views, Parts(self.out, self.header, table, order)

    def _draw(self, view: int) -> Views:
        return draw_views(self.config.policy(), self.train.dataset.sizes, self.config.seed, view)

    def _views(self, table: int | str) -> list[Views]:
        """The views of a table for each teacher, which differ only in the centre crops of the validation images."""
        if isinstance(table, int):
            return self.teachers.same(self._draw(table))
        return self.teachers.centered(self.val.dataset.sizes)

    def _count(self, table: int | str) -> int:
        return len((self.train if isinstance(table, int) else self.val).dataset)

    def _predict(
        self, source: Source, views: list[Views], parts: Parts, work: Work, index: int, bar: SharedBar
    ) -> list[Columns]:
        """The teacher's predictions for one range, in the order of the table."""
        dataset, pipeline = source
        table, start, stop = work.ranges[index]
        saved_at = time.monotonic()
        downloads = Downloads(self.teachers.device)
        columns: list[Columns] = []

        def keep(arrived: list[Columns]) -> None:
            """Check predictions that follow those in `columns`, and add them."""
            for targets in map(as_stored, arrived):
                first = start + sum(map(rows_in, columns))
                rows = parts.order[first : first + rows_in(targets)]
                names = [dataset.names[i] for i in samples_of(rows, len(dataset)).tolist()]
                which = f"view {table}" if isinstance(table, int) else "the validation view"
                self.teachers.check_finite(targets, which, names)
                if self.config.features == "pooled":
                    check_finite_vectors(self.teachers.name, targets["pooled"], which, names)
                columns.append(targets)
            if arrived:
                bar.advance(sum(map(rows_in, arrived)))

        def save() -> None:
            with suppress(LostContact):
                if self.shares.is_done(index):  # by rank 0, because this rank was silent for too long
                    return
            if columns:
                parts.save(start, concatenated(columns))

        with self.naming(table), self.saving(save):
            try:
                with closing(self.teachers.batches(pipeline, views, parts.order[:stop], start)) as batches:
                    for each in batches:
                        keep(downloads.add(self.program(*(batch.images for batch in each))))
                        self.stop_if_interrupted()
                        if time.monotonic() - saved_at > SAVE_EVERY_S:
                            save()
                            saved_at = time.monotonic()
            finally:  # also after an error, since what was computed is saved
                keep(downloads.finish())
        return columns

    @contextmanager
    def saving(self, save: Callable[[], None]) -> Iterator[None]:
        """Save the predictions of an unfinished range if an exception occurs."""
        try:
            yield
        except Stopped:
            save()
            raise
        except Exception:
            with suppress(BadInput):  # such as a full disk; the first error is the one to report
                save()
            raise

    @contextmanager
    def naming(self, table: int | str) -> Iterator[None]:
        """Add the table's file and how to continue to the message of a BadInput."""
        try:
            yield
        except BadInput as error:
            raise BadInput(f"{table_file(table)}: {error}{self._how_to_continue()}") from None

    def _how_to_continue(self) -> str:
        """The end of an error message: what was saved, and how to continue."""
        views, predicted = len(list(self.out.glob("view-*.safetensors"))), saved_rows(self.out)
        if not views and not predicted:
            return ""
        skip = "requires another --out" if views else "starts over"
        return (
            f"; saved in {self.out}: {counted(views, 'view')} and {counted(predicted, 'prediction')} of the next; "
            f"repeat the command to continue; with --skip-corrupt, it {skip} if that changes the images"
        )

    def _commit(self, views: list[Views], table: int | str, columns: Columns, bar: SharedBar) -> None:
        """Write a finished table."""
        if isinstance(table, int):
            drawn = {name: torch.from_numpy(column) for name, column in views[0].columns().items()}
            write_table(self.out / table_file(table), {**drawn, **kept(columns)}, self.header, table)
            bar.advance(views=1)
            return
        write_table(self.out / VAL, targets_only(columns, self.header), self.header, VAL)
        dataset = self.val.dataset
        for name, best in self.teachers.best(columns, len(dataset.classes)):
            correct = best.to(torch.int64) == torch.from_numpy(dataset.labels)
            report_accuracy(name, float(correct.float().mean()), len(dataset.classes), len(dataset))

    def _wait(self, bar: SharedBar) -> None:
        self.stop_if_interrupted()
        bar.advance()

    def stop_if_interrupted(self) -> None:
        """Raises Stopped after Ctrl-C or SIGTERM."""
        self.interrupt.check(f"saved in {self.out}; run the same command again to continue")


def table_file(table: int | str) -> str:
    """The file of a view, or of another table."""
    return view_file(table) if isinstance(table, int) else table
