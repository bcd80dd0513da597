"""Exits: modules that map the features of a student's stage to logits (OFA-KD, section 3.2, as published).

Shapes: B batch, C channels of a stage, D channels of an exit's last layer, L tokens, P prefix tokens.
"""

import math
from itertools import pairwise

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

GRID = 7  # approximate side of the grid into which tokens are merged
HEADS = 4  # attention heads


class SepConv(nn.Sequential):
    """Two depthwise-separable 3x3 convolutions, the first with stride 2; halves the sides."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class ConvExit(nn.Module):
    """Exit of a CNN's stage: [B, C, H, W] -> logits. Stage 4 has one 1x1 convolution, stage k < 4 has 4 - k
    SepConvs."""

    def __init__(self, stage: int, channels: int, dim: int, num_classes: int) -> None:
        super().__init__()
        if stage == 4:
            self.blocks: nn.Module = nn.Conv2d(channels, dim, 1)
        else:
            widths = [channels * 2**i for i in range(4 - stage)] + [dim]
            self.blocks = nn.Sequential(*(SepConv(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_exit)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.blocks, nn.Conv2d):  # 1x1: it commutes with the mean, so the mean is taken first
            return self.head(self.blocks(x.mean(dim=(2, 3), keepdim=True)).flatten(1))
        return self.head(self.blocks(x).mean(dim=(2, 3)))


class PatchMerging(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, D]: concatenate 2x2 neighbours, LayerNorm, Linear; odd sides are padded."""

    def __init__(self, dim: int, out_dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return self.activation(self.reduction(self.norm(x)))


class TokenExit(nn.Module):
    """Exit of a token model's stage: tokens [B, L, C] and, if any, prefix tokens [B, P, C] -> logits.

    It merges the tokens into a grid of about 7x7, runs max(4 - stage, 1) transformer blocks of the student's final
    width, and classifies the class token, or the mean of the tokens if there is none.
    """

    def __init__(
        self, stage: int, grid: tuple[int, int], channels: int, dim: int, num_classes: int, class_token: bool
    ) -> None:
        super().__init__()
        self.grid, self.class_token = grid, class_token
        merges = max(int(math.log2(math.sqrt(grid[0] * grid[1]) / GRID)), 0)
        layers: list[nn.Module] = []
        for i in range(merges):
            activation = nn.GELU() if i == 0 or i < merges - 1 else nn.Identity()
            layers.append(PatchMerging(channels if i == 0 else dim, dim, activation))
        if merges == 0 and channels != dim:
            layers.append(nn.Linear(channels, dim))  # small images: nothing to merge, but the width must match
        self.merge = nn.Sequential(*layers)
        self.project_prefix = nn.Linear(channels, dim) if class_token and channels != dim else nn.Identity()
        # torch's LayerNorm: its epsilon, 1e-5, is the published one; that of timm's is now 1e-6.
        blocks = (Block(dim, HEADS, norm_layer=nn.LayerNorm) for _ in range(max(4 - stage, 1)))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_exit)

    def forward(self, tokens: Tensor, prefix: Tensor | None = None) -> Tensor:
        x = tokens.unflatten(1, self.grid)
        x = self.merge(x).flatten(1, 2)
        if self.class_token and prefix is not None:
            x = self.blocks(torch.cat([self.project_prefix(prefix), x], dim=1))
            return self.head(x[:, 0])
        return self.head(self.blocks(x).mean(dim=1))


def init_exit(module: nn.Module) -> None:
    """Initialise convolutions: Kaiming (fan out); batch norms: 1 and 0; linear layers: truncated normal, std 0.02."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
