"""Logit standardisation (Sun et al., CVPR 2024): the student matches the teacher's logits up to shift and scale."""

from torch import Tensor

from fastofa.methods.method import Method, Outputs, log_softmax
from fastofa.methods.options import LSKDOptions
from fastofa.methods.targets import Targets, full

TINY = 1e-7


class LSKD(Method):
    """T^2 * KL(softmax(Z(teacher) / T) || softmax(Z(student) / T)), mean over the batch (algorithm 2).

    Z subtracts the mean of an image's logits and divides by their standard deviation.
    """

    Options = LSKDOptions
    needs = "all classes"

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        t = self.options.temperature
        teacher = targets.all_log_probs
        if teacher is None:
            teacher = targets.probs(outputs.logits.shape[1]).clamp(min=TINY).log()
        log_p, log_q = (log_softmax(standardised(z), t) for z in (teacher, outputs.logits))
        return t**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def standardised(logits: Tensor) -> Tensor:
    logits = full(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + TINY)
