"""What a classifier mixes up: the table of its answers to each class, the worst pairs and the worst classes.

C classes, N images.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pair:
    """`count` images of class `truth` were answered with `answer`: `share` of that class's images."""

    truth: int
    answer: int
    count: int
    share: float


@dataclass(frozen=True)
class ClassResult:
    index: int
    images: int
    right: float
    """Share of them."""
    rival: int | None
    """The most frequent wrong answer; None if there was none."""


def confusion(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Images of each true class (row) by answer (column), int64 [C, C], from two times N classes.

    Raises:
        ValueError: a number that is no class, or an image without an answer.
    """
    both = np.concatenate([answers, labels])
    if len(answers) != len(labels) or (len(both) and not 0 <= both.min() <= both.max() < classes):
        raise ValueError(f"expected an answer and a label among {classes} classes for each image")
    cells = labels.astype(np.int64) * classes + answers
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def pairs(counts: np.ndarray) -> list[Pair]:
    """Every pair that occurred, right answers too, row by row."""
    totals = counts.sum(axis=1)
    return [
        Pair(truth, answer, int(counts[truth, answer]), float(counts[truth, answer] / totals[truth]))
        for truth, answer in np.argwhere(counts).tolist()
    ]


def worst_pairs(counts: np.ndarray, most: int) -> list[Pair]:
    """At most `most` pairs of different classes, the most frequent first; of equal ones in the order of `pairs`."""
    wrong = [pair for pair in pairs(counts) if pair.truth != pair.answer]
    return sorted(wrong, key=lambda pair: -pair.count)[:most]


def worst_classes(counts: np.ndarray, most: int) -> list[ClassResult]:
    """At most `most` classes that have images, the one with the smallest share of right answers first."""
    totals, wrong = counts.sum(axis=1), counts - np.diag(counts.diagonal())
    found = [
        ClassResult(
            i, int(totals[i]), float(counts[i, i] / totals[i]), int(wrong[i].argmax()) if wrong[i].any() else None
        )
        for i in np.flatnonzero(totals).tolist()
    ]
    return sorted(found, key=lambda result: result.right)[:most]
