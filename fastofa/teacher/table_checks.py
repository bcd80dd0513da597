"""Check the values in the tables of a teacher cache. A checksum shows that a file is unchanged, not that it is valid.

Each function returns a fault, "expected ..., got ...", or "". For a view of 1,281,167 images, one CPU core takes 0.6 s
to check the targets (K = 16), and 0.01 s (crop and flip) to 1.2 s (all columns) to check the view.

Shapes: N samples, C classes, K classes kept, D width of the teacher's pooled vector.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastofa.teacher.cache_columns import PREDICTIONS, of_teacher, suffixes
from fastofa.teacher.packed_rows import RowFormat, row_format
from fastofa.views import rand_augment
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import UNIT

Kind = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""
ROWS_AT_ONCE = 1 << 14
MASS_ERROR = 0.01  # float16 rounds log p by at most |log p| / 2048, and thus the sum of p by the entropy / 2048


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
        own = of_teacher(tensors, suffix)
        if rows is not None and PREDICTIONS in own:
            fault = packed_fault(own[PREDICTIONS], count, rows)
        else:
            fault = targets_fault(own, count, header["topk"], header["num_classes"])
        if fault:
            return f"teacher {suffix[1:]}: {fault}" if suffix else fault
    return ""


def targets_fault(tensors: Mapping[str, Tensor], count: int, topk: int, num_classes: int) -> str:
    """Check `classes` and `log_probs`, [N, K] with N = `count`: types, shapes, ranges, order, sums of probabilities."""
    narrow = num_classes <= 1 << 16
    shape = (count, topk)
    # fp32 before they are packed; schema 3 has float16.
    exact = topk < num_classes and "log_probs" in tensors and tensors["log_probs"].dtype == torch.float32
    kinds: dict[str, Kind] = {
        "classes": (torch.uint16 if narrow else torch.int32, shape),
        "log_probs": (torch.float32 if exact else torch.float16, shape),
    }
    if fault := _kinds_fault(tensors, kinds):
        return fault
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


def packed_fault(packed: Tensor, count: int, row_format: RowFormat) -> str:
    """Check packed rows: type, shape and classes. Every log-probability that they can hold is possible."""
    if fault := _kinds_fault({"predictions": packed}, {"predictions": (torch.uint8, (count, row_format.num_bytes))}):
        return fault
    for first in range(0, count, ROWS_AT_ONCE):
        classes = row_format.classes_of(packed[first : first + ROWS_AT_ONCE])
        outside = classes >= row_format.num_classes
        if outside.any():
            return _classes_fault(classes, outside, f"classes from 0 to {row_format.num_classes - 1}", first)
        for distance in range(1, len(classes)):
            equal = classes[distance:] == classes[:-distance]
            if equal.any():
                return _classes_fault(classes, equal, "each class once", first)
    return ""


def _classes_fault(classes: np.ndarray, bad: np.ndarray, expected: str, first: int) -> str:
    """The fault of the first bad row. `classes` [K, M] and `bad`, bool [.., M], are of the rows from `first` on."""
    row = int(bad.any(axis=0).argmax())
    return f"expected {expected}, got {_some(classes[:, row].tolist())} for sample {first + row}"


def vectors_fault(tensors: Mapping[str, Tensor], count: int, kind: str, width: int) -> str:
    """Check `pooled` [N, D] and, for pooled-int8, `pooled_scale` [N], with N = `count`: types, shapes and ranges."""
    kinds: dict[str, Kind] = {"pooled": (torch.float16 if kind == "pooled" else torch.int8, (count, width))}
    if kind == "pooled-int8":
        kinds["pooled_scale"] = (torch.float32, (count,))
    if fault := _kinds_fault(tensors, kinds):
        return fault
    least = {"pooled": -torch.inf, "pooled_scale": 0}
    for name, first in itertools.product(kinds, range(0, count, ROWS_AT_ONCE)):
        values = tensors[name][first : first + ROWS_AT_ONCE].float().reshape(-1, width if name == "pooled" else 1)
        good = (values.isfinite() & (values >= least[name])).all(dim=1)
        if not good.all():
            row = int(good.int().argmin())
            of = " of at least 0" if name == "pooled_scale" else ""
            return f"expected finite {name}{of}, got {_some(values[row].tolist())} for sample {first + row}"
    return ""


def classifier_fault(tensors: Mapping[str, Tensor], num_classes: int, width: int) -> str:
    """Check `weight` [C, D] and `bias` [C]: types, shapes and finite values."""
    kinds: dict[str, Kind] = {"weight": (torch.float32, (num_classes, width)), "bias": (torch.float32, (num_classes,))}
    if fault := _kinds_fault(tensors, kinds):
        return fault
    infinite = [name for name in kinds if not bool(tensors[name].isfinite().all())]
    return f"expected finite values, got NaN or infinity in {' and '.join(infinite)}" if infinite else ""


def _kinds_fault(tensors: Mapping[str, Tensor], kinds: Mapping[str, Kind]) -> str:
    """Check that no tensor is missing or has another type or shape."""
    if missing := kinds.keys() - tensors.keys():
        return f"expected {' and '.join(kinds)}, but {' and '.join(sorted(missing))} is missing"
    for name, (dtype, shape) in kinds.items():
        if (tensors[name].dtype, tuple(tensors[name].shape)) != (dtype, shape):
            got = _kind(tensors[name].dtype, tuple(tensors[name].shape))
            return f"expected {name} {_kind(dtype, shape)}, got {got}"
    return ""


def views_fault(columns: Mapping[str, np.ndarray], policy: ViewPolicy, count: int) -> str:
    """Check the columns of a view of `count` samples: those that the policy draws, their types, shapes and ranges."""
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
    if policy.bicubic:
        kinds |= {"bicubic": ("bool", 0)}
    if policy.auto_augment:
        layers = rand_augment.parse(policy.auto_augment).layers
        kinds |= {"ops": ("uint8", layers), "amounts": ("float32", layers)}
    if policy.mixes:
        kinds |= {"partner": ("int32", 0), "mix": ("float32", 0), "mix_box": ("uint16", 4)}
    if policy.erase:
        kinds |= {"erase": ("uint16", 4), "noise": ("int32", 0)}
    return {name: (np.dtype(kind), (count, width) if width else (count,)) for name, (kind, width) in kinds.items()}


def _column_faults(columns: Mapping[str, np.ndarray], rows: slice) -> dict[str, tuple[str, np.ndarray]]:
    """For each column, the expected property and a bool array of the rows that lack it."""
    crop = columns["crop"][rows]
    faults = {"crop": ("to be a box inside the image", _is_outside(crop) | (crop[:, 2] == 0) | (crop[:, 3] == 0))}
    if "ops" in columns:
        ops, amounts = columns["ops"][rows], columns["amounts"][rows]
        low, high = rand_augment.limits()
        known = ops < len(rand_augment.OPS)
        which = np.where(known, ops, 0)
        within = (low[which] <= amounts) & (amounts <= high[which])
        faults["ops"] = (f"from 0 to {len(rand_augment.OPS) - 1}", ~known.all(axis=1))
        faults["amounts"] = ("within the ranges of the operations", ~within.all(axis=1))
    if "partner" in columns:
        partner, mix, box = columns["partner"], columns["mix"], columns["mix_box"]
        partners = partner[rows]
        exists = (partners >= 0) & (partners < len(partner))
        other = np.where(exists, partners, 0)
        sample_ids = np.arange(len(partner))[rows]
        faults["partner"] = ("to be mutual", ~exists | (partner[other] != sample_ids))
        share = mix[rows]
        faults["mix"] = (
            "from 0 to 1 and equal for both partners",
            ~((share >= 0) & (share <= 1) & (share == mix[other])),
        )
        same_box = (box[rows] == box[other]).all(axis=1)
        faults["mix_box"] = (
            "to be a box inside the image, equal for both partners",
            _is_outside(box[rows]) | ~same_box,
        )
    if "erase" in columns:
        faults["erase"] = ("to be a box inside the image", _is_outside(columns["erase"][rows]))
    return faults


def _is_outside(boxes: np.ndarray) -> np.ndarray:
    """bool [M]: which boxes, uint16 [M, 4], exceed the image by more than the rounding of position and size."""
    top, left, height, width = boxes.T.astype(np.int32)
    return (top + height > UNIT + 1) | (left + width > UNIT + 1)


def _kind(dtype: object, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _some(values: object) -> str:
    text = str(values)
    return text if len(text) <= 80 else f"{text[:80]}..."
