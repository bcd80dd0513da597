"""The columns of a cache's tables: from the teacher's log-probabilities to what the files contain, and back.

With `--keep-each`, the names of a teacher's columns end in _1, _2, ...

Shapes: N samples, B batch, C classes, K classes kept.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastofa.methods.targets import TopK
from fastofa.teacher.mixture import EachTeacher
from fastofa.teacher.packed_rows import PackedRows, packed, row_format

PREDICTIONS = "predictions"  # the column of packed rows
BOOLEAN = ("flip", "bicubic")


def best_classes(log_probs: Tensor, topk: int) -> TopK:
    """The K most probable classes of log_probs [B, C] (fp32), and their log-probabilities, on the same device.

    Returns:
        classes [B, K], best first: int32 if C > 65,536, else int16 with the bits of uint16, which has few operations;
        and log_probs [B, K]: fp32, which the cache packs, or float16 if all classes are kept.
    """
    values, classes = log_probs.topk(topk, dim=-1)
    narrow, dense = log_probs.shape[-1] <= 1 << 16, topk == log_probs.shape[-1]
    return TopK(classes.to(torch.int16 if narrow else torch.int32), values.half() if dense else values)


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


def suffixes(header: dict[str, Any]) -> tuple[str, ...]:
    """What follows the names of a teacher's columns: "" if the cache keeps one prediction, else "_1", "_2", ..."""
    if not header.get("keep_each"):
        return ("",)
    return tuple(f"_{teacher}" for teacher in range(1, len(header["teachers"]) + 1))


def of_teacher(columns: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """The predictions of one teacher, by names without its suffix."""
    return {name: columns[name + suffix] for name in (PREDICTIONS, *TopK._fields) if name + suffix in columns}


def targets_only(columns: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """The classes and log_probs among the columns of a table, of each teacher kept."""
    return {name + suffix: columns[name + suffix] for suffix in suffixes(header) for name in TopK._fields}


def packed_columns(columns: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """The columns of a view with bool columns as bits and, if K < C, the predictions as packed rows."""
    columns = {
        name: torch.from_numpy(np.packbits(values.numpy())) if values.dtype == torch.bool else values
        for name, values in columns.items()
    }
    for suffix in suffixes(header):
        own = of_teacher(columns, suffix)
        predictions = packed(TopK(**own), header["num_classes"]) if "classes" in own else None
        if isinstance(predictions, PackedRows):
            others = {name: values for name, values in columns.items() if name.removesuffix(suffix) not in own}
            columns = {**others, PREDICTIONS + suffix: predictions.rows}
    return columns


def rounded_columns(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns as schema 3 has them, with log_probs float16."""
    return {name: values.half() if name == "log_probs" else values for name, values in columns.items()}


def predictions_in(
    columns: dict[str, Tensor], header: dict[str, Any], weights: tuple[float, ...] | None
) -> TopK | PackedRows | EachTeacher:
    """The predictions among the columns of a table as a file has them; `weights`: of teachers kept apart, else None."""
    rows = row_format(header["topk"], header["num_classes"])
    each: list[TopK | PackedRows] = []
    for suffix in suffixes(header):
        own = of_teacher(columns, suffix)
        if rows is not None and PREDICTIONS in own:
            each.append(PackedRows(own[PREDICTIONS], rows))
        else:
            each.append(TopK(**own))
    return each[0] if weights is None else EachTeacher(tuple(each), weights, header["num_classes"])


def from_bits(name: str, values: Tensor, count: int) -> np.ndarray:
    """A column of a view of `count` samples; bits become bool [N]."""
    if name in BOOLEAN and values.dtype == torch.uint8 and values.shape == (-(-count // 8),):
        return np.unpackbits(values.numpy(), count=count).view(bool)
    return values.numpy()
