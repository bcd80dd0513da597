"""FitNet (Romero et al., ICLR 2015) between any two families of networks."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.options import FitNetOptions
from fastofa.methods.targets import Targets, full
from fastofa.system.errors import BadInput


class FitNet(Method):
    """sum over stages of the mean squared difference of the student's projected features and the teacher's (eq. 3).

    A 1x1 convolution projects the student's features to the teacher's width; bilinear interpolation resizes them to its
    grid. Tokens are arranged as a grid; class tokens are left out. Between CNNs with equal grids, this is the form of
    the published comparison of OFA-KD.

    Raises:
        BadInput: student or teacher does not have one of the stages.
    """

    Options = FitNetOptions
    needs = "stage features"

    def __init__(self, options: FitNetOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        own, teachers = sizes.student_stages, sizes.teacher_stages
        if not set(options.stages) <= own.keys() & teachers.keys():
            wanted, student, teacher, both = map(_names, (options.stages, own, teachers, own.keys() & teachers.keys()))
            remedy = f"give --fitnet.stages {both}" if both else "choose another student or teacher"
            raise BadInput(
                f"fitnet.stages: expected stages that both networks have, got {wanted}, but the student has "
                f"{student or 'none'} and the teacher {teacher or 'none'}; {remedy}"
            )
        self.projectors = nn.ModuleList(
            nn.Conv2d(own[stage], teachers[stage], 1, bias=False) for stage in options.stages
        )
        for projector in self.projectors:
            assert isinstance(projector, nn.Conv2d)
            nn.init.kaiming_normal_(projector.weight, mode="fan_out", nonlinearity="relu")

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        assert outputs.stages is not None
        assert targets.stages is not None
        differences = []
        for stage, projector in zip(self.options.stages, self.projectors, strict=True):
            student, teacher = full(outputs.stages[stage]), full(targets.stages[stage])
            # Projection and interpolation commute; the one on the smaller grid costs less.
            if student.shape[2] > teacher.shape[2]:
                student = projector(resized(student, teacher))
            else:
                student = resized(projector(student), teacher)
            differences.append(F.mse_loss(student, teacher))
        return torch.stack(differences).sum()


def resized(x: Tensor, like: Tensor) -> Tensor:
    """x [B, C, H, W] interpolated to the height and width of another map."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="bilinear", antialias=True)


def _names(stages: Iterable[int]) -> str:
    return " ".join(map(str, sorted(stages)))
