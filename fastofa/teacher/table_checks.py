"""What the tables of a teacher cache may hold. A checksum says that a file is as it was written, not that it is right.

Each function returns what is wrong, "expected ..., got ...", or an empty string. For a view of 1,281,167 images that
takes one CPU core 0.6 s for the answers (K = 16), and 0.01 s (crop and flip) to 1.2 s (all) for the columns.

Shapes: N samples, C classes, K classes kept.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastofa.views import rand_augment
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import UNIT

ROWS_AT_ONCE = 1 << 14
MASS_ERROR = 0.01  # float16 rounds log p by |log p| / 2048 at most, so their mass by their entropy / 2048


def answers_fault(tensors: Mapping[str, Tensor], count: int, topk: int, num_classes: int) -> str:
    """Of `classes` and `log_probs`: kinds and shapes [N, K]; classes that exist, each once a row; log-probabilities."""
    narrow = num_classes <= 1 << 16
    kinds = {"classes": torch.uint16 if narrow else torch.int32, "log_probs": torch.float16}
    if missing := kinds.keys() - tensors.keys():
        return f"expected {' and '.join(kinds)}, {' and '.join(sorted(missing))} is missing"
    for name, kind in kinds.items():
        if (tensors[name].dtype, tuple(tensors[name].shape)) != (kind, (count, topk)):
            return (
                f"expected {name} {_kind(kind, (count, topk))}, got {_kind(tensors[name].dtype, tensors[name].shape)}"
            )
    for first in range(0, count, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        classes, log_probs = tensors["classes"][rows].numpy(), tensors["log_probs"][rows].float()
        ordered = np.sort(classes, axis=1)
        mass, values = log_probs.exp().sum(dim=1, keepdim=True).numpy(), log_probs.numpy()
        least = 1 - MASS_ERROR if topk == num_classes else 0
        for expected, good, got in (
            (f"classes from 0 to {num_classes - 1}", (classes >= 0) & (classes < num_classes), classes),
            ("each class once", ordered[:, 1:] != ordered[:, :-1], classes),
            ("finite log_probs", np.isfinite(values), values),
            ("log_probs of at most 0", values <= 0, values),
            ("the largest of log_probs first", values[:, 1:] <= values[:, :-1], values),
            ("probabilities with a sum of at most 1", mass <= 1 + MASS_ERROR, values),
            ("probabilities of all classes with a sum of 1", mass >= least, values),
        ):
            if not good.all():
                row = int(good.all(axis=1).argmin())
                return f"expected {expected}, got {_some(got[row].tolist())} for sample {first + row}"
    return ""


def views_fault(columns: Mapping[str, np.ndarray], policy: ViewPolicy, count: int) -> str:
    """Of the columns of a view of `count` samples: those that the policy draws, with kinds, shapes and ranges."""
    kinds = _column_kinds(policy, count)
    if columns.keys() != kinds.keys():
        return f"expected the columns {', '.join(sorted(kinds))}, got {', '.join(sorted(columns))}"
    for name, (kind, shape) in kinds.items():
        if (columns[name].dtype, columns[name].shape) != (kind, shape):
            return f"expected {name} {_kind(kind, shape)}, got {_kind(columns[name].dtype, columns[name].shape)}"
    for first in range(0, count, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        for name, (expected, bad) in _column_faults(columns, rows).items():
            if bad.any():
                row = first + int(bad.argmax())
                return f"expected {name} {expected}, got {_some(columns[name][row].tolist())} for sample {row}"
    return ""


def _column_kinds(policy: ViewPolicy, count: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    kinds = {"crop": ("uint16", 4), "flip": ("bool", 0)}
    if policy.auto_augment:
        layers = rand_augment.parse(policy.auto_augment).layers
        kinds |= {"ops": ("uint8", layers), "amounts": ("float32", layers)}
    if policy.mixes:
        kinds |= {"partner": ("int32", 0), "mix": ("float32", 0), "mix_box": ("uint16", 4)}
    if policy.erase:
        kinds |= {"erase": ("uint16", 4), "noise": ("int32", 0)}
    return {name: (np.dtype(kind), (count, width) if width else (count,)) for name, (kind, width) in kinds.items()}


def _column_faults(columns: Mapping[str, np.ndarray], rows: slice) -> dict[str, tuple[str, np.ndarray]]:
    """For each column: what is expected of it, and which of the rows are otherwise, bool."""
    crop = columns["crop"][rows]
    faults = {"crop": ("a box of the picture", _leaves(crop) | (crop[:, 2:] == 0).any(axis=1))}
    if "ops" in columns:
        ops, amounts = columns["ops"][rows], columns["amounts"][rows]
        low, high = rand_augment.limits()
        known = ops < len(rand_augment.OPS)
        which = np.where(known, ops, 0)
        within = (low[which] <= amounts) & (amounts <= high[which])
        faults["ops"] = (f"from 0 to {len(rand_augment.OPS) - 1}", ~known.all(axis=1))
        faults["amounts"] = ("that the operations can have", ~within.all(axis=1))
    if "partner" in columns:
        partner, mix, box = columns["partner"], columns["mix"], columns["mix_box"]
        mine = partner[rows]
        inside = (mine >= 0) & (mine < len(partner))
        other = np.where(inside, mine, 0)
        itself = np.arange(len(partner))[rows]
        faults["partner"] = ("whose partner is the sample", ~inside | (partner[other] != itself))
        share = mix[rows]
        faults["mix"] = (
            "from 0 to 1, of both partners the same",
            ~((share >= 0) & (share <= 1) & (share == mix[other])),
        )
        of_both = (box[rows] == box[other]).all(axis=1)
        faults["mix_box"] = ("a box of the picture, of both partners the same", _leaves(box[rows]) | ~of_both)
    if "erase" in columns:
        faults["erase"] = ("a box of the picture", _leaves(columns["erase"][rows]))
    return faults


def _leaves(boxes: np.ndarray) -> np.ndarray:
    """Which boxes, uint16 [M, 4], are not inside the picture; place and extent are rounded each by itself."""
    return (boxes[:, :2].astype(np.int32) + boxes[:, 2:] > UNIT + 1).any(axis=1)


def _kind(dtype: object, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _some(values: object) -> str:
    text = str(values)
    return text if len(text) <= 80 else f"{text[:80]}..."
