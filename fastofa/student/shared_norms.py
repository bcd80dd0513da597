"""Share the statistics of a model's batch norms among ranks, each of which has one part of the batch (`--sync-bn`).

Unlike nn.SyncBatchNorm they compile as one graph, run on CPUs too, and keep the activation after them. Only the classes
of modules change. Parameters, buffers and their names stay the same, and so do checkpoints and exports.
"""

from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastofa.kernels import norm_act
from fastofa.student.fused_depthwise import FoldedBatchNorm2d, has_weights_and_statistics
from fastofa.student.fused_norms import NormAct2d, norm_arguments
from fastofa.student.fused_stem import NormActPool2d
from fastofa.system.errors import BadInput


class SharedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm with the statistics of all ranks, in plain PyTorch."""

    group: str

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return norm_act(input, **norm_arguments(self, input, "torch"))


class SharedBatchNormAct2d(BatchNormAct2d):
    """The same, with timm's activation after it."""

    group: str

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return self.act(self.drop(norm_act(x, **norm_arguments(self, x, "torch"))))


def share_statistics(module: nn.Module, group: str) -> None:
    """Let the batch norms in `module` compute the statistics of the images of all ranks in training.

    Call this after switching modules to kernels, which then share their statistics, too. Compile, copy or wrap the
    module only afterwards.

    Args:
        group: name of the process group of these ranks, which all have the same number of images.

    Raises:
        BadInput: a batch norm is of an unsupported kind; `module` is then partly switched.
    """
    kinds: dict[type, type] = {nn.BatchNorm2d: SharedBatchNorm2d, BatchNormAct2d: SharedBatchNormAct2d}
    for name, norm in module.named_modules():
        if isinstance(norm, NormAct2d | NormActPool2d | FoldedBatchNorm2d):
            norm.group = group
        elif isinstance(norm, _BatchNorm):
            if type(norm) not in kinds or not has_weights_and_statistics(norm):
                raise BadInput(
                    f"sync-bn: expected batch norms of maps with weights and running statistics, got {name}, "
                    f"a {type(norm).__name__}, in this student; leave sync-bn out"
                )
            norm.__class__ = kinds[type(norm)]
            norm.group = group  # type: ignore[assignment]
