"""The error of a run whose numbers are no longer finite."""

from pathlib import Path

from fastofa.runs import checkpoint
from fastofa.system.errors import BadInput
from fastofa.training.step import Step


def diverged(run: Path, step: Step, what: str) -> BadInput:
    """The error to raise once all checkpoints are written; `what` is "the loss is" or the like."""
    steps, saved = step.steps, checkpoint.checkpoints(run)
    retry = f"; or retry from {saved[0]} with --resume" if saved else ""
    return BadInput(
        f"{what} no longer finite between steps {steps - step.summed} and {steps}; start again with a lower --lr or "
        f"--clip and another --out{retry}"
    )
