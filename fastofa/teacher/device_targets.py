"""The targets of an epoch's views, kept on the device and looked up by row."""

import numpy as np
import torch
from torch import Tensor

from fastofa.methods.targets import Targets
from fastofa.pipelines import Batch
from fastofa.teacher.vectors import Classifier, Vectors


class DeviceTargets:
    """The targets of one view table on the device. A lookup by row is one gather, the teacher's only cost.

    Args:
        classes: uint16 or int32 [N, K].
        log_probs: float16 [N, K].
        device: where to keep them.
        dense: K = C. Lookups renormalise the log-probabilities, which undoes most of float16's rounding.
        rows: int64 [n]: the only rows to keep, such as a rank's share of the epoch; None keeps all.
        vectors: the teacher's pooled vectors [N, D]; None if no method needs them.
        classifier: restores the log-probabilities of all classes from the vectors; None if no method needs them.
    """

    def __init__(
        self,
        classes: Tensor,
        log_probs: Tensor,
        device: torch.device,
        dense: bool = False,
        rows: np.ndarray | None = None,
        vectors: Vectors | None = None,
        classifier: Classifier | None = None,
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
            vectors = None if vectors is None else vectors.rows(kept)
        self.classes, self.log_probs = classes.to(device), log_probs.to(device)
        self.vectors = None if vectors is None else vectors.to(device)
        self.classifier = None if classifier is None else classifier.to(device)

    def of(self, batch: Batch) -> Targets:
        """The targets of the batch's images, with their sample ids."""
        return self.lookup(batch.rows)._replace(sample_ids=batch.sample_ids)

    def lookup(self, rows: Tensor) -> Targets:
        """Rows int64 [B] -> classes int32 [B, K], log_probs float16 (dense: float32) [B, K], and, with
        vectors, pooled fp32 [B, D] and, with a classifier, all_log_probs fp32 [B, C]."""
        rows = rows if self.positions is None else self.positions[rows]
        classes = self.classes[rows]
        if self.narrow:
            classes = classes.to(torch.int32) & 0xFFFF
        log_probs = self.log_probs[rows]
        targets = Targets(classes, log_probs.float().log_softmax(dim=1) if self.dense else log_probs)
        if self.vectors is None:
            return targets
        pooled = self.vectors.rows(rows).restored()
        return targets._replace(
            pooled=pooled, all_log_probs=None if self.classifier is None else self.classifier.log_probs(pooled)
        )
