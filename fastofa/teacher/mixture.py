"""The weighted mean of several teachers' probabilities, from what a cache keeps of each of them.

Teacher t keeps its K best classes; each of its C - K others has the same probability u_t, its even tail. So every class
that no teacher keeps has the same probability in the mean, m = sum_t w_t u_t. Together the teachers keep at most
K' = min(T K, C) classes. Choose K' classes that include all of these. Then each class that is left has the probability
m = (1 - sum of the K') / (C - K'), which is an even tail. So K' classes with an even tail are the mean itself, not an
approximation of it. With K = C, K' = C and no class is left.

Shapes: T teachers, N images, C classes, K classes kept of each teacher, K' = min(T K, C) classes of the mean.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastofa.kernels.reference import teacher_probs
from fastofa.methods.targets import TopK, full
from fastofa.teacher.packed_rows import PackedRows

TINY = 1e-30  # smallest probability of the even tail, which rounding may make 0
NUMBERS = 1 << 22  # probabilities in memory at a time


class Mixture(NamedTuple):
    """The mean of the teachers' probabilities."""

    best: TopK
    """classes int32 [N, K'] and log_probs fp32 [N, K']: all classes that a teacher keeps, most probable first, then
    others up to K'. The rest of the probability is spread evenly over the classes that are left."""
    log_probs: Tensor
    """fp32 [N, C], of all classes."""


def mix(each: Sequence[TopK], weights: Sequence[float], num_classes: int) -> Mixture:
    """The mean of the teachers' probabilities.

    Args:
        each: for each teacher, classes integer [N, K] and log_probs floating [N, K]; if K = C, the latter are
            renormalised, which undoes most of float16's rounding.
        weights: the weight of each teacher, above 0; their sum is 1.
        num_classes: C.
    """
    count, topk = each[0].classes.shape
    kept = torch.zeros(count, num_classes, dtype=torch.bool, device=each[0].classes.device)
    weighted = []
    for (classes, log_probs), weight in zip(each, weights, strict=True):
        places = classes.long()
        own = full(log_probs).log_softmax(dim=1) if topk == num_classes else full(log_probs)
        _, tail = teacher_probs(own, num_classes, 1.0)
        every = tail.clamp(min=TINY).log()[:, None].repeat(1, num_classes).scatter(1, places, own)
        weighted.append(every + math.log(weight))
        kept.scatter_(1, places, True)
    log_probs = torch.logsumexp(torch.stack(weighted), dim=0)
    # Rounding may move a kept class below the tail, but it has to be among the K' all the same.
    found = log_probs.masked_fill(~kept, -torch.inf).topk(min(len(each) * topk, num_classes), dim=1).indices
    return Mixture(TopK(found.int(), log_probs.gather(1, found)), log_probs)


class EachTeacher(NamedTuple):
    """What a cache made with `--keep-each` stores of every teacher, and the weights of their mean."""

    tables: tuple[TopK | PackedRows, ...]
    """For each teacher, its K best classes of N images."""
    weights: tuple[float, ...]
    """Weight of each teacher; their sum is 1."""
    num_classes: int
    """C."""

    def unpacked(self) -> TopK:
        """On the CPU: the best classes of the mean, int32 [N, K'], and their log_probs fp32 [N, K']."""
        each = self._each()
        rows = max(1, NUMBERS // self.num_classes)
        chunks = zip(*(zip(*(column.split(rows) for column in own), strict=True) for own in each), strict=True)
        best = [mix([TopK(*own) for own in chunk], self.weights, self.num_classes).best for chunk in chunks]
        return TopK(*map(torch.cat, zip(*best, strict=True)))

    def probs(self) -> Tensor:
        """On the CPU: the mean of the teachers' probabilities, fp32 [N, C], for small N."""
        return mix(self._each(), self.weights, self.num_classes).log_probs.exp()

    def _each(self) -> list[TopK]:
        return [own.unpacked() if isinstance(own, PackedRows) else own for own in self.tables]
