"""The arguments of `fastofa precompute`."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastofa.data.headers import Limits, parse_limits
from fastofa.runs.config import MAX_EPOCHS
from fastofa.runs.config_file import to_json
from fastofa.runs.recipes import default_policy, recipe, teacher_normalization
from fastofa.system.errors import BadInput, at_least
from fastofa.teacher.teacher_weights import checked_weights
from fastofa.views.policy import ViewPolicy, changed_policy

# Titles of groups in the help, keyed by the first field of each group.
SECTIONS = {"data": "cache and teacher", "scale": "view", "skip_corrupt": "image", "batch_size": "hardware"}
# Fields that a cache does not record: how its predictions were computed, and which images were left out (which the
# dataset's index records). --out is always given.
FREE = {"first_view", "plan", "skip_corrupt", "allow_warnings"}
FREE |= {"batch_size", "device", "compile", "pipeline", "workers"}


@dataclass(frozen=True)
class PrecomputeConfig:
    """Write a teacher cache: V views of the training set, each with the teacher's top-K predictions for every image."""

    data: str
    """Dataset: digits, digits:N, cifar100:DIR, a folder with train/ and val/, or the output of `fastofa write`,
    here or at a URL."""
    teacher: str | tuple[str, ...]
    """A timm model with its tag (convnext_tiny.in12k_ft_in1k), a folder written by `fastofa train`, `fastofa export` or
    timm, or hf-hub:OWNER/NAME. Its classes are matched with the data's by name. Give --teacher several times to store
    the mean of several teachers' probabilities."""
    out: Path
    """Folder of the cache."""
    views: int
    """Views of the training set. An epoch replays view (epoch modulo views). One view per epoch is best; fewer make a
    smaller cache. More can be added later; a number below that of an existing cache changes nothing."""
    topk: int | Literal["auto"]
    """Classes stored per prediction, at 2 to 3 bytes each. The remaining probability is spread over the other classes.
    auto: the fewest with which the gradient of the OFA loss has a cosine of 0.999 with the exact one, measured on up to
    512 images that are not stored."""
    plan: bool = False
    """Print the hours and disk space that the cache would take, from batches timed on this machine; writes nothing."""
    first_view: int = 0
    """Compute only the views from this one on, for a cache whose other views are computed elsewhere; `fastofa cache
    merge` joins the parts."""
    features: Literal["none", "pooled", "pooled-int8"] = "none"
    """Also store the teacher's pooled vector, the input of its classifier, for cc, rkd, crd and rsd; bkd, dkd, dist and
    lskd then learn from all classes exactly. pooled: 2 bytes per number; pooled-int8: 1 byte per number. Needs a
    linear classifier."""
    teacher_checkpoint: Path | None = None
    """A .safetensors or .pth file with the teacher's weights, instead of timm's. A config.json next to it, if for the
    same architecture, supplies normalisation, input size and class names."""
    teacher_checkpoint_key: str | None = None
    """Which weights to use if that file contains several, such as model or model_ema. Default: those of an average; a
    notice says which were used."""
    teacher_weights: tuple[float, ...] | None = None
    """Weights of several teachers' probabilities, with a sum of 1. Default: equal."""
    keep_each: bool = False
    """Store the top K of each of several teachers, instead of those of their mean, so that every run can weigh them
    (`fastofa train --teacher-weights`). Each further teacher takes as many bytes again."""
    image_size: int | None = None
    """Side of the teacher's input in pixels. Default: its own."""
    mean: tuple[float, float, float] | None = None
    """Mean of RGB (0 to 1) for normalising the teacher's input. Default: CIFAR's with a cifar_* recipe, otherwise its
    own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of RGB (0 to 1) for normalising the teacher's input. Default: as for --mean."""
    scale: tuple[float, float] | None = None
    """Minimum and maximum area of a crop as a fraction of the image. Default: 0.08 1 (digits: 0.6 1)."""
    ratio: tuple[float, float] | None = None
    """Minimum and maximum aspect ratio (width over height) of a crop. Default: 3/4 4/3."""
    flip: float | None = None
    """Probability of a horizontal flip. Default: 0.5 (digits: 0)."""
    bicubic: float | None = None
    """Probability that a crop is resized with a bicubic filter instead of a bilinear one. Default: the recipe's (0.5 as
    published), or 0."""
    recipe: str = ""
    """Draw the views of this training recipe, as published; the flags above and the next five override its values. With
    a cifar_* recipe, the teacher's input is normalised as published too."""
    auto_augment: str | None = None
    """RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1. Default: the recipe's, or none."""
    mixup: float | None = None
    """Alpha of mixup. Default: the recipe's, or 0 (off)."""
    cutmix: float | None = None
    """Alpha of cutmix. Default: the recipe's, or 0 (off)."""
    erase: float | None = None
    """Probability of random erasing. Default: the recipe's, or 0."""
    repeats: int | None = None
    """Repeated augmentation: views per sample in one epoch. Default: the recipe's, or 1."""
    seed: int = 0
    """Random seed of the views."""
    skip_corrupt: bool = False
    """Decode every file first, list the unreadable ones and skip them. Without it, unreadable files are an error."""
    allow_warnings: bool = False
    """Accept images that decode with signs of damage, and use them as decoded."""
    max_pixels: float = 200
    """Maximum size of an image in millions of pixels, by its header; larger ones count as unreadable."""
    batch_size: int = 256
    """Images per forward pass of the teacher."""
    device: str = "auto"
    """auto, cuda, cuda:1, cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the teacher's weights and activations; log-softmax is always fp32. auto: bf16 on a GPU, fp32 on a
    CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the teacher, from pixels to stored predictions, as one program. auto: on for a GPU, off for a
    CPU."""
    pipeline: str = "auto"
    """resident, packed, ffcv, dali, torchvision, or auto, which reports its choice and the reason."""
    workers: int | None = None
    """Decoder processes (torchvision pipeline) or threads (others). Default: one per core, at most 16."""

    def __post_init__(self) -> None:
        at_least(self, 1, "views", "topk", "batch_size")
        at_least(self, 0, "workers")
        if isinstance(self.topk, str) and self.topk != "auto":
            raise BadInput(f"topk: expected a number or auto, got {self.topk!r}")
        if self.views > MAX_EPOCHS:
            raise BadInput(f"views: expected at most {MAX_EPOCHS:,}, got {self.views}")
        if not 0 <= self.first_view < self.views:
            last = self.views - 1
            raise BadInput(f"first-view: expected 0 to {last}, the last of --views {self.views}, got {self.first_view}")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed: expected a number from 0 to 2^63 - 1, got {self.seed}")
        if self.image_size is not None and self.image_size < 1:
            raise BadInput(f"image-size: expected at least 1 pixel, got {self.image_size}")
        if self.teacher_checkpoint_key is not None and self.teacher_checkpoint is None:
            raise BadInput("teacher-checkpoint-key: expected --teacher-checkpoint with it")
        self._check_teachers()
        if (self.mean is None) != (self.std is None):
            raise BadInput("expected both --mean and --std or neither")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise BadInput(f"std: expected three numbers above 0, got {self.std}")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise BadInput(f"mean: expected three numbers, got {self.mean}")
        self.limits()
        if self.recipe:
            recipe(self.recipe)

    def _check_teachers(self) -> None:
        count = len(self.teachers)
        if count < 1:
            raise BadInput("teacher: expected at least one, got none")
        if count > 1 and self.features != "none":
            raise BadInput(f"features: expected none with several teachers, got {self.features}; leave it out")
        if count > 1 and self.teacher_checkpoint is not None:
            raise BadInput(
                f"teacher-checkpoint: expected one --teacher with it, got {count}; give each as a folder with "
                "config.json and weights, as `fastofa export` writes it"
            )
        if count == 1 and self.keep_each:
            raise BadInput("keep-each: expected several --teacher with it, got one; leave it out")
        checked_weights(self.teacher_weights, count, "--teacher")

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each teacher; their sum is 1."""
        return checked_weights(self.teacher_weights, len(self.teachers), "--teacher")

    def to_json(self) -> dict[str, Any]:
        """The fields on which predictions depend; others have their defaults, so that equal caches are equal files."""
        own = {field.name: field.default for field in dataclasses.fields(self) if field.name in FREE}
        values = {**to_json(self), **own, "out": ""}
        if not self.keep_each:
            del values["keep_each"]  # as caches of earlier versions
        return values

    def limits(self) -> Limits:
        """The limits within which images are accepted."""
        return parse_limits(self.max_pixels, self.allow_warnings)

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
        """The (mean, std) for the teacher's input: those given, or the recipe's; None for the teacher's own."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        return teacher_normalization(self.recipe)

    def eps(self) -> tuple[float, ...]:
        """The values of eps for which the fidelity of the cache is measured: the recipe's, or the two that were
        published (1 for CIFAR-100, 1.5 for ImageNet)."""
        if not self.recipe:
            return (1.0, 1.5)
        return tuple(sorted({*recipe(self.recipe)(data=self.data, student="any", out=self.out).eps}))

    def policy(self) -> ViewPolicy:
        """The policy by which views are drawn. Raises BadInput for impossible values."""
        names = ("scale", "ratio", "flip", "bicubic", "auto_augment", "mixup", "cutmix", "erase", "repeats")
        flags = {name: getattr(self, name) for name in names}
        policy = changed_policy(default_policy(self.data, self.recipe), **flags)
        for name in ("views", "first_view"):
            if getattr(self, name) % policy.repeats:
                raise BadInput(
                    f"{name.replace('_', '-')}: expected a multiple of {policy.repeats}, the repeats of the "
                    f"augmentation, got {getattr(self, name)}"
                )
        return policy
