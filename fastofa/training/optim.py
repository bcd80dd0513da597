"""Optimisers, fused where possible, with parameter groups that exempt biases and norms from weight decay."""

import importlib
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from fastofa.runs.config import TrainConfig
from fastofa.system.errors import BadInput

APEX = {"apex_sgd": "fusedsgd", "apex_adam": "fusedadamw", "apex_lamb": "fusedlamb"}  # timm's names for them


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, AdamW or LAMB over the model's parameters.

    Biases, norms and, unless `config.decay_embeddings`, parameters named by `model.no_weight_decay()` (position
    embeddings, class tokens) have no weight decay.

    Raises:
        BadInput: an apex_* optimiser without a GPU or without NVIDIA's apex.
    """
    name: str = config.optimizer
    arguments: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": 0.9}
    check_optimizer(name, next(model.parameters()).device)
    if name in APEX:
        name = APEX[name]
    elif name != "lamb":  # torch has no fused LAMB; timm's updates all tensors together on a GPU
        arguments["fused"] = True
    if config.decay_embeddings:
        return create_optimizer_v2(param_groups_weight_decay(model, config.weight_decay), opt=name, **arguments)
    return create_optimizer_v2(model, opt=name, **arguments)


def check_optimizer(name: str, device: torch.device) -> None:
    """Raises BadInput for an apex_* optimiser without a GPU or without NVIDIA's apex."""
    if name not in APEX:
        return
    remedy = "use sgd, adamw or lamb, which need neither, or see `fastofa doctor`"
    if device.type != "cuda":
        raise BadInput(f"optimizer apex_*: expected a GPU, but the student is on {device}; {remedy}")
    try:
        importlib.import_module("amp_C")
        importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise BadInput(
            f"optimizer apex_*: expected NVIDIA's apex built with --cuda_ext ({error}); the `apex` on PyPI is another "
            f"package; {remedy}"
        ) from None


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate, times `lr_scale` in parameter groups that have one (timm's layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
