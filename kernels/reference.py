"""Plain-PyTorch form of every kernel: the truth in tests, the fallback without a GPU, the baseline in benchmarks.

Shapes: H heads, B batch, C classes, K classes kept of the teacher, S side of an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# --- OFA loss ---------------------------------------------------------------------------------------------------------
# Official form, p the teacher's probabilities, m the one-hot target:
#     w = (p + m)^eps - m          L = - sum_c w_c log softmax(z / T)_c
# Paper's form: w_y = (1 + p_y)^eps for the target class, w_c = p_c for every other.


def teacher_probs(log_probs: Tensor, num_classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities at temperature T of the K stored classes [B, K], and of each single other class [B]."""
    probs = log_probs.exp()
    others = num_classes - log_probs.shape[1]
    rest = (1 - probs.sum(dim=1)).clamp(min=0) / others if others else torch.zeros_like(probs[:, 0])
    if temperature != 1:
        probs, rest = (log_probs / temperature).exp(), rest ** (1 / temperature)
        total = probs.sum(dim=1) + others * rest
        probs, rest = probs / total[:, None], rest / total
    return probs, rest


def ofa_loss_dense(
    logits: Tensor, labels: Tensor, probs: Tensor, eps: Tensor, temperature: float = 1.0, variant: str = "official"
) -> Tensor:
    """The definition, word by word: logits [H, B, C], the teacher's probabilities [B, C] at T, eps [H] -> [H].

    The oracle of the tests (in float64) and the baseline of the benchmarks; training uses `ofa_loss`.
    """
    target = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(probs.dtype)
    eps = eps.to(probs.dtype)[:, None, None]
    if variant == "official":
        weights = (probs + target) ** eps - target
    else:
        weights = torch.where(target.bool(), (1 + probs) ** eps, probs.expand(len(logits), -1, -1))
    return -(weights * torch.log_softmax(logits / temperature, dim=-1)).sum(dim=-1).mean(dim=-1)


def dense_probs(classes: Tensor, log_probs: Tensor, num_classes: int, temperature: float = 1.0) -> Tensor:
    """The teacher's whole distribution [B, C] that a top-K answer stands for."""
    probs, rest = teacher_probs(log_probs, num_classes, temperature)
    return rest[:, None].repeat(1, num_classes).scatter(1, classes.long(), probs)


def ofa_loss(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
) -> Tensor:
    """Closed sparse form: every class outside the top-K has one weight w0, so one pass over the logits is enough.

    L = W logsumexp(z) - (w0 sum_c z_c + sum_k (w_k - w0) z_k + [y not in K] (w_y - w0) z_y),  W the sum of all weights.
    """
    num_classes, batch = logits.shape[-1], logits.shape[1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(dtype) / temperature
    z = z - z.amax(dim=-1, keepdim=True).detach()  # weights and softmax do not care; cancellation does
    classes = classes.long()
    probs, rest = teacher_probs(log_probs.to(dtype), num_classes, temperature)
    is_target = classes == labels[:, None]  # [B, K]
    missing = ~is_target.any(dim=1)  # [B]: the label is not among the K
    exponent = eps.to(dtype)[:, None]  # [H, 1]

    if variant == "official":
        w0 = rest**exponent  # [H, B]
        wk = (probs + is_target.to(dtype)) ** exponent[..., None] - is_target.to(dtype)  # [H, B, K]
        wy = (1 + rest) ** exponent - 1
    else:
        w0 = rest.expand(len(logits), -1)
        wk = torch.where(is_target, (1 + probs) ** exponent[..., None], probs)
        wy = (1 + rest) ** exponent
    wk = wk - w0[..., None]
    wy = torch.where(missing, wy - w0, 0)

    total = num_classes * w0 + wk.sum(dim=-1) + wy
    z_k = z.gather(-1, classes.expand(len(logits), -1, -1))
    z_y = z.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
    loss = total * torch.logsumexp(z, dim=-1) - (w0 * z.sum(dim=-1) + (wk * z_k).sum(dim=-1) + wy * z_y)
    return loss.sum(dim=1) / max(batch, 1)


# --- Crop and resize --------------------------------------------------------------------------------------------------


def resize_weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Antialiased bilinear weights [B, S, source] that map pixels start .. start + length onto S output pixels."""
    scale = (length / size)[:, None, None]
    support = scale.clamp(min=1)
    out = torch.arange(size, device=start.device, dtype=start.dtype)[None, :, None]
    pixel = torch.arange(source, device=start.device, dtype=start.dtype)[None, None, :] + 0.5
    first, last = start[:, None, None], (start + length)[:, None, None]
    weights = (1 - ((pixel - first - (out + 0.5) * scale) / support).abs()).clamp(min=0)
    weights = weights * ((pixel + 0.5 > first) & (pixel - 0.5 < last))  # the pixels that the box touches
    return weights / weights.sum(dim=-1, keepdim=True)


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Resizing is separable: two small matrix products per image, and a flip is the same weights in reverse."""
    batch, height, width, _ = images.shape
    top, left, box_height, box_width = boxes.to(torch.float32).unbind(dim=1)
    rows = resize_weights(top, box_height, height, size)
    columns = resize_weights(left, box_width, width, size)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    out = torch.bmm(rows, images.to(torch.float32).reshape(batch, height, width * 3))
    out = torch.einsum("bxw,bywc->byxc", columns, out.view(batch, size, width, 3))  # [B, S, S, 3]
    if dtype == torch.uint8:
        out = out.round().clamp(0, 255)
    else:
        out = out / 255
        if mean is not None and std is not None:
            out = (out - out.new_tensor(mean)) / out.new_tensor(std)
    return out.to(dtype).contiguous().permute(0, 3, 1, 2)
