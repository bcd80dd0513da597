"""Batch statistics over several ranks (processes of torch.distributed), each with one part of the batch.

The collectives are functional, so that torch.compile keeps them in its graph. All parts have the same size. Every
rank adds the parts in the same order and thus gets the same numbers.

Shapes: C channels.
"""

from torch import Tensor, stack
from torch.distributed._functional_collectives import all_gather_tensor_autograd


def statistics_over_ranks(mean: Tensor, var: Tensor, group: str) -> tuple[Tensor, Tensor, int]:
    """The statistics of the whole batch, from those of this rank's part, [C] each.

    Differentiable. The variance is the mean of the variances plus that of the squared distances between the means,
    which loses no digits if the means are far from 0.

    Args:
        group: name of the process group.

    Returns:
        Mean and biased variance of each channel, [C], and the number of ranks.
    """
    means, variances = _gather(mean, var, group)
    mean = means.mean(dim=0)
    return mean, (variances + (means - mean) ** 2).mean(dim=0), len(means)


def mean_over_ranks(first: Tensor, second: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The mean over the ranks of each of two tensors [C]."""
    firsts, seconds = _gather(first, second, group)
    return firsts.mean(dim=0), seconds.mean(dim=0)


def _gather(first: Tensor, second: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The two tensors [C] of all ranks, [ranks, C] each, in one collective."""
    gathered = all_gather_tensor_autograd(stack([first, second])[None], 0, group)  # type: ignore[arg-type]
    return gathered[:, 0], gathered[:, 1]
