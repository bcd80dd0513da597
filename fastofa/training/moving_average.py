"""The exponential moving average of a student's weights, updated by a few multi-tensor kernels."""

import copy

import torch
from torch import nn


class MovingAverage:
    """`module` is a copy of the student in eval mode whose tensors follow the student's, as in timm's ModelEmaV3.

    It has no modules of distillation methods (`student.methods`), which are neither evaluated nor exported.

    The lists of tensors are built once, not at every step, so the student's tensors must stay the same objects.
    Optimisers and `load_state_dict` update them in place.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        """
        Args:
            decay: weight of the old average in an update, 0 to 1.
        """
        self.decay = decay
        without = {id(methods): nn.ModuleList()} if (methods := getattr(student, "methods", None)) is not None else {}
        self.module = copy.deepcopy(student, without).eval().requires_grad_(False)
        current = student.state_dict()
        pairs = [(own, current[name]) for name, own in self.module.state_dict().items()]
        averaged = [(own, current) for own, current in pairs if own.is_floating_point()]
        self._averaged = [own for own, _ in averaged], [current for _, current in averaged]
        self._copied = [(own, current) for own, current in pairs if not own.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay * average + (1 - decay) * student; counters of batch norm are copied.

        Args:
            step: number of this update, from 1; the first one copies the student, so its initial weights are not
                included.
        """
        average, current = self._averaged
        torch._foreach_lerp_(average, current, 1 - self.decay if step > 1 else 1.0)
        for own, count in self._copied:
            own.copy_(count)
