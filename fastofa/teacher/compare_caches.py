"""Compare two teacher caches: how they were made, and how far their predictions agree.

    fastofa cache diff cache-a cache-b

Predictions are compared where both caches show the same pixels: for the validation images if both have the same ones,
and for the views whose view tables are equal.

Shapes: N images, C classes, K classes kept.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastofa.methods.targets import TopK
from fastofa.system.progress import track
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_header import FieldDifference, differences, identity
from fastofa.views.table import Views

LEAST = 1e-9  # smallest probability: float16 may round the sum of the kept ones to 1, which leaves 0 for the others
NUMBERS = 1 << 22  # probabilities in memory at a time
MADE = ("pipeline", "versions", "views")  # fields of the header on which predictions depend at most in the last bits


class Agreement(NamedTuple):
    """How far the predictions of two caches agree on N images."""

    top1: float
    """Fraction of the images for which both have the same most probable class."""
    kl: float
    """Mean Kullback-Leibler divergence of the second cache's predictions from the first's, in nats."""
    worst_kl: float
    """The largest divergence of an image."""


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    identity: list[FieldDifference]
    """Differences on which predictions depend; empty for two parts of one cache."""
    made: list[FieldDifference]
    """Other differences: loader, versions of libraries, planned views."""
    validation: Agreement | None
    """On the validation images; None if they or the classes differ."""
    views: dict[int, Agreement]
    """By number of the view, for views with equal view tables in both caches; empty if the classes differ."""

    def to_json(self) -> dict[str, Any]:
        return {
            "identity": [each._asdict() for each in self.identity],
            "made": [each._asdict() for each in self.made],
            "validation": None if self.validation is None else self.validation._asdict(),
            "views": {str(view): each._asdict() for view, each in self.views.items()},
        }


def compare(a: TeacherCache, b: TeacherCache) -> Comparison:
    """Compare two caches. Raises BadInput if a table is damaged."""
    same_classes = a.classes == b.classes
    of = identity(a.header), identity(b.header)
    validation, views = None, {}
    if same_classes and of[0]["dataset"]["val"] == of[1]["dataset"]["val"]:
        validation = agreement(a.val_targets(), b.val_targets(), a.num_classes)
    if same_classes and all(of[0][name] == of[1][name] for name in ("policy", "seed")) and _same_images(*of):
        first, end = max(a.first, b.first), min(a.first + a.views, b.first + b.views)
        common = range(first, end)
        for view in track(common, len(common) * a.num_samples, "comparing", lambda _: a.num_samples):
            one, two = a.table(view), b.table(view)
            if _same_views(one.views, two.views):
                views[view] = agreement(one.targets, two.targets, a.num_classes)
    made = differences(*({name: cache.header[name] for name in MADE} for cache in (a, b)))
    return Comparison(differences(*of), made, validation, views)


def _same_images(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["dataset"]["train"] == b["dataset"]["train"]


def _same_views(a: Views, b: Views) -> bool:
    one, two = a.columns(), b.columns()
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def agreement(a: TopK, b: TopK, num_classes: int) -> Agreement:
    """The agreement of two sets of predictions for the same N images.

    The probability outside the classes kept is spread evenly over the other classes, as in the loss. No probability
    counts as less than 1e-9.

    Args:
        a: classes integer [N, K], most probable first, and log_probs floating [N, K].
        b: the same, with its own K.
        num_classes: C.
    """
    rows = max(1, NUMBERS // num_classes)
    total, worst = 0.0, 0.0
    for first in range(0, len(a.classes), rows):
        p, q = (_log_probs(each, slice(first, first + rows), num_classes) for each in (a, b))
        divergence = (p.exp() * (p - q)).sum(dim=1)
        total += divergence.sum().item()
        worst = max(worst, divergence.max().item())
    same = a.classes[:, 0].to(torch.int64) == b.classes[:, 0].to(torch.int64)
    return Agreement(same.double().mean().item(), total / len(a.classes), worst)


def _log_probs(targets: TopK, rows: slice, num_classes: int) -> Tensor:
    """Log-probabilities of all classes, float64 [n, C], that sum to 1."""
    classes, log_probs = targets.classes[rows].to(torch.int64), targets.log_probs[rows].double()
    rest = (1 - log_probs.exp().sum(dim=1)).clamp(min=0) / max(1, num_classes - classes.shape[1])
    every = rest[:, None].expand(-1, num_classes).scatter(1, classes, log_probs.exp()).clamp(min=LEAST)
    return (every / every.sum(dim=1, keepdim=True)).log()
