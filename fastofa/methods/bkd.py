"""Binary distillation, as in the published code of OFA-KD: each class is a binary classification."""

import torch.nn.functional as F
from torch import Tensor

from fastofa.methods.method import Method, Outputs
from fastofa.methods.options import BKDOptions
from fastofa.methods.targets import Targets, full


class BKD(Method):
    """mean_bc -p_c log sigmoid(z_c) - (1 - p_c) log sigmoid(-z_c), with p = softmax(teacher)."""

    Options = BKDOptions
    needs = "all classes"

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        logits = full(outputs.logits)
        return F.binary_cross_entropy_with_logits(logits, targets.probs(logits.shape[1]))
