"""Ctrl-C and SIGTERM end a long job at its next safe point; a second one ends it at once.

Not so a second SIGTERM to a rank: a cluster sends one to every process, and torchrun hands on the one it got itself.
"""

import os
import signal
from types import FrameType
from typing import Any


class Interrupt:
    """`with Interrupt() as interrupt:` then look at `interrupt.signum` where it is safe to stop.

    Outside the main thread, where Python gives no signals, it is never set.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        try:
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        if signum == signal.SIGINT or os.environ.get("WORLD_SIZE", "1") == "1":
            signal.signal(signum, self._before[signum])


class Stopped(Exception):
    """A job saved its state because of a signal; commands print the message and exit with 128 + signum."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
