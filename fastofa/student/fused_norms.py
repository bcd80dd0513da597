"""Run a model's batch norms with the Triton kernel, which fuses the operations after them.

Activations and residuals are fused into the batch norm before them; fused_stem.py also fuses a ResNet's max-pool. Only
the classes of modules change. Parameters, buffers and their names stay the same, and so do checkpoints and exports.
Modules that are not recognised stay unchanged.

Shapes: B batch, C channels.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from fastofa.kernels import norm_act
from fastofa.kernels.choice import can_run_triton
from fastofa.kernels.comparison import Comparison, describe, random_like
from fastofa.student.fused_depthwise import ACTIVATIONS, is_plain_norm

FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}

# --- Modules ----------------------------------------------------------------------------------------------------------


class NormAct2d(nn.BatchNorm2d):
    """A batch norm, the addition of a residual if one is given, and the activation after it."""

    activation: str | None
    impl: str = "triton"
    group: str | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training:  # PyTorch's implementation needs few passes, even without a compiler
            y = super().forward(input)
            return FUNCTIONS[self.activation](y if residual is None else y + residual)
        if residual is not None:
            dtype = torch.promote_types(input.dtype, residual.dtype)
            input, residual = input.to(dtype), residual.to(dtype)
        return norm_act(input, **norm_arguments(self, input), activation=self.activation, residual=residual)

    def comparisons(self, input: Tensor, residual: Tensor | None = None) -> dict[str, Comparison]:
        if residual is not None:
            input = input.to(torch.promote_types(input.dtype, residual.dtype))
        run = partial(norm_act, activation=self.activation)
        after = None if residual is None else input
        size = describe(input, residual="no" if residual is None else "yes", activation=self.activation or "no")
        return {"impl": norm_comparison("norm_act", size, run, self, input, after)}


class FusedBasicBlock(BasicBlock):
    """A block without attention or stochastic depth whose last batch norm adds the residual."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        return self.bn2(self.conv2(x), shortcut)


class FusedBottleneck(Bottleneck):
    """A block without attention or stochastic depth whose last batch norm adds the residual."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))  # type: ignore[misc]
        return self.bn3(self.conv3(x), shortcut)


class FusedInvertedResidual(InvertedResidual):
    """A block with a residual and without stochastic depth whose last batch norm adds the residual."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.conv_s2d is not None:
            x = self.bn_s2d(self.conv_s2d(x))
        x = self.se(self.aa(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))))  # type: ignore[misc]
        return self.bn3(self.conv_pwl(x), shortcut)


def norm_arguments(norm: Any, x: Tensor, impl: str | None = None) -> dict[str, Any]:
    """The arguments of `norm_act` for a batch in training; increments the norm's batch counter.

    Args:
        norm: a batch norm with a `group`.
        impl: the implementation if Triton can run; None for the norm's own.
    """
    cast(Tensor, norm.num_batches_tracked).add_(1)
    names = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "group")
    impl = (impl or norm.impl) if can_run_triton(x) else "torch"
    return {name: getattr(norm, name) for name in names} | {"impl": impl}


def norm_comparison(
    kernel: str,
    size: str,
    run: Callable[..., Tensor],
    norm: nn.BatchNorm2d,
    x: Tensor,
    residual: Tensor | None = None,
) -> Comparison:
    """Forward and backward pass of a batch norm in training, by `run(x, weight, ..., impl=)`; any residual is last."""

    def training(impl: str, *given: Tensor | None) -> Tensor:
        *norms, after = given
        more = {} if after is None else {"residual": after}
        return run(*norms, momentum=norm.momentum, eps=norm.eps, impl=impl, **more)

    inputs = random_like(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, residual)
    candidates = {impl: partial(training, impl) for impl in ("triton", "torch")}
    return Comparison(kernel, size, inputs, candidates, (0, 1, 2, 5), fused=("torch",), elements=x.numel())


# --- Switching a model's modules --------------------------------------------------------------------------------------


def use_norm_kernels(module: nn.Module) -> int:
    """Switch the batch norms in `module`, with the operations that follow them, to the kernel.

    The results stay the same up to rounding. Compile, copy or wrap the module only afterwards. Fold batch norms into
    depthwise convolutions beforehand: those are not switched.

    Returns:
        The number of batch norms that were switched.
    """
    before = sum(isinstance(each, NormAct2d) for each in module.modules())
    for block in module.modules():
        if type(block) is BasicBlock:
            _switch_norm(block.bn1, block.act1 if isinstance(block.drop_block, nn.Identity) else None)
            if block.se is None and block.drop_path is None and _switch_norm(block.bn2, block.act2, absorb=True):
                block.__class__ = FusedBasicBlock
        elif type(block) is Bottleneck:
            _switch_norm(block.bn1, block.act1)
            _switch_norm(block.bn2, block.act2 if isinstance(block.drop_block, nn.Identity) else None)
            if block.se is None and block.drop_path is None and _switch_norm(block.bn3, block.act3, absorb=True):
                block.__class__ = FusedBottleneck
        elif type(block) is InvertedResidual:
            own = getattr(block.bn3, "act", None)
            plain = block.has_skip and isinstance(block.drop_path, nn.Identity) and isinstance(own, nn.Identity | None)
            if plain and _switch_norm(block.bn3):
                block.__class__ = FusedInvertedResidual
        elif isinstance(block, ResNet):
            _switch_norm(block.bn1, block.act1)
        elif type(block).forward is nn.Sequential.forward:
            for norm, activation in pairwise(block.children()):
                _switch_norm(norm, activation)
    for norm in module.modules():
        _switch_norm(norm)
    return sum(isinstance(each, NormAct2d) for each in module.modules()) - before


def _switch_norm(norm: nn.Module, activation: nn.Module | None = None, absorb: bool = False) -> bool:
    """Switch a batch norm that the kernel supports, and fuse the activation if possible; with `absorb`, only if it can
    be fused.

    Returns:
        Whether it was switched.
    """
    if not is_plain_norm(norm):
        return False
    own = ACTIVATIONS.get(type(getattr(norm, "act", nn.Identity())), "other")
    after = ACTIVATIONS.get(type(activation), "other")
    if own == "other" or (absorb and (own is not None or after == "other")):
        return False
    if own is None and after not in (None, "other"):
        own, cast(nn.Module, activation).__class__ = after, nn.Identity
    norm.__class__ = NormAct2d
    cast(NormAct2d, norm).activation = own
    return True
