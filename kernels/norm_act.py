"""Batch norm, optional residual and activation, channels last: public functions that check their arguments, then run an
implementation.

Shapes: B batch, C channels, H and W sides, N = B H W values per channel.
"""

from typing import Any

import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.choice import interpreted, use_triton
from fastofa.kernels.ranks import mean_over_ranks, statistics_over_ranks

ACTIVATIONS = (None, "relu", "relu6")


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    group: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """act(batch_norm(x) + residual), computed in fp32 (float64 for float64) and rounded once.

    Args:
        x: [B, C, H, W] fp32, bf16, fp16 or float64, preferably in channels-last memory format; others are copied.
        weight, bias: floating [C]; they may be fp32 with a bf16 x.
        running_mean, running_var: floating [C]; updated in training, otherwise used.
        training: normalise by the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        activation: None, "relu" or "relu6".
        residual: added before the activation; shape, dtype and device as x.
        group: name of the process group among whose ranks the batch is split into parts of the same shape; the
            statistics are then those of the whole batch. Every rank must call this function. None: x is the batch.
        impl: "triton", "torch" or None (choose). The kernels are for training; otherwise the twin runs.

    Returns:
        [B, C, H, W] in x's dtype, differentiable in x, weight, bias and residual.

    Raises:
        ValueError: invalid shapes, dtypes, devices or options; the message states what was expected and what was given.
    """
    _check(x, training, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual: expected {x.dtype} {tuple(x.shape)} on {x.device}, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
    triton = _use_triton("norm_act", impl, x)
    if not training:
        return reference.norm_act(x, running_mean, running_var, weight, bias, eps, activation, residual)
    mean, var = _training_statistics(x, running_mean, running_var, momentum, group, triton)
    if not triton:
        return reference.norm_act(x, mean, var, weight, bias, eps, activation, residual)
    return norm_act_op(x, mean, var, weight, bias, residual, eps, activation, group)


def norm_act_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: str | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """3x3 max-pooling with stride 2 and padding 1 of relu(batch_norm(x)), as in a ResNet's stem.

    The arguments are those of `norm_act` and `statistics`: the mean and biased variance of x, fp32 [C], if they are
    known already (used in training; the gradient of x includes the paths through them). Of equal maxima, the first one
    gets the gradient. The kernels never store the normalised map.

    Returns:
        [B, C, ceil(H / 2), ceil(W / 2)] in x's dtype, differentiable in x, weight and bias.

    Raises:
        ValueError: as `norm_act`.
    """
    _check(x, training, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    triton = _use_triton("norm_act_pool", impl, x)
    if not training:
        return reference.norm_act_pool(x, running_mean, running_var, weight, bias, eps)
    mean, var = _training_statistics(x, running_mean, running_var, momentum, group, triton, statistics)
    if not triton:
        return reference.norm_act_pool(x, mean, var, weight, bias, eps)
    return norm_act_pool_op(x, mean, var, weight, bias, eps, group)[0]


def channel_statistics(x: Tensor, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, fp32 (or float64) [C], differentiable in x [B, C, H, W].

    Raises:
        ValueError: fewer than two values per channel, and as in `norm_act`.
    """
    _check(x, training=True)
    if not _use_triton("norm_act", impl, x):
        return reference.channel_statistics(x)
    return statistics_op(x)


def batch_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    group: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `channel_statistics`, over all ranks of `group` (None: only this one); updates the running statistics."""
    return _over_ranks(*channel_statistics(x, impl), x, running_mean, running_var, momentum, group)


def _over_ranks(
    mean: Tensor,
    var: Tensor,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """The statistics of x over all ranks of `group`, given those of this rank; updates the running statistics."""
    count = x.numel() // x.shape[1]
    if group is not None:
        mean, var, ranks = statistics_over_ranks(mean, var, group)
        count *= ranks
    _update_running(running_mean, running_var, mean.detach(), var.detach(), momentum, count)
    return mean, var


def _training_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    group: str | None,
    triton: bool,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `batch_statistics`; not differentiable if `triton`, since its operators compute the whole gradient of x.

    `known` are x's mean and biased variance on this rank. The twin computes them again, for their gradient.
    """
    if not triton:
        return batch_statistics(x, running_mean, running_var, momentum, group, "torch")
    if known is not None:
        return _over_ranks(*known, x, running_mean, running_var, momentum, group)
    if group is not None:
        return batch_statistics(x.detach(), running_mean, running_var, momentum, group, "triton")
    return update_statistics_op(x.detach(), running_mean, running_var, momentum)


@torch.no_grad()
def _update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> None:
    """Update running statistics as nn.BatchNorm2d does, with the unbiased variance of `count` values per channel."""
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def _check(x: Tensor, training: bool, **per_channel: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point() or not x.shape[1]:
        raise ValueError(f"x: expected floating [B, C, H, W], got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1]
    if training and x.numel() // channels < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    for name, tensor in per_channel.items():
        if tensor.shape != (channels,) or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floating [{channels}], got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device}, got {tensor.device}")


def _use_triton(kernel: str, impl: str | None, x: Tensor) -> bool:
    triton = use_triton(kernel, impl, x.device)
    if triton and x.dtype == torch.float64:
        if impl is None:
            return False
        raise ValueError("impl: expected fp32, bf16 or fp16 for 'triton', got torch.float64; leave impl out")
    return triton


# --- Statistics as a PyTorch operator ---------------------------------------------------------------------------------

# On a CPU, the operators run the twins.


def _interpreted(x: Tensor) -> bool:
    return interpreted() and x.dtype != torch.float64


@torch.library.custom_op("fastofa::channel_statistics", mutates_args=(), device_types="cuda")
def statistics_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, fp32 [C]."""
    from fastofa.kernels import triton_norm_act

    with torch.cuda.device_of(x):
        return triton_norm_act.statistics(x)


@statistics_op.register_kernel("cpu")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    if _interpreted(x):
        from fastofa.kernels import triton_norm_act

        return triton_norm_act.statistics(x)
    return reference.channel_statistics(x)


@statistics_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


def _vector(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _channels_last(shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _statistics_backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> Tensor:
    """One pass over x, which the compiler fuses with other additions to the gradient."""
    x, mean = ctx.saved_tensors
    away = x.to(mean.dtype) - mean[:, None, None]
    count = x.numel() // x.shape[1]
    return ((dmean / count)[:, None, None] + (2 * dvar / count)[:, None, None] * away).to(x.dtype)


statistics_op.register_autograd(_statistics_backward, setup_context=_save_mean)


@torch.library.custom_op(
    "fastofa::update_statistics", mutates_args=("running_mean", "running_var"), device_types="cuda"
)
def update_statistics_op(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """As statistics_op, without a gradient; updates the running statistics."""
    from fastofa.kernels import triton_norm_act

    with torch.cuda.device_of(x):
        return triton_norm_act.statistics(x, (running_mean, running_var), momentum)


@update_statistics_op.register_kernel("cpu")
def _(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    if _interpreted(x):
        from fastofa.kernels import triton_norm_act

        return triton_norm_act.statistics(x, (running_mean, running_var), momentum)
    mean, var = reference.channel_statistics(x)
    _update_running(running_mean, running_var, mean, var, momentum, x.numel() // x.shape[1])
    return mean, var


@update_statistics_op.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


# --- Normalise, add, activate -----------------------------------------------------------------------------------------

# The gradient of x includes the paths through mean and var, which are statistics of x, or of the x of all ranks of
# `group`.


@torch.library.custom_op("fastofa::norm_act", mutates_args=(), device_types="cuda")
def norm_act_op(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    group: str | None,
) -> Tensor:
    """A tensor like x, channels last. `group` concerns the gradient only."""
    from fastofa.kernels import triton_norm_act

    with torch.cuda.device_of(x):
        return triton_norm_act.norm_act(x, mean, var, weight, bias, residual, eps, activation)


@norm_act_op.register_kernel("cpu")
def _(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    group: str | None,
) -> Tensor:
    if _interpreted(x):
        from fastofa.kernels import triton_norm_act

        return triton_norm_act.norm_act(x, mean, var, weight, bias, residual, eps, activation)
    y = reference.norm_act(x, mean, var, weight, bias, eps, activation, residual)
    return _channels_last(y.shape, y).copy_(y)


@norm_act_op.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return _channels_last(x.shape, x)


@torch.library.custom_op("fastofa::norm_act_sums", mutates_args=(), device_types="cuda")
def sums_op(
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
    """The gradient before the activation, like x; dweight and dbias of this x, fp32 [C].

    `y` is the result if there are both a residual and an activation. Without `y`, x determines where the activation
    passes the gradient on, and the first tensor is empty, [0].
    """
    from fastofa.kernels import triton_norm_act

    with torch.cuda.device_of(x):
        return triton_norm_act.norm_act_sums(dy, x, y, mean, var, weight, bias, eps, activation)


@sums_op.register_kernel("cpu")
def _(dy: Tensor, x: Tensor, y: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _interpreted(x):
        from fastofa.kernels import triton_norm_act

        return triton_norm_act.norm_act_sums(dy, x, y, *arguments)
    gradient, dweight, dbias = reference.norm_act_sums(dy, x, y, *arguments)
    masked = x.new_empty(0) if y is None else _channels_last(x.shape, x).copy_(gradient)
    return masked, dweight, dbias


@sums_op.register_fake
def _(dy: Tensor, x: Tensor, y: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    masked = x.new_empty(0) if y is None else _channels_last(x.shape, x)
    return masked, _vector(x, x.shape[1]), _vector(x, x.shape[1])


@torch.library.custom_op("fastofa::norm_act_gradient", mutates_args=(), device_types="cuda")
def gradient_op(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    eps: float,
    activation: str | None,
) -> Tensor:
    """dx, like x. dweight and dbias: those of this x, or their mean over the ranks."""
    from fastofa.kernels import triton_norm_act

    with torch.cuda.device_of(x):
        return triton_norm_act.norm_act_gradient(dy, x, mean, var, weight, bias, dweight, dbias, eps, activation)


@gradient_op.register_kernel("cpu")
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    eps: float,
    activation: str | None,
) -> Tensor:
    if _interpreted(x):
        from fastofa.kernels import triton_norm_act

        return triton_norm_act.norm_act_gradient(dy, x, mean, var, weight, bias, dweight, dbias, eps, activation)
    gradient, *_ = reference.norm_act_sums(dy, x, None, mean, var, weight, bias, eps, activation)
    dx = reference.norm_act_gradient(gradient, x, mean, var, weight, dweight, dbias, eps)
    return _channels_last(x.shape, x).copy_(dx)


@gradient_op.register_fake
def _(dy: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return _channels_last(x.shape, x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, residual, ctx.eps, ctx.activation, ctx.group = inputs
    y = None if residual is None or ctx.activation is None else output
    ctx.save_for_backward(x, y, mean, var, weight, bias)
    ctx.with_residual = residual is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *norm = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)  # once, by the compiler, not in each of the operators
    masked, dweight, dbias = sums_op(dy, x, y, *norm, ctx.eps, ctx.activation)
    means = (dweight, dbias) if ctx.group is None else mean_over_ranks(dweight, dbias, ctx.group)
    if y is not None:
        dx = gradient_op(masked, x, *norm, *means, ctx.eps, None)
    else:
        dx = gradient_op(dy, x, *norm, *means, ctx.eps, ctx.activation)
    dresidual = (dy if y is None else masked) if ctx.with_residual else None
    *_, weight, bias = norm
    return dx, None, None, dweight.to(weight.dtype), dbias.to(bias.dtype), dresidual, None, None, None


norm_act_op.register_autograd(_backward, setup_context=_save)


# --- Normalise, ReLU, max-pool ----------------------------------------------------------------------------------------


@torch.library.custom_op("fastofa::norm_act_pool", mutates_args=(), device_types="cuda")
def norm_act_pool_op(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, C, OH, OW], channels last: the result; the value of x from which it was computed; and the position of that
    value among the nine, uint8, 9 if the result is 0 and no gradient passes. `group` concerns the gradient only."""
    from fastofa.kernels import triton_norm_act_pool

    with torch.cuda.device_of(x):
        return triton_norm_act_pool.norm_act_pool(x, mean, var, weight, bias, eps)


@norm_act_pool_op.register_kernel("cpu")
def _(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    if _interpreted(x):
        from fastofa.kernels import triton_norm_act_pool

        return triton_norm_act_pool.norm_act_pool(x, mean, var, weight, bias, eps)
    maps = reference.norm_act_pool_places(x, mean, var, weight, bias, eps)
    return tuple(_channels_last(t.shape, t).copy_(t) for t in maps)  # type: ignore[return-value]


@norm_act_pool_op.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    shape = (batch, channels, (height + 1) // 2, (width + 1) // 2)
    return _channels_last(shape, x), _channels_last(shape, x), _channels_last(shape, x, torch.uint8)


@torch.library.custom_op("fastofa::norm_act_pool_gradient", mutates_args=(), device_types="cuda")
def pool_gradient_op(
    dy: Tensor,
    places: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    eps: float,
) -> Tensor:
    """dx, like x. dweight and dbias: those of this x, or their mean over the ranks."""
    from fastofa.kernels import triton_norm_act_pool

    with torch.cuda.device_of(x):
        return triton_norm_act_pool.norm_act_pool_gradient(dy, places, x, mean, var, weight, dweight, dbias, eps)


@pool_gradient_op.register_kernel("cpu")
def _(dy: Tensor, places: Tensor, x: Tensor, mean: Tensor, *arguments: Any) -> Tensor:
    if _interpreted(x):
        from fastofa.kernels import triton_norm_act_pool

        return triton_norm_act_pool.norm_act_pool_gradient(dy, places, x, mean, *arguments)
    gradient = reference.max_pool_gradient(dy.to(mean.dtype), places, x)
    dx = reference.norm_act_gradient(gradient, x, mean, *arguments)
    return _channels_last(x.shape, x).copy_(dx)


@pool_gradient_op.register_fake
def _(dy: Tensor, places: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return _channels_last(x.shape, x)


def _save_places(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mean, var, weight, bias, ctx.eps, ctx.group = inputs
    _, greatest, places = output
    ctx.mark_non_differentiable(greatest, places)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, greatest, places, mean, var, weight, bias)


def _pool_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, greatest, places, mean, var, weight, bias = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    _, dweight, dbias = sums_op(dy, greatest, None, mean, var, weight, bias, ctx.eps, "relu")
    means = (dweight, dbias) if ctx.group is None else mean_over_ranks(dweight, dbias, ctx.group)
    dx = pool_gradient_op(dy, places, x, mean, var, weight, *means, ctx.eps)
    return dx, None, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


norm_act_pool_op.register_autograd(_pool_backward, setup_context=_save_places)
