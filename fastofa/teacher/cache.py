"""The teacher cache: for each view, the view table and the teacher's top-K predictions for every sample.

    CACHE/cache.json                the header: dataset, teacher, view policy, and the planned number of views
    CACHE/view-00000.safetensors    the columns of `Views` (crop uint16 [N, 4], and the others that the policy draws; a
                                    bool column such as flip as bits, uint8 [N / 8, rounded up])
                                    predictions uint8 [N, R]: packed rows (packed_rows.py) of the K best classes and
                                    their log-probabilities at temperature 1; or, if K = C, classes uint16 or int32
                                    [N, K], best first, and log_probs float16 [N, K]
                                    with --features also pooled float16 [N, D], the input of the teacher's classifier,
                                    or pooled int8 [N, D] with pooled_scale float32 [N]
                                    with --keep-each, the predictions of teacher t are in columns of their own:
                                    predictions_t, or classes_t and log_probs_t, from t = 1 on
    CACHE/classifier.safetensors    only with --features: weight float32 [C, D] and bias float32 [C]
    CACHE/val.safetensors           the same predictions of the validation images, on the teacher's own centre crops
    CACHE/seen.png                  a few images of view 0 as the teacher saw them (reference_images.py)
    CACHE/part-....safetensors      only while `fastofa precompute` runs, or after an interruption: predictions for some
                                    rows of an unfinished table (parts.py)

A cache may grow while it is used: opening it gives the views that are finished, and a run records a digest of each view
that it replays.

Views are stored as parameters, not as seeds, so that a cache replays exactly even if a library changes its random
numbers. No file is a pickle. A cache of schema 3 packs nothing; it is read, and continued in its own form.

Shapes: N samples, B batch, C classes, K classes kept, R bytes of a packed row, D width of the teacher's pooled vector.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.methods.targets import TopK
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import load_tensors, read_info, save_tensors
from fastofa.system.progress import track
from fastofa.teacher.cache_header import AGAIN, SCHEMA, identity, policy_from_json, read_header
from fastofa.teacher.mixture import EachTeacher
from fastofa.teacher.packed_rows import PackedRows, packed, row_format
from fastofa.teacher.table_checks import classifier_fault, packed_fault, targets_fault, vectors_fault, views_fault
from fastofa.teacher.teacher_weights import checked_weights
from fastofa.teacher.vectors import Classifier, Vectors
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views

VAL, CLASSIFIER = "val.safetensors", "classifier.safetensors"
PREDICTIONS = "predictions"  # the column of packed rows
BOOLEAN = ("flip", "bicubic")


class Table(NamedTuple):
    """One view, and what the teacher computed for it."""

    views: Views
    predictions: TopK | PackedRows | EachTeacher
    """The K best classes as the cache stores them."""
    vectors: Vectors | None
    """[N, D]; None if the cache has none."""

    def of_each(self) -> tuple[TopK | PackedRows, ...]:
        """The predictions of each teacher kept; one, unless the cache keeps several apart."""
        return self.predictions.tables if isinstance(self.predictions, EachTeacher) else (self.predictions,)

    def kept(self) -> Tensor:
        """float64 [N]: the probability that the K classes hold; of several teachers, its weighted mean."""
        weights = self.predictions.weights if isinstance(self.predictions, EachTeacher) else (1.0,)
        masses = [_unpacked(own).log_probs.double().exp().sum(dim=1).clamp(max=1) for own in self.of_each()]
        return torch.stack([w * mass for w, mass in zip(weights, masses, strict=True)]).sum(dim=0)

    @property
    def targets(self) -> TopK:
        """classes uint16 or int32 [N, K], log_probs fp32 or, if they are not packed, float16 [N, K]. Of several
        teachers kept apart, the best classes of their mean (`mixture.mix`)."""
        return _unpacked(self.predictions)


@dataclass(frozen=True)
class TeacherCache:
    """A cache opened for reading."""

    path: Path
    header: dict[str, Any]
    views: int
    """The number of finished views, from view `first` on; a multiple of the policy's `repeats`."""
    first: int = 0
    """The first finished view; above 0 only in a part of a cache, made with `precompute --first-view`."""

    @classmethod
    def open(cls, path: str | Path, part: bool = False) -> "TeacherCache":
        """Open a cache.

        Args:
            path: its folder.
            part: also accept a part of a cache, made with `precompute --first-view`; its finished views are those from
                that view on. Students learn only from whole caches.

        Raises:
            BadInput: not a cache, no finished views, no validation predictions, or another schema version.
        """
        path = Path(path)
        header = read_header(path)
        repeats = policy_from_json(header["policy"]).repeats
        planned_first = header.get("first_view", 0)
        first = planned_first if part else 0
        end = next(view for view in itertools.count(first) if not (path / view_file(view)).is_file())
        views = (min(end, header["views"]) - first) // repeats * repeats
        others = (VAL, CLASSIFIER) if "features" in header else (VAL,)
        needed = (*map(view_file, range(first + views, first + repeats)), *others)
        missing = [file for file in needed if not (path / file).is_file()]
        if missing:
            remedy = f"{AGAIN}, it continues where it stopped"
            if planned_first > first:
                remedy = (
                    f"run `fastofa cache merge` to join this part, which begins with view {planned_first}, with the "
                    "others, or `fastofa precompute` again without --first-view"
                )
            raise BadInput(
                f"{path}: expected the validation predictions and at least {repeats} of {header['views']} views, but "
                f"{missing[0]} is missing; {remedy}"
            )
        cache = cls(path, header, views, first)
        cache.val_predictions()
        cache.classifier()
        return cache

    @property
    def finished(self) -> str:
        """The number of finished views; if some are missing, "n of total"."""
        total = self.header["views"] - self.first
        return f"{total}" if self.views == total else f"{self.views} of {total}"

    @property
    def finished_views(self) -> str:
        """The finished views in words: "1 view", "2 of 4 views", "2 views from view 3 on"."""
        from_view = f" from view {self.first} on" if self.first else ""
        return f"{self.finished} view{'s' * (self.finished != '1')}{from_view}"

    @property
    def num_samples(self) -> int:
        return self.header["num_samples"]

    @property
    def num_classes(self) -> int:
        return self.header["num_classes"]

    @property
    def classes(self) -> tuple[str, ...]:
        """The dataset's class names; `classes` of the targets are indices into them."""
        return tuple(self.header["classes"])

    @property
    def topk(self) -> int:
        return self.header["topk"]

    @property
    def policy(self) -> ViewPolicy:
        return policy_from_json(self.header["policy"])

    @property
    def teacher_dim(self) -> int:
        """The number of features before the teacher's classifier; of several teachers, the largest."""
        return max(teacher["num_features"] for teacher in self.header["teachers"])

    @property
    def keeps_each(self) -> bool:
        """Whether the predictions of several teachers are kept apart, so that a run can weigh them."""
        return self.header.get("keep_each", False)

    def weights(self, given: Sequence[float] | None = None) -> tuple[float, ...] | None:
        """The weights of teachers kept apart: those given, or those of the cache. None if it keeps one prediction.

        Raises:
            BadInput: the weights do not suit the number of teachers, or the cache keeps one prediction.
        """
        if self.keeps_each:
            teachers = len(self.header["teachers"])
            return checked_weights(given or self.header["teacher_weights"], teachers, f"teacher of {self.path}")
        if given is not None:
            raise BadInput(
                f"teacher-weights: expected a cache made with `fastofa precompute --keep-each`, got {self.path}, which "
                "holds one prediction per image; leave them out"
            )
        return None

    @property
    def features(self) -> str:
        """none, pooled or pooled-int8: what the cache stores beside the top K."""
        return self.header.get("features", {}).get("kind", "none")

    @property
    def pooled_dim(self) -> int:
        """D; 0 if the cache has no vectors."""
        return self.header.get("features", {}).get("width", 0)

    def digests(self, count: int) -> tuple[str, ...]:
        """A digest of each of the first `count` views: the first 16 hexadecimal digits of its file's checksum.

        Raises:
            BadInput: fewer views are finished, or a file is truncated or from another cache.
        """
        if count > self.views:
            raise BadInput(f"{self.path}: expected {counted(count, 'view')}, finished: {self.finished}; {AGAIN}")
        digests = []
        for view in range(count):
            path = self.path / view_file(view)
            info, checksum = read_info(path)
            check_origin(path, info, self.header, view)
            digests.append(checksum[:16])
        return tuple(digests)

    def targets(self, view: int) -> tuple[Views, Tensor, Tensor]:
        """The view and the targets of `table`: (views, classes uint16 or int32 [N, K], log_probs floating [N, K])."""
        table = self.table(view)
        return table.views, table.targets.classes, table.targets.log_probs

    def table(self, view: int) -> Table:
        """One view and everything stored for it, with checksum and values checked.

        Raises:
            BadInput: the file is truncated, edited or from another cache, or contains impossible values.
        """
        if not self.first <= view < self.first + self.views:
            last = self.first + self.views - 1
            raise BadInput(f"{self.path}: expected a view from {self.first} to {last}, got {view}")
        path = self.path / view_file(view)
        tensors = read_table(path, self.header, view)
        predicted = {name + suffix for name in (PREDICTIONS, *TopK._fields) for suffix in suffixes(self.header)}
        predicted |= set(Vectors._fields) if self.pooled_dim else set()
        columns = {
            name: _flags(name, tensor, self.num_samples) for name, tensor in tensors.items() if name not in predicted
        }
        fault = predictions_fault(tensors, self.header, self.num_samples)
        if fault := fault or views_fault(columns, self.policy, self.num_samples):
            raise BadInput(f"{path}: {fault}; delete it and {AGAIN}")
        views = Views(**columns, mean=self.policy.mean, std=self.policy.std)
        vectors = Vectors(tensors["pooled"], tensors.get("pooled_scale")) if self.pooled_dim else None
        return Table(views, _predictions(tensors, self.header, self.weights()), vectors)

    def classifier(self) -> Classifier | None:
        """The teacher's classifier, with checksum and values checked; None if the cache has no vectors."""
        if not self.pooled_dim:
            return None
        path = self.path / CLASSIFIER
        tensors = read_table(path, self.header, CLASSIFIER)
        if fault := classifier_fault(tensors, self.num_classes, self.pooled_dim):
            raise BadInput(f"{path}: {fault}; delete it and {AGAIN}")
        return Classifier(tensors["weight"], tensors["bias"])

    def val_targets(self, weights: tuple[float, ...] | None = None) -> TopK:
        """The teacher's predictions for the validation images, checked like those of `targets`; those of teachers kept
        apart with these weights, or those of the cache."""
        return _unpacked(self.val_predictions(weights))

    def val_predictions(self, weights: tuple[float, ...] | None = None) -> TopK | PackedRows | EachTeacher:
        """The same as the cache stores them."""
        path = self.path / VAL
        tensors = read_table(path, self.header, VAL)
        if fault := best_classes_fault(tensors, self.header, self.header["num_val_samples"]):
            raise BadInput(f"{path}: {fault}; delete it and {AGAIN}")
        return _predictions(tensors, self.header, self.weights(weights))

    def verify(self) -> None:
        """Read every finished table, compare its checksum and its origin, and check its values.

        Raises:
            BadInput: for the first table that is wrong, or a view that is missing although later ones exist.
        """
        title, total = f"verifying {self.path}", self.views * self.num_samples
        finished = range(self.first, self.first + self.views)
        for view in track(finished, total, title, lambda _: self.num_samples):
            self.table(view)
        self.val_predictions()
        self.classifier()
        exists = [(self.path / view_file(view)).is_file() for view in range(self.first, self.header["views"])]
        if exists != sorted(exists, reverse=True):
            missing = view_file(self.first + exists.index(False))
            raise BadInput(f"{self.path}: {missing} is missing although later views exist; {AGAIN}")

    def check(self, dataset: Dataset, policy: ViewPolicy, other_pixels: bool = False) -> None:
        """Raises BadInput unless the cache was made from this dataset with this policy.

        Args:
            dataset: the training images.
            policy: how the run's views are drawn.
            other_pixels: accept other content of the images if their names, labels and classes are the same.
        """
        name = f"cache {self.path}"
        if self.num_classes != len(dataset.classes):
            classes = counted(len(dataset.classes), "class")
            raise BadInput(
                f"{name}: expected the {classes} of {dataset.spec}, got {self.num_classes}, of "
                f"{self.header['dataset']['spec']}; run `fastofa precompute` on that dataset with another --out"
            )
        if self.classes != dataset.classes:
            pairs = zip(dataset.classes, self.classes, strict=True)
            expected, actual = next(pair for pair in pairs if pair[0] != pair[1])
            raise BadInput(
                f"{name}: expected the classes of {dataset.spec} in their order, got {actual!r} instead of "
                f"{expected!r}; run `fastofa precompute` on that dataset with another --out"
            )
        made_from = self.header["dataset"]
        if (made_from[dataset.split], self.num_samples) != (dataset.fingerprint, len(dataset)):
            cached = f"{counted(self.num_samples, 'sample')}, sha256 {made_from[dataset.split]:.12}"
            current = f"{counted(len(dataset), 'sample')}, sha256 {dataset.fingerprint:.12}"
            only_pixels = made_from.get("train_samples") == dataset.samples_fingerprint
            if not (only_pixels and other_pixels):
                samples = " of the same names and labels" if only_pixels else ""
                accept = ", or accept the other pixels with --allow-mismatch pixels" if only_pixels else ""
                raise BadInput(
                    f"{name}: expected one made from {dataset.spec} in its present state ({current}), got one made "
                    f"from {made_from['spec']} ({cached}){samples}; run `fastofa precompute` on that dataset with "
                    f"another --out{accept}"
                )
        requested, cached_policy = dataclasses.asdict(policy), dataclasses.asdict(self.policy)
        different = [field for field in requested if requested[field] != cached_policy[field]]
        expected, actual = (
            ", ".join(f"{field}={values[field]}" for field in different) for values in (requested, cached_policy)
        )
        if different:
            raise BadInput(
                f"{name}: expected views drawn with ({expected}), got ({actual}); omit the flags or precompute again"
            )


def best_classes(log_probs: Tensor, topk: int) -> TopK:
    """The K most probable classes of log_probs [B, C] (fp32), and their log-probabilities, on the same device.

    Returns:
        classes [B, K], best first: int32 if C > 65,536, else int16 with the bits of uint16, which has few operations;
        and log_probs [B, K]: fp32, which the cache packs, or float16 if all classes are kept.
    """
    values, classes = log_probs.topk(topk, dim=-1)
    narrow, dense = log_probs.shape[-1] <= 1 << 16, topk == log_probs.shape[-1]
    return TopK(classes.to(torch.int16 if narrow else torch.int32), values.half() if dense else values)


def predictions_fault(tensors: dict[str, Tensor], header: dict[str, Any], count: int) -> str:
    """Check the columns that the teacher computed for `count` images. Returns a fault, or ""."""
    fault = best_classes_fault(tensors, header, count)
    if fault or "features" not in header:
        return fault
    return vectors_fault(tensors, count, **header["features"])


def best_classes_fault(tensors: dict[str, Tensor], header: dict[str, Any], count: int) -> str:
    """Check the K best classes of `count` images, packed or not, of each teacher kept. Returns a fault, or ""."""
    rows = row_format(header["topk"], header["num_classes"])
    for suffix in suffixes(header):
        own = _of_teacher(tensors, suffix)
        if rows is not None and PREDICTIONS in own:
            fault = packed_fault(own[PREDICTIONS], count, rows)
        else:
            fault = targets_fault(own, count, header["topk"], header["num_classes"])
        if fault:
            return f"teacher {suffix[1:]}: {fault}" if suffix else fault
    return ""


def suffixes(header: dict[str, Any]) -> tuple[str, ...]:
    """What follows the names of a teacher's columns: "" if the cache keeps one prediction, else "_1", "_2", ..."""
    if not header.get("keep_each"):
        return ("",)
    return tuple(f"_{teacher}" for teacher in range(1, len(header["teachers"]) + 1))


def targets_only(columns: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """The classes and log_probs among the columns of a table, of each teacher kept."""
    return {name + suffix: columns[name + suffix] for suffix in suffixes(header) for name in TopK._fields}


def _of_teacher(columns: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """The predictions of one teacher, by names without its suffix."""
    return {name: columns[name + suffix] for name in (PREDICTIONS, *TopK._fields) if name + suffix in columns}


def as_stored(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns of a table on the CPU as `write_table` takes them: int16 classes of `best_classes` become uint16."""
    return {
        name: values.view(torch.uint16) if name.startswith("classes") and values.dtype == torch.int16 else values
        for name, values in columns.items()
    }


def topk_targets(log_probs: Tensor, topk: int) -> TopK:
    """The K most probable classes of log_probs [B, C] (fp32), and their log-probabilities, before they are packed.

    Returns:
        On the CPU: classes uint16 (int32 if C > 65,536) [B, K], best first, and log_probs fp32 (float16 if K = C)
        [B, K].
    """
    columns = best_classes(log_probs, topk)._asdict()
    return TopK(**as_stored({name: values.cpu() for name, values in columns.items()}))


def view_file(view: int) -> str:
    return f"view-{view:05d}.safetensors"


def views_in(path: Path, header: dict[str, Any]) -> list[int]:
    """The numbers of the views whose files exist, in ascending order."""
    return [view for view in range(header["views"]) if (path / view_file(view)).is_file()]


def write_table(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], table: int | str) -> None:
    """Write the table of a view (`table` is its number) or another table; the file records the cache's identity.

    Args:
        tensors: columns as `as_stored` returns them. Finished predictions are packed, unless the cache has schema 3.
    """
    if isinstance(table, int) or table == VAL:
        tensors = packed_columns(tensors, header) if header.get("schema", SCHEMA) == SCHEMA else _rounded(tensors)
    save_tensors(path, tensors, {"table": table, "cache": identity(header)})


def packed_columns(columns: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """The columns of a view with bool columns as bits and, if K < C, the predictions as packed rows."""
    columns = {
        name: torch.from_numpy(np.packbits(values.numpy())) if values.dtype == torch.bool else values
        for name, values in columns.items()
    }
    for suffix in suffixes(header):
        own = _of_teacher(columns, suffix)
        predictions = packed(TopK(**own), header["num_classes"]) if "classes" in own else None
        if isinstance(predictions, PackedRows):
            others = {name: values for name, values in columns.items() if name.removesuffix(suffix) not in own}
            columns = {**others, PREDICTIONS + suffix: predictions.rows}
    return columns


def _rounded(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns as schema 3 has them, with log_probs float16."""
    return {name: values.half() if name == "log_probs" else values for name, values in columns.items()}


def _predictions(
    columns: dict[str, Tensor], header: dict[str, Any], weights: tuple[float, ...] | None
) -> TopK | PackedRows | EachTeacher:
    rows = row_format(header["topk"], header["num_classes"])
    each: list[TopK | PackedRows] = []
    for suffix in suffixes(header):
        own = _of_teacher(columns, suffix)
        if rows is not None and PREDICTIONS in own:
            each.append(PackedRows(own[PREDICTIONS], rows))
        else:
            each.append(TopK(**own))
    return each[0] if weights is None else EachTeacher(tuple(each), weights, header["num_classes"])


def _unpacked(predictions: TopK | PackedRows | EachTeacher) -> TopK:
    return predictions if isinstance(predictions, TopK) else predictions.unpacked()


def _flags(name: str, values: Tensor, count: int) -> np.ndarray:
    """A column of a view of `count` samples; bits become bool [N]."""
    if name in BOOLEAN and values.dtype == torch.uint8 and values.shape == (-(-count // 8),):
        return np.unpackbits(values.numpy(), count=count).view(bool)
    return values.numpy()


def read_table(path: Path, header: dict[str, Any], table: int | str) -> dict[str, Tensor]:
    """Read a table. Raises BadInput if it is missing, truncated, edited, or from another cache."""
    tensors, info = load_tensors(path)
    check_origin(path, info, header, table)
    return tensors


def check_origin(path: Path | str, info: dict[str, Any], header: dict[str, Any], table: int | str) -> None:
    """Raises BadInput unless the metadata of a file (`info`) name this table of this cache."""
    if info != {"table": table, "cache": identity(header)}:
        expected = f"view {table}" if isinstance(table, int) else table
        raise BadInput(
            f"{path}: expected {expected} of this cache, got a table of another view or another cache; delete it, and "
            f"{AGAIN}"
        )


def agreement(predicted: np.ndarray, targets: TopK) -> float:
    """The fraction of samples for which `predicted` (class indices [N]) is the teacher's most probable class."""
    return float((predicted == targets.classes[:, 0].to(torch.int64).numpy()).mean())
