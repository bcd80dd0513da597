"""A classifier's errors: the confusion matrix, the most frequent confusions and the weakest classes.

C classes, N images.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pair:
    """`count` images of class `truth` were predicted as class `predicted`: `share` of that class's images."""

    truth: int
    predicted: int
    count: int
    share: float


@dataclass(frozen=True)
class ClassResult:
    index: int
    images: int
    recall: float
    """Fraction of the class's images that are predicted correctly."""
    rival: int | None
    """The class most often predicted instead; None if there is none."""


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count the images of each true class (row) by predicted class (column).

    Args:
        predictions, labels: integer [N].
        classes: C.

    Returns:
        int64 [C, C].

    Raises:
        ValueError: a number is not a class, or predictions and labels differ in length.
    """
    both = np.concatenate([predictions, labels])
    if len(predictions) != len(labels) or (len(both) and not 0 <= both.min() <= both.max() < classes):
        raise ValueError(f"expected a prediction and a label among {classes} classes for each image")
    cells = labels.astype(np.int64) * classes + predictions
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def pairs(counts: np.ndarray) -> list[Pair]:
    """Every pair of classes that occurred, correct predictions included, row by row."""
    totals = counts.sum(axis=1)
    return [
        Pair(truth, predicted, int(counts[truth, predicted]), float(counts[truth, predicted] / totals[truth]))
        for truth, predicted in np.argwhere(counts).tolist()
    ]


def worst_pairs(counts: np.ndarray, limit: int) -> list[Pair]:
    """At most `limit` pairs of different classes, the most frequent first; ties keep the order of `pairs`."""
    wrong = [pair for pair in pairs(counts) if pair.truth != pair.predicted]
    return sorted(wrong, key=lambda pair: -pair.count)[:limit]


def worst_classes(counts: np.ndarray, limit: int) -> list[ClassResult]:
    """At most `limit` classes that have images, lowest recall first; ties keep the order of the classes."""
    totals, wrong = counts.sum(axis=1), counts - np.diag(counts.diagonal())
    results = [
        ClassResult(
            i, int(totals[i]), float(counts[i, i] / totals[i]), int(wrong[i].argmax()) if wrong[i].any() else None
        )
        for i in np.flatnonzero(totals).tolist()
    ]
    return sorted(results, key=lambda result: result.recall)[:limit]
