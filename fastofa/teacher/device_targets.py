"""The targets of an epoch's views, held on the device and looked up by row."""

import numpy as np
import torch
from torch import Tensor

from fastofa.methods.targets import Targets


class DeviceTargets:
    """One view's answers on the device, looked up by row of the view table: the teacher costs a gather.

    With `dense` (K = C) the answers are normalised again, which takes back most of what float16 rounded off.
    With `kept` (int64 [n]) only these rows' answers are kept: a rank's share of the epoch.
    """

    def __init__(
        self,
        classes: Tensor,
        log_probs: Tensor,
        device: torch.device,
        dense: bool = False,
        kept: np.ndarray | None = None,
    ) -> None:
        self.dense = dense
        self.narrow = classes.dtype == torch.uint16
        # torch can hardly index uint16, so the same bits travel as int16.
        classes = classes.view(torch.int16) if self.narrow else classes
        self.rows: Tensor | None = None
        if kept is not None:
            chosen = torch.from_numpy(kept)
            rows = torch.zeros(len(classes), dtype=torch.int32)
            rows[chosen] = torch.arange(len(chosen), dtype=torch.int32)
            self.rows = rows.to(device)
            classes, log_probs = classes[chosen], log_probs[chosen]
        self.classes, self.log_probs = classes.to(device), log_probs.to(device)

    def lookup(self, rows: Tensor) -> Targets:
        """int64 [B] -> classes int32 [B, K] and log_probs float16 (dense: float32) [B, K]."""
        rows = rows if self.rows is None else self.rows[rows]
        classes = self.classes[rows]
        if self.narrow:
            classes = classes.to(torch.int32) & 0xFFFF
        log_probs = self.log_probs[rows]
        return Targets(classes, log_probs.float().log_softmax(dim=1) if self.dense else log_probs)
