"""The policy of a view: the distributions from which augmentations are drawn."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastofa.system.errors import BadInput
from fastofa.views import rand_augment


@dataclass(frozen=True)
class ViewPolicy:
    """The distributions from which views are drawn. The defaults are those of the published ImageNet recipe, except
    that every crop is resized with the bilinear filter."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Minimum and maximum area of a crop as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Minimum and maximum aspect ratio (width over height) of a crop; its logarithm is uniform."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    bicubic: float = 0.0
    """Probability that a crop is resized with a bicubic filter instead of a bilinear one. The published code draws one
    of the two for every image (0.5); bilinear is faster."""
    auto_augment: str = ""
    """RandAugment of the cropped image in timm's notation (rand-m9-mstd0.5-inc1); "" for none."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none. If cutmix is also on, each pair gets one of the two at random."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta distribution; 0 for none."""
    erase: float = 0.0
    """Probability of random erasing with normal noise."""
    repeats: int = 1
    """Repeated augmentation: an epoch shows this many views of a sample, for 1/repeats of the samples."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """RGB in 0..1: the fill colour where an operation moves the image away, and the mean of the erasing noise."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """RGB in 0..1: standard deviation of the erasing noise."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high or (name == "scale" and high > 1):
                limit = " <= 1" if name == "scale" else ""
                raise BadInput(f"view policy: expected {name} with 0 < minimum <= maximum{limit}, got {low} {high}")
        if not 0 <= self.flip <= 1:
            raise BadInput(f"view policy: expected flip between 0 and 1, got {self.flip}")
        for name in ("bicubic", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"view policy: expected {name} between 0 and 1, got {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"view policy: expected {name} of at least 0, got {getattr(self, name)}")
        if self.repeats < 1:
            raise BadInput(f"view policy: expected repeats of at least 1, got {self.repeats}")
        if not (all(0 <= value <= 1 for value in self.mean) and all(value > 0 for value in self.std)):
            raise BadInput(f"view policy: expected mean between 0 and 1, std above 0, got {self.mean} {self.std}")
        if self.auto_augment:
            rand_augment.parse(self.auto_augment)

    @property
    def mixes(self) -> bool:
        """Whether its views mix pairs of samples."""
        return self.mixup > 0 or self.cutmix > 0


def changed_policy(policy: ViewPolicy, **changes: Any) -> ViewPolicy:
    """`policy` with the changes that are not None. Raises BadInput for impossible values."""
    return dataclasses.replace(policy, **{name: value for name, value in changes.items() if value is not None})
