"""The teacher's top K packed into a row of bytes per image: 35 bytes for 16 of 1,000 classes.

A row is a sequence of fields, lowest bits first, padded with zeros to whole bytes:

    K classes         ceil(log2 C) bits each, most probable first
    rest              15 bits: log(rest / kept) in units of 1/1024, from -16 to 16; kept is the probability of the K
                      classes together, rest that of all others
    K - 1 steps       7 bits each, by which log p falls from one class to the next: -3 log(1 - i / 128), i the field

So the K classes and the rest have a sum of 1 whatever the rounding, and a small rest is as exact as a large one, which
matters at high temperatures. In terms of the ratio r of two successive probabilities, steps are a uniform grid of
r^(1/3): fine where the two are close to each other. The largest step is 14.6. The encoder rounds against the decoded
value of the class before, so that errors do not add up. No step is negative, so the order of the classes is kept.

Steps are added up as whole units, logarithms are computed in float64, and the result is rounded once to fp32, so that
every device decodes the same numbers.

Shapes: N rows, K classes kept, C classes, R bytes per row, F = 2 K fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.methods.targets import TopK

UNIT = 1 / 1024  # of a logarithm
REST_BITS, STEP_BITS = 15, 7
LEVELS, HALF = 1 << STEP_BITS, 1 << (REST_BITS - 1)
STEPS = np.rint(-3 / UNIT * np.log1p(-np.arange(LEVELS) / LEVELS)).astype(np.int32)
NEAREST = np.searchsorted((STEPS[1:] + STEPS[:-1]) / 2, np.arange(STEPS[-1] + 1)).astype(np.int32)
"""The step nearest to 0, 1, 2, ... units."""
KEPT = -np.log1p(np.exp((np.arange(2 * HALF) - HALF) * UNIT))
"""float64: log kept, by the field of the rest."""
TINY = 1e-30
MAX_CLASSES = 1 << 24
ROWS_AT_ONCE = 1 << 13  # a few hundred kB, which stay in the L2 cache


@dataclass(frozen=True)
class RowFormat:
    """The fields of a row for the K best of C classes."""

    topk: int
    num_classes: int

    @property
    def bits(self) -> np.ndarray:
        """int64 [F]: the width of each field."""
        classes = max((self.num_classes - 1).bit_length(), 1)
        return np.array([classes] * self.topk + [REST_BITS] + [STEP_BITS] * (self.topk - 1))

    @property
    def starts(self) -> np.ndarray:
        """int64 [F]: the first bit of each field."""
        return np.cumsum(self.bits) - self.bits

    @property
    def num_bytes(self) -> int:
        """R."""
        return -(-int(self.bits.sum()) // 8)

    def pack(self, targets: TopK) -> Tensor:
        """Pack predictions on the CPU.

        Args:
            targets: classes integer [N, K], most probable first; log_probs floating [N, K].

        Returns:
            uint8 [N, R].

        Raises:
            ValueError: a log-probability is not a number.
        """
        rows = np.empty((len(targets.classes), self.num_bytes), np.uint8)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            classes = targets.classes[part].numpy().T.astype(np.uint64)
            codes = _codes(targets.log_probs[part].numpy().T)
            rows[part] = self._joined(np.concatenate([classes, codes]))
        return torch.from_numpy(rows)

    def _joined(self, fields: np.ndarray) -> np.ndarray:
        """Fields uint64 [F, N] -> uint8 [N, R]."""
        words = np.zeros((self.num_bytes // 8 + 1, fields.shape[1]), np.uint64)
        moved = np.empty_like(fields[0])
        for field, start, bits in zip(fields, self.starts.tolist(), self.bits.tolist(), strict=True):
            word, shift = divmod(start, 64)
            words[word] |= np.left_shift(field, np.uint64(shift), out=moved)
            if shift + bits > 64:
                words[word + 1] |= np.right_shift(field, np.uint64(64 - shift), out=moved)
        return np.ascontiguousarray(words.T).view(np.uint8)[:, : self.num_bytes]

    def unpack(self, rows: Tensor) -> TopK:
        """Rows uint8 [N, R] on the CPU -> classes uint16 (int32 if C > 65,536) and log_probs fp32, both [N, K]."""
        classes = torch.empty(len(rows), self.topk, dtype=torch.uint16 if self.num_classes <= 1 << 16 else torch.int32)
        log_probs = torch.empty(len(rows), self.topk)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            fields = self._split(rows[part].numpy(), 2 * self.topk)
            classes[part] = torch.from_numpy(fields[: self.topk].T).to(classes.dtype)
            rest, steps = fields[self.topk], fields[self.topk + 1 :]
            log_probs[part] = _decoded(torch.from_numpy(KEPT[rest]), torch.from_numpy(STEPS[steps].T))
        return TopK(classes, log_probs)

    def classes_of(self, rows: Tensor) -> np.ndarray:
        """Rows uint8 [N, R] on the CPU -> their classes, uint16 (int32 if C > 65,536) [K, N]."""
        return self._split(rows.numpy(), self.topk, np.uint16 if self.num_classes <= 1 << 16 else np.int32)

    def _split(self, rows: np.ndarray, count: int, dtype: type[np.integer] = np.int32) -> np.ndarray:
        """Rows uint8 [N, R] -> the first `count` fields, [count, N]."""
        last_bit = int(self.bits[:count].sum())
        words = np.zeros((len(rows), last_bit // 64 + 1, 8), np.uint8)
        read = min(words[0].size, self.num_bytes) if len(rows) else 0
        words.reshape(len(rows), -1)[:, :read] = rows[:, :read]
        planes = np.ascontiguousarray(words.view(np.uint64)[..., 0].T)
        fields = np.empty((count, len(rows)), dtype)
        moved, high = np.empty_like(planes[0]), np.empty_like(planes[0])
        for field, start, bits in zip(fields, self.starts.tolist(), self.bits.tolist(), strict=False):
            word, shift = divmod(start, 64)
            np.right_shift(planes[word], np.uint64(shift), out=moved)
            if shift + bits > 64:
                moved |= np.left_shift(planes[word + 1], np.uint64(64 - shift), out=high)
            moved &= np.uint64((1 << bits) - 1)
            field[:] = moved
        return fields


def row_format(topk: int, num_classes: int) -> RowFormat | None:
    """The format in which a cache packs its predictions; None if it stores them unpacked, because it keeps all classes
    or there are more than 2^24."""
    return RowFormat(topk, num_classes) if topk < num_classes <= MAX_CLASSES else None


def _codes(log_probs: np.ndarray) -> np.ndarray:
    """The fields of log-probabilities, floating [K, N], most probable first -> uint64 [K, N]."""
    values = log_probs.astype(np.float64)
    kept = np.exp(values).sum(axis=0)
    if np.isnan(kept).any():
        raise ValueError("log_probs: expected numbers, got NaN")
    codes = np.empty(values.shape, np.uint64)
    rest = np.log((1 - kept).clip(min=TINY) / kept.clip(min=TINY))
    codes[0] = np.rint(rest / UNIT + HALF).clip(0, 2 * HALF - 1)
    wanted = np.rint(((values[0] - values) / UNIT).clip(0, STEPS[-1] * len(values))).astype(np.int32)
    decoded = np.zeros_like(wanted[0])
    for k in range(1, len(wanted)):
        step = NEAREST[(wanted[k] - decoded).clip(0, STEPS[-1])]
        codes[k] = step
        decoded += STEPS[step]
    return codes


def _decoded(log_kept: Tensor, steps: Tensor) -> Tensor:
    """Log of the kept probability, float64 [N], and steps in units, integer [N, K - 1] -> log_probs fp32 [N, K]."""
    units = F.pad(steps.cumsum(dim=1), (1, 0))
    return (torch.log_softmax(units * -UNIT, dim=1, dtype=torch.float64) + log_kept[:, None]).float()


class PackedRows(NamedTuple):
    """Packed predictions, as a cache stores them."""

    rows: Tensor
    """uint8 [N, R]."""
    format: RowFormat

    def unpacked(self) -> TopK:
        """On the CPU: classes uint16 (int32 if C > 65,536) [N, K], log_probs fp32 [N, K]."""
        return self.format.unpack(self.rows)


def packed(targets: TopK, num_classes: int) -> TopK | PackedRows:
    """Predictions on the CPU as a cache stores them: packed, or unchanged if `row_format` is None."""
    found = row_format(targets.classes.shape[1], num_classes)
    return targets if found is None else PackedRows(found.pack(targets), found)


def joined(parts: Sequence[TopK | PackedRows]) -> TopK | PackedRows:
    """The rows of several tables with the same K and C, one after the other; unpacked unless all are packed."""
    packed_rows = [part for part in parts if isinstance(part, PackedRows)]
    if len(packed_rows) == len(parts):
        return PackedRows(torch.cat([part.rows for part in packed_rows]), packed_rows[0].format)
    plain = [part.unpacked() if isinstance(part, PackedRows) else part for part in parts]
    classes, log_probs = zip(*plain, strict=True)
    return TopK(torch.cat(classes), torch.cat(log_probs))


class Decoder:
    """Decodes packed rows on a device, with the same bits on every device.

    Args:
        row_format: the fields of the rows.
        device: of the rows.
    """

    def __init__(self, row_format: RowFormat, device: torch.device) -> None:
        self.topk = row_format.topk
        starts, bits = row_format.starts, row_format.bits
        count = row_format.num_bytes
        # A field of at most 24 bits lies within four bytes; beyond the row's end, its last byte is read again.
        places = (starts // 8)[None] + np.arange(4)[:, None]
        self.places = torch.from_numpy(places.clip(max=count - 1)).to(device)
        self.shifts = torch.from_numpy(starts % 8).to(device)
        self.masks = torch.from_numpy((1 << bits) - 1).to(device)
        self.bytes = torch.tensor([[0], [8], [16], [24]], device=device)
        self.kept, self.steps = torch.from_numpy(KEPT).to(device), torch.from_numpy(STEPS).to(device)

    def __call__(self, rows: Tensor) -> TopK:
        """Rows uint8 [B, R] -> classes int32 [B, K], log_probs fp32 [B, K]."""
        words = (rows[:, self.places].long() << self.bytes).sum(dim=1)
        fields = words >> self.shifts & self.masks
        classes, rest, steps = fields.split([self.topk, 1, self.topk - 1], dim=1)
        return TopK(classes.int(), _decoded(self.kept[rest[:, 0]], self.steps[steps]))
