"""FitNet (Romero et al., ICLR 2015) between any two families of networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.options import FitNetOptions
from fastofa.methods.targets import Targets, full


class FitNet(Method):
    """sum over stages of the mean squared difference of the student's projected features and the teacher's (eq. 3).

    A 1x1 convolution projects the student's features to the teacher's width; bilinear interpolation resizes them to its
    grid. Tokens are arranged as a grid; class tokens are left out. Between CNNs with equal grids, this is the published
    form.
    """

    Options = FitNetOptions
    needs = "stage features"

    def __init__(self, options: FitNetOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.projectors = nn.ModuleList(
            nn.Conv2d(sizes.student_stages[stage - 1], sizes.teacher_stages[stage - 1], 1, bias=False)
            for stage in options.stages
        )
        for projector in self.projectors:
            assert isinstance(projector, nn.Conv2d)
            nn.init.kaiming_normal_(projector.weight, mode="fan_out", nonlinearity="relu")

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        found = []
        for stage, projector in zip(self.options.stages, self.projectors, strict=True):
            student, teacher = full(outputs.stages[stage - 1]), full(targets.stages[stage - 1])
            student = projector(student)
            if student.shape[2:] != teacher.shape[2:]:
                student = F.interpolate(student, teacher.shape[2:], mode="bilinear", antialias=True)
            found.append(F.mse_loss(student, teacher))
        return torch.stack(found).sum()
