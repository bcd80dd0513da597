"""A model together with its normalisation: pixels -> logits.

Shapes: B batch, S image side, C classes.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Normalized(nn.Module):
    """`model(pixels)`: uint8 [B, 3, S, S], RGB -> logits [B, C].

    Args:
        model: takes normalised images.
        mean, std: float [1, 3, 1, 1], of pixels scaled to 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels.float() / 255 - self.mean) / self.std)


def in_words(mean: Iterable[float], std: Iterable[float]) -> str:
    """ "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"."""
    return ", ".join(
        f"{name} {' '.join(f'{value:.4g}' for value in values)}" for name, values in (("mean", mean), ("std", std))
    )
