"""Knowledge distillation (Hinton et al., 2015): cross-entropy against the teacher's softened probabilities."""

import torch
from torch import Tensor

from fastofa.kernels import ofa_loss
from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.options import KDOptions
from fastofa.methods.targets import Targets


class KD(Method):
    """T^2 * mean_b sum_c -p_c log q_c, with p = softmax(teacher / T) and q = softmax(student / T).

    The factor T^2 keeps the gradient's scale independent of T (section 2 of the paper). The loss exceeds the
    Kullback-Leibler divergence by T^2 times the teacher's entropy, which has no gradient.
    """

    Options = KDOptions
    eps: Tensor

    def __init__(self, options: KDOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.register_buffer("eps", torch.ones(1), persistent=False)  # of the OFA loss, which 1 makes a cross-entropy

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        t = self.options.temperature
        each = ofa_loss(outputs.heads[-1:], labels, targets.classes, targets.log_probs, self.eps, t, self.impl)
        return t**2 * each[0]
