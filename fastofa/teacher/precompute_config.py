"""The arguments of `fastofa precompute`."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastofa.data.headers import Limits, given_limits
from fastofa.runs.config import MOST_EPOCHS, to_json
from fastofa.runs.recipes import default_policy, recipe
from fastofa.system.errors import BadInput, at_least
from fastofa.views.policy import ViewPolicy, changed_policy

# Titles in the help, each by the first of its fields.
SECTIONS = {"data": "cache and teacher", "scale": "view", "skip_corrupt": "image", "batch_size": "hardware"}
# What a cache does not remember: how its predictions were computed, and which images were left out (the data set's
# index does). --out is always given.
FREE = {"skip_corrupt", "allow_warnings", "batch_size", "device", "pipeline", "workers"}


@dataclass(frozen=True)
class PrecomputeConfig:
    """Write a teacher cache: V views of the training set, each with the teacher's top-K answer for every picture."""

    data: str
    """Data set: digits, digits:N, cifar100:DIR, a folder with train/ and val/, or what `fastofa write` wrote."""
    teacher: str
    """A timm model with its tag (convnext_tiny.in12k_ft_in1k), a folder that `fastofa train`, `fastofa export` or timm
    wrote, or hf-hub:OWNER/NAME. Its classes are matched with the data's by name."""
    out: Path
    """Folder of the cache."""
    views: int
    """Views of the training set. An epoch replays view (epoch modulo views): one for each is best, fewer are small.
    More can be added later; fewer than the cache holds changes nothing."""
    topk: int
    """Classes kept of each answer, at 4 bytes a class. The mass they leave is spread over the other classes."""
    teacher_checkpoint: Path | None = None
    """The teacher's weights from a .safetensors or .pth file instead of timm's. A config.json beside it, if of the same
    architecture, gives normalisation, input size and names of classes."""
    teacher_checkpoint_key: str | None = None
    """Which weights of that file, where it holds several: model, say, or model_ema. By default an average's; a line
    says which."""
    image_size: int | None = None
    """Side of the teacher's input in pixels; by default its own."""
    mean: tuple[float, float, float] | None = None
    """Normalisation of the teacher's pixels; by default its own."""
    std: tuple[float, float, float] | None = None
    """Normalisation of the teacher's pixels; by default its own."""
    scale: tuple[float, float] | None = None
    """Share of the picture's area that a crop takes, from and to. By default 0.08 1 (digits: 0.6 1)."""
    ratio: tuple[float, float] | None = None
    """Width over height of a crop, from and to. By default 3/4 to 4/3."""
    flip: float | None = None
    """Probability of mirroring. By default 0.5 (digits: 0)."""
    recipe: str = ""
    """The training recipe whose published views are drawn; the flags above and the next five change them."""
    auto_augment: str | None = None
    """RandAugment in timm's notation, as rand-m9-mstd0.5-inc1. By default the recipe's, or none."""
    mixup: float | None = None
    """Alpha of mixup. By default the recipe's, or 0: none."""
    cutmix: float | None = None
    """Alpha of cutmix. By default the recipe's, or 0: none."""
    erase: float | None = None
    """Probability of random erasing. By default the recipe's, or 0."""
    repeats: int | None = None
    """Views of a sample that one epoch shows. By default the recipe's, or 1."""
    seed: int = 0
    """Of the views."""
    skip_corrupt: bool = False
    """Decode every file first, list the unreadable ones and leave them out for good. Without it they are refused."""
    allow_warnings: bool = False
    """Take images that decode with signs of damage, too, as they decode."""
    max_pixels: float = 200
    """Millions of pixels of an image at most, by its header; larger ones are unreadable."""
    batch_size: int = 256
    """Pictures the teacher sees at once."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the teacher's arithmetic; log-softmax is always fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    pipeline: str = "auto"
    """resident, packed, ffcv, dali, torchvision, or auto, which says what it takes and why."""
    workers: int | None = None
    """Decoding processes of the torchvision pipeline, threads of others; by default one per core, at most 16."""

    def __post_init__(self) -> None:
        at_least(self, 1, "views", "topk", "batch_size")
        at_least(self, 0, "workers")
        if self.views > MOST_EPOCHS:
            raise BadInput(f"views: expected at most {MOST_EPOCHS:,}, got {self.views}")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed: expected a number from 0 to 2^63 - 1, got {self.seed}")
        if self.image_size is not None and self.image_size < 1:
            raise BadInput(f"image-size: expected at least 1 pixel, got {self.image_size}")
        if self.teacher_checkpoint_key is not None and self.teacher_checkpoint is None:
            raise BadInput("teacher-checkpoint-key: expected --teacher-checkpoint with it")
        if (self.mean is None) != (self.std is None):
            raise BadInput("expected both --mean and --std or neither")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise BadInput(f"std: expected three numbers above 0, got {self.std}")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise BadInput(f"mean: expected three numbers, got {self.mean}")
        self.limits()
        if self.recipe:
            recipe(self.recipe)

    def to_json(self) -> dict[str, Any]:
        """What the predictions depend on; the rest at its defaults, so that equal caches are equal files."""
        own = {field.name: field.default for field in dataclasses.fields(self) if field.name in FREE}
        return {**to_json(self), **own, "out": ""}

    def limits(self) -> Limits:
        """Which images are taken."""
        return given_limits(self.max_pixels, self.allow_warnings)

    def policy(self) -> ViewPolicy:
        """What to draw. Raises BadInput for impossible values."""
        names = ("scale", "ratio", "flip", "auto_augment", "mixup", "cutmix", "erase", "repeats")
        given = {name: getattr(self, name) for name in names}
        policy = changed_policy(default_policy(self.data, self.recipe), **given)
        if self.views % policy.repeats:
            raise BadInput(
                f"views: expected a multiple of {policy.repeats}, as repeated augmentation shows them, got {self.views}"
            )
        return policy
