"""Ctrl-C and SIGTERM end a long job at its next safe point; a second signal ends it at once.

A second SIGTERM to a rank is ignored, because a cluster sends one to every process and torchrun forwards its own. If a
job is waiting for something external, such as a disk that does not respond, it ends after PATIENCE_S.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PATIENCE_S = 10.0  # seconds that a wait may last after a signal


class Stopped(Exception):
    """A job ended because of a signal, after saving. Commands print the message and exit with code 128 + signum."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Interrupt:
    """`with Interrupt() as interrupt:`, then `interrupt.check(...)`, or its `signum`, where it is safe to stop.

    Outside the main thread, where Python delivers no signals, it stays None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.is_waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        global _current
        handlers = {signal.SIGINT: self._record, signal.SIGTERM: self._record, signal.SIGALRM: self._time_out}
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

    def check(self, message: str) -> None:
        """Raises Stopped with this message after a signal."""
        if self.signum is not None:
            raise Stopped(message, self.signum)

    def _record(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        if self.is_waiting:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        if signum == signal.SIGINT or os.environ.get("WORLD_SIZE", "1") == "1":
            signal.signal(signum, self._before[signum])

    def _time_out(self, _signum: int, _: FrameType | None) -> None:
        if self.is_waiting and self.signum is not None:
            raise Stopped(
                f"stopped after waiting {PATIENCE_S:.0f} s for images; run the same command again (train: with "
                "--resume) to continue from the last save",
                self.signum,
            )


_current: Interrupt | None = None


@contextmanager
def waiting() -> Iterator[None]:
    """Wrap a wait that may never end: after a signal, it raises Stopped within PATIENCE_S."""
    interrupt = _current
    if interrupt is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt.is_waiting = True
    if interrupt.signum is not None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        yield
    finally:
        interrupt.is_waiting = False
        if interrupt.signum is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
