"""The teacher is a table: for each view, the view itself and the teacher's top-K answer for every sample.

    CACHE/cache.json                what it was made from, and how many views it is to hold
    CACHE/view-00000.safetensors    the columns of `Views` (crop uint16 [N, 4], flip bool [N], and what else the policy
                                    draws), classes uint16 or int32 [N, K], best first, log_probs float16 [N, K] at
                                    temperature 1
    CACHE/val.safetensors           classes and log_probs of the validation pictures, on the teacher's own centre crops
    CACHE/seen.png                  a few pictures of view 0 as the teacher saw them (seen.py)
    CACHE/partial.safetensors       only while `fastofa precompute` is interrupted: the answers it had for the next view
                                    (a view that mixes: in the order of its pairs)

A cache may grow while it is used: it opens at the views that are finished, and a run keeps a digest of each view that
it replays.

Stored parameters, not seeds: a cache replays exactly even if a library changes its random stream. No pickle anywhere.

Shapes: N samples, B batch, C classes, K classes kept.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.methods.targets import Targets
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import load_tensors, read_info, save_tensors
from fastofa.system.progress import track
from fastofa.teacher.header import AGAIN, HEADER, identity, policy_from_json, read_header
from fastofa.teacher.table_checks import answers_fault, views_fault
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views

VAL, PARTIAL = "val.safetensors", "partial.safetensors"


@dataclass(frozen=True)
class TeacherCache:
    """A cache opened for reading. Its header's values are attributes."""

    path: Path
    header: dict[str, Any]
    views: int
    """Those that are finished, from view 0 on; whole groups of the policy's `repeats`."""

    @classmethod
    def open(cls, path: str | Path) -> "TeacherCache":
        """Raises BadInput: no cache, one without a finished view or the validation answers, another schema."""
        path = Path(path)
        header = read_header(path)
        repeats = policy_from_json(header["policy"]).repeats
        views = next(view for view in itertools.count() if not (path / view_file(view)).is_file())
        views = min(views, header["views"]) // repeats * repeats
        missing = [file for file in (*map(view_file, range(views, repeats)), VAL) if not (path / file).is_file()]
        if missing:
            raise BadInput(
                f"{path}: expected the validation answers and {repeats} or more of its {header['views']} views, "
                f"{missing[0]} is missing; {AGAIN}, it goes on where it stopped"
            )
        cache = cls(path, header, views)
        cache.val_targets()
        return cache

    @property
    def finished(self) -> str:
        """How many views, and if some are missing, of how many."""
        total = self.header["views"]
        return f"{total}" if self.views == total else f"{self.views} of {total}"

    @property
    def num_samples(self) -> int:
        return self.header["num_samples"]

    @property
    def num_classes(self) -> int:
        return self.header["num_classes"]

    @property
    def classes(self) -> tuple[str, ...]:
        """The data set's class names, in the order of the teacher's answers."""
        return tuple(self.header["classes"])

    @property
    def topk(self) -> int:
        return self.header["topk"]

    @property
    def policy(self) -> ViewPolicy:
        return policy_from_json(self.header["policy"])

    @property
    def teacher_dim(self) -> int:
        """Width of the teacher's last features."""
        return self.header["teachers"][0]["num_features"]

    def digests(self, count: int) -> tuple[str, ...]:
        """Of the first `count` views: the beginning of the checksum of everything in the file, and of what it is made
        from. Only the files' headers are read.

        Raises:
            BadInput: there are not so many; truncated or from another cache.
        """
        if count > self.views:
            raise BadInput(f"{self.path}: expected {counted(count, 'view')}, finished: {self.finished}; {AGAIN}")
        found = []
        for view in range(count):
            path = self.path / view_file(view)
            info, checksum = read_info(path)
            check_origin(path, info, self.header, view)
            found.append(checksum[:16])
        return tuple(found)

    def targets(self, view: int) -> tuple[Views, Tensor, Tensor]:
        """(views, classes [N, K], log_probs [N, K]) of one view, its checksum verified and its values checked.

        Raises:
            BadInput: truncated, edited, a file from another cache, or values that cannot be.
        """
        if not 0 <= view < self.views:
            raise BadInput(f"{self.path}: expected a view from 0 to {self.views - 1}, got {view}")
        path = self.path / view_file(view)
        tensors = read_table(path, self.header, view)
        columns = {name: tensor.numpy() for name, tensor in tensors.items() if name not in Targets._fields}
        fault = answers_fault(tensors, self.num_samples, self.topk, self.num_classes)
        if fault := fault or views_fault(columns, self.policy, self.num_samples):
            raise BadInput(f"{path}: {fault}; delete it and {AGAIN}")
        views = Views(**columns, mean=self.policy.mean, std=self.policy.std)
        return views, tensors["classes"], tensors["log_probs"]

    def val_targets(self) -> Targets:
        """The teacher's answers for the validation images, checked in the same way."""
        path = self.path / VAL
        tensors = read_table(path, self.header, VAL)
        if fault := answers_fault(tensors, self.header["num_val_samples"], self.topk, self.num_classes):
            raise BadInput(f"{path}: {fault}; delete it and {AGAIN}")
        return Targets(tensors["classes"], tensors["log_probs"])

    def verify(self) -> None:
        """Read every finished table; compare its checksum and its origin, check its values.

        Raises:
            BadInput: at the first that does not fit; a view that is missing though later ones are there.
        """
        title, total = f"verifying {self.path}", self.views * self.num_samples
        for view in track(range(self.views), total, title, lambda _: self.num_samples):
            self.targets(view)
        self.val_targets()
        there = [(self.path / view_file(view)).is_file() for view in range(self.header["views"])]
        if there != sorted(there, reverse=True):
            missing = view_file(there.index(False))
            raise BadInput(f"{self.path}: {missing} is missing, though later views are there; {AGAIN}")

    def check(self, dataset: Dataset, policy: ViewPolicy) -> None:
        """Raises BadInput unless the cache was made from this data set with this policy."""
        what = f"cache {self.path}"
        if self.num_classes != len(dataset.classes):
            classes = counted(len(dataset.classes), "class")
            raise BadInput(f"{what}: expected {classes}, as {dataset.spec} has, got {self.num_classes}")
        if self.classes != dataset.classes:
            pairs = zip(dataset.classes, self.classes, strict=True)
            wanted, found = next(pair for pair in pairs if pair[0] != pair[1])
            raise BadInput(
                f"{what}: expected the classes of {dataset.spec} in their order, got {found!r} in place of {wanted!r}; "
                "run `fastofa precompute` on it into another folder"
            )
        if (self.header["dataset"][dataset.split], self.num_samples) != (dataset.fingerprint, len(dataset)):
            then, now = counted(self.num_samples, "sample"), counted(len(dataset), "sample")
            raise BadInput(
                f"{what}: made from {self.header['dataset']['spec']} ({then}), which is not the "
                f"data set {dataset.spec} ({now}) as it is now; run `fastofa precompute` on it into "
                "another folder"
            )
        mine, theirs = dataclasses.asdict(policy), dataclasses.asdict(self.policy)
        asked, drawn = (
            ", ".join(f"{name}={values[name]}" for name in mine if mine[name] != theirs[name])
            for values in (mine, theirs)
        )
        if asked:
            raise BadInput(
                f"{what}: expected views drawn with ({asked}), got ({drawn}); leave the flags out or precompute anew"
            )


def answers(log_probs: Tensor, topk: int) -> Targets:
    """fp32 [B, C] -> the K best classes and their log-probabilities as the cache stores them."""
    values, classes = log_probs.topk(topk, dim=-1)
    narrow = log_probs.shape[-1] <= 1 << 16
    return Targets(classes.cpu().to(torch.uint16 if narrow else torch.int32), values.to(torch.float16).cpu())


def view_file(view: int) -> str:
    return f"view-{view:05d}.safetensors"


def write_table(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], table: int | str) -> None:
    """A view (`table` its number) or the validation table; the file says which cache it belongs to."""
    save_tensors(path, tensors, {"table": table, "cache": identity(header)})


def read_table(path: Path, header: dict[str, Any], table: int | str) -> dict[str, Tensor]:
    """Raises BadInput: missing, truncated, edited, or from another cache."""
    tensors, info = load_tensors(path)
    check_origin(path, info, header, table)
    return tensors


def check_origin(path: Path, info: dict[str, Any], header: dict[str, Any], table: int | str) -> None:
    """Raises BadInput unless a file says of itself (`info`) that it is this table of this cache."""
    if info != {"table": table, "cache": identity(header)}:
        raise BadInput(f"{path}: belongs to another cache or view than {HEADER} says; delete it and {AGAIN}")


def agreement(predicted: np.ndarray, targets: Targets) -> float:
    """Share of samples where the prediction is the teacher's best class."""
    return float((predicted == targets.classes[:, 0].to(torch.int64).numpy()).mean())
