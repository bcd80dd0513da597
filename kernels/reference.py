"""Plain-PyTorch twins of the kernels: the reference in tests, the fallback without a GPU, the baseline in benchmarks.

The stem's convolution has its twin in stem_conv.py, the augmentation in augment.py.

Shapes: H heads, B batch, C classes, K classes kept of the teacher, S side of an image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# --- OFA loss ---------------------------------------------------------------------------------------------------------
# Official form, p the teacher's probabilities, m the one-hot target:
#     w = (p + m)^eps - m          L = - sum_c w_c log softmax(z / T)_c
# Paper's form: w_y = (1 + p_y)^eps for the target class, w_c = p_c for all others.


def teacher_probs(log_probs: Tensor, num_classes: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities at temperature T: of the K stored classes [B, K], and of any one of the other classes [B]."""
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
    """The definition, written out: logits [H, B, C], the teacher's probabilities [B, C] at T, eps [H] -> losses [H].

    Tests use it as the reference (in float64) and benchmarks as the baseline; training uses `head_losses`.
    """
    target = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(probs.dtype)
    eps = eps.to(probs.dtype)[:, None, None]
    if variant == "official":
        weights = (probs + target) ** eps - target
    else:
        weights = torch.where(target.bool(), (1 + probs) ** eps, probs.expand(len(logits), -1, -1))
    return -(weights * torch.log_softmax(logits / temperature, dim=-1)).sum(dim=-1).mean(dim=-1)


def dense_probs(classes: Tensor, log_probs: Tensor, num_classes: int, temperature: float = 1.0) -> Tensor:
    """The teacher's full distribution [B, C] that its top-K predictions represent."""
    probs, rest = teacher_probs(log_probs, num_classes, temperature)
    return rest[:, None].repeat(1, num_classes).scatter(1, classes.long(), probs)


def head_losses(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
) -> Tensor:
    """Losses [H], differentiable. All classes outside the top-K have the same weight w0, so one pass over z suffices:

    L = W logsumexp(z) - (w0 sum_c z_c + sum_k (w_k - w0) z_k + [y not in K] (w_y - w0) z_y),

    where W is the sum of all weights.
    """
    z = _shifted(logits, temperature)
    classes = classes.long()
    w0, wk, wy, total = sparse_weights(
        labels, classes, log_probs.to(z.dtype), eps.to(z.dtype), z.shape[-1], temperature, variant
    )
    z_k = z.gather(-1, classes.expand(len(z), -1, -1))
    z_y = z.gather(-1, labels.expand(len(z), -1)[..., None])[..., 0]
    loss = total * torch.logsumexp(z, dim=-1) - (w0 * z.sum(dim=-1) + (wk * z_k).sum(dim=-1) + wy * z_y)
    return loss.sum(dim=1) / max(len(labels), 1)


def head_gradients(
    logits: Tensor,
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    temperature: float,
    variant: str,
) -> Tensor:
    """[H, B, C]: the gradient of each head's loss in closed form: dL/dz = (W softmax(z / T) - w) / T, divided by B."""
    z = _shifted(logits, temperature)
    classes = classes.long()
    w0, wk, wy, total = sparse_weights(
        labels, classes, log_probs.to(z.dtype), eps.to(z.dtype), z.shape[-1], temperature, variant
    )
    gradient = total[..., None] * z.softmax(dim=-1) - w0[..., None]
    gradient = gradient.scatter_add(-1, classes.expand(len(z), -1, -1), -wk)
    gradient = gradient.scatter_add(-1, labels.expand(len(z), -1)[..., None], -wy[..., None])
    return gradient / (temperature * max(len(labels), 1))


def sparse_weights(
    labels: Tensor,
    classes: Tensor,
    log_probs: Tensor,
    eps: Tensor,
    num_classes: int,
    temperature: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight w0 [H, B] of every class; the additional weights of the K classes [H, B, K] and, if it is not among
    them, of the label [H, B]; and the sum of all weights [H, B]."""
    probs, rest = teacher_probs(log_probs, num_classes, temperature)
    is_target = classes == labels[:, None]  # [B, K]
    missing = ~is_target.any(dim=1)  # [B]: the label is not among the K
    exponent = eps[:, None]  # [H, 1]
    if variant == "official":
        w0 = rest**exponent  # [H, B]
        wk = (probs + is_target.to(probs.dtype)) ** exponent[..., None] - is_target.to(probs.dtype)  # [H, B, K]
        wy = (1 + rest) ** exponent - 1
    else:
        w0 = rest.expand(len(eps), -1)
        wk = torch.where(is_target, (1 + probs) ** exponent[..., None], probs)
        wy = (1 + rest) ** exponent
    wk, wy = wk - w0[..., None], torch.where(missing, wy - w0, 0)
    return w0, wk, wy, num_classes * w0 + wk.sum(dim=-1) + wy


def _shifted(logits: Tensor, temperature: float) -> Tensor:
    """z / T minus its maximum, in fp32: this changes neither weights nor softmax, but avoids cancellation."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return z - z.amax(dim=-1, keepdim=True).detach()


# --- Cross-entropy with the labels of mixed images --------------------------------------------------------------------


def mixed_labels(labels: Tensor, partner_labels: Tensor, mix: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """[B, C], fp32 (float64 for a float64 `mix`): `mix` times the image's own label plus 1 - `mix` times the
    partner's, with label smoothing (timm's mixup_target)."""
    mix = mix.to(torch.promote_types(mix.dtype, torch.float32))
    both = mix.new_full((len(labels), num_classes), smoothing / num_classes)
    own, others = (share[:, None] * (1 - smoothing) for share in (mix, 1 - mix))
    return both.scatter_add(1, labels[:, None], own).scatter_add(1, partner_labels[:, None], others)


def heavier(labels: Tensor, partner_labels: Tensor, mix: Tensor) -> Tensor:
    """int64 [B]: argmax of the mixed label; for equal weights, the smaller class number, as argmax returns."""
    tie = torch.minimum(labels, partner_labels)
    return torch.where(mix == 0.5, tie, torch.where(mix > 0.5, labels, partner_labels))


def cross_entropy(
    logits: Tensor, labels: Tensor, partner_labels: Tensor | None, mix: Tensor | None, smoothing: float
) -> Tensor:
    """Logits [B, C] -> cross-entropy [] with smoothed and possibly mixed labels; 0 for an empty batch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not len(labels):
        return logits.sum()
    if partner_labels is None or mix is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    target = mixed_labels(labels, partner_labels, mix, logits.shape[1], smoothing)
    return F.cross_entropy(logits, target.to(logits.dtype))


def cross_entropy_gradient(
    logits: Tensor, labels: Tensor, partner_labels: Tensor | None, mix: Tensor | None, smoothing: float
) -> Tensor:
    """[B, C]: (softmax(z) - t) / B."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if partner_labels is None or mix is None:
        partner_labels, mix = labels, torch.ones_like(labels, dtype=logits.dtype)
    target = mixed_labels(labels, partner_labels, mix, logits.shape[1], smoothing).to(logits.dtype)
    return (logits.softmax(dim=-1) - target) / max(len(labels), 1)


# --- Crop and resize --------------------------------------------------------------------------------------------------


def resize_weights(start: Tensor, length: Tensor, source: int, size: int, bicubic: bool = False) -> Tensor:
    """Bilinear or bicubic weights [B, S, source] that map pixels start .. start + length to S output pixels.

    Antialiased: a filter's width grows with the scale. The bicubic filter is Keys' with a = -1/2, as in Pillow and in
    torch's antialiased resizing.
    """
    scale = (length / size)[:, None, None]
    out = torch.arange(size, device=start.device, dtype=start.dtype)[None, :, None]
    pixel = torch.arange(source, device=start.device, dtype=start.dtype)[None, None, :] + 0.5
    first, last = start[:, None, None], (start + length)[:, None, None]
    x = ((pixel - first - (out + 0.5) * scale) / scale.clamp(min=1)).abs()
    if bicubic:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weights = (1 - x).clamp(min=0)
    weights = weights * ((pixel + 0.5 > first) & (pixel - 0.5 < last))  # only pixels that overlap the box
    return weights / weights.sum(dim=-1, keepdim=True)


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    flip: Tensor,
    size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
    bicubic: bool = False,
) -> Tensor:
    """The crop by two small matrix products per image, because resizing is separable. A flip reverses the weights.

    A bicubic filter overshoots at edges. As in torch, the rows of pixels are resized first, then rounded and clipped.
    """
    batch, height, width, _ = images.shape
    top, left, box_height, box_width = boxes.to(torch.float32).unbind(dim=1)
    rows = resize_weights(top, box_height, height, size, bicubic)
    columns = resize_weights(left, box_width, width, size, bicubic)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    if bicubic:
        out = torch.einsum("bxw,bywc->byxc", columns, images.to(torch.float32)).round().clamp(0, 255)
        out = torch.bmm(rows, out.reshape(batch, height, size * 3)).view(batch, size, size, 3).clamp(0, 255)
    else:
        out = torch.bmm(rows, images.to(torch.float32).reshape(batch, height, width * 3))
        out = torch.einsum("bxw,bywc->byxc", columns, out.view(batch, size, width, 3))  # [B, S, S, 3]
    if dtype == torch.uint8:
        out = out.round().clamp(0, 255)
    else:
        out = out / 255
        if mean is not None and std is not None:
            for channel, (m, d) in enumerate(
                zip(mean, std, strict=True)
            ):  # copying them as a tensor would wait for the device
                out[..., channel].sub_(m).div_(d)
    return out.to(dtype).contiguous().permute(0, 3, 1, 2)


# --- Depthwise convolution --------------------------------------------------------------------------------------------


def depthwise_conv3x3(
    x: Tensor, weight: Tensor, stride: int, scale: Tensor | None, shift: Tensor | None, activation: str | None
) -> Tensor:
    """Apply scale and shift, the activation, and the convolution in x's dtype, as autocast runs it."""
    return F.conv2d(
        _before_conv(x, scale, shift, activation), weight.to(x.dtype), stride=stride, padding=1, groups=x.shape[1]
    )


def depthwise_input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift (the last two at least fp32, empty if there are none) in closed form."""
    convolved = _before_conv(x, scale, shift, activation)
    dx, _, _ = _convolution_backward(dy, convolved, weight, stride, [True, False, False])
    dtype = torch.promote_types(x.dtype, torch.float32)
    if scale is None:
        return dx, dx.new_empty(0, dtype=dtype), dx.new_empty(0, dtype=dtype)
    gradient = dx.to(dtype)
    if activation is not None:
        gradient = gradient * ((convolved > 0) & (convolved < 6) if activation == "relu6" else convolved > 0)
    dscale, dshift = (gradient * x.to(dtype)).sum(dim=(0, 2, 3)), gradient.sum(dim=(0, 2, 3))
    return (gradient * scale[:, None, None]).to(x.dtype), dscale, dshift


def depthwise_weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The gradient of the weight, in its dtype, in closed form."""
    convolved = _before_conv(x, scale, shift, activation)
    return _convolution_backward(dy, convolved, weight, stride, [False, True, False])[1].to(weight.dtype)


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, stride: int, mask: list[bool]) -> tuple[Tensor, ...]:
    settings = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], x.shape[1])
    return torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), *settings, mask)


def _before_conv(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None) -> Tensor:
    if scale is None or shift is None:
        return x
    z = x.to(torch.promote_types(x.dtype, torch.float32)) * scale[:, None, None] + shift[:, None, None]
    if activation is not None:
        z = F.relu(z) if activation == "relu" else F.relu6(z)
    return z.to(x.dtype)


# --- Batch norm, residual, activation, max-pool -----------------------------------------------------------------------


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C], at least fp32."""
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
    return mean, var


def norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Computed in at least fp32 and rounded once. With a batch's own statistics, autograd gives the full gradient."""
    z = (x.to(mean.dtype) - mean[:, None, None]) * (weight * torch.rsqrt(var + eps))[:, None, None]
    z = z + bias[:, None, None]
    if residual is not None:
        z = z + residual
    if activation is not None:
        z = F.relu(z) if activation == "relu" else F.relu6(z)
    return z.to(x.dtype)


def norm_act_sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before the activation, like x, and the gradients of weight and bias, at least fp32 [C].

    `y` is the result, if a residual was added.
    """
    inverse = torch.rsqrt(var + eps)
    away = x.to(mean.dtype) - mean[:, None, None]
    gradient = dy.to(mean.dtype)
    if activation is not None:
        value = away * (weight * inverse)[:, None, None] + bias[:, None, None] if y is None else y
        gradient = gradient * ((value > 0) & (value < 6) if activation == "relu6" else value > 0)
    return gradient.to(x.dtype), (gradient * away).sum(dim=(0, 2, 3)) * inverse, gradient.sum(dim=(0, 2, 3))


def norm_act_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    eps: float,
) -> Tensor:
    """The gradient of x, normalised by its batch's statistics, from the gradient before the activation and the
    gradients of weight and bias (their mean over the parts of the batch, if x is one of several)."""
    inverse, count = torch.rsqrt(var + eps), x.numel() // x.shape[1]
    normalised = (x.to(mean.dtype) - mean[:, None, None]) * inverse[:, None, None]
    centred = gradient - (dbias / count)[:, None, None] - normalised * (dweight / count)[:, None, None]
    return (centred * (weight * inverse)[:, None, None]).to(x.dtype)


def norm_act_pool(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The maximum of unrounded values, rounded at the end."""
    z = norm_act(x.to(mean.dtype), mean, var, weight, bias, eps, "relu", None)
    return F.max_pool2d(z, 3, stride=2, padding=1).to(x.dtype)


def norm_act_pool_places(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the value of x from which it was computed, and that value's position among the nine: uint8, 9 where
    the result is 0."""
    z = norm_act(x.to(mean.dtype), mean, var, weight, bias, eps, "relu", None)
    y, index = F.max_pool2d(z, 3, stride=2, padding=1, return_indices=True)
    greatest = x.flatten(2).gather(2, index.flatten(2)).view(y.shape)
    top, left = (2 * torch.arange(n, device=x.device) - 1 for n in y.shape[2:])
    place = 3 * (index // x.shape[3] - top[:, None]) + index % x.shape[3] - left
    return y.to(x.dtype), greatest, torch.where(y > 0, place, 9).to(torch.uint8)


def max_pool_gradient(dy: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """dy of the pooled map, moved to the values' sources (see norm_act_pool_places): shape as `like`, dtype as dy."""
    batch, channels, height, width = like.shape
    place = places.long()
    passes = place < 9
    rows, columns = (2 * torch.arange(n, device=dy.device) - 1 for n in dy.shape[2:])
    index = torch.where(passes, (rows[:, None] + place // 3) * width + columns + place % 3, 0)
    gradient = dy.new_zeros(batch, channels, height * width)
    return gradient.scatter_add(2, index.flatten(2), (dy * passes).flatten(2)).view(like.shape)


# --- Bias and GELU ----------------------------------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Computed in at least fp32 and rounded once."""
    u = x.to(torch.promote_types(x.dtype, torch.float32)) + bias
    return F.gelu(u, approximate=approximate).to(x.dtype)


def bias_gelu_gradients(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., C] and of the bias [C] (the latter at least fp32)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    du = torch.ops.aten.gelu_backward(dy.to(dtype), x.to(dtype) + bias, approximate=approximate)
    return du.to(x.dtype), du.flatten(end_dim=-2).sum(dim=0) if du.ndim > 1 else du


# --- Layer norm -------------------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The stream x + residual and its norm, computed in at least fp32 and rounded once."""
    stream = x if residual is None else x + residual
    wide = torch.promote_types(stream.dtype, torch.float32)
    return stream, F.layer_norm(stream.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(dtype)


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each row [M], at least fp32."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(end_dim=-2) if x.ndim > 1 else x[None]
    var, mean = torch.var_mean(rows, dim=1, correction=0)
    return mean, torch.rsqrt(var + eps)


def layer_norm_gradients(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream [..., C], with `dstream` added, and of weight and bias [C], all at least fp32."""
    channels = stream.shape[-1]
    rows, slope = (t.reshape(-1, channels).to(mean.dtype) for t in (stream, dy))
    normal = (rows - mean[:, None]) * inverse[:, None]
    g = slope * weight
    dx = (g - g.mean(dim=1, keepdim=True) - normal * (g * normal).mean(dim=1, keepdim=True)) * inverse[:, None]
    dx = dx.view(stream.shape) if dstream is None else dx.view(stream.shape) + dstream
    return dx, (slope * normal).sum(dim=0), slope.sum(dim=0)
