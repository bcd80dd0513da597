"""Run the layer norms of transformer and mixer blocks with a Triton kernel, which also adds the residual before them.

Only the classes of blocks change. Parameters and their names stay the same, and so do checkpoints and exports. Blocks
that are not recognised stay unchanged. In evaluation, PyTorch's own functions run.
"""

from typing import Any, cast

import timm.layers
import torch
from timm.models.mlp_mixer import MixerBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastofa.kernels import layer_norm
from fastofa.kernels.choice import can_run_triton


class FusedBlock(Block):
    """A block of a ViT. The addition after its MLP is left to the compiler: the next norm is in the next block."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not self.training:
            return super().forward(x, attn_mask, is_causal)
        x, y = add_and_norm(self.norm1, x)
        branch = self.drop_path1(self.ls1(self.attn(y, attn_mask=attn_mask, is_causal=is_causal)))
        x, y = add_and_norm(self.norm2, x, branch)
        return x + self.drop_path2(self.ls2(self.mlp(y)))


class FusedSwinBlock(SwinTransformerBlock):
    """[B, H, W, C] -> [B, H, W, C], as FusedBlock."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x, y = add_and_norm(self.norm1, x)
        x, y = add_and_norm(self.norm2, x, self.drop_path1(self._attn(y)))
        return x + self.drop_path2(self.mlp(y))


class FusedMixerBlock(MixerBlock):
    """As FusedBlock."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x, y = add_and_norm(self.norm1, x)
        branch = self.drop_path(self.mlp_tokens(y.transpose(1, 2)).transpose(1, 2))
        x, y = add_and_norm(self.norm2, x, branch)
        return x + self.drop_path(self.mlp_channels(y))


FUSED: dict[type, type] = {Block: FusedBlock, SwinTransformerBlock: FusedSwinBlock, MixerBlock: FusedMixerBlock}


def add_and_norm(norm: nn.Module, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + branch, and its layer norm, under autocast in the dtype of the matrix product that follows."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    impl = "triton" if can_run_triton(x) else "torch"
    own = cast(nn.LayerNorm, norm)
    return layer_norm(x, own.weight, own.bias, own.eps, branch, dtype, impl)


def use_layer_norm_kernels(module: nn.Module) -> int:
    """Switch the blocks of ViTs, Swins and mixers in `module` to the kernel.

    The results stay the same up to rounding. Compile, copy or wrap the module only afterwards.

    Returns:
        The number of blocks that were switched.
    """
    switched = 0
    for block in module.modules():
        fused: Any = FUSED.get(type(block))
        if fused is not None and _is_plain(block.norm1) and _is_plain(block.norm2):
            block.__class__ = fused
            switched += 1
    return switched


def _is_plain(norm: Any) -> bool:
    """Whether it is a layer norm over the last dimension with weight and bias."""
    return (
        (type(norm) is nn.LayerNorm or (type(norm) is timm.layers.LayerNorm and not norm._fast_norm))
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
    )
