"""Comparative timing: every candidate runs in every round, so that noise of the machine affects all alike."""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def interleaved_ms(
    steps: dict[str, Callable[[], object]], device: torch.device, rounds: int, calls: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds per call, one figure per round, for each candidate; the device is synchronised around every round.

    A round begins with a call that is not timed, since the previous candidate has filled the caches. A candidate that
    is a context manager is entered for its round, such as a loader whose workers must not run during another's.
    """
    for step in steps.values():
        with _entered(step):
            for _ in range(warmup):
                step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            with _entered(step):
                step()
                gc.collect()
                times[name].append(timed_ms(step, device, calls))
    return times


def captured(call: Callable[[int], object], calls: int) -> Callable[[], None]:
    """A CUDA graph of call(0) .. call(calls - 1): a replay takes only the device's time, without launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)  # compiles, and fills caches that must not be filled while capturing
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph.replay


def timed_ms(step: Callable[[], object], device: torch.device, calls: int) -> float:
    """Milliseconds per call, including the work it queues on the device; earlier work is finished first."""
    wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        step()
    wait(device)
    return (time.perf_counter() - began) * 1e3 / calls


def median_ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """How many times faster than the baseline: median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(times[name], times[baseline], strict=True))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _entered(step: Any) -> AbstractContextManager[Any]:
    return step if isinstance(step, AbstractContextManager) else nullcontext()
