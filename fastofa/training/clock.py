"""The time spent in training steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Clock:
    """Counts training steps and their seconds; evaluation, saving and compilation are excluded."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """The part of `seconds` that the loop waited for the pipeline."""
    started: float = 0.0

    def start(self) -> None:
        self.started = time.monotonic()

    def stop(self) -> None:
        self.seconds += time.monotonic() - self.started

    def timed_wait(self, get: Callable[[], T]) -> T:
        """Return `get()` and add its time to `waited`."""
        began = time.monotonic()
        result = get()
        self.waited += time.monotonic() - began
        return result
