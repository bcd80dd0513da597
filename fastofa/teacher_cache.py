"""The teacher is a table: for each view, the view itself and the teacher's top-K answer for every sample.

    CACHE/cache.json                what it was made from, and how many views it is to hold
    CACHE/view-00000.safetensors    the columns of `Views` (crop uint16 [N, 4], flip bool [N], and what else the policy
                                    draws), classes uint16 or int32 [N, K], best first, log_probs float16 [N, K] at
                                    temperature 1
    CACHE/val.safetensors           classes and log_probs of the validation pictures, on the teacher's own centre crops
    CACHE/seen.png                  a few pictures of view 0 as the teacher saw them (seen.py)
    CACHE/partial.safetensors       only while `fastofa precompute` is interrupted: the answers it had for the next view
                                    (a view that mixes: in the order of its pairs)

Stored parameters, not seeds: a cache replays exactly even if a library changes its random stream. No pickle anywhere.

Shapes: N samples, B batch, C classes, K classes kept.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.dataset import Dataset
from fastofa.errors import BadInput
from fastofa.files import load_tensors, read_json, save_tensors, write_json
from fastofa.progress import track
from fastofa.views import ViewPolicy, Views

SCHEMAS = (1, 2)  # 1: views of crop and flip. 2: of more, which a reader of schema 1 would not replay
HEADER, VAL, PARTIAL = "cache.json", "val.safetensors", "partial.safetensors"


class Targets(NamedTuple):
    """The teacher's answers for a batch (or for a whole view)."""

    classes: Tensor
    """integer [B, K], best first."""
    log_probs: Tensor
    """floating [B, K], at temperature 1."""


@dataclass(frozen=True)
class TeacherCache:
    """A finished cache, opened for reading; `Header` values are attributes."""

    path: Path
    header: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "TeacherCache":
        """Raises BadInput: no cache, an unfinished one, another schema."""
        path = Path(path)
        header = read_header(path)
        cache = cls(path, header)
        missing = [f for f in (*map(view_file, range(cache.views)), VAL) if not (path / f).exists()]
        if missing:
            raise BadInput(
                f"{path}: expected {cache.views} views, {missing[0]} is missing ({len(missing)} files in all); run "
                "`fastofa precompute` again with the arguments it was begun with, it goes on where it stopped"
            )
        return cache

    @property
    def views(self) -> int:
        return self.header["views"]

    @property
    def num_samples(self) -> int:
        return self.header["num_samples"]

    @property
    def num_classes(self) -> int:
        return self.header["num_classes"]

    @property
    def topk(self) -> int:
        return self.header["topk"]

    @property
    def policy(self) -> ViewPolicy:
        return policy_from_json(self.header["policy"])

    @property
    def teacher_dim(self) -> int:
        """Width of the teacher's last features (the widest teacher's, were there several)."""
        return max(teacher["num_features"] for teacher in self.header["teachers"])

    @property
    def fingerprint(self) -> str:
        """sha256 over what the answers depend on and the number of views: what a run that replays them depends on."""
        made_from = json.dumps([identity(self.header), self.views], sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()

    def targets(self, view: int) -> tuple[Views, Tensor, Tensor]:
        """(views, classes [N, K], log_probs [N, K]) of one view, its checksum verified.

        Raises:
            BadInput: truncated, edited, or a file from another cache.
        """
        if not 0 <= view < self.views:
            raise BadInput(f"{self.path}: expected a view from 0 to {self.views - 1}, got {view}")
        tensors = read_table(self.path / view_file(view), self.header, view)
        classes, log_probs = tensors.pop("classes"), tensors.pop("log_probs")
        columns = {name: column.numpy() for name, column in tensors.items()}
        return Views(**columns, mean=self.policy.mean, std=self.policy.std), classes, log_probs

    def val_targets(self) -> Targets:
        """The teacher's answers for the validation pictures."""
        tensors = read_table(self.path / VAL, self.header, VAL)
        return Targets(tensors["classes"], tensors["log_probs"])

    def verify(self) -> None:
        """Read every file and compare its checksum and its origin. Raises BadInput at the first that does not fit."""
        title, total = f"verifying {self.path}", self.views * self.num_samples
        for view in track(range(self.views), total, title, lambda _: self.num_samples):
            self.targets(view)
        self.val_targets()

    def check(self, dataset: Dataset, policy: ViewPolicy) -> None:
        """Raises BadInput unless the cache was made from this data set with this policy."""
        what = f"cache {self.path}"
        if self.num_classes != len(dataset.classes):
            raise BadInput(
                f"{what}: expected {len(dataset.classes)} classes, as {dataset.spec} has, got {self.num_classes}"
            )
        if self.header["dataset"][dataset.split] != dataset.fingerprint:
            raise BadInput(
                f"{what}: made from {self.header['dataset']['spec']} ({self.num_samples} samples), which is not the "
                f"data set {dataset.spec} ({len(dataset)} samples) as it is now; run `fastofa precompute` on it"
            )
        mine, theirs = dataclasses.asdict(policy), dataclasses.asdict(self.policy)
        wanted, found = (
            ", ".join(f"{name}={values[name]}" for name in mine if mine[name] != theirs[name])
            for values in (mine, theirs)
        )
        if wanted:
            raise BadInput(
                f"{what}: expected views drawn with ({wanted}), got ({found}); leave the flags out or precompute anew"
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
    if not (path / HEADER).is_file():
        raise BadInput(f"{path}: expected a teacher cache made by `fastofa precompute`, found no {HEADER}")
    header = read_json(path / HEADER)
    if not isinstance(header, dict) or header.get("schema") not in SCHEMAS:
        found = header.get("schema") if isinstance(header, dict) else type(header).__name__
        expected = " or ".join(map(str, SCHEMAS))
        raise BadInput(f"{path / HEADER}: expected schema {expected}, got {found}; precompute anew with this version")
    required = {"dataset", "num_samples", "num_classes", "topk", "policy", "seed", "teachers", "views"}
    if missing := sorted(required - header.keys()):
        raise BadInput(f"{path / HEADER}: expected the fields {', '.join(missing)}, it was edited; precompute anew")
    if not _fits(header):
        raise BadInput(f"{path / HEADER}: expected what `fastofa precompute` writes, it was edited; precompute anew")
    return header


def _fits(header: dict[str, Any]) -> bool:
    """Does every field hold a value of its kind?"""
    numbers = ("num_samples", "num_val_samples", "num_classes", "topk", "views")
    teacher = {"name": str, "sha256": str, "image_size": int, "precision": str, "num_features": int}
    try:
        policy_from_json(header["policy"])
        return (
            all(type(header[name]) is int and header[name] >= 1 for name in numbers)
            and all(isinstance(header["dataset"][name], str) for name in ("spec", "train", "val"))
            and len(header["teachers"]) > 0
            and all(isinstance(t[name], kind) for t in header["teachers"] for name, kind in teacher.items())
            and isinstance(header["versions"], dict)
        )
    except (AttributeError, KeyError, TypeError, ValueError, BadInput):
        return False


def write_header(path: Path, header: dict[str, Any]) -> None:
    schema = 1 if header["policy"].keys() == policy_to_json(ViewPolicy()).keys() else 2
    write_json(path / HEADER, {"schema": schema, **header})


def identity(header: dict[str, Any]) -> dict[str, Any]:
    """What the answers depend on: two caches with the same identity hold the same views."""
    dataset = {split: header["dataset"][split] for split in ("train", "val")}
    return {"dataset": dataset, **{k: header[k] for k in ("num_classes", "topk", "policy", "seed", "teachers")}}


def write_table(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], table: int | str) -> None:
    """A view (`table` its number) or the validation table; the file says which cache it belongs to."""
    save_tensors(path, tensors, {"table": table, "cache": identity(header)})


def read_table(path: Path, header: dict[str, Any], table: int | str) -> dict[str, Tensor]:
    """Raises BadInput: missing, truncated, edited, or from another cache."""
    tensors, info = load_tensors(path)
    if info != {"table": table, "cache": identity(header)}:
        raise BadInput(
            f"{path}: belongs to another cache or view than {HEADER} says; delete it and run precompute again"
        )
    return tensors


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
