"""Many names in one block of memory: 14 million take 0.5 GB, whereas a list of strings takes 1.4 GB.

A forked worker shares the block. It would copy the memory of a list as soon as it reads the strings, because that
changes their reference counts.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

BLOCK = 1 << 16  # names decoded at a time


class Names(Sequence[str]):
    """A sequence of strings without NUL characters, which file names never contain.

    Args:
        text: each name in UTF-8, followed by a NUL.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text
        ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == 0) + 1
        self.bounds = np.concatenate([[0], ends])
        """int64 [N + 1]: the offset of each name in `text`, and the end of the last one."""
        if self.bounds[-1] != len(text):
            raise ValueError("expected a NUL after every name")

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Raises UnicodeEncodeError for a name that is not UTF-8."""
        return names if isinstance(names, Names) else cls("".join(f"{name}\0" for name in names).encode())

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = operator.index(place)
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {i}")
        i %= len(self)
        return self.text[self.bounds[i] : self.bounds[i + 1] - 1].decode()

    def __iter__(self) -> Iterator[str]:
        for i in range(0, len(self), BLOCK):
            begin, end = self.bounds[i], self.bounds[min(i + BLOCK, len(self))]
            yield from self.text[begin : end - 1].decode().split("\0")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self.text == other.text
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def without(self, places: np.ndarray) -> "Names":
        """The names except those at the given indices (int64)."""
        keep = np.ones(len(self.text), dtype=bool)
        for i in places.tolist():
            keep[self.bounds[i] : self.bounds[i + 1]] = False
        return Names(np.frombuffer(self.text, dtype=np.uint8)[keep].tobytes())

    def places_in(self, other: "Names") -> np.ndarray:
        """int64 [N]: the index of each name in `other`, -1 if it is absent."""
        if self.text == other.text:
            return np.arange(len(self))
        if not len(other):
            return np.full(len(self), -1)
        # Compares 64-bit hashes, seeded differently in each process: for 14 million names, one comparison in 100,000
        # has a collision. A dictionary would take five times the memory.
        hashes, other_hashes = (np.fromiter(map(hash, names), np.int64, len(names)) for names in (self, other))
        order, other_order = np.argsort(hashes), np.argsort(other_hashes)  # both sorted: memory is read in order
        nearest = np.searchsorted(other_hashes[other_order], hashes[order])
        candidates = other_order[np.minimum(nearest, len(other) - 1)]
        is_same = other_hashes[candidates] == hashes[order]
        places = np.full(len(self), -1)
        places[order[is_same]] = candidates[is_same]
        return places
