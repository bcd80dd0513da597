"""What may be drawn: the policy of a view."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastofa.system.errors import BadInput
from fastofa.views import rand_augment


@dataclass(frozen=True)
class ViewPolicy:
    """What may be drawn; the defaults are the published ImageNet recipe's."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a share of the picture's, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, from and to (uniform in its logarithm)."""
    flip: float = 0.5
    """Probability of mirroring left to right."""
    auto_augment: str = ""
    """RandAugment in timm's notation (rand-m9-mstd0.5-inc1), on the cropped picture; empty for none."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none. Where cutmix is asked for too, each pair gets one of them."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta distribution; 0 for none."""
    erase: float = 0.0
    """Probability of random erasing with normal noise."""
    repeats: int = 1
    """Views that an epoch shows of a sample, of a share of the samples as much smaller (repeated augmentation)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Colour where an operation moves the picture away, and mean of the erasing noise; of pixels scaled to 0..1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the erasing noise."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high or (name == "scale" and high > 1):
                limit = " <= 1" if name == "scale" else ""
                raise BadInput(f"view policy: expected {name} with 0 < from <= to{limit}, got {low} {high}")
        if not 0 <= self.flip <= 1:
            raise BadInput(f"view policy: expected flip between 0 and 1, got {self.flip}")
        if not 0 <= self.erase <= 1:
            raise BadInput(f"view policy: expected erase between 0 and 1, got {self.erase}")
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
        """Do its views pair the samples?"""
        return self.mixup > 0 or self.cutmix > 0


def changed_policy(policy: ViewPolicy, **given: Any) -> ViewPolicy:
    """`policy` with what was given (and is not None) in place of its own. Raises BadInput for impossible values."""
    return dataclasses.replace(policy, **{name: value for name, value in given.items() if value is not None})
