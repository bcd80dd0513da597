"""Run a model's stem with Triton kernels: the convolution of the pixels, and a ResNet's batch norm, ReLU and max-pool.

Only the classes of modules change. Parameters, buffers and their names stay the same, and so do checkpoints and
exports. Modules that are not recognised stay unchanged.
"""

from typing import cast

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from fastofa.kernels import norm_act_pool, stem_conv2d
from fastofa.student.fused_depthwise import is_plain_norm
from fastofa.student.fused_norms import norm_arguments


class NormActPool2d(nn.BatchNorm2d):
    """A batch norm, ReLU, and 3x3 max-pooling with stride 2."""

    group: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.max_pool2d(F.relu(super().forward(input)), 3, 2, 1)
        return norm_act_pool(input, **norm_arguments(self, input))


class StridedConv2d(nn.Conv2d):
    """A convolution of the pixels, computed on squares of pixels (see `fastofa.kernels.stem_conv2d`)."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return stem_conv2d(input, self.weight, self.bias, self.stride[0], cast(int, self.padding[0]))


def use_stem_kernels(module: nn.Module) -> int:
    """Switch convolutions of the pixels, and a ResNet's batch norm, ReLU and max-pool after them, to kernels.

    Call this before `use_norm_kernels`; the notes there apply here, too. The ResNet's features of reduction 2 are then
    those after its max-pool.

    Returns:
        The number of convolutions and batch norms that were switched.
    """
    switched = 0
    for block in module.modules():
        if _is_of_pixels(block):
            block.__class__ = StridedConv2d
            switched += 1
        if (
            isinstance(block, ResNet)
            and _is_stem_pool(block.maxpool)
            and type(block.bn1) is nn.BatchNorm2d
            and is_plain_norm(block.bn1)
            and type(block.act1) is nn.ReLU
        ):
            block.bn1.__class__ = NormActPool2d
            for absorbed in (block.act1, block.maxpool):
                cast(nn.Module, absorbed).__class__ = nn.Identity
            switched += 1
    return switched


def _is_stem_pool(pool: nn.Module) -> bool:
    return type(pool) is nn.MaxPool2d and (
        (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
        == (3, 2, 1, 1, False, False)
    )


def _is_of_pixels(conv: nn.Module) -> bool:
    """Whether `conv` is a convolution with at most four input channels whose kernel covers every pixel."""
    return (
        type(conv) is nn.Conv2d
        and conv.in_channels <= 4
        and conv.groups == 1
        and conv.stride[0] == conv.stride[1] >= 2
        and conv.kernel_size[0] == conv.kernel_size[1] >= conv.stride[0]
        and conv.padding in [(p, p) for p in range(conv.kernel_size[0])]
        and (conv.padding_mode, conv.dilation) == ("zeros", (1, 1))
    )
