"""The targets of an epoch's views, kept on the device and looked up by row."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastofa.methods.targets import Targets, TopK
from fastofa.pipelines import Batch
from fastofa.teacher.mixture import mix
from fastofa.teacher.packed_rows import Decoder, PackedRows
from fastofa.teacher.vectors import Classifier, Vectors


class DeviceTargets:
    """The targets of one view table on the device. A lookup by row is one gather, the teacher's only cost.

    Args:
        predictions: the K best classes, uint16 or int32 [N, K] with log_probs floating [N, K], or packed rows. Packed
            rows stay packed on the device; a lookup decodes those of its batch.
        device: where to keep them.
        dense: whether K = C. Lookups then renormalise the log-probabilities, which undoes most of float16's rounding.
        rows: int64 [n]: the only rows to keep, such as a rank's share of the epoch; None keeps all.
        vectors: the teacher's pooled vectors [N, D]; None if no method needs them.
        classifier: restores the log-probabilities of all classes from the vectors; None if no method needs them.
    """

    def __init__(
        self,
        predictions: TopK | PackedRows,
        device: torch.device,
        dense: bool = False,
        rows: np.ndarray | None = None,
        vectors: Vectors | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        self.dense = dense
        columns: list[Tensor]
        self.decode: Callable[..., TopK]
        if isinstance(predictions, PackedRows):
            columns, self.decode = [predictions.rows], Decoder(predictions.format, device)
        else:
            columns, self.decode = list(predictions), _indexable
        # torch cannot index uint16 tensors, so the same bits are kept as int16.
        columns = [values.view(torch.int16) if values.dtype == torch.uint16 else values for values in columns]
        self.positions: Tensor | None = None
        if rows is not None:
            kept = torch.from_numpy(rows)
            positions = torch.zeros(len(columns[0]), dtype=torch.int32)
            positions[kept] = torch.arange(len(kept), dtype=torch.int32)
            self.positions = positions.to(device)
            columns = [values[kept] for values in columns]
            vectors = None if vectors is None else vectors.rows(kept)
        self.columns = [values.to(device) for values in columns]
        """Packed rows, or classes and log_probs."""
        self.vectors = None if vectors is None else vectors.to(device)
        self.classifier = None if classifier is None else classifier.to(device)

    def of(self, batch: Batch) -> Targets:
        """The targets of the batch's images, with their sample ids."""
        return self.lookup(batch.rows)._replace(sample_ids=batch.sample_ids)

    def __len__(self) -> int:
        """The number of rows on the device."""
        return len(self.columns[0])

    def lookup(self, rows: Tensor) -> Targets:
        """Rows int64 [B] -> classes int32 [B, K] and log_probs [B, K], in fp32 if packed or dense, else as stored; with
        vectors also pooled fp32 [B, D], and with a classifier all_log_probs fp32 [B, C]."""
        rows = rows if self.positions is None else self.positions[rows]
        classes, log_probs = self.decode(*(values[rows] for values in self.columns))
        targets = Targets(classes, log_probs.float().log_softmax(dim=1) if self.dense else log_probs)
        if self.vectors is None:
            return targets
        pooled = self.vectors.rows(rows).restored()
        return targets._replace(
            pooled=pooled, all_log_probs=None if self.classifier is None else self.classifier.log_probs(pooled)
        )


class MixedTargets:
    """The targets of one view table whose teachers are kept apart. A lookup decodes each and computes their mean.

    Args:
        each: the table of each teacher, with `dense` False.
        weights: the weight of each teacher; their sum is 1.
        num_classes: C.
        all_classes: whether a method needs the log-probabilities of all classes.
    """

    def __init__(
        self, each: Sequence[DeviceTargets], weights: Sequence[float], num_classes: int, all_classes: bool
    ) -> None:
        self.each, self.weights, self.num_classes, self.all_classes = each, weights, num_classes, all_classes

    def of(self, batch: Batch) -> Targets:
        """The targets of the batch's images, with their sample ids."""
        return self.lookup(batch.rows)._replace(sample_ids=batch.sample_ids)

    def __len__(self) -> int:
        """The number of rows on the device."""
        return len(self.each[0])

    def lookup(self, rows: Tensor) -> Targets:
        """Rows int64 [B] -> the best classes of the mean (`mixture.mix`), int32 [B, K'], log_probs fp32 [B, K'] and, if
        a method needs them, all_log_probs fp32 [B, C]. Needs memory for a few tensors [B, C] per teacher."""
        found = [own.lookup(rows) for own in self.each]
        mean = mix([TopK(own.classes, own.log_probs) for own in found], self.weights, self.num_classes)
        return Targets(*mean.best, all_log_probs=mean.log_probs if self.all_classes else None)


def _indexable(classes: Tensor, log_probs: Tensor) -> TopK:
    """Classes int16 with the bits of uint16, or int32 -> int32."""
    return TopK(classes.to(torch.int32) & 0xFFFF if classes.dtype == torch.int16 else classes, log_probs)
