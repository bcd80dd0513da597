"""How exactly the predictions that a cache stores represent the teacher's, measured on images that are not stored.

    CACHE/fidelity.json
    RUN/fidelity.json       a copy in the folder of a run whose cache is at a URL

A cache keeps the K most probable classes, rounded, and spreads the rest of the probability evenly. Up to 512 images, in
a view that no cache stores, show what this changes: the probability kept, and the error of the OFA loss and of its
gradient at the logits of two simulated students. One is untrained: its logits are normal with standard deviation 1.
The other is trained: its logits are the teacher's log-probabilities plus normal noise with standard deviation 1.

Shapes: N images, C classes, K classes kept.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastofa.data.dataset import Dataset
from fastofa.kernels.reference import heavier, ofa_loss_dense
from fastofa.pipelines import Pipeline
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import read_json, write_json
from fastofa.system.progress import track
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.cache_header import MAX_VIEWS, identity
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.ensemble import Ensemble
from fastofa.teacher.mixture import EachTeacher
from fastofa.teacher.model import check_finite
from fastofa.teacher.packed_rows import packed
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy

FIDELITY = "fidelity.json"
IMAGES = 512
HELD_BACK = MAX_VIEWS  # the number of a view that no cache stores
LEAST_COSINE = 0.999
ROWS_AT_ONCE = 64  # bounds the memory for float64 gradients, and for a teacher that runs uncompiled
STUDENTS = ("untrained", "trained")


class Sample(NamedTuple):
    """The teacher's predictions for the images held back."""

    log_probs: Tensor
    """fp32 [N, C]: log-probabilities of all classes at temperature 1."""
    labels: Tensor
    """int64 [N]: the labels; of mixed images, that of the larger share."""
    each: tuple[Tensor, ...] = ()
    """fp32 [N, C] of each teacher, if the cache keeps several apart; `log_probs` is their mean."""
    weights: tuple[float, ...] = ()
    """Weight of each of these teachers; their sum is 1."""


@dataclass(frozen=True)
class LossFidelity:
    """What the stored predictions change for one eps and one student."""

    eps: float
    student: str
    """untrained or trained; see the module's docstring."""
    loss_error: float
    """Relative error of the loss: |stored - exact| / exact."""
    cosine: float
    """Between the stored and the exact gradient of the loss, [N, C], with respect to the student's logits."""
    gradient_error: float
    """Relative error of the same gradients: |stored - exact| / |exact|."""


@dataclass(frozen=True)
class Fidelity:
    """How exactly stored predictions represent the teacher's."""

    images: int
    kept: float
    """Probability of the K classes together, mean over the images."""
    kept_p1: float
    """1st percentile of this probability."""
    moved: float
    """Total variation between the stored distribution and the teacher's: the probability that is on other classes. Mean
    over the images."""
    losses: tuple[LossFidelity, ...]
    """For each eps and student."""

    @property
    def cosine(self) -> float:
        """The smallest over all eps and students."""
        return min(loss.cosine for loss in self.losses)


def less_exact(losses: Sequence[LossFidelity]) -> list[LossFidelity]:
    """For each eps, the student whose gradient has the smaller cosine."""
    found: dict[float, LossFidelity] = {}
    for loss in sorted(losses, key=lambda loss: -loss.cosine):
        found[loss.eps] = loss
    return [found[eps] for eps in sorted(found)]


# --- Measuring --------------------------------------------------------------------------------------------------------


def held_back(teachers: Ensemble, dataset: Dataset, pipeline: Pipeline, policy: ViewPolicy, seed: int) -> Sample:
    """Run the teachers on images that are evenly spaced in the dataset, in a view that is not stored.

    An interrupt takes effect only afterwards, because part of the sample could not be saved.

    Raises:
        BadInput: a prediction is not finite.
    """
    views = draw_views(policy, dataset.sizes, seed, HELD_BACK)
    order = held_back_order(len(dataset))
    names = iter([dataset.names[i] for i in order.tolist()])
    log_probs, labels = [], []
    apart: list[list[Tensor]] = []
    with closing(teachers.batches(pipeline, teachers.same(views), order)) as batches:
        for each in track(batches, len(order), "fidelity", lambda each: len(each[0].images)):
            for images in zip(*(batch.images.split(ROWS_AT_ONCE) for batch in each), strict=True):
                predicted = teachers.each(*images)
                samples = list(itertools.islice(names, len(images[0])))
                for teacher, values in zip(teachers.names, predicted, strict=True):
                    check_finite(teacher, values, "a view that is not stored", samples)
                log_probs.append(teachers.mean(predicted))
                apart.append(predicted)
            own, partner, mix = each[0].labels, each[0].partner_labels, each[0].mix
            labels.append(own if partner is None or mix is None else heavier(own, partner, mix))
    if not teachers.keep_each:
        return Sample(torch.cat(log_probs), torch.cat(labels))
    of_each = tuple(torch.cat(own) for own in zip(*apart, strict=True))
    return Sample(torch.cat(log_probs), torch.cat(labels), of_each, teachers.weights)


def held_back_order(images: int) -> np.ndarray:
    """The sample ids of the images held back, int64, evenly spaced in a dataset of `images`."""
    return np.linspace(0, images - 1, min(IMAGES, images)).astype(np.int64)


def top_k(topk: int) -> Callable[[Tensor], Tensor]:
    """log_probs [N, C] -> the probabilities [N, C] that a method sees from a cache with K = `topk`."""

    def seen(log_probs: Tensor) -> Tensor:
        count, num_classes = log_probs.shape
        stored = packed(topk_targets(log_probs, topk), num_classes)
        table = DeviceTargets(stored, log_probs.device, dense=topk == num_classes)
        return table.lookup(torch.arange(count, device=log_probs.device)).probs(num_classes)

    return seen


def seen_from(sample: Sample, topk: int) -> Tensor:
    """The probabilities [N, C] that a method sees from a cache of these predictions with K = `topk`."""
    if not sample.each:
        return top_k(topk)(sample.log_probs)
    num_classes = sample.log_probs.shape[1]
    stored = [packed(topk_targets(own, topk), num_classes) for own in sample.each]
    return EachTeacher(tuple(stored), sample.weights, num_classes).probs().to(sample.log_probs.device)


def measure(sample: Sample, topk: int, eps: Sequence[float]) -> Fidelity:
    """The fidelity of a cache with K = `topk` for these values of eps."""
    each = zip(sample.each or (sample.log_probs,), sample.weights or (1.0,), strict=True)
    kept = torch.stack([w * own.double().exp().topk(topk).values.sum(dim=1) for own, w in each]).sum(dim=0)
    seen = seen_from(sample, topk).double()
    moved = (seen - sample.log_probs.double().exp()).abs().sum(dim=1) / 2
    figures = (kept.mean().item(), kept.quantile(0.01).item(), moved.mean().item())
    return Fidelity(len(kept), *figures, compare(sample, seen, eps))


def compare(sample: Sample, seen: Tensor, eps: Sequence[float]) -> tuple[LossFidelity, ...]:
    """Compare the loss for probabilities `seen` [N, C] with that for the teacher's own, for each eps and student."""
    exact = sample.log_probs.double().exp()
    students, found = students_logits(sample.log_probs), []
    for value, student in itertools.product(eps, STUDENTS):
        loss, stored_loss, squares = 0.0, 0.0, torch.zeros(4, dtype=torch.float64)
        parts = (values.split(ROWS_AT_ONCE) for values in (students[student], sample.labels, exact, seen.double()))
        for z, label, p, q in zip(*parts, strict=True):
            (a, g), (b, h) = (_loss_and_gradient(z, label, probs, value) for probs in (p, q))
            loss, stored_loss = loss + a, stored_loss + b
            squares += torch.stack([(x * y).sum() for x, y in ((g, g), (h, h), (g, h), (h - g, h - g))]).cpu()
        exact_square, stored_square, product, error = squares.tolist()
        figures = (
            _ratio(abs(stored_loss - loss), loss),
            _ratio(product, (exact_square * stored_square) ** 0.5, of_zeros=1.0),
            _ratio(error, exact_square) ** 0.5,
        )
        found.append(LossFidelity(value, student, *figures))
    return tuple(found)


def smallest_topk(sample: Sample, eps: Sequence[float]) -> int:
    """The smallest K whose gradients have a cosine of at least `LEAST_COSINE` with the exact ones, by bisection."""
    low, high = 0, sample.log_probs.shape[1]
    while high - low > 1:
        middle = min(2 * low, (low + high) // 2) or 1  # small K first, because they are the usual answer
        losses = compare(sample, seen_from(sample, middle), eps)
        if min(loss.cosine for loss in losses) >= LEAST_COSINE:
            high = middle
        else:
            low = middle
    return high


def _ratio(a: float, b: float, of_zeros: float = 0.0) -> float:
    """a / b; `of_zeros` if b is 0, as with a dataset of one class."""
    return a / b if b else of_zeros


def students_logits(log_probs: Tensor) -> dict[str, Tensor]:
    """Logits of the two students, float64 [N, C], for a teacher's log-probabilities fp32 [N, C]."""
    random = torch.Generator().manual_seed(0)
    untrained, noise = (torch.randn(log_probs.shape, generator=random, dtype=torch.float64) for _ in range(2))
    return dict(zip(STUDENTS, (untrained.to(log_probs.device), log_probs + noise.to(log_probs.device)), strict=True))


def _loss_and_gradient(logits: Tensor, labels: Tensor, probs: Tensor, eps: float) -> tuple[float, Tensor]:
    """The sum of the rows' losses, and its gradient [N, C]."""
    z = logits.clone().requires_grad_()
    with torch.enable_grad():
        loss = ofa_loss_dense(z[None], labels, probs, z.new_tensor([eps]))[0] * len(z)
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.item(), gradient


# --- The file ---------------------------------------------------------------------------------------------------------


def write_fidelity(folder: Path, header: dict[str, Any], fidelity: Fidelity) -> None:
    """Write fidelity.json for the cache with this header."""
    write_json(folder / FIDELITY, {**dataclasses.asdict(fidelity), "cache": identity(header)})


def read_fidelity(folder: Path, header: dict[str, Any] | None) -> Fidelity | None:
    """The fidelity of a cache; None if the file is missing or describes another cache, such as one that started over.

    Args:
        folder: of the cache, or of a run whose cache is at a URL.
        header: of the cache; None accepts the file for whichever cache it describes.

    Raises:
        BadInput: the file is damaged.
    """
    if not (folder / FIDELITY).is_file():
        return None
    values = read_json(folder / FIDELITY)
    if not isinstance(values, dict) or "cache" not in values:
        raise _damaged(folder)
    cache = values.pop("cache")
    if header is not None and cache != identity(header):
        return None
    try:
        losses = tuple(LossFidelity(**loss) for loss in values.pop("losses"))
        fidelity = Fidelity(losses=losses, **values)
    except (KeyError, TypeError, AttributeError):
        raise _damaged(folder) from None
    figures = [value for name, value in vars(fidelity).items() if name != "losses"]
    figures += [value for loss in losses for name, value in vars(loss).items() if name != "student"]
    known = losses and all(loss.student in STUDENTS for loss in losses)
    if not known or any(type(figure) not in (int, float) for figure in figures):
        raise _damaged(folder)
    return fidelity


def _damaged(folder: Path) -> BadInput:
    return BadInput(
        f"{folder / FIDELITY}: expected figures written by `fastofa precompute`, got others; delete it and run "
        "`fastofa precompute` again with the same arguments"
    )


# --- Text -------------------------------------------------------------------------------------------------------------


def in_one_line(fidelity: Fidelity, topk: int) -> str:
    """The figures for a notice."""
    cosines = ", ".join(f"{_cosine(loss.cosine)} (eps {loss.eps:g})" for loss in less_exact(fidelity.losses))
    return (
        f"top {topk} keep {fidelity.kept:.2%} of the probability; cosine of the OFA loss's gradient: {cosines}; on "
        f"{counted(fidelity.images, 'image')} held back"
    )


def warning(fidelity: Fidelity, topk: int) -> str:
    """A line for a cache that is not faithful; "" for one that is."""
    if fidelity.cosine >= LEAST_COSINE:
        return ""
    return (
        f"the top {topk} change the gradient of the OFA loss: cosine {_cosine(fidelity.cosine)}, expected at least "
        f"{LEAST_COSINE}; give a larger --topk and another --out, or --topk auto"
    )


def in_rows(fidelity: Fidelity) -> dict[str, str]:
    """The figures by name, for a table."""
    return {
        "kept probability": f"{fidelity.kept:.3%}, 1st percentile {fidelity.kept_p1:.3%}; {fidelity.moved:.3%} is "
        f"on other classes ({counted(fidelity.images, 'image')} held back)",
        **{
            f"OFA loss, eps {loss.eps:g}": f"error {loss.loss_error:.2%}; gradient: cosine {_cosine(loss.cosine)}, "
            f"error {loss.gradient_error:.2%}"
            for loss in less_exact(fidelity.losses)
        },
    }


def _cosine(value: float) -> str:
    """Five decimals, rounded down: 0.99999 if it is below 1."""
    return f"{int(value * 1e5) / 1e5:.5f}"
