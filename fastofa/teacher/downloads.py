"""Fetch predictions from a GPU without making it wait for the CPU.

Shapes: B images in a batch, K classes kept.
"""

from collections import deque

import torch
from torch import Tensor

from fastofa.methods.targets import TopK

EVERY = 8  # batches per copy from a GPU


class Downloads:
    """Copies the predictions of several batches at once, and returns them when the next copy begins.

    The CPU waits once per copy, for the one before it. At that time the device has the batches of a whole copy to work
    on, so that it never becomes idle.

    Args:
        device: where the predictions are computed.
        every: batches per copy; None for EVERY on a GPU, and 1 on a CPU.
    """

    def __init__(self, device: torch.device, every: int | None = None) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.every = every or (EVERY if self.gpu else 1)
        self.batches: list[TopK] = []
        self.copies: deque[tuple[TopK, torch.cuda.Event | None]] = deque()

    def add(self, targets: TopK) -> list[TopK]:
        """Add a batch, [B, K] on the device. Returns the predictions that have arrived on the CPU, in their order."""
        self.batches.append(targets)
        if len(self.batches) < self.every:
            return []
        self._begin_copy()
        return self._arrived(len(self.copies) - 1)

    def finish(self) -> list[TopK]:
        """Wait for all predictions that have not been returned yet."""
        if self.batches:
            self._begin_copy()
        return self._arrived(len(self.copies))

    def _begin_copy(self) -> None:
        joined = TopK(*(torch.cat(values) for values in zip(*self.batches, strict=True)))
        self.batches = []
        copies = TopK(*map(self._copy, joined))
        event = torch.cuda.current_stream(self.device).record_event() if self.gpu else None
        self.copies.append((copies, event))

    def _copy(self, values: Tensor) -> Tensor:
        if not self.gpu:
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def _arrived(self, count: int) -> list[TopK]:
        """The predictions of the oldest `count` copies."""
        found = []
        for _ in range(count):
            copies, event = self.copies.popleft()
            if event is not None:
                event.synchronize()
                copies = TopK(*(values.clone() for values in copies))  # pinned memory is scarce
            found.append(copies)
        return found
