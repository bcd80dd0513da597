"""Ctrl-C and SIGTERM end a long job at its next safe point; a second one ends it at once.

A second SIGTERM to a rank is ignored: a cluster sends one to every process, and torchrun forwards its own.
A job that waits for something from outside (a picture from a disk that does not answer) is not waited for long.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PATIENCE_S = 10.0  # that a wait may last after a signal


class Stopped(Exception):
    """A job saved its state because of a signal; commands print the message and exit with 128 + signum."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Interrupt:
    """`with Interrupt() as interrupt:` then look at `interrupt.signum` where it is safe to stop.

    Outside the main thread, where Python gives no signals, it is never set.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        global _current
        handlers = {signal.SIGINT: self._note, signal.SIGTERM: self._note, signal.SIGALRM: self._give_up}
        try:
            self._before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        except ValueError:
            self._before = {}
        self._outer, _current = _current, self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self._outer
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        if self.waits:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        if signum == signal.SIGINT or os.environ.get("WORLD_SIZE", "1") == "1":
            signal.signal(signum, self._before[signum])

    def _give_up(self, _signum: int, _: FrameType | None) -> None:
        if self.waits and self.signum is not None:
            raise Stopped(
                f"stopped while it waited for images for {PATIENCE_S:.0f} s; run the same command again (train: with "
                "--resume) to go on from what was saved before",
                self.signum,
            )


_current: Interrupt | None = None


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait that may never end: once there is a signal, it raises Stopped after PATIENCE_S."""
    interrupt = _current
    if interrupt is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt.waits = True
    if interrupt.signum is not None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        yield
    finally:
        interrupt.waits = False
        if interrupt.signum is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
