"""The metrics of an evaluation. To add one, write a function and list it in METRICS.

Every metric is then logged in metrics.jsonl, printed and written by `fastofa evaluate`, and shown in report.html.

N images, K best classes of each (5, or all classes if there are fewer).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def top1(best: np.ndarray, labels: np.ndarray) -> float:
    return float((best[:, 0] == labels).mean())


def top5(best: np.ndarray, labels: np.ndarray) -> float:
    return float((best == labels[:, None]).any(axis=1).mean())


@dataclass(frozen=True)
class Metric:
    name: str
    """Its key in metrics.jsonl and evaluation.json."""
    title: str
    """Its name in tables."""
    compute: Callable[[np.ndarray, np.ndarray], float]
    """(best classes, int64 [N, K], best first; labels, int64 [N]) -> a finite number."""
    format: str = "{:.2%}"
    """Its number as text."""

    def text(self, value: float | None) -> str:
        """The value as text; "-" for a row that was logged before the metric was added."""
        return "-" if value is None else self.format.format(value)


# The best weights of a run are those with the highest top-1.
METRICS = (Metric("top1", "top-1", top1), Metric("top5", "top-5", top5))


def measure(best: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric by name.

    Args:
        best: int64 [N, K], the best classes of each image, best first.
        labels: int64 [N].
    """
    return {metric.name: metric.compute(best, labels) for metric in METRICS}
