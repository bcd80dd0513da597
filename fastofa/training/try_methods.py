"""Run the loss of every method in a user's file once before a run, so that its errors are reported before anything is
written."""

import copy
from collections.abc import Iterable
from contextlib import closing
from typing import cast

import torch

from fastofa.kernels.reference import heavier
from fastofa.methods.method import Method
from fastofa.methods.options import is_own
from fastofa.methods.own_errors import explained
from fastofa.pipelines import Pipeline
from fastofa.system.errors import BadInput
from fastofa.training.epochs import Epoch
from fastofa.training.step import Step


def try_methods(step: Step, pipeline: Pipeline, epoch: Epoch) -> None:
    """Compute the losses of the first batch and their gradients, and trace them if steps are compiled.

    The losses are those of copies, so that memories and other buffers stay as they are.

    Raises:
        BadInput: a loss raises an error, is no scalar or does not depend on the student, or torch cannot compile it.
    """
    pairs = zip(step.config.methods, cast(Iterable[Method], step.student.methods), strict=True)
    methods = [(name, copy.deepcopy(method)) for name, method in pairs if is_own(name)]
    if not methods or epoch.targets is None:
        return
    with closing(pipeline.epoch(epoch.views, epoch.order)) as batches:
        batch = next(batches)
    step.student.eval()  # the batch norms' statistics do not change
    with torch.no_grad():
        outputs = step.outputs(batch.images)
    given = [outputs.heads, outputs.pooled, *(outputs.stages or {}).values()]
    leaves = [each.requires_grad_() for each in given if each is not None]
    targets = epoch.targets.of(batch)
    labels = batch.labels
    if batch.partner_labels is not None and batch.mix is not None:
        labels = heavier(labels, batch.partner_labels, batch.mix)
    for name, method in methods:
        with explained([name]):
            loss = method.losses(outputs, targets, labels).sum()
            if not loss.requires_grad:
                raise BadInput(
                    f"method {name}: expected a loss that depends on the student's outputs, got one without a gradient"
                )
            torch.autograd.grad(loss, leaves, allow_unused=True)
            if step.compiled:
                traced = torch.compile(method.losses, fullgraph=True, dynamic=False, backend="eager")
                traced(outputs, targets, labels)
