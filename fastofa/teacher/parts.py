"""The parts of an unfinished table: predictions for ranges of its rows, each in a file of its own.

    CACHE/part-00003-0000025600.safetensors     predictions of view 3 from position 25,600 of its order on
    CACHE/part-val-0000000000.safetensors       those for the first validation images

The *order* of a table is the one in which its images are read. Parts are saved after an interruption, and by each of
several ranks. They are joined, in the order of sample ids, once they cover all rows.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.teacher.cache_files import read_table, write_table
from fastofa.teacher.cache_header import AGAIN
from fastofa.teacher.downloads import Columns
from fastofa.teacher.table_checks import predictions_fault

PARTS = "part-*.safetensors"


class Range(NamedTuple):
    """The rows of a table at the positions `start` to `stop` of its order."""

    table: int | str
    """The number of a view, or VAL."""
    start: int
    stop: int


def part_file(table: int | str, start: int) -> str:
    """Name of the file with the part of a table that starts at position `start`."""
    return f"part-{_short(table)}-{start:010d}.safetensors"


def part_files(out: Path, table: int | str) -> list[Path]:
    return sorted(out.glob(f"part-{_short(table)}-*.safetensors"))


def has_parts(out: Path, table: int | str) -> bool:
    return len(part_files(out, table)) > 0


def _short(table: int | str) -> str:
    return f"{table:05d}" if isinstance(table, int) else Path(table).stem


class Parts(NamedTuple):
    """The parts of one table."""

    out: Path
    """Folder of the cache."""
    header: dict[str, Any]
    table: int | str
    order: np.ndarray
    """int64 [N]: the rows of the table in the order in which their images are read."""

    def save(self, start: int, columns: Columns) -> None:
        """Write predictions from position `start` on; replaces an earlier part that starts there."""
        write_table(self.out / part_file(self.table, start), columns, self.header, self._origin(start))

    def read(self, start: int) -> Columns:
        """The predictions of one part.

        Raises:
            BadInput: it is missing, damaged, of another cache or in another order, or contains impossible values.
        """
        path = self.out / part_file(self.table, start)
        columns = read_table(path, self.header, self._origin(start))
        count = min(rows_in(columns), len(self.order) - start)
        if fault := predictions_fault(columns, self.header, count):
            raise BadInput(f"{path}: {fault}")
        return columns

    def saved(self) -> list[Range]:
        """The ranges that usable parts cover, in ascending order. Other parts of this table are removed."""
        covered: list[Range] = []
        for path in part_files(self.out, self.table):
            try:
                start = int(path.stem.rpartition("-")[2])
                if start < (covered[-1].stop if covered else 0):
                    raise BadInput(f"{path}: overlaps an earlier part")
                covered.append(Range(self.table, start, start + rows_in(self.read(start))))
            except (BadInput, ValueError):  # such as a part in another order, because the data now have another form
                path.unlink(missing_ok=True)
        return covered

    def missing(self, saved: list[Range]) -> list[Range]:
        """The ranges that `saved` leaves out; if there are none, an empty one, so that the table is still joined."""
        size = len(self.order)
        bounds = [0, *(bound for part in saved for bound in part[1:]), size]
        gaps = [Range(self.table, *pair) for pair in zip(bounds[::2], bounds[1::2], strict=True) if pair[0] < pair[1]]
        return gaps or [Range(self.table, size, size)]

    def joined(self, starts: list[int]) -> Columns:
        """The predictions of the parts that start at these positions and cover all rows, in the order of sample ids.

        Raises:
            BadInput: as `read`, or a part was replaced by a shorter one.
        """
        parts = [self.read(start) for start in sorted(starts)]
        if (found := sum(map(rows_in, parts))) != len(self.order):
            raise BadInput(f"expected parts with {len(self.order):,} predictions, got {found:,}; {AGAIN}")
        return self.by_sample(parts)

    def by_sample(self, columns: list[Columns]) -> Columns:
        """Predictions in the order of the table -> in the order of sample ids."""
        place = np.argsort(self.order)
        return {name: torch.from_numpy(values.numpy()[place]) for name, values in concatenated(columns).items()}

    def _origin(self, start: int) -> str:
        """What a part's file records besides the identity of the cache."""
        digest = hashlib.sha256(self.order.tobytes()).hexdigest()
        return f"rows from {start} of {self.table} in the order {digest}"


def saved_rows(out: Path) -> int:
    """The number of predictions in all parts of a cache; damaged parts are left out."""
    rows = 0
    for path in out.glob(PARTS):
        with suppress(BadInput):
            rows += rows_in(load_tensors(path)[0])
    return rows


def remove_parts(out: Path, tables: list[int | str]) -> None:
    """Remove the parts of these tables."""
    names = set(map(_short, tables))
    for path in out.glob(PARTS):
        if path.name.split("-")[1] in names:
            path.unlink(missing_ok=True)


def rows_in(columns: Columns) -> int:
    return next((len(values) for values in columns.values() if values.dim()), 0)


def concatenated(columns: list[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
