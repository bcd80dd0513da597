"""The interface of a distillation method: a loss between the student's outputs and the teacher's targets.

Shapes: B images, C classes, H heads (the exits, then the model's own), D width of a pooled vector.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastofa.methods.options import Weight
from fastofa.methods.targets import Targets, full
from fastofa.system.errors import BadInput

Needs = Literal["top-K", "all classes", "pooled vector", "stage features"]


class Outputs(NamedTuple):
    """What the student computes for a batch. The loss is computed in fp32; the outputs may be bf16."""

    heads: Tensor
    """floating [H, B, C]: the logits of the exits in stage order, then the final logits."""
    pooled: Tensor | None = None
    """floating [B, D]: the input of the student's classifier, for methods that need the teacher's pooled vector."""
    stages: dict[int, Tensor] | None = None
    """By number of the stage: its features, floating [B, channels, height, width], for methods that need the
    teacher's."""

    @property
    def logits(self) -> Tensor:
        """floating [B, C]: the final logits."""
        return self.heads[-1]


@dataclass(frozen=True)
class Sizes:
    """What the modules of a method depend on."""

    num_classes: int
    student_dim: int = 0
    """Width of the student's pooled vector."""
    teacher_dim: int = 0
    """Width of the teacher's pooled vector."""
    images_per_class: tuple[int, ...] = ()
    """Number of training images of each class, whose sample ids are consecutive."""
    student_stages: dict[int, int] = field(default_factory=dict)
    """Channels of each stage that the student has, by its number, for methods that need features of stages."""
    teacher_stages: dict[int, int] = field(default_factory=dict)
    """Likewise of the teacher."""


class Method(nn.Module):
    """A distillation method. Subclasses define `Options` and `loss`.

    A method may create modules and buffers in `__init__`. They are trained, saved and resumed with the student, and are
    not part of what is exported.

    Args:
        options: an instance of the class's `Options`.
        sizes: the sizes of student, teacher and dataset.
    """

    needs: ClassVar[Needs] = "top-K"
    """What the method needs from the teacher."""
    impl: str | None = None
    """The implementation of its kernels, "triton" or "torch"; None: chosen by the device."""

    Options: ClassVar[Any] = Weight
    """A frozen dataclass with at least `weight`; every field has a default."""

    def __init__(self, options: Any, sizes: Sizes) -> None:
        super().__init__()
        self.options, self.sizes = options, sizes

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its losses in the log."""
        return (type(self).__name__.lower(),)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each part in the total."""
        return (self.options.weight,)

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        """The unweighted loss, fp32 [].

        Args:
            outputs: what the student computes for the images.
            targets: the teacher's for the same images.
            labels: int64 [B]; for mixed images, the label of larger weight.
        """
        raise NotImplementedError

    def losses(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        """The unweighted losses, fp32 [len(parts)]."""
        loss = self.loss(outputs, targets, labels)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise BadInput(
                f"method {type(self).__name__}: expected its loss to return a scalar, a tensor of shape [], got {got}"
            )
        return loss[None]


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities at a temperature, in fp32 (float64 for float64)."""
    return torch.log_softmax(full(logits) / temperature, dim=-1)
