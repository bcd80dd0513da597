"""Run the layer norms of transformer and mixer blocks with a Triton kernel, which also adds the residual before them.

Only the classes of blocks change. Parameters and their names stay the same, and so do checkpoints and exports. Blocks
that are not recognised stay unchanged. In evaluation, PyTorch's own functions run.
"""

from functools import partial
from typing import Any, cast

import timm.layers
import torch
from timm.models.mlp_mixer import MixerBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastofa.kernels import layer_norm
from fastofa.kernels.choice import can_run_triton
from fastofa.kernels.comparison import Comparison, describe, random_like


class AddNorm:
    """The part that blocks with two layer norms share: x + branch, and its layer norm."""

    impl: str = "triton"

    def add_and_norm(self, norm: Any, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + branch, and its layer norm, under autocast in the dtype of the matrix product that follows."""
        impl = self.impl if can_run_triton(x) else "torch"
        return layer_norm(x, norm.weight, norm.bias, norm.eps, branch, _dtype_of_products(x), impl)

    def comparisons(self, x: Tensor, *_: Any) -> dict[str, Comparison]:
        """The addition and the second norm of the block, with their gradients."""
        norm, dtype, x = cast(Any, self).norm2, _dtype_of_products(x), x.flatten(0, -2)
        branch = x.to(dtype or x.dtype)

        def run(impl: str, x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
            stream, y = layer_norm(x, weight, bias, norm.eps, branch, dtype, impl)
            return y, stream

        return {
            "impl": Comparison(
                "layer_norm",
                describe(x, branch, dtype=dtype or x.dtype),
                random_like(x, norm.weight, norm.bias, branch),
                {impl: partial(run, impl) for impl in ("triton", "torch")},
                leaves=(0, 1, 2, 3),
                fused=("torch",),
                elements=x.numel(),
            )
        }


def _dtype_of_products(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes matrix products on x's device; None without autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class FusedBlock(AddNorm, Block):
    """A block of a ViT. The addition after its MLP is left to the compiler: the next norm is in the next block."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not self.training:
            return super().forward(x, attn_mask, is_causal)
        x, y = self.add_and_norm(self.norm1, x)
        branch = self.drop_path1(self.ls1(self.attn(y, attn_mask=attn_mask, is_causal=is_causal)))
        x, y = self.add_and_norm(self.norm2, x, branch)
        return x + self.drop_path2(self.ls2(self.mlp(y)))


class FusedSwinBlock(AddNorm, SwinTransformerBlock):
    """[B, H, W, C] -> [B, H, W, C], as FusedBlock."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x, y = self.add_and_norm(self.norm1, x)
        x, y = self.add_and_norm(self.norm2, x, self.drop_path1(self._attn(y)))
        return x + self.drop_path2(self.mlp(y))


class FusedMixerBlock(AddNorm, MixerBlock):
    """As FusedBlock."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x, y = self.add_and_norm(self.norm1, x)
        branch = self.drop_path(self.mlp_tokens(y.transpose(1, 2)).transpose(1, 2))
        x, y = self.add_and_norm(self.norm2, x, branch)
        return x + self.drop_path(self.mlp_channels(y))


FUSED: dict[type, type] = {Block: FusedBlock, SwinTransformerBlock: FusedSwinBlock, MixerBlock: FusedMixerBlock}


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
