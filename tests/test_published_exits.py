"""The exits of the paper's students equal an independent construction from the published description, in float64.

The construction gets the features of the modules at which the published code ends the stages, and the exits' tensors in
their order. It is written with plain tensor operations.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastofa.student.model import Student

CLASSES, TEACHER_DIM = 10, 768


# --- The published description ----------------------------------------------------------------------------------------


def norm(x: Tensor, tensors: Iterator[Tensor]) -> Tensor:
    """LayerNorm with PyTorch's epsilon."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * next(tensors) + next(tensors)


def linear(x: Tensor, tensors: Iterator[Tensor], bias: bool = True) -> Tensor:
    x = x @ next(tensors).T
    return x + next(tensors) if bias else x


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def batch_norm(x: Tensor, tensors: Iterator[Tensor]) -> Tensor:
    """In evaluation."""
    weight, bias, mean, variance, _ = (next(tensors).view(-1, 1, 1) for _ in range(5))
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def conv_exit(x: Tensor, stage: int, prefix: int, tensors: Iterator[Tensor]) -> Tensor:
    """Stage 4: a 1x1 convolution; others: 4 - stage separable convolutions of stride 2. Then the mean and a linear
    layer."""
    if stage == 4:
        x = F.conv2d(x, next(tensors), next(tensors))
    for _ in range(4 - stage):
        for stride in (2, 1):
            x = F.conv2d(x, next(tensors), stride=stride, padding=1, groups=x.shape[1])
            x = batch_norm(F.conv2d(x, next(tensors)), tensors).clamp(min=0)
    return linear(x.mean(dim=(2, 3)), tensors)


def transformer_block(x: Tensor, tensors: Iterator[Tensor]) -> Tensor:
    """Four heads, queries, keys and values without bias, an MLP four times as wide."""
    batch, length, width = x.shape
    qkv = linear(norm(x, tensors), tensors, bias=False).view(batch, length, 3, 4, width // 4)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    shares = (q @ k.transpose(-2, -1) / math.sqrt(width // 4)).softmax(dim=-1)
    x = x + linear((shares @ v).transpose(1, 2).reshape(batch, length, width), tensors)
    return x + linear(gelu(linear(norm(x, tensors), tensors)), tensors)


def token_exit(x: Tensor, stage: int, prefix: int, tensors: Iterator[Tensor]) -> Tensor:
    """Merges 2x2 tokens until the grid is about 7x7, with a GELU after each merging but the last of several; then
    max(4 - stage, 1) transformer blocks, and a linear layer on the class token or on the mean of the tokens."""
    x = x.flatten(1, -2)
    first, x = x[:, :prefix], x[:, prefix:]
    side = math.isqrt(x.shape[1])
    merges = int(math.log2(side / 7))
    for i in range(merges):
        x = x.view(len(x), side, side, -1)
        side //= 2
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = linear(norm(torch.cat(neighbours, dim=-1), tensors), tensors, bias=False).flatten(1, 2)
        x = gelu(x) if i == 0 or i < merges - 1 else x
    x = torch.cat([first, x], dim=1) if prefix else x
    for _ in range(max(4 - stage, 1)):
        x = transformer_block(x, tensors)
    return linear(x[:, 0] if prefix else x.mean(dim=1), tensors)


# --- The paper's students ---------------------------------------------------------------------------------------------


def mobilenet_stages(model: Any) -> list[nn.Module]:
    """The published code counts the blocks through all groups; its last stage is the widest layer, after the blocks."""
    blocks = [block for group in model.blocks for block in group]
    return [blocks[2], blocks[5], blocks[12], model.bn2]


def swin_stages(model: Any) -> list[nn.Module]:
    """Before the merging of patches, which belongs to the next stage."""
    return [layer.blocks[-1] for layer in model.layers]


def isotropic_stages(model: Any) -> list[nn.Module]:
    return [model.blocks[i] for i in (1, 3, 9, 11)]


Stages = Callable[[Any], list[nn.Module]]
STUDENTS: list[tuple[str, int, Stages, Any, int]] = [
    *[
        (name, 64, lambda model: [model.layer1, model.layer2, model.layer3, model.layer4], conv_exit, 0)
        for name in ("resnet18", "resnet50")
    ],
    ("mobilenetv2_100", 64, mobilenet_stages, conv_exit, 0),
    ("convnext_tiny", 64, lambda model: list(model.stages), conv_exit, 0),
    *[(name, 224, isotropic_stages, token_exit, 1) for name in ("deit_tiny_patch16_224", "vit_small_patch16_224")],
    *[
        (f"swin_{size}_patch4_window7_224", 224, swin_stages, token_exit, 0)
        for size in ("tiny", "nano", "pico")
    ],
    *[(name, 224, isotropic_stages, token_exit, 0) for name in ("mixer_b16_224", "resmlp_12_224")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "stages", "published", "prefix"), STUDENTS, ids=[s[0] for s in STUDENTS])
@torch.no_grad()
def test_exits_equal_the_published_construction(
    name: str, size: int, stages: Stages, published: Any, prefix: int
) -> None:
    """With the same weights, none of which has its initial value. Tokens at 224 px, so that there are as many
    as in the paper."""
    student = Student(name, CLASSES, size, TEACHER_DIM).double().eval()
    for tensor in student.exits.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor), alpha=0.03)
    features: list[Tensor] = []
    for module in stages(student.backbone):
        module.register_forward_hook(lambda _, __, output: features.append(output))
    logits = student(torch.randn(1, 3, size, size, dtype=torch.float64))
    assert len(features) == 4
    for stage, (feature, exit_, got) in enumerate(zip(features, student.exits, logits[:-1], strict=True), 1):
        tensors = iter(exit_.state_dict().values())
        expected = published(feature, stage, prefix, tensors)
        assert list(tensors) == []
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
