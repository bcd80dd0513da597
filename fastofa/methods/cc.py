"""Correlation congruence (Peng et al., ICCV 2019), in the form of the published comparison of OFA-KD."""

from torch import Tensor, nn

from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.options import CCOptions
from fastofa.methods.targets import Targets, full


class CC(Method):
    """scale * mean_b sum_d |s - t|_b,d |s - t|_b+1,d, with s and t the projected pooled vectors of student and teacher.

    The paper itself compares kernel matrices over the batch; the published comparison uses this form.
    """

    Options = CCOptions
    needs = "pooled vector"

    def __init__(self, options: CCOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.of_student = nn.Linear(sizes.student_dim, options.width)
        self.of_teacher = nn.Linear(sizes.teacher_dim, options.width)

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        assert outputs.pooled is not None
        assert targets.pooled is not None
        away = (self.of_student(full(outputs.pooled)) - self.of_teacher(full(targets.pooled))).abs()
        return self.options.scale * (away[:-1] * away[1:]).sum(dim=1).mean()
