"""The optimiser (timm's factory and weight-decay exemptions), and the learning rate as a pure function of the step."""

import math

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from fastofa.config import TrainConfig


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, AdamW or LAMB over the model's parameters.

    Biases, norms and what `model.no_weight_decay()` names (position embeddings, class tokens) are not decayed.
    """
    return create_optimizer_v2(
        model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, momentum=0.9
    )


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, as timm's cosine and step schedulers give it when they are updated every step."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + step * (config.lr - config.warmup_lr) / warmup
    if config.schedule == "step":
        return config.lr * config.decay_rate ** (step // (config.decay_epochs * steps_per_epoch))
    progress = step / (config.epochs * steps_per_epoch)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Parameter groups with an `lr_scale` of their own (timm's layer decay) keep it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
