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
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.config import MOST_EPOCHS
from fastofa.dataset import Dataset
from fastofa.errors import BadInput, counted
from fastofa.files import load_tensors, read_info, read_json, save_tensors, write_json
from fastofa.progress import track
from fastofa.table_checks import answers_fault, views_fault
from fastofa.views import ViewPolicy, Views

SCHEMA = 3
MOST_VIEWS = MOST_EPOCHS  # an epoch shows one
AGAIN = "run `fastofa precompute` again with the arguments it was begun with"
HEADER, VAL, PARTIAL = "cache.json", "val.safetensors", "partial.safetensors"


class Targets(NamedTuple):
    """The teacher's answers for a batch (or for a whole view)."""

    classes: Tensor
    """integer [B, K], best first."""
    log_probs: Tensor
    """floating [B, K], at temperature 1."""


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


class DeviceTargets:
    """One view's answers on the device, looked up by sample id: the teacher costs a gather.

    With `dense` (K = C) the answers are normalised again, which takes back most of what float16 rounded off.
    With `samples` (int64 [n]) only these samples' answers are kept: a rank's share of the epoch.
    """

    def __init__(
        self,
        classes: Tensor,
        log_probs: Tensor,
        device: torch.device,
        dense: bool = False,
        samples: np.ndarray | None = None,
    ) -> None:
        self.dense = dense
        self.narrow = classes.dtype == torch.uint16
        # torch can hardly index uint16, so the same bits travel as int16.
        classes = classes.view(torch.int16) if self.narrow else classes
        self.rows: Tensor | None = None
        if samples is not None:
            chosen = torch.from_numpy(samples)
            rows = torch.zeros(len(classes), dtype=torch.int32)
            rows[chosen] = torch.arange(len(chosen), dtype=torch.int32)
            self.rows = rows.to(device)
            classes, log_probs = classes[chosen], log_probs[chosen]
        self.classes, self.log_probs = classes.to(device), log_probs.to(device)

    def lookup(self, sample_ids: Tensor) -> Targets:
        """int64 [B] -> classes int32 [B, K] and log_probs float16 (dense: float32) [B, K]."""
        rows = sample_ids if self.rows is None else self.rows[sample_ids]
        classes = self.classes[rows]
        if self.narrow:
            classes = classes.to(torch.int32) & 0xFFFF
        log_probs = self.log_probs[rows]
        return Targets(classes, log_probs.float().log_softmax(dim=1) if self.dense else log_probs)


def answers(log_probs: Tensor, topk: int) -> Targets:
    """fp32 [B, C] -> the K best classes and their log-probabilities as the cache stores them."""
    values, classes = log_probs.topk(topk, dim=-1)
    narrow = log_probs.shape[-1] <= 1 << 16
    return Targets(classes.cpu().to(torch.uint16 if narrow else torch.int32), values.to(torch.float16).cpu())


def view_file(view: int) -> str:
    return f"view-{view:05d}.safetensors"


def read_header(path: Path) -> dict[str, Any]:
    """cache.json. Raises BadInput: missing, damaged, of another schema."""
    file = path / HEADER
    try:
        found = file.is_file()
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror}") from None
    if not found:
        raise BadInput(f"{path}: expected a teacher cache made by `fastofa precompute`, found no {HEADER}")
    header = read_json(file)
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        schema = header.get("schema") if isinstance(header, dict) else type(header).__name__
        raise BadInput(
            f"{file}: expected schema {SCHEMA}, got {str(schema)[:80]}; remove the cache and precompute anew with this "
            "version"
        )
    if missing := sorted(FIELDS - header.keys()):
        raise BadInput(
            f"{file}: expected the fields {', '.join(missing)}, it was edited; remove the cache and precompute anew"
        )
    if odd := [name for name, fits in _fits(header).items() if not fits]:
        raise BadInput(
            f"{file}: expected what `fastofa precompute` writes as {', '.join(odd)}, it was edited; remove the cache "
            "and precompute anew"
        )
    return header


FIELDS = {
    "dataset", "num_samples", "num_val_samples", "num_classes", "classes", "topk", "policy", "seed", "views",
    "teachers", "pipeline", "versions",
}  # fmt: skip


def _fits(header: dict[str, Any]) -> dict[str, bool]:
    """Does each field hold a value of its kind and size?"""
    classes, policy, teachers, versions = (header[name] for name in ("classes", "policy", "teachers", "versions"))
    return {
        **{name: _whole(header[name], 1, 2**31 - 1) for name in ("num_samples", "num_val_samples", "num_classes")},
        "dataset": _texts(header["dataset"], ("spec", "train", "val")),
        "classes": isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and len(classes) == header["num_classes"],
        "topk": _whole(header["topk"], 1, header["num_classes"]),
        "policy": _policy_fits(policy),
        "seed": _whole(header["seed"], 0, 2**63 - 1),
        "views": _whole(header["views"], 1, MOST_VIEWS)
        and _policy_fits(policy)
        and header["views"] % policy_from_json(policy).repeats == 0,
        "teachers": isinstance(teachers, list) and len(teachers) == 1 and _teacher_fits(teachers[0]),
        "pipeline": isinstance(header["pipeline"], str),
        "versions": isinstance(versions, dict) and len(versions) <= 100 and _texts(versions, tuple(versions)),
    }


def _whole(value: Any, low: int, high: Any) -> bool:
    return type(value) is int and type(high) is int and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _texts(value: Any, names: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def _teacher_fits(teacher: Any) -> bool:
    return (
        _texts(teacher, ("name", "sha256", "precision"))
        and _whole(teacher.get("image_size"), 1, 1 << 16)
        and _whole(teacher.get("num_features"), 1, 1 << 20)
    )


def _policy_fits(values: Any) -> bool:
    """Is it what `policy_to_json` makes of a policy?"""
    if not isinstance(values, dict):
        return False
    lengths = {"scale": 2, "ratio": 2, "mean": 3, "std": 3}
    for name, value in values.items():
        numbers = value if name in lengths and isinstance(value, list) else [value]
        if len(numbers) != lengths.get(name, 1):
            return False
        if not (name == "auto_augment" or all(_number(number, 0, math.inf) for number in numbers)):
            return False
    try:
        return policy_to_json(policy_from_json(values)) == values and _whole(values.get("repeats", 1), 1, MOST_VIEWS)
    except (AttributeError, KeyError, TypeError, ValueError, BadInput):
        return False


def write_header(path: Path, header: dict[str, Any]) -> None:
    write_json(path / HEADER, {"schema": SCHEMA, **header})


def identity(header: dict[str, Any]) -> dict[str, Any]:
    """What the answers depend on: two caches with the same identity hold the same views."""
    dataset = {split: header["dataset"][split] for split in ("train", "val")}
    return {"dataset": dataset, **{k: header[k] for k in ("classes", "topk", "policy", "seed", "teachers")}}


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


def policy_to_json(policy: ViewPolicy) -> dict[str, Any]:
    """Scale, ratio and flip, and of the others those that differ from their defaults."""
    values = dataclasses.asdict(policy)
    left_out = {field.name for field in dataclasses.fields(policy) if values[field.name] == field.default}
    left_out -= {"scale", "ratio", "flip"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in left_out}


def policy_from_json(values: dict[str, Any]) -> ViewPolicy:
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return ViewPolicy(kept.pop("scale"), kept.pop("ratio"), kept.pop("flip"), **kept)


def agreement(predicted: np.ndarray, targets: Targets) -> float:
    """Share of samples where the prediction is the teacher's best class."""
    return float((predicted == targets.classes[:, 0].to(torch.int64).numpy()).mean())
