"""What changes in the course of a training: pure functions of step or epoch, so that a resumed run needs no state."""

import math

from fastofa.runs.config import TrainConfig
from fastofa.system.errors import counted

SIZE_STEP = 32  # pixels


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, as timm's schedulers give it when they are updated every step.

    cosine and step count from the first step on; linear falls from the end of the warm-up to min_lr at the end.
    """
    warmup, last = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + step * (config.lr - config.warmup_lr) / warmup
    if config.schedule == "step":
        return config.lr * config.decay_rate ** (step // (config.decay_epochs * steps_per_epoch))
    if config.schedule == "linear":
        return config.lr + (config.min_lr - config.lr) * min((step - warmup) / max(last - warmup, 1), 1)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(step / last, 1)))


def cautions(config: TrainConfig, steps_per_epoch: int) -> list[str]:
    """What in the configuration comes too late for a run of this length, with what to do, in a line each."""
    c, found = config, []
    steps, epochs = c.epochs * steps_per_epoch, counted(c.epochs, "epoch")
    if c.warmup_epochs >= c.epochs:
        found.append(
            f"warmup-epochs {c.warmup_epochs:g}: the run has {epochs}, so the learning rate never reaches "
            f"--lr {c.lr:g}; --warmup-epochs {c.epochs / 20:g} would suit it"
        )
    if c.schedule == "step" and c.decay_epochs >= c.epochs:
        found.append(
            f"decay-epochs {c.decay_epochs:g}: the run has {epochs}, so the learning rate never falls; "
            f"--decay-epochs {c.epochs * 0.3:g} would suit it"
        )
    if c.ema is not None and steps < 2 / (1 - c.ema):
        shorter = max(1 - 10 / steps, 0.5)
        found.append(
            f"ema {c.ema:g}: the average is over {1 / (1 - c.ema):,.0f} steps, the run has {steps:,}, so it holds much "
            f"of the initial weights to the end; --ema {shorter:.3g} would suit it (weights and average are both "
            "evaluated)"
        )
    return found


def lengthened(before: TrainConfig, config: TrainConfig, step: int, steps_per_epoch: int, full: int) -> str:
    """What more epochs change in a run that resumes at `step`, in one line; see `image_size` for `full`."""
    old, new = (learning_rate(c, step, steps_per_epoch) for c in (before, config))
    what = f"epochs {before.epochs:,} -> {config.epochs:,}: "
    if config.schedule == "step":
        what += f"the learning rate stays as it was, {new:.3g} at step {step:,}"
    else:
        what += (
            f"from step {step:,} on the learning rate follows the {config.schedule} curve of the new length; at this "
            f"step {new:.3g}, before {old:.3g}"
        )
    if config.start_size is not None:
        small, large = (image_size(c, step // steps_per_epoch, full) for c in (config, before))
        what += f"; the images grow over the new length, at this step {small} px, before {large} px"
    return what


def image_size(config: TrainConfig, epoch: int, full: int) -> int:
    """Side of an epoch's pictures: from start_size to `full` in steps of 32 pixels, linearly over config.growth."""
    if config.start_size is None:
        return full
    first, last = (share * config.epochs for share in config.growth)
    if epoch >= last:
        return full
    if epoch <= first:
        return config.start_size
    grown = config.start_size + (full - config.start_size) * (epoch - first) / (last - first)
    return min(max(round(grown / SIZE_STEP) * SIZE_STEP, config.start_size), full)


def summary(config: TrainConfig, steps: int) -> str:
    """What is known without measuring, in one line; `steps` of an epoch."""
    parts = ((config.epochs, "epoch"), (steps, "step"), (config.batch_size, "image"))
    return (
        f"{' of '.join(counted(number, noun) for number, noun in parts)}, "
        f"{config.epochs * steps * config.batch_size:,} in all; --plan says beforehand how long that takes"
    )
