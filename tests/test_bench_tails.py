"""The sampled tail of the benchmark has no bias: the mean of its losses and gradients is that of all classes.

The expected values are written in closed form with NumPy. The same comparison rejects the even tail, which has a bias.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.bench_tails import Weights, even, sampled

CLASSES, DRAWS, CHUNKS, LABEL = 12, 100_000, 50, 7
ERRORS = 5  # standard errors: a chance of 6e-7 for each of 13 figures


def teacher() -> np.ndarray:
    """float64 [C]: probabilities from .3 to below .01, in no order; the label is outside the classes kept exactly."""
    values = np.random.default_rng(0).permutation(1.35 ** -np.arange(CLASSES))
    return values / values.sum()


LOGITS = np.random.default_rng(1).normal(size=CLASSES)


def exact(eps: float) -> tuple[float, np.ndarray]:
    """The loss -sum w log q and its gradient q sum(w) - w, for w = (p + label)^eps - label and q = softmax(z)."""
    label = np.eye(CLASSES)[LABEL]
    weights = (teacher() + label) ** eps - label
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum()
    return float(-(weights * np.log(shares)).sum()), shares * weights.sum() - weights


def drawn(weights: Weights, eps: float) -> np.ndarray:
    """float64 [CHUNKS, 1 + C]: means of loss and gradient over many draws, in independent chunks."""
    draw, count = torch.Generator().manual_seed(0), DRAWS // CHUNKS
    probs = torch.from_numpy(teacher()).repeat(count, 1)
    labels, found = torch.full((count,), LABEL), []
    for _ in range(CHUNKS):
        logits = torch.from_numpy(LOGITS).requires_grad_()
        loss = -(weights(probs, labels, eps, draw) * logits.log_softmax(dim=0)).sum(dim=1).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        found.append([loss.item(), *gradient.tolist()])
    return np.array(found)


def deviations(weights: Weights, eps: float) -> tuple[float, float]:
    """How far the means are from the exact loss and gradient: the largest in standard errors, and relative to the
    gradient's length."""
    found = drawn(weights, eps)
    assert found.dtype == np.float64
    loss, gradient = exact(eps)
    off = found.mean(axis=0) - np.array([loss, *gradient])
    errors = found.std(axis=0, ddof=1) / CHUNKS**0.5 + 1e-12  # rounding, where there is no randomness
    return float(np.abs(off / errors).max()), float(np.abs(off).max() / np.linalg.norm(gradient))


FORMS = [(topk, samples, over_even) for topk, samples in ((4, 3), (6, 1), (2, 8)) for over_even in (False, True)]


@pytest.mark.parametrize("eps", [1.0, 1.5])
@pytest.mark.parametrize(("topk", "samples", "over_even"), FORMS)
def test_the_mean_over_many_draws_is_the_exact_loss_and_gradient(topk, samples, over_even, eps):
    """Also where a class is drawn several times on average: 8 of the other 10."""
    in_errors, relative = deviations(partial(sampled, topk, samples, over_even), eps)
    assert in_errors < ERRORS
    assert relative < 0.01


def scaled(weights: Weights, factor: float) -> Weights:
    """The classes outside the four best count too much."""

    def changed(probs: Tensor, labels: Tensor, eps: float, draw: torch.Generator) -> Tensor:
        found = weights(probs, labels, eps, draw)
        kept = probs.topk(4, dim=1).indices
        return (found * factor).scatter(1, kept, found.gather(1, kept))

    return changed


@pytest.mark.parametrize(
    "weights",
    [partial(even, 4), scaled(partial(sampled, 4, 3, False), 1.02), scaled(partial(sampled, 4, 3, False), 0.98)],
)
def test_a_bias_would_be_seen(weights: Callable[..., Tensor]):
    """Of the even tail, and of a sample whose weights are wrong by 2%."""
    assert deviations(weights, 1.0)[0] > 2 * ERRORS
