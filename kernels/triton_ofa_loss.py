"""The OFA loss in Triton: the loss of one head and one sample, or its gradient, from a single read of the logits.

A program handles the row z of C logits of one (head, sample). In reference.py's closed form, the loss needs the row's
maximum, sum and sum of exponentials, and the logits of the teacher's K classes and of the label. The gradient is first
written for the whole row by the formula for all other classes; after a barrier, it is written again for the teacher's
classes and the label. Nothing of size C is read from the teacher.

Rows of C elements need not be aligned. The part between 16-byte boundaries is read and written 16 bytes at a time; the
few elements before and after it, the edges, one at a time.

Shapes: H heads, B batch, C classes, K classes kept of the teacher.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- One row ----------------------------------------------------------------------------------------------------------


@triton.jit
def _power(x, exponent):
    """x^exponent for x >= 0; 0 for x = 0."""
    return tl.where(x > 0, tl.exp2(exponent * tl.log2(tl.maximum(x, 1e-37))), 0.0)


@triton.jit
def _teacher(
    classes, log_probs, row, start, inverse_temperature, C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A block of a sample's K classes: their numbers, p, p^(1/T) (0 beyond K), and whether all are in 0..C-1."""
    k = start + tl.arange(0, BLOCK_K)
    kept = k < K
    number = tl.load(classes + row * K + k, mask=kept, other=0).to(tl.int64)
    known = tl.load(log_probs + row * K + k, mask=kept, other=0.0).to(tl.float32)
    inside = kept & (number >= 0) & (number < C)
    probs = tl.where(kept, tl.exp(known), 0.0)
    at_temperature = tl.where(kept, tl.exp(known * inverse_temperature), 0.0)
    return tl.where(inside, number, -1), probs, at_temperature, tl.sum((kept & ~inside).to(tl.int32)) == 0


@triton.jit
def _weights(number, probs, rest, label, eps, PAPER: tl.constexpr):
    """The weights w_k of classes, from their numbers and the teacher's probabilities at T."""
    is_label = number == label
    if PAPER:
        return tl.where(is_label, _power(1.0 + probs, eps), probs)
    return tl.where(is_label, _power(1.0 + probs, eps) - 1.0, _power(probs, eps))


@triton.jit
def _label_share(number, own, partner, mix, smoothing, C: tl.constexpr):
    """The probabilities that the (smoothed, mixed) label assigns to classes."""
    return smoothing / C + (1.0 - smoothing) * (
        tl.where(number == own, mix, 0.0) + tl.where(number == partner, 1.0 - mix, 0.0)
    )


@triton.jit
def _read(logits, offsets, mask):
    return tl.load(logits + offsets, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _statistics(z, mask, greatest, inverse_temperature, TEMPERED: tl.constexpr):
    """Sums over a block of z - greatest, of its exponential, and of that at 1 / T."""
    away = tl.where(mask, z - greatest, 0.0)
    exponentials = tl.sum(tl.where(mask, tl.exp(away), 0.0))
    tempered = exponentials
    if TEMPERED:
        tempered = tl.sum(tl.where(mask, tl.exp(away * inverse_temperature), 0.0))
    return tl.sum(away), exponentials, tempered


@triton.jit
def _write_slope(gradient, at, mask, away, by_exp, by_tempered, target, inverse_temperature, TEMPERED: tl.constexpr):
    """Store dL/dz where z - greatest is `away`: both softmax terms, minus the weights that label and teacher assign."""
    if TEMPERED:
        slope = by_exp * tl.exp(away) + by_tempered * tl.exp(away * inverse_temperature) - target
    else:
        slope = (by_exp + by_tempered) * tl.exp(away) - target
    tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _loss_kernel(
    logits, labels, partners, mixes, classes, log_probs, eps, incoming, row_losses, gradient,
    batch, gt_weight, kd_weight, ofa_weight, smoothing, inverse_temperature,
    H: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
    PAPER: tl.constexpr, TEMPERED: tl.constexpr, WITH_LABELS: tl.constexpr, MIXED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """row_losses fp32 [H (+ 1 with labels), B], unweighted; or, with GRADIENT, the gradient of the logits [H, B, C].

    `incoming` is the gradient of each head's mean [H] or, with labels, of the weighted sum [1].
    """
    program = tl.program_id(0)
    head, row = program // batch, (program % batch).to(tl.int64)
    base = program.to(tl.int64) * C
    ALIGNED: tl.constexpr = C % VECTOR == 0

    # `inner` elements, from `first` on, are between 16-byte boundaries; `before` precede and `after` follow them.
    columns = tl.arange(0, BLOCK)
    edge = tl.arange(0, 2 * VECTOR)
    if ALIGNED:
        first, inner = base, C
        edge_at, at_edge = base + edge, edge < 0
    else:
        first = (base + VECTOR - 1) // VECTOR * VECTOR
        vectors = tl.maximum((base + C) // VECTOR - (base + VECTOR - 1) // VECTOR, 0)
        inner = (vectors * VECTOR).to(tl.int32)
        before = tl.minimum(first - base, C).to(tl.int32)
        after = C - before - inner
        edge_at = base + tl.where(edge < VECTOR, edge, before + inner + edge - VECTOR)
        at_edge = tl.where(edge < VECTOR, edge < before, edge - VECTOR < after)

    # Read the row. Its first block stays in registers; for most C, that is the whole row.
    z = _read(logits, first + columns, columns < inner)
    greatest = tl.max(z)
    if not ALIGNED:
        z_edge = _read(logits, edge_at, at_edge)
        greatest = tl.maximum(greatest, tl.max(z_edge))
    total_away, exponentials, tempered = _statistics(z, columns < inner, greatest, inverse_temperature, TEMPERED)
    if not ALIGNED:
        away, more, more_tempered = _statistics(z_edge, at_edge, greatest, inverse_temperature, TEMPERED)
        total_away, exponentials, tempered = total_away + away, exponentials + more, tempered + more_tempered
    for start in range(BLOCK, C, BLOCK):
        here = columns < inner - start
        x = _read(logits, first + start + columns, here)
        greater = tl.maximum(greatest, tl.max(x))
        away, more, more_tempered = _statistics(x, here, greater, inverse_temperature, TEMPERED)
        seen = start if ALIGNED else start + before + after
        rise = greatest - greater
        total_away = total_away + seen * rise + away
        exponentials = exponentials * tl.exp(rise) + more
        tempered = tempered * tl.exp(rise * inverse_temperature if TEMPERED else rise) + more_tempered
        greatest = greater

    # The label. For a mixed image, the OFA loss enhances the class with the larger weight.
    own = tl.load(labels + row)
    partner, mix = own, 1.0
    if MIXED:
        partner = tl.load(partners + row)
        mix = tl.load(mixes + row).to(tl.float32)
        tie = tl.minimum(own, partner)
        label = tl.where(mix == 0.5, tie, tl.where(mix > 0.5, own, partner))
    else:
        label = own
    valid = (own >= 0) & (own < C) & (partner >= 0) & (partner < C)

    # The teacher: the probability of each class outside its K classes.
    mass, mass_tempered = 0.0, 0.0
    for start in range(0, K, BLOCK_K):
        number, probs, at_temperature, inside = _teacher(
            classes, log_probs, row, start, inverse_temperature, C, K, BLOCK_K
        )
        mass += tl.sum(probs)
        mass_tempered += tl.sum(at_temperature)
        valid = valid & inside
    valid = valid & (mass == mass)  # a NaN from the teacher
    OTHERS: tl.constexpr = C - K
    rest = 0.0
    if OTHERS > 0:
        rest = tl.maximum(1.0 - mass, 0.0) / OTHERS
        if TEMPERED:
            rest = _power(rest, inverse_temperature)
    # At T = 1, the K probabilities are used as stored; at other temperatures, all are normalised.
    normaliser = 1.0
    if TEMPERED:
        normaliser = 1.0 / (mass_tempered + OTHERS * rest)
        rest = rest * normaliser
    power = tl.load(eps + head).to(tl.float32)
    w0 = rest if PAPER else _power(rest, power)

    # Losses, from the logits of the K classes and of the label.
    weight = C * w0
    weighted_z = w0 * total_away
    own_known, partner_known, label_known = 0, 0, 0
    for start in range(0, K, BLOCK_K):
        number, probs, at_temperature, inside = _teacher(
            classes, log_probs, row, start, inverse_temperature, C, K, BLOCK_K
        )
        known = number >= 0
        added = tl.where(known, _weights(number, at_temperature * normaliser, rest, label, power, PAPER) - w0, 0.0)
        z_k = tl.load(logits + base + number, mask=known, other=0.0).to(tl.float32) - greatest
        weight += tl.sum(added)
        weighted_z += tl.sum(tl.where(known, added * z_k, 0.0))
        own_known += tl.sum((number == own).to(tl.int32))
        partner_known += tl.sum((number == partner).to(tl.int32))
        label_known += tl.sum((number == label).to(tl.int32))
    z_own = tl.load(logits + base + own, mask=valid, other=0.0).to(tl.float32) - greatest
    z_partner = z_own
    if MIXED:
        z_partner = tl.load(logits + base + partner, mask=valid, other=0.0).to(tl.float32) - greatest
    label_weight = _weights(label, rest, rest, label, power, PAPER)
    if label_known == 0:
        weight += label_weight - w0
        weighted_z += (label_weight - w0) * tl.where(label == own, z_own, z_partner)
    is_last = head == H - 1

    if not GRADIENT:
        loss = weight * tl.log(tempered) - weighted_z * inverse_temperature
        tl.store(row_losses + program, tl.where(valid, loss, float("nan")))
        if WITH_LABELS:  # noqa: SIM102
            if is_last:
                by_labels = smoothing / C * total_away + (1.0 - smoothing) * (mix * z_own + (1.0 - mix) * z_partner)
                tl.store(row_losses + batch * H + row, tl.where(valid, tl.log(exponentials) - by_labels, float("nan")))
    else:
        scale = tl.load(incoming + (0 if WITH_LABELS else head)).to(tl.float32) / batch
        of_teacher = tl.where(is_last, kd_weight, ofa_weight) * inverse_temperature * scale
        of_label = 0.0
        if WITH_LABELS:
            of_label = tl.where(is_last, gt_weight, 0.0) * scale
        by_exp = of_label / exponentials
        by_tempered = of_teacher * weight / tempered
        target = of_teacher * w0 + of_label * smoothing / C

        away = z - greatest
        at = first + columns
        _write_slope(gradient, at, columns < inner, away, by_exp, by_tempered, target, inverse_temperature, TEMPERED)
        if not ALIGNED:
            away_edge = z_edge - greatest
            _write_slope(
                gradient, edge_at, at_edge, away_edge, by_exp, by_tempered, target, inverse_temperature, TEMPERED
            )
        for start in range(BLOCK, C, BLOCK):
            at = first + start + columns
            here = columns < inner - start
            away = _read(logits, at, here) - greatest
            _write_slope(gradient, at, here, away, by_exp, by_tempered, target, inverse_temperature, TEMPERED)

        tl.debug_barrier()
        for start in range(0, K, BLOCK_K):
            number, probs, at_temperature, inside = _teacher(
                classes, log_probs, row, start, inverse_temperature, C, K, BLOCK_K
            )
            known = number >= 0
            at_k = base + number
            away_k = tl.load(logits + at_k, mask=known, other=0.0).to(tl.float32) - greatest
            target_k = of_teacher * _weights(number, at_temperature * normaliser, rest, label, power, PAPER)
            target_k += of_label * _label_share(number, own, partner, mix, smoothing, C)
            _write_slope(gradient, at_k, known, away_k, by_exp, by_tempered, target_k, inverse_temperature, TEMPERED)
        given_own = of_teacher * tl.where(own == label, label_weight, w0)
        given_own += of_label * _label_share(own, own, partner, mix, smoothing, C)
        is_new = valid & (own_known == 0)
        _write_slope(gradient, base + own, is_new, z_own, by_exp, by_tempered, given_own, inverse_temperature, TEMPERED)
        if MIXED:
            given_own = of_teacher * tl.where(partner == label, label_weight, w0)
            given_own += of_label * _label_share(partner, own, partner, mix, smoothing, C)
            is_new = valid & (partner_known == 0) & (partner != own)
            _write_slope(
                gradient,
                base + partner,
                is_new,
                z_partner,
                by_exp,
                by_tempered,
                given_own,
                inverse_temperature,
                TEMPERED,
            )


# --- Means over the batch, summed in a fixed order --------------------------------------------------------------------


@triton.jit
def _mean(row_losses, batch, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(row_losses + at, mask=at < batch, other=0.0)
    return tl.sum(sums) / batch


@triton.jit
def _heads_kernel(row_losses, losses, batch, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    tl.store(losses + head, _mean(row_losses + head * batch, batch, BLOCK))


@triton.jit
def _total_kernel(row_losses, losses, batch, gt_weight, kd_weight, ofa_weight, H: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [4]: total, gt, kd, ofa."""
    gt = _mean(row_losses + H * batch, batch, BLOCK)
    kd = _mean(row_losses + (H - 1) * batch, batch, BLOCK)
    ofa = 0.0
    for head in range(H - 1):
        ofa += _mean(row_losses + head * batch, batch, BLOCK)
    tl.store(losses, gt_weight * gt + kd_weight * kd + ofa_weight * ofa)
    tl.store(losses + 1, gt)
    tl.store(losses + 2, kd)
    tl.store(losses + 3, ofa)


# --- Launchers --------------------------------------------------------------------------------------------------------

TEACHERS = 6  # number of arguments between the logits and those of the labels


def block_sizes(num_classes: int, topk: int) -> tuple[int, int, int]:
    """Logits and teacher's classes per block, and warps of a program: 8 logits per thread, 16 in long rows."""
    block = min(max(triton.next_power_of_2(num_classes), 256), 4096)
    return block, min(triton.next_power_of_2(topk), 1024), min(block // 256, 8)


def losses(logits: Tensor, *arguments: Any) -> Tensor:
    """Implements the operators in ofa_loss.py: each head's loss [H] or, with all arguments, the objective [4]."""
    heads, batch = logits.shape[:2]
    with_labels = len(arguments) > TEACHERS
    result = logits.new_empty(4 if with_labels else heads, dtype=torch.float32)
    if not batch:
        return result.zero_()
    row_losses = logits.new_empty(heads + with_labels, batch, dtype=torch.float32)
    weights = _launch(logits, row_losses, row_losses, logits, False, *arguments)
    if with_labels:
        _total_kernel[(1,)](row_losses, result, batch, *weights, H=heads, BLOCK=1024)
    else:
        _heads_kernel[(heads,)](row_losses, result, batch, BLOCK=1024)
    return result


def gradient(incoming: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype, from that of the heads' losses [H] or the total [1]."""
    out = logits.new_empty(logits.shape)
    if len(out[0]):
        _launch(logits, incoming.contiguous(), incoming, out, True, *arguments)
    return out


def _launch(
    logits: Tensor,
    incoming: Tensor,
    row_losses: Tensor,
    out: Tensor,
    gradient: bool,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
    weights: Sequence[float] | None = None,
    smoothing: float = 0.0,
    partner_labels: Tensor | None = None,
    mix: Tensor | None = None,
) -> Sequence[float]:
    """Launch one program per row; returns the weights of gt, kd and ofa."""
    heads, batch, num_classes = logits.shape
    gt_kd_ofa = weights or (0.0, 1.0, 1.0)
    block, block_k, num_warps = block_sizes(num_classes, classes.shape[1])
    _loss_kernel[(heads * batch,)](
        logits.contiguous(),
        labels.contiguous(),
        labels if partner_labels is None else partner_labels.contiguous(),
        labels if mix is None else mix.contiguous(),
        classes.contiguous(),
        log_probs.contiguous(),
        eps.contiguous(),
        incoming,
        row_losses,
        out,
        batch,
        *gt_kd_ofa,
        smoothing,
        1.0 / temperature,
        H=heads,
        C=num_classes,
        K=classes.shape[1],
        BLOCK=block,
        BLOCK_K=block_k,
        VECTOR=16 // logits.element_size(),
        PAPER=variant == "paper",
        TEMPERED=temperature != 1,
        WITH_LABELS=weights is not None,
        MIXED=mix is not None,
        GRADIENT=gradient,
        num_warps=num_warps,
    )
    return gt_kd_ofa
