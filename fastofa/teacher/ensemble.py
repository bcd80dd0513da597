"""One teacher or several, whose predictions are combined into a weighted mean of probabilities, or kept apart.

Every teacher sees the same views with its own normalisation and image size, and the validation images with its own
centre crop. Teachers of one image size share the pixels; for each further size, the pipeline reads the images again.

Shapes: T teachers, B images in a batch, S image side, C classes, K classes kept.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastofa.methods.targets import TopK
from fastofa.pipelines import Batch, Pipeline
from fastofa.system.device import choose_bf16
from fastofa.teacher.cache_columns import best_classes
from fastofa.teacher.compiled_teacher import LogProbsProgram, TopKProgram
from fastofa.teacher.downloads import Columns
from fastofa.teacher.mixture import EachTeacher
from fastofa.teacher.model import Teacher, check_finite, open_teacher
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.views.table import Views, center_views

EACH = "best_of_each"  # a column int32 [B, T]: the best class of each teacher; -1 where its predictions are not finite


@dataclass(frozen=True)
class Ensemble:
    """One teacher or several, whose class names are those of the data."""

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]
    """Weight of each teacher's probabilities; their sum is 1."""
    names: tuple[str, ...]
    """For messages: one teacher's architecture; of several, what the user gave, since architectures may repeat."""
    keep_each: bool = False
    """Whether the predictions of several teachers are stored apart, instead of their mean."""

    @property
    def only(self) -> Teacher:
        """The one teacher."""
        (teacher,) = self.teachers
        return teacher

    @property
    def name(self) -> str:
        """For messages about all of them."""
        return " + ".join(self.names)

    @property
    def device(self) -> torch.device:
        return self.teachers[0].device

    @property
    def image_size(self) -> int:
        """S of the first teacher."""
        return self.teachers[0].image_size

    def describe(self) -> dict[str, Any]:
        """The fields of a cache's header."""
        fields: dict[str, Any] = {"teachers": [teacher.describe() for teacher in self.teachers]}
        if len(self.teachers) > 1:
            fields["teacher_weights"] = list(self.weights)
        return {**fields, "keep_each": True} if self.keep_each else fields

    # --- Images ---

    def same(self, views: Views) -> list[Views]:
        """The same views for every teacher."""
        return [views] * len(self.teachers)

    def centered(self, sizes: np.ndarray) -> list[Views]:
        """Each teacher's centre crops of images of these sizes, int [N, 2]; one table for teachers with the same
        crop."""
        tables = {crop: center_views(sizes, crop) for crop in {teacher.crop for teacher in self.teachers}}
        return [tables[teacher.crop] for teacher in self.teachers]

    def batches(
        self, pipeline: Pipeline, views: Sequence[Views], order: np.ndarray, start: int = 0
    ) -> Generator[tuple[Batch, ...], None, None]:
        """Each teacher's batches of its views, in lockstep. Teachers with the same views and image size share a batch.

        Args:
            pipeline: the loader of the images.
            views: the views of each teacher.
            order: int64, the rows to read, in this order.
            start: position in `order` from which to read.
        """
        inputs = [(id(own), teacher.image_size) for own, teacher in zip(views, self.teachers, strict=True)]
        tables = {id(own): own for own in views}
        with ExitStack() as stack:
            epochs = {
                (table, size): stack.enter_context(closing(pipeline.epoch(tables[table], order, start, size)))
                for table, size in dict.fromkeys(inputs)
            }
            for batches in zip(*epochs.values(), strict=True):
                of_input = dict(zip(epochs, batches, strict=True))
                yield tuple(of_input[key] for key in inputs)

    # --- Predictions ---

    def each(self, *images: Tensor) -> list[Tensor]:
        """uint8 [B, 3, S, S] for each teacher, on `device` -> its log-probabilities fp32 [B, C] at temperature 1."""
        return [teacher.log_probs(own) for teacher, own in zip(self.teachers, images, strict=True)]

    def mean(self, each: Sequence[Tensor]) -> Tensor:
        """The logarithm of the weighted mean of the teachers' probabilities, fp32 [B, C], from their logarithms."""
        if len(each) == 1:
            return each[0]
        weighted = [log_probs + math.log(weight) for log_probs, weight in zip(each, self.weights, strict=True)]
        return torch.logsumexp(torch.stack(weighted), dim=0)

    def program(self, topk: int, batch_size: int, compile_: bool, features: str) -> "Program":
        """`program(*images)`: images as for `each` -> columns of a table, on `device`. The arguments are those of
        `TopKProgram`; several teachers have no features."""
        if len(self.teachers) == 1:
            return TopKProgram(self.only, topk, batch_size, compile_, features)
        if self.keep_each:
            return EachProgram(self, topk, batch_size, compile_)
        return MeanProgram(self, topk, batch_size, compile_)

    def check_finite(self, columns: Columns, view: str, samples: Sequence[str]) -> None:
        """Raises BadInput, which names the teacher, unless all predictions are finite (`model.check_finite`)."""
        if EACH in columns:
            for name, best in zip(self.names, columns[EACH].T, strict=True):
                check_finite(name, torch.where(best < 0, torch.nan, 0.0)[:, None], view, samples)
        named = self._apart(columns) if self.keep_each else [(self.name, columns)]
        for name, own in named:
            check_finite(name, own["log_probs"], view, samples)

    def best(self, columns: Columns, num_classes: int) -> list[tuple[str, Tensor]]:
        """Names, and most probable classes, integer [B]: of each teacher if there are several, and of their mean."""
        if self.keep_each:
            apart = [(name, TopK(**own)) for name, own in self._apart(columns)]
            mean = EachTeacher(tuple(own for _, own in apart), self.weights, num_classes).unpacked()
            return [(name, own.classes[:, 0]) for name, own in (*apart, (self.name, mean))]
        each = zip(self.names, columns[EACH].T, strict=True) if EACH in columns else ()
        return [*each, (self.name, columns["classes"][:, 0])]

    def _apart(self, columns: Columns) -> list[tuple[str, Columns]]:
        """Each teacher's name, and its columns of `EachProgram` under the names that `TopKProgram` uses."""
        numbered = enumerate(self.names, 1)
        return [(name, {field: columns[f"{field}_{i}"] for field in TopK._fields}) for i, name in numbered]


class MeanProgram:
    """`program(*images)`: the columns of `best_classes` for the mean of several teachers, and the column `EACH`.

    Each teacher is a program of its own, so that one that the compiler refuses does not stop the others.
    """

    def __init__(self, ensemble: Ensemble, topk: int, batch_size: int, compile_: bool) -> None:
        self.ensemble, self.topk = ensemble, topk
        self.programs = [LogProbsProgram(teacher, batch_size, compile_) for teacher in ensemble.teachers]

    @property
    def to_compile(self) -> bool:
        """Whether the next call compiles."""
        return any(program.to_compile for program in self.programs)

    @torch.no_grad()
    def __call__(self, *images: Tensor) -> Columns:
        each = [program(own)["log_probs"] for program, own in zip(self.programs, images, strict=True)]
        best = [torch.where(own.isfinite().all(dim=1), own.argmax(dim=1), -1) for own in each]
        columns = best_classes(self.ensemble.mean(each), self.topk)._asdict()
        return {**columns, EACH: torch.stack(best, dim=1).to(torch.int32)}


class EachProgram:
    """`program(*images)`: the columns of `TopKProgram` for each of several teachers, classes_1, log_probs_1, ..."""

    def __init__(self, ensemble: Ensemble, topk: int, batch_size: int, compile_: bool) -> None:
        self.programs = [TopKProgram(teacher, topk, batch_size, compile_) for teacher in ensemble.teachers]

    @property
    def to_compile(self) -> bool:
        """Whether the next call compiles."""
        return any(program.to_compile for program in self.programs)

    def __call__(self, *images: Tensor) -> Columns:
        each = [program(own) for program, own in zip(self.programs, images, strict=True)]
        return {f"{name}_{i}": values for i, own in enumerate(each, 1) for name, values in own.items()}


Program = TopKProgram | MeanProgram | EachProgram


def open_teachers(config: PrecomputeConfig, classes: Sequence[str], device: torch.device) -> Ensemble:
    """Open the teachers of a configuration. An image size or normalisation that is given applies to all of them.

    Raises:
        BadInput: see `open_teacher`.
    """
    mean, std = config.normalization()
    teachers = [
        open_teacher(
            name,
            classes,
            config.teacher_checkpoint,
            config.image_size,
            mean,
            std,
            device,
            choose_bf16(config.precision, device),
            config.teacher_checkpoint_key,
        )
        for name in config.teachers
    ]
    names = config.teachers if len(teachers) > 1 else (teachers[0].name,)
    return Ensemble(tuple(teachers), config.weights, names, config.keep_each)


def kept(columns: Columns) -> Columns:
    """The columns that a cache keeps."""
    return {name: values for name, values in columns.items() if name != EACH}
