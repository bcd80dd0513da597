"""DIST (Huang et al., NeurIPS 2022): the student's probabilities need only correlate with the teacher's."""

from torch import Tensor

from fastofa.methods.method import Method, Outputs, log_softmax
from fastofa.methods.options import DISTOptions
from fastofa.methods.targets import Targets

TINY = 1e-8  # keeps the correlation of constant rows finite


class DIST(Method):
    """T^2 * (beta * inter + gamma * intra) (eq. 8-10): one minus the mean Pearson correlation of student and teacher.

    inter: over the classes of each image; intra: over the images of each class, in the part of the batch that this rank
    computes at once.
    """

    Options = DISTOptions
    needs = "all classes"

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        o = self.options
        q = log_softmax(outputs.logits, o.temperature).exp()
        p = targets.probs(q.shape[1], o.temperature)
        inter, intra = 1 - correlation(q, p).mean(), 1 - correlation(q.T, p.T).mean()
        return o.temperature**2 * (o.beta * inter + o.gamma * intra)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the rows of a and b [R, N] -> [R]."""
    a, b = (values - values.mean(dim=1, keepdim=True) for values in (a, b))
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + TINY)
