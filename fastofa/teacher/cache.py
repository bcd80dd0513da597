"""Read a teacher cache: its views, the teacher's predictions for them, and whether they suit a dataset.

Its files are described in cache_files.py. A cache may grow while it is used: opening it gives the views that are
finished, and a run records a digest of each view that it replays.

Shapes: N samples, C classes, K classes kept, D width of the teacher's pooled vector.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.methods.targets import TopK
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import read_info
from fastofa.system.progress import track
from fastofa.teacher.cache_columns import PREDICTIONS, from_bits, predictions_in, suffixes
from fastofa.teacher.cache_files import CLASSIFIER, VAL, check_origin, read_table, view_file
from fastofa.teacher.cache_header import AGAIN, policy_from_json, read_header
from fastofa.teacher.mixture import EachTeacher
from fastofa.teacher.packed_rows import PackedRows
from fastofa.teacher.table_checks import best_classes_fault, classifier_fault, predictions_fault, views_fault
from fastofa.teacher.teacher_weights import checked_weights
from fastofa.teacher.vectors import Classifier, Vectors
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views


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
            name: from_bits(name, tensor, self.num_samples) for name, tensor in tensors.items() if name not in predicted
        }
        fault = predictions_fault(tensors, self.header, self.num_samples)
        if fault := fault or views_fault(columns, self.policy, self.num_samples):
            raise BadInput(f"{path}: {fault}; delete it and {AGAIN}")
        views = Views(**columns, mean=self.policy.mean, std=self.policy.std)
        vectors = Vectors(tensors["pooled"], tensors.get("pooled_scale")) if self.pooled_dim else None
        return Table(views, predictions_in(tensors, self.header, self.weights()), vectors)

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
        return predictions_in(tensors, self.header, self.weights(weights))

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


def _unpacked(predictions: TopK | PackedRows | EachTeacher) -> TopK:
    return predictions if isinstance(predictions, TopK) else predictions.unpacked()
