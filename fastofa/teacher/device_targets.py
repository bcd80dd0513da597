"""The targets of an epoch's views, kept on the device and looked up by row."""

import numpy as np
import torch
from torch import Tensor

from fastofa.methods.targets import Targets


class DeviceTargets:
    """The targets of one view table on the device. A lookup by row is one gather, so that the teacher costs no more.

    Args:
        classes: uint16 or int32 [N, K].
        log_probs: float16 [N, K].
        device: where to keep them.
        dense: K = C. Lookups renormalise the log-probabilities, which undoes most of float16's rounding.
        rows: int64 [n]: the only rows to keep, such as a rank's share of the epoch; None keeps all.
    """

    def __init__(
        self,
        classes: Tensor,
        log_probs: Tensor,
        device: torch.device,
        dense: bool = False,
        rows: np.ndarray | None = None,
    ) -> None:
        self.dense = dense
        self.narrow = classes.dtype == torch.uint16
        # torch cannot index uint16 tensors, so the same bits are kept as int16.
        classes = classes.view(torch.int16) if self.narrow else classes
        self.positions: Tensor | None = None
        if rows is not None:
            kept = torch.from_numpy(rows)
            positions = torch.zeros(len(classes), dtype=torch.int32)
            positions[kept] = torch.arange(len(kept), dtype=torch.int32)
            self.positions = positions.to(device)
            classes, log_probs = classes[kept], log_probs[kept]
        self.classes, self.log_probs = classes.to(device), log_probs.to(device)

    def lookup(self, rows: Tensor) -> Targets:
        """Rows int64 [B] -> classes int32 [B, K] and log_probs float16 (dense: float32) [B, K]."""
        rows = rows if self.positions is None else self.positions[rows]
        classes = self.classes[rows]
        if self.narrow:
            classes = classes.to(torch.int32) & 0xFFFF
        log_probs = self.log_probs[rows]
        return Targets(classes, log_probs.float().log_softmax(dim=1) if self.dense else log_probs)
