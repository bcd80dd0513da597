"""The teacher's pooled vectors and its linear classifier: how a cache stores them, and what it restores from them.

Shapes: N images, D width of a vector, C classes of the data.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 127  # of int8, on each side of 0
TINY = 1e-30  # smallest step of int8


class Vectors(NamedTuple):
    """Pooled vectors as a cache stores them."""

    pooled: Tensor
    """float16 or int8 [N, D]."""
    pooled_scale: Tensor | None = None
    """With int8: float32 [N], the factor of each row."""

    def columns(self) -> dict[str, Tensor]:
        """The columns of a table, by name."""
        return {name: values for name, values in self._asdict().items() if values is not None}

    def rows(self, rows: Tensor) -> "Vectors":
        return Vectors(self.pooled[rows], None if self.pooled_scale is None else self.pooled_scale[rows])

    def to(self, device: torch.device) -> "Vectors":
        scale = self.pooled_scale
        return Vectors(self.pooled.to(device), None if scale is None else scale.to(device))

    def restored(self) -> Tensor:
        """fp32 [N, D]."""
        return self.pooled.float() if self.pooled_scale is None else self.pooled * self.pooled_scale[:, None]


def stored(vectors: Tensor, features: str) -> Vectors:
    """Round vectors, floating [N, D], for `--features`: pooled (float16) or pooled-int8 (int8 with a scale per row)."""
    vectors = vectors.float()
    if features == "pooled":
        return Vectors(vectors.half())
    scale = vectors.abs().amax(dim=1) / STEPS
    return Vectors((vectors / scale.clamp(min=TINY)[:, None]).round().to(torch.int8), scale)


def joined(parts: list[Vectors]) -> Vectors:
    """The rows of several tables, one after the other."""
    scales = [part.pooled_scale for part in parts if part.pooled_scale is not None]
    return Vectors(torch.cat([part.pooled for part in parts]), torch.cat(scales) if scales else None)


class Classifier(NamedTuple):
    """The teacher's linear classifier, reduced to the classes of the data, in their order."""

    weight: Tensor
    """float32 [C, D]."""
    bias: Tensor
    """float32 [C]."""

    def to(self, device: torch.device) -> "Classifier":
        return Classifier(*(values.to(device) for values in self))

    def log_probs(self, vectors: Tensor) -> Tensor:
        """Log-probabilities of all classes at temperature 1, fp32 [N, C], of vectors fp32 [N, D]."""
        return torch.log_softmax(torch.addmm(self.bias, vectors, self.weight.T), dim=1)
