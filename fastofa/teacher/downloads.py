"""Fetch predictions from a GPU without making it wait for the CPU.

Shapes: B images in a batch.
"""

from collections import deque

import torch
from torch import Tensor

EVERY = 8  # batches per copy from a GPU
Columns = dict[str, Tensor]
"""Columns of a table by name, with a row per image."""


class Downloads:
    """Copies the predictions of several batches at once, and returns them when the next copy begins.

    The CPU waits once per copy, for the previous copy. Meanwhile, the batches of the next copy are queued on the
    device, so that it does not become idle.

    Args:
        device: where the predictions are computed.
        every: batches per copy; None for EVERY on a GPU, and 1 on a CPU.
    """

    def __init__(self, device: torch.device, every: int | None = None) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.every = every or (EVERY if self.gpu else 1)
        self.batches: list[Columns] = []
        self.copies: deque[tuple[Columns, torch.cuda.Event | None]] = deque()

    def add(self, batch: Columns) -> list[Columns]:
        """Add a batch, [B, ...] on the device. Returns the predictions that have arrived on the CPU, in their order."""
        self.batches.append(batch)
        if len(self.batches) < self.every:
            return []
        self._begin_copy()
        return self._arrived(len(self.copies) - 1)

    def finish(self) -> list[Columns]:
        """Wait for all predictions that have not been returned yet, and return them."""
        if self.batches:
            self._begin_copy()
        return self._arrived(len(self.copies))

    def _begin_copy(self) -> None:
        copies = {name: self._copy(torch.cat([batch[name] for batch in self.batches])) for name in self.batches[0]}
        self.batches = []
        event = torch.cuda.current_stream(self.device).record_event() if self.gpu else None
        self.copies.append((copies, event))

    def _copy(self, values: Tensor) -> Tensor:
        if not self.gpu:
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def _arrived(self, count: int) -> list[Columns]:
        """The predictions of the oldest `count` copies."""
        found = []
        for _ in range(count):
            copies, event = self.copies.popleft()
            if event is not None:
                event.synchronize()
                copies = {name: values.clone() for name, values in copies.items()}  # pinned memory is scarce
            found.append(copies)
        return found
