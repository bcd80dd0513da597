"""Run the MLPs of token models with a Triton kernel for the bias and the GELU between their matrix products.

Only the classes of modules change. Parameters and their names stay the same, and so do checkpoints and exports. Modules
that are not recognised stay unchanged. In evaluation, PyTorch's own functions run.
"""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.layers.activations import GELU, GELUTanh
from torch import Tensor, nn

from fastofa.kernels import bias_gelu
from fastofa.kernels.choice import can_run_triton
from fastofa.kernels.comparison import Comparison, describe, random_like


class FusedMlp(Mlp):
    """An MLP whose first matrix product leaves out the bias, which is added where the GELU is computed."""

    impl: str = "triton"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x = F.linear(x, self.fc1.weight)
        impl = self.impl if can_run_triton(x) else "torch"
        x = bias_gelu(x, cast(Tensor, self.fc1.bias), cast(str, _approximation(self.act)), impl=impl)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def comparisons(self, x: Tensor) -> dict[str, Comparison]:
        """Bias and GELU, with their gradients."""
        kind, approximate = x.device.type, cast(str, _approximation(self.act))
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.new_empty((x.shape[:-1].numel(), cast(int, self.fc1.out_features)), dtype=dtype)
        run = {impl: partial(bias_gelu, approximate=approximate, impl=impl) for impl in ("triton", "torch")}
        inputs, size = random_like(x, self.fc1.bias), describe(x, approximate=approximate)
        return {"impl": Comparison("bias_gelu", size, inputs, run, (0, 1), ("torch",), x.numel())}


def use_token_kernels(module: nn.Module) -> int:
    """Switch the MLPs in `module` with linear layers and a GELU (those of ViT, Swin, Mixer, ResMLP and ConvNeXt).

    The results stay the same up to rounding. Compile, copy or wrap the module only afterwards.

    Returns:
        The number of MLPs that were switched.
    """
    switched = 0
    for mlp in module.modules():
        if (
            type(mlp) is Mlp
            and type(mlp.fc1) is type(mlp.fc2) is nn.Linear
            and mlp.fc1.bias is not None
            and _approximation(mlp.act) is not None
        ):
            mlp.__class__ = FusedMlp
            switched += 1
    return switched


def _approximation(activation: nn.Module) -> str | None:
    """How a module computes the GELU, "none" or "tanh"; None if it is another activation."""
    if type(activation) is nn.GELU:
        return activation.approximate
    return {GELU: "none", GELUTanh: "tanh"}.get(type(activation))
