"""Report how long the first call of a compiled program takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastofa.system.progress import notice
from fastofa.training.step import Step


@contextmanager
def compiling(step: Step, what: str) -> Iterator[None]:
    """Report that the body compiles a program and runs it for the first time, and the seconds it took.

    Nothing is reported if the step is not compiled, or on a rank other than 0.
    """
    began, reports = time.monotonic(), step.world.is_main and step.compiled
    if reports:
        notice(f"{what}: compiling, which can take minutes unless the compiler's cache contains it")
    yield
    if reports:
        notice(f"{what}: compiled and run for the first time in {time.monotonic() - began:.0f} s")
