"""RandAugment as a table: the operations applied to an image, and the amount of each.

The notation, such as "rand-m9-mstd0.5-inc1", and the distributions are timm's: n operations per image out of fifteen,
each applied with probability p, at magnitude m with normal noise of standard deviation mstd, clipped to 0..10.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np

from fastofa.system.errors import BadInput

OPS = (
    "none", "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
    "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""Operations by their number in `Views.ops`; all but "none" are equally likely."""
ENHANCE = ("color", "contrast", "brightness", "sharpness")
COLUMNS = 5  # uniform numbers per operation of an image
MAX = 10.0  # the largest magnitude


@dataclass(frozen=True)
class RandAugment:
    """The parsed notation."""

    magnitude: float = MAX
    std: float = 0.0
    increasing: bool = False
    """Posterize, solarize and the enhancements become stronger with the magnitude (timm's inc1)."""
    layers: int = 2
    probability: float = 0.5


def parse(text: str) -> RandAugment:
    """Parse rand-mM[-mstdS][-inc1][-nN][-pP] as timm does, in any order. Raises BadInput for anything else."""
    kinds = {"m": ("magnitude", 0, 10), "mstd": ("std", 0, 100), "inc": ("increasing", 0, 1)}
    kinds |= {"n": ("layers", 1, 15), "p": ("probability", 0, 1)}
    values: dict[str, float] = {}
    first, *sections = text.split("-")
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        name, low, high = kinds.get(match[1] if match else "", ("", 0, 0))
        whole = match is not None and (match[1] in ("mstd", "p") or match[2].isdigit())
        if match is None or not whole or name in values or not low <= float(match[2]) <= high:
            first = ""
            break
        values[name] = float(match[2])
    if first != "rand" or "magnitude" not in values:
        raise BadInput(
            f"auto-augment: expected rand-mM[-mstdS][-inc1][-nN][-pP] with M from 0 to 10, such as "
            f"rand-m9-mstd0.5-inc1, got {text!r}"
        )
    return RandAugment(
        magnitude=values["magnitude"],
        std=values.get("std", 0.0),
        increasing=bool(values.get("increasing", 0)),
        layers=int(values.get("layers", 2)),
        probability=values.get("probability", 0.5),
    )


def choose(policy: RandAugment, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`draws` uniform [N, layers, COLUMNS] -> operations uint8 and their amounts float32, [N, layers]."""
    which, applied, radius, angle, side = np.moveaxis(draws, -1, 0)
    ops = np.where(applied < policy.probability, 1 + (which * (len(OPS) - 1)).astype(np.uint8), 0).astype(np.uint8)
    magnitude = np.full(ops.shape, policy.magnitude)
    if policy.std:
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box-Muller always takes two draws
        magnitude = (policy.magnitude + policy.std * normal).clip(0, MAX)
    return ops, amounts(ops, magnitude, np.where(side < 0.5, -1, 1), policy.increasing).astype(np.float32)


def amounts(ops: np.ndarray, magnitude: np.ndarray, side: np.ndarray, increasing: bool) -> np.ndarray:
    """Convert magnitudes 0..10 to each operation's own unit, as timm's LEVEL_TO_ARG does.

    rotate: degrees; shear: pixels per pixel; translate: fraction of the side; enhancements: factor (1 changes nothing);
    posterize: bits kept; solarize: the lowest level that is inverted; solarize_add: amount added to levels below 128;
    other operations: 0.
    """
    level = magnitude / MAX
    bits, threshold = (level * 4).astype(np.int64), np.minimum(256, (level * 256).astype(np.int64))
    units = {
        "rotate": side * (level * 30.0),
        "posterize": 4 - bits if increasing else bits,
        "solarize": 256 - threshold if increasing else threshold,
        "solarize_add": np.minimum(128, (level * 110).astype(np.int64)),
        **dict.fromkeys(ENHANCE, np.maximum(0.1, 1.0 + side * (level * 0.9)) if increasing else level * 1.8 + 0.1),
        **dict.fromkeys(("shear_x", "shear_y"), side * (level * 0.3)),
        **dict.fromkeys(("translate_x", "translate_y"), side * (level * 0.45)),
    }
    return np.select([ops == OPS.index(name) for name in units], list(units.values()), 0.0)


@functools.cache
def limits() -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest amount of each operation, float32 [len(OPS)], for any notation."""
    ends = [
        amounts(np.arange(len(OPS)), np.full(len(OPS), magnitude), np.full(len(OPS), side), increasing)
        for magnitude in (0.0, MAX)
        for side in (-1, 1)
        for increasing in (False, True)
    ]
    return np.min(ends, axis=0).astype(np.float32), np.max(ends, axis=0).astype(np.float32)
