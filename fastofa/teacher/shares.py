"""How several ranks share the work of `precompute`: through counters in torchrun's store, and the cache's folder.

Rank 0 lists the work: ranges of rows of the tables that are missing. Each rank takes the next range when it has
finished one, so that none waits for a slower one. Predictions never pass between ranks: each writes its own to the
shared folder. If a rank dies, the others go on, and at the end rank 0 computes the ranges that it had taken.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from fastofa.system.errors import BadInput, Failed, LostContact
from fastofa.system.rendezvous import Place, meet
from fastofa.teacher.parts import Range

MEET_S = 600  # seconds to wait for the other ranks to start
POLL_S = 0.2
SILENT_S = 60.0  # seconds without a prediction of any rank, after which those that have not finished count as lost
LEAVE_S = 10.0  # seconds that rank 0 waits for the others to learn of the end
T = TypeVar("T")


class Work(NamedTuple):
    """The work of all ranks."""

    ranges: list[Range]
    """To be computed, in the order in which they are taken; a table's parts are joined when its last one is done."""
    saved: list[Range]
    """Parts of the same tables that an earlier run saved."""

    def starts(self, table: int | str) -> list[int]:
        """Where the parts of a table start."""
        return [part.start for part in self.ranges + self.saved if part.table == table and part.start < part.stop]


def deal(missing: list[Range], ranks: int, batch_size: int) -> list[Range]:
    """Cut missing ranges for `ranks` to take: large ones first, and smaller ones towards the end.

    A range has at most half of a rank's share of the remaining rows. So views are taken whole while there are many per
    rank, are cut when few are left, and at the end no rank works for long after the others.
    ("Guided self-scheduling", Polychronopoulos and Kuck, 1987.)

    Args:
        missing: the ranges that are missing.
        ranks: the number of ranks. One rank takes each range whole.
        batch_size: ranges are cut into whole batches, so that the batches are those of a single rank.
    """
    left = sum(stop - start for _, start, stop in missing)
    dealt = []
    for table, start, stop in missing:
        while start < stop:
            share = left if ranks == 1 else max(left // (2 * ranks), batch_size)
            size = _quotient(stop - start, _quotient(stop - start, share))
            end = min(start + _quotient(size, batch_size) * batch_size, stop)
            dealt.append(Range(table, start, end))
            left, start = left - (end - start), end
    empty = [part for part in missing if part.start == part.stop]  # tables that only have to be joined
    return empty + dealt


def _quotient(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


class Shares:
    """One rank's access to the work of all ranks. Every method is a request to the store; a single process has its own.

    Raises:
        Failed: the store still holds the keys of an earlier start (the constructor).
        LostContact: the store is gone (every method).
    """

    def __init__(self, store: dist.Store | None = None, place: Place | None = None) -> None:
        self.store, self.place = store or dist.HashStore(), place or Place()
        if self._add(f"rank {self.place.rank}", 1) > 1:
            raise Failed(
                "torchrun's store still contains an earlier start of these ranks; set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and run the same command again"
            )

    @property
    def is_main(self) -> bool:
        return self.place.is_main

    # --- What rank 0 announces

    def announce(self, key: str, value: Any = None) -> None:
        """Set a key for all ranks. The value is anything that JSON holds."""
        self._request(lambda store: store.set(key, json.dumps(value)))

    def wait_for(self, key: str, check: Callable[[], None]) -> Any:
        """Wait for a key, for as long as it takes, and return its value.

        Args:
            key: the key.
            check: called several times per second; it may raise, to end the wait.

        Raises:
            BadInput: another rank refused its input.
        """
        while not self._request(lambda store: store.check([key])):
            self._check_refused()
            check()
            time.sleep(POLL_S)
        return json.loads(self._request(lambda store: store.get(key)))

    def announce_work(self, work: Work) -> None:
        self.announce("work", work)

    def wait_for_work(self, check: Callable[[], None]) -> Work:
        """The work that rank 0 announced; see `wait_for`."""
        ranges, saved = self.wait_for("work", check)
        return Work([Range(*part) for part in ranges], [Range(*part) for part in saved])

    # --- Counters

    def take(self, work: Work) -> Iterator[int]:
        """Take ranges until all are taken: yields the index of each range that this rank has to compute."""
        while (index := self._add("taken", 1) - 1) < len(work.ranges):
            yield index

    def is_done(self, index: int) -> bool:
        return self._add(f"done {index}", 0) > 0

    def finish(self, work: Work, index: int) -> bool:
        """Record that a range is on the disk. Returns whether it was the last of its table, to be joined now."""
        table = work.ranges[index].table
        if self._add(f"done {index}", 1) > 1:  # computed twice, because this rank or another counted as lost
            return False
        return self._add(f"done of {table}", 1) == sum(part.table == table for part in work.ranges)

    def report(self, rows: int = 0) -> int:
        """Add to the number of predictions that all ranks have computed, and return it."""
        return self._add("rows", rows)

    def report_views(self, views: int = 0) -> int:
        """Add to the number of views that all ranks have finished, and return it."""
        return self._add("views", views)

    # --- The end

    def wait_for_others(self, check: Callable[[], None]) -> bool:
        """Rank 0: wait until every rank has nothing left to do. Returns False if some count as lost."""
        self._add("idle", 1)
        rows, since = self.report(), time.monotonic()
        while self._add("idle", 0) < self.place.size:
            self._check_refused()
            check()
            time.sleep(POLL_S)
            if self.report() != rows:
                rows, since = self.report(), time.monotonic()
            elif time.monotonic() - since > SILENT_S:
                return False
        return True

    def wait_for_end(self, check: Callable[[], None]) -> None:
        """Every other rank: wait until rank 0 has completed the cache."""
        self._add("idle", 1)
        self.wait_for("end", check)
        self._add("left", 1)

    def announce_end(self) -> None:
        """Rank 0: let the others end. The store may end with this process, so it waits for them for a while."""
        self.announce("end")
        until = time.monotonic() + LEAVE_S
        while self._add("left", 0) < self.place.size - 1 and time.monotonic() < until:
            time.sleep(POLL_S / 4)

    # --- Requests

    def refuse(self) -> None:
        """Let the other ranks know that this one refuses its input."""
        with suppress(LostContact):
            self._request(lambda store: store.set("refused", str(self.place.rank)))

    def _check_refused(self) -> None:
        if self._request(lambda store: store.check(["refused"])):
            other = self._request(lambda store: store.get("refused")).decode()
            raise BadInput(f"rank {self.place.rank}: stopped because rank {other} refused its input")

    def _add(self, key: str, number: int) -> int:
        return self._request(lambda store: store.add(key, number))

    def _request(self, request: Callable[[dist.Store], T]) -> T:
        try:
            return request(self.store)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise LostContact(
                f"rank {self.place.rank}: lost the other ranks ({reason}); run the same command again, or use torchrun "
                "--max-restarts"
            ) from None


@contextmanager
def shares_of_ranks() -> Iterator[Shares]:
    """This process's shares. If it refuses its input, the others learn of it."""
    shares = Shares(*meet(timedelta(seconds=MEET_S)))
    try:
        yield shares
    except BadInput:
        shares.refuse()
        raise
