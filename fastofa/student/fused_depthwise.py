"""Run a model's 3x3 depthwise convolutions with the Triton kernel, folding in the batch norms before them.

A folded batch norm returns its input with a scale and a shift, which the convolution applies on load. Only the classes
of modules change. Parameters, buffers and their names stay the same, and so do checkpoints and exports.

Shapes: B batch, C channels.
"""

from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, UniversalInvertedResidual
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from fastofa.kernels import depthwise_conv3x3
from fastofa.kernels.choice import can_run_triton
from fastofa.kernels.comparison import Comparison
from fastofa.kernels.depthwise import Passes, comparisons
from fastofa.kernels.norm_act import batch_statistics
from fastofa.student.exits import ConvExit

ACTIVATIONS = {nn.Identity: None, nn.ReLU: "relu", nn.ReLU6: "relu6"}


class Folded(NamedTuple):
    """The deferred computation of act(x * scale + shift): x [B, C, H, W], scale and shift fp32 [C]."""

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str | None = None


class DepthwiseConv2d(nn.Conv2d):
    """A 3x3 depthwise convolution (padding 1, no bias). If Triton can run, each pass has its own implementation."""

    forward_impl, input_gradient_impl, weight_gradient_impl = "triton", "triton", "triton"

    def forward(self, input: Tensor | Folded) -> Tensor:
        x, scale, shift, activation = self._arguments(input)
        impl: Passes | str = "torch"
        if can_run_triton(x):
            impl = Passes(self.forward_impl, self.input_gradient_impl, self.weight_gradient_impl)
        return depthwise_conv3x3(x, self.weight, self.stride[0], scale, shift, activation, impl)

    def comparisons(self, input: Tensor | Folded) -> dict[str, Comparison]:
        x, scale, shift, activation = self._arguments(input)
        found = comparisons(x, self.weight, self.stride[0], scale, shift, activation)
        return {f"{name}_impl": comparison for name, comparison in found.items()}

    def _arguments(self, input: Tensor | Folded) -> Folded:
        """The input in the dtype in which autocast runs a convolution."""
        folded = input if isinstance(input, Folded) else Folded(input)
        device = folded.x.device.type
        if torch.is_autocast_enabled(device):
            folded = folded._replace(x=folded.x.to(torch.get_autocast_dtype(device)))
        return folded


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm and the activation after it, both applied by the next DepthwiseConv2d; else like nn.BatchNorm2d.

    Where Triton can run, it always computes the statistics: on an H200, the compiler failed on PyTorch's.
    """

    activation: str | None
    group: str | None = None

    def forward(self, input: Tensor) -> Folded:  # type: ignore[override]
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        if self.training:
            impl = "triton" if can_run_triton(input) else "torch"
            mean, var = batch_statistics(input, mean, var, cast(float, self.momentum), self.group, impl)
            cast(Tensor, self.num_batches_tracked).add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return Folded(input, scale, self.bias - mean * scale, self.activation)


def use_depthwise_kernel(module: nn.Module) -> int:
    """Switch the depthwise 3x3 convolutions of exits, MobileNets and EfficientNets in `module` to the kernel.

    The batch norms before them are folded in, with their activation if it is ReLU or ReLU6. The results stay the same
    up to rounding. Compile, copy or wrap the module only afterwards.

    Returns:
        The number of convolutions that were switched.
    """
    switched = 0
    for block in module.modules():
        if isinstance(block, ConvExit):
            layers = [layer for layer in block.blocks.modules() if not any(layer.children())]  # in forward order
            for number, layer in enumerate(layers):
                switched += _switch(layer, *layers[max(number - 2, 0) : number])
        elif isinstance(block, EfficientNet | MobileNetV3):
            switched += _switch_next(block.bn1, block.blocks[0][0])  # type: ignore[index]
        elif isinstance(block, InvertedResidual):
            switched += _switch_after(block.bn1, block.conv_dw)
        elif isinstance(block, UniversalInvertedResidual):
            switched += _switch_layers(block.dw_start, block.pw_exp, block.dw_mid)
            switched += _switch_layers(block.pw_proj, block.dw_end)
        elif isinstance(block, DepthwiseSeparableConv):
            switched += _switch(block.conv_dw)
        elif type(block) is nn.Sequential:  # only its last block's result can be the features of a stage
            for before, after in pairwise(block.children()):
                if isinstance(before, DepthwiseSeparableConv) and not before.has_skip:
                    switched += _switch_next(before.bn2, after)
    return switched


def _switch_next(norm: nn.Module, block: nn.Module) -> bool:
    """Switch the first convolution of a block, if only that convolution uses the norm's result."""
    if not isinstance(block, DepthwiseSeparableConv) or block.has_skip or block.conv_s2d is not None:
        return False
    return _switch_after(norm, block.conv_dw)


def _switch_layers(*layers: nn.Module) -> int:
    """Switch the convolutions of consecutive layers; layers that are not a convolution and a batch norm are skipped."""
    found: list[Any] = [layer for layer in layers if isinstance(layer, ConvNormAct)]
    switched = _switch(found[0].conv) if found else 0
    for before, after in pairwise(found):
        switched += _switch_after(before.bn, after.conv) if before.aa is None else _switch(after.conv)
    return switched


def _switch_after(norm: nn.Module, conv: nn.Module) -> bool:
    """Switch a convolution after one of timm's norms, which contain the activation."""
    return _switch(conv, norm, getattr(norm, "act", None))


def _switch(conv: nn.Module, norm: nn.Module | None = None, activation: nn.Module | None = None) -> bool:
    """Switch a convolution that the kernel supports, and fold in the norm and activation before it if possible.

    Returns:
        Whether it was switched.
    """
    if not (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (3, 3)
        and conv.stride in ((1, 1), (2, 2))
        and (conv.padding, conv.padding_mode, conv.dilation) == ((1, 1), "zeros", (1, 1))
        and conv.bias is None
    ):
        return False
    conv.__class__ = DepthwiseConv2d
    if norm is not None and is_plain_norm(norm) and activation is not None and type(activation) in ACTIVATIONS:
        cast(FoldedBatchNorm2d, norm).activation = ACTIVATIONS[type(activation)]
        norm.__class__, activation.__class__ = FoldedBatchNorm2d, nn.Identity
    return True


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether `norm` is a plain batch norm with weights and running statistics, not followed by DropBlock."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and type(norm) in (nn.BatchNorm2d, BatchNormAct2d)
        and has_weights_and_statistics(norm)
        and isinstance(getattr(norm, "drop", None), nn.Identity | None)
    )


def has_weights_and_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether a batch norm has weights and running statistics with a fixed momentum."""
    return norm.affine and norm.track_running_stats and norm.momentum is not None
