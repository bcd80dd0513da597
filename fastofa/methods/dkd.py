"""Decoupled knowledge distillation (Zhao et al., CVPR 2022): the target class and the others, weighted separately."""

import torch
from torch import Tensor

from fastofa.methods.method import Method, Outputs, log_softmax
from fastofa.methods.options import DKDOptions
from fastofa.methods.targets import Targets

TINY = 1e-8  # smallest probability of all classes but the target; the cache rounds log-probabilities to fp16


class DKD(Method):
    """alpha * TCKD + beta * NCKD (eq. 7), each times T^2; p the teacher's and q the student's probabilities at T.

    TCKD = KL([p_y, 1 - p_y] || [q_y, 1 - q_y]), NCKD = KL(p without y || q without y), both renormalised; means over
    the batch.
    """

    Options = DKDOptions
    needs = "all classes"

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        o = self.options
        log_q, p = log_softmax(outputs.logits, o.temperature), targets.probs(outputs.logits.shape[1], o.temperature)
        is_target = torch.zeros_like(p, dtype=torch.bool).scatter(1, labels[:, None], True)
        log_q_y, p_y = (values.gather(1, labels[:, None]).squeeze(1) for values in (log_q, p))
        log_q_rest = log_q.masked_fill(is_target, -torch.inf).logsumexp(dim=1)  # log(1 - q_y), exact near q_y = 1
        p_rest = p.masked_fill(is_target, 0).sum(dim=1).clamp(min=TINY)
        target_part = torch.xlogy(p_y, p_y) - p_y * log_q_y + torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest
        others = p.masked_fill(is_target, 0) / p_rest[:, None]
        log_q_others = (log_q - log_q_rest[:, None]).masked_fill(is_target, 0)
        other_part = (torch.xlogy(others, others) - others * log_q_others).sum(dim=1)
        return o.temperature**2 * (o.alpha * target_part.mean() + o.beta * other_part.mean())
