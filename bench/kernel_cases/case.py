"""What every kernel's cases consist of: a size, the implementations to compare, and their inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BASELINE = "twin, eager"
MAX_INPUTS_MB = 200  # total size of the rotating inputs: four times an H100's L2 cache

Call = Callable[[int], Any]


class Inputs:
    """Inputs made from seeds 0, 1, ... on first use, since those of all cases together do not fit in memory."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count = make, count
        self.made: list[Any] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        if not self.made:
            self.made = [self.make(seed) for seed in range(self.count)]
        return self.made[number % self.count]

    def free(self) -> None:
        self.made = []


@dataclass(frozen=True)
class Case:
    """One size of one kernel and its implementations, each of which is called with the number of an input."""

    kernel: str
    size: str
    bytes: float
    items: int
    """Number of images or samples, for the rate."""
    candidates: dict[str, Call]
    compare: tuple[str, ...] = ()
    """Candidates that must give the twin's results; peers that compute something else are not among them."""
    tolerance: float = 0.02
    """Largest difference from the twin, as a share of the twin's largest value."""
    waiting: tuple[str, ...] = ()
    """Candidates that wait for the device, so that a CUDA graph cannot capture them."""
    inputs: Inputs | None = None
    """The inputs to rotate over; None if the candidates hold a single one."""
    skipped: dict[str, str] = field(default_factory=dict)
    by_norm: bool = False
    """Compare norms of whole tensors, since single values may differ where rounding decides what a ReLU passes."""


def rotate(make: Callable[[int], Any], bytes_each: float, device: torch.device) -> Inputs:
    """Inputs to rotate over; on a GPU, enough of them to exceed its cache."""
    count = max(2, int(MAX_INPUTS_MB * 1e6 // bytes_each) + 1) if device.type == "cuda" else 1
    return Inputs(make, min(count, 32))


def on(inputs: Inputs, function: Callable[..., Any]) -> Call:
    """The function called with the tensors of an input."""
    return lambda i: function(*inputs[i])


def twins(twin: Callable[..., Any], call: Callable[[Callable[..., Any]], Call]) -> dict[str, Call]:
    """The baseline and its compiled form, each as `call` makes a candidate of it."""
    return {BASELINE: call(twin), "twin, compiled": call(torch.compile(twin, dynamic=False))}


def training_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, as under autocast, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
