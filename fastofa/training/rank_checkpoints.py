"""Checkpoints of a run on several ranks: rank 0 writes one for all of them, and each restores its own part."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastofa.runs import checkpoint
from fastofa.training.background_writer import Writer
from fastofa.training.distributed import check_shared, statistics
from fastofa.training.divergence import diverged
from fastofa.training.step import Step


def save(run: Path, step: Step, sums: list[list[float]], scheduled: bool, writer: Writer) -> None:
    """Save a checkpoint, with the logged sums of each rank. All ranks call it together.

    A checkpoint at an interruption stores each rank's own batch statistics, so that the resumed run equals one that was
    not interrupted. A scheduled checkpoint averages them over the ranks.

    Raises:
        BadInput: the weights are no longer finite.
    """
    writer.wait()  # so that the host holds one copy of the state
    world, ema = step.world, None if step.ema is None else step.ema.module
    by_rank: dict[str, Tensor] = {}
    for part, model in (("student", step.student), ("ema", ema)):
        if model is not None and scheduled:
            world.average_statistics(model)
        elif model is not None:
            by_rank |= {f"{part}.{name}": world.gather(own) for name, own in statistics(model).items()}
    if world.sum(torch.tensor(int(not step.is_finite()))):
        raise diverged(run, step, "the weights are")
    if world.is_main:
        position: dict[str, Any] = {"sums": means(sums), "summed": step.summed}
        if any(own != sums[0] for own in sums):
            position["sums_by_rank"] = sums
        keep = step.config.keep
        checkpoint.save_checkpoint(
            run, step.steps, step.student, step.optimizer, ema, position, keep, by_rank, when=writer
        )


def restore(run: Path, step: Step) -> None:
    """Restore this rank's part of the newest checkpoint.

    Raises:
        BadInput: there is no undamaged one that fits, or rank 0 finds a newer one.
    """
    world, ema = step.world, None if step.ema is None else step.ema.module
    step.steps, position = checkpoint.load_newest(run, step.student, step.optimizer, ema, world.rank, world.size)
    newest = world.broadcast(step.steps)
    check_shared(world, step.steps == newest, f"the checkpoint of step {newest} (its newest is of step {step.steps})")
    each = position.get("sums_by_rank", [])
    sums = each[world.rank] if len(each) == world.size else position["sums"]
    step.sums, step.summed = torch.tensor(sums, device=step.device), position["summed"]


def means(by_rank: list[list[float]]) -> list[float]:
    """The mean of each sum over the ranks."""
    return [math.fsum(values) / len(by_rank) for values in zip(*by_rank, strict=True)]
