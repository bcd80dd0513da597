"""How long the training steps took, and nothing else."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Clock:
    """Counts training steps and the seconds they took, evaluation, saving and compilation left out."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds in which the loop waited for the pipeline."""
    started: float = 0.0

    def start(self) -> None:
        self.started = time.monotonic()

    def stop(self) -> None:
        self.seconds += time.monotonic() - self.started

    def waiting_for(self, get: Callable[[], T]) -> T:
        began = time.monotonic()
        got = get()
        self.waited += time.monotonic() - began
        return got
