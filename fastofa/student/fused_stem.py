"""Run a model's stem with Triton kernels: the convolution of the pixels, and a ResNet's batch norm, ReLU and max-pool.

In a student whose stem is known, the convolution also normalises the pixels, so that a kernel can read uint8 images.
Only the classes of modules change, and such a convolution gets buffers that are not saved. Parameters and the state
dict stay the same, and so do checkpoints and exports. Modules that are not recognised stay unchanged.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

from fastofa.kernels import norm_act_pool, stem_conv2d, stem_conv2d_with_statistics
from fastofa.kernels.choice import can_run_triton
from fastofa.kernels.comparison import Comparison, describe, random_like
from fastofa.kernels.stem_conv import MAX_KERNEL
from fastofa.student.fused_depthwise import is_plain_norm
from fastofa.student.fused_norms import norm_arguments, norm_comparison
from fastofa.student.model import Student

# The convolution that receives the images directly in these models.
STEMS = {
    ResNet: ("conv1", "conv1.0"), EfficientNet: ("conv_stem",), MobileNetV3: ("conv_stem",), RegNet: ("stem.conv",),
    ConvNeXt: ("stem.0",),
}  # fmt: skip


class NormActPool2d(nn.BatchNorm2d):
    """A batch norm, ReLU, and 3x3 max-pooling with stride 2."""

    impl: str = "triton"
    group: str | None = None

    def forward(self, input: Tensor | tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """`input`: x [B, C, H, W], or a tuple of x and its mean and biased variance, fp32 [C] each."""
        x, statistics = (input[0], input[1:]) if isinstance(input, tuple) else (input, None)
        if not self.training:
            return F.max_pool2d(F.relu(super().forward(x)), 3, 2, 1)
        return norm_act_pool(x, **norm_arguments(self, x), statistics=statistics)

    def comparisons(self, input: Tensor) -> dict[str, Comparison]:
        return {"impl": norm_comparison("norm_act_pool", describe(input), norm_act_pool, self, input)}


class StridedConv2d(nn.Conv2d):
    """A convolution of the pixels, which also normalises uint8 images.

    `impl` is "squares" (PyTorch's convolution on squares of pixels, see `fastofa.kernels.stem_conv2d`), "triton" (uint8
    images and kernels of up to 8x8 only) or "torch" (PyTorch's own).
    """

    impl: str = "squares"
    before_norm = False
    """Whether a NormActPool2d follows; in training, "triton" then also returns the statistics that it needs."""
    mean: Tensor
    std: Tensor

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        if self.impl == "triton" and self._fits_triton(input):
            options = (self.weight, self.bias, self.stride[0], cast(int, self.padding[0]))
            pixels: dict[str, Any] = {"mean": self.mean, "std": self.std, "dtype": self._dtype(input)}
            if self.training and self.before_norm:
                return stem_conv2d_with_statistics(input, *options, **pixels, impl="triton")
            return stem_conv2d(input, *options, **pixels, impl="triton")
        return self._run("squares" if self.impl == "triton" else self.impl, input, self.weight, self.bias)

    def _fits_triton(self, x: Tensor) -> bool:
        small = self.kernel_size[0] <= MAX_KERNEL
        return small and x.dtype == torch.uint8 and self._dtype(x) != torch.float64 and can_run_triton(self.weight)

    def _run(self, impl: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dtype = self.stride[0], cast(int, self.padding[0]), self._dtype(x, weight)
        if impl == "torch":
            x = self._normalized(x).to(dtype)
            return F.conv2d(x, weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding)
        if x.dtype != torch.uint8:
            return stem_conv2d(x.to(dtype), weight, bias, stride, padding)
        pixels: dict[str, Any] = {"mean": self.mean, "std": self.std, "dtype": dtype}
        return stem_conv2d(x, weight, bias, stride, padding, **pixels, impl="torch" if impl == "squares" else impl)

    def _dtype(self, x: Tensor, weight: Tensor | None = None) -> torch.dtype:
        """The dtype of the result: autocast's, else that of floating-point images, else the weight's."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return x.dtype if x.is_floating_point() else (self.weight if weight is None else weight).dtype

    def _normalized(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8:
            return x
        return (x.float() / 255 - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def comparisons(self, input: Tensor) -> dict[str, Comparison]:
        """Forward pass and gradients of the parameters; pixels need none."""
        dtype = self._dtype(input)
        own = [None if p is None else p.detach().to(dtype) for p in (self.weight, self.bias)]
        is_bytes = input.dtype == torch.uint8
        shape, device = tuple(input.shape), input.device
        others, pixels = random_like(*own), random_like(input if is_bytes else input.to(dtype))

        def inputs() -> tuple[Tensor | None, ...]:
            if not is_bytes:
                return *pixels(), *others()
            images = torch.randint(256, shape, dtype=torch.uint8, device=device)
            return images.contiguous(memory_format=torch.channels_last), *others()

        kinds = ["squares", "torch"] + ["triton"] * (is_bytes and self.kernel_size[0] <= MAX_KERNEL)
        size = describe(input, *own, stride=self.stride[0], padding=self.padding[0])
        runs = {impl: partial(self._run, impl) for impl in kinds}
        return {"impl": Comparison("stem_conv2d", size, inputs, runs, (1, 2), ("squares",), input.numel())}


class UnnormalizedStudent(Student):
    """A student whose stem normalises uint8 images."""

    def normalize(self, images: Tensor) -> Tensor:
        return images


def use_stem_kernels(module: nn.Module, impl: str = "squares") -> int:
    """Switch convolutions of the pixels, and a ResNet's batch norm, ReLU and max-pool after them, to kernels.

    Call this before `use_norm_kernels`; the notes there apply here, too. The ResNet's features of reduction 2 are then
    those after its max-pool.

    Args:
        impl: the implementation of a Student's stem, see `StridedConv2d`.

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
    if type(module) is Student and (stem := _stem(module.backbone)) is not None:
        stem.register_buffer("mean", module.mean.flatten(), persistent=False)
        stem.register_buffer("std", module.std.flatten(), persistent=False)
        stem.impl = impl
        stem.before_norm = (
            stem is getattr(module.backbone, "conv1", None) and type(module.backbone.bn1) is NormActPool2d
        )
        module.__class__ = UnnormalizedStudent
    return switched


def _stem(backbone: nn.Module) -> StridedConv2d | None:
    """The switched convolution that receives the images directly; None if it is not known."""
    modules = dict(backbone.named_modules())
    for kind, names in STEMS.items():
        found = [modules[name] for name in names if type(modules.get(name)) is StridedConv2d]
        if isinstance(backbone, kind) and found:
            return cast(StridedConv2d, found[0])
    return None


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
