"""Timing that compares: every candidate in every round, interleaved, so that a noisy machine disturbs all alike."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved_ms(
    steps: dict[str, Callable[[], object]], device: torch.device, rounds: int, calls: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds a call, one figure a round, for each candidate; the device is waited for around every round."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            for _ in range(calls):
                step()
            _wait(device)
            times[name].append((time.perf_counter() - began) * 1e3 / calls)
    return times


def median_ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """How many times faster than the baseline: median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(times[name], times[baseline], strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
