"""The options of every built-in method, without torch, so that `fastofa train --help` shows them at once.

The options of a method in a user's file (`--method FILE.py:Name`) are in that file. Their names start with the class's
name in lower case: squares.weight.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from fastofa.system.errors import BadInput


@dataclass(frozen=True)
class Weight:
    """Options of a method that has no others."""

    weight: float = 1.0
    """Weight of the loss."""


@dataclass(frozen=True)
class OFAOptions:
    """Options of `ofa`. H heads: the exits in stage order, then the final logits."""

    eps: tuple[float, ...] = (1.0,)
    """[H]: exponents of the target enhancement."""
    temperature: float = 1.0
    variant: Literal["official", "paper"] = "official"
    kd_weight: float = 1.0
    ofa_weight: float = 1.0


@dataclass(frozen=True)
class KDOptions:
    """Options of `kd`."""

    weight: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class BKDOptions:
    """Binary cross-entropy of each class against the teacher's probability."""

    weight: float = 1.0
    """Weight of the loss."""


@dataclass(frozen=True)
class DKDOptions:
    """Decoupled distillation of the target class and of the other classes."""

    weight: float = 1.0
    """Weight of the loss."""
    alpha: float = 1.0
    """Weight of the part of the target class."""
    beta: float = 2.0
    """Weight of the part of the other classes (OFA-KD's comparison uses 2, DKD's authors up to 8)."""
    temperature: float = 1.0
    """Divisor of the student's and the teacher's logits."""


@dataclass(frozen=True)
class DISTOptions:
    """Correlation of the probabilities, across the classes of an image and across the images of a class."""

    weight: float = 1.0
    """Weight of the loss."""
    beta: float = 1.0
    """Weight of the correlation across classes."""
    gamma: float = 1.0
    """Weight of the correlation across images."""
    temperature: float = 1.0
    """Divisor of the student's and the teacher's logits."""


@dataclass(frozen=True)
class LSKDOptions:
    """Distillation of standardised logits."""

    weight: float = 9.0
    """Weight of the loss (the authors' choice, with --gt-weight 0.1)."""
    temperature: float = 2.0
    """Divisor of the standardised logits."""


@dataclass(frozen=True)
class CCOptions:
    """Product of the differences between student and teacher for consecutive images of the batch."""

    weight: float = 1.0
    """Weight of the loss."""
    scale: float = 0.02
    """Factor of the loss."""
    width: int = 128
    """Width of the space into which both vectors are projected."""


@dataclass(frozen=True)
class RKDOptions:
    """Distances and angles between the images of a batch."""

    weight: float = 1.0
    """Weight of the loss."""
    distance: float = 25.0
    """Weight of the distances."""
    angle: float = 50.0
    """Weight of the angles, whose memory grows with the cube of the batch size."""


@dataclass(frozen=True)
class CRDOptions:
    """Contrastive loss: student and teacher agree on an image and differ on others, which come from a memory."""

    weight: float = 1.0
    """Weight of the loss."""
    width: int = 128
    """Width of the space into which both vectors are projected."""
    negatives: int = 16384
    """Images of other classes with which each image of the batch is contrasted."""
    temperature: float = 0.07
    """Divisor of the products of vectors."""
    momentum: float = 0.5
    """Weight of an image's earlier entry when its entry in the memory is updated."""


@dataclass(frozen=True)
class RSDOptions:
    """Difference of the cross-correlation of student and teacher over the batch from the identity matrix."""

    weight: float = 0.1
    """Weight of the loss."""
    kappa: float = 0.01
    """Weight of the elements off the diagonal."""
    expansion: int = 2
    """Width of the projector's hidden layer, as a multiple of the student's."""


@dataclass(frozen=True)
class FitNetOptions:
    """Squared difference of the features of each stage, which only an online teacher provides."""

    weight: float = 1.0
    """Weight of the loss."""
    stages: tuple[int, ...] = (1, 2, 3, 4)
    """Stages of student and teacher that are compared."""


# The class of each built-in method in the module of its name.
BUILT_IN = {
    "ofa": "OFA",
    "kd": "KD",
    "bkd": "BKD",
    "dkd": "DKD",
    "dist": "DIST",
    "lskd": "LSKD",
    "cc": "CC",
    "rkd": "RKD",
    "crd": "CRD",
    "rsd": "RSD",
    "fitnet": "FitNet",
}


def method_names(method: str) -> tuple[str, ...]:
    """The names that the value of --method joins by +. The path of a user's file may also contain a +."""
    names: list[str] = []
    for part in method.split("+"):
        if not names or names[-1] in BUILT_IN or is_own(names[-1]):
            names.append(part)
        else:
            names[-1] += f"+{part}"
    return tuple(names)


def is_own(name: str) -> bool:
    """Whether it is FILE.py:Name."""
    return re.fullmatch(r".+\.py:\w+", name) is not None


def prefix_of(name: str) -> str:
    """The first part of the names of a method's options: squares for my_method.py:Squares."""
    return name.rpartition(":")[2].lower() if is_own(name) else name


def own_methods(method: str) -> dict[str, str]:
    """The methods of users' files by the prefix of their options."""
    return {prefix_of(name): name for name in method_names(method) if is_own(name)}


@dataclass(frozen=True)
class ObjectiveOptions:
    """Options of `fastofa.methods.objective.Objective`, whose docstring gives the formula."""

    methods: tuple[tuple[str, Any], ...] = ()
    """Name and options of each method: an instance of its `Options`; for a method in a user's file also an object of
    those that differ from the defaults; None for the defaults."""
    gt_weight: float = 1.0
    gt_loss: Literal["ce", "bce"] = "ce"
    smoothing: float = 0.0


def check_options(name: str, options: Any) -> None:
    """Raises BadInput for a number outside its range; `name` is the method's."""
    for field, value in vars(options).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if isinstance(value, str):
            continue  # a choice, which the configuration checks
        if field in ("temperature", "expansion", "width", "negatives"):
            fits, expected = all(v > 0 for v in numbers), "a number above 0"
        elif field == "momentum":
            fits, expected = 0 <= value < 1, "a number from 0 to below 1"
        elif field == "stages":
            fits, expected = len(set(value)) == len(value) > 0 and set(value) <= {1, 2, 3, 4}, "some of 1 2 3 4"
        else:
            fits, expected = all(v >= 0 and v != float("inf") for v in numbers), "a number of at least 0"
        if not fits:
            raise BadInput(f"{name}.{field}: expected {expected}, got {' '.join(map(str, numbers))}")
