"""Schedules of learning rate and image size, as pure functions of step or epoch, so that resuming needs no state."""

import math

from fastofa.runs.config import TrainConfig
from fastofa.system.errors import counted

SIZE_STEP = 32  # pixels


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, equal to that of timm's schedulers, updated at every step or at every epoch.

    With `lr_updates` epoch, all steps of an epoch have the rate of its first one, as in the published code. In a
    warm-up of E epochs from about 0, the mean rate is then (E - 1) / E of that with updates at every step.
    `cosine` and `step` count from the first step of the run; `linear` falls from `lr` at the end of the warm-up to
    `min_lr` at the end of the run.
    """
    if config.lr_updates == "epoch":
        step -= step % steps_per_epoch
    warmup, last = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + step * (config.lr - config.warmup_lr) / warmup
    if config.schedule == "step":
        return config.lr * config.decay_rate ** (step // (config.decay_epochs * steps_per_epoch))
    if config.schedule == "linear":
        return config.lr + (config.min_lr - config.lr) * min((step - warmup) / max(last - warmup, 1), 1)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(step / last, 1)))


def cautions(config: TrainConfig, steps_per_epoch: int) -> list[str]:
    """A line, with a remedy, for each setting that does not suit a run of this length."""
    c, lines = config, []
    steps, epochs = c.epochs * steps_per_epoch, counted(c.epochs, "epoch")
    if c.warmup_epochs >= c.epochs:
        lines.append(
            f"warmup-epochs {c.warmup_epochs:g}: the run has {epochs}, so the learning rate never reaches "
            f"--lr {c.lr:g}; try --warmup-epochs {c.epochs / 20:g}"
        )
    if c.schedule == "step" and c.decay_epochs >= c.epochs:
        lines.append(
            f"decay-epochs {c.decay_epochs:g}: the run has {epochs}, so the learning rate never falls; "
            f"try --decay-epochs {c.epochs * 0.3:g}"
        )
    if c.ema is not None and steps < 2 / (1 - c.ema):
        shorter = max(1 - 10 / steps, 0.5)
        lines.append(
            f"ema {c.ema:g}: the average is over {1 / (1 - c.ema):,.0f} steps, but the run has {steps:,}, so the "
            f"initial weights keep a large share; try --ema {shorter:.3g} (weights and average are both evaluated)"
        )
    return lines


def lengthened(before: TrainConfig, config: TrainConfig, step: int, steps_per_epoch: int, full: int) -> str:
    """One line on how additional epochs change a run that is resumed at `step`.

    Args:
        before: the run's configuration so far.
        config: the same with more epochs.
        full: image size of the last epochs, in pixels.
    """
    old, new = (learning_rate(c, step, steps_per_epoch) for c in (before, config))
    line = f"epochs {before.epochs:,} -> {config.epochs:,}: "
    if config.schedule == "step":
        line += f"the learning rate does not change, {new:.3g} at step {step:,}"
    else:
        line += (
            f"from step {step:,} on the learning rate follows the {config.schedule} curve of the new length; at this "
            f"step it is {new:.3g} instead of {old:.3g}"
        )
    if config.start_size is not None:
        small, large = (image_size(c, step // steps_per_epoch, full) for c in (config, before))
        line += f"; the images grow over the new length: at this step {small} px instead of {large} px"
    return line


def image_size(config: TrainConfig, epoch: int, full: int) -> int:
    """Side of an epoch's images in pixels: it grows linearly from `start_size` to `full` during `growth`, in steps of
    32."""
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
    """One line with the length of the run: epochs, `steps` per epoch, images."""
    parts = ((config.epochs, "epoch"), (steps, "step"), (config.batch_size, "image"))
    return (
        f"{' of '.join(counted(number, noun) for number, noun in parts)}, "
        f"{config.epochs * steps * config.batch_size:,} in all; --plan estimates how long a run takes"
    )
