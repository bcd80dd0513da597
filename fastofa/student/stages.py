"""The four stages of a timm model, found by running it."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastofa.models.timm_models import first_line
from fastofa.system.errors import BadInput

REDUCTIONS = {4: 1, 8: 2, 16: 3, 32: 4}  # a stage's features are this much smaller than the picture
ALL_STAGES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Stage:
    """Where a stage of the backbone ends."""

    number: int
    index: int
    """Position among the backbone's intermediate features; -1: its final feature map."""
    channels: int
    grid: tuple[int, int]
    """Height and width of its features."""


Feature = Tensor | tuple[Tensor, Tensor]


def run_stages(
    backbone: Any, images: Tensor, indices: list[int] | None, output_format: str
) -> tuple[Tensor, list[Feature]]:
    """The backbone's final features and those of the stages: [B, C, H, W], or tokens [B, L, C] with their prefix."""
    arguments = {"return_prefix_tokens": True} if output_format == "NLC" and has_prefix(backbone) else {}
    return backbone.forward_intermediates(images, indices=indices, output_fmt=output_format, **arguments)


def has_prefix(backbone: Any) -> bool:
    """Can its class and register tokens be had apart from the others?"""
    offers = "return_prefix_tokens" in inspect.signature(backbone.forward_intermediates).parameters
    return offers and backbone.num_prefix_tokens > 0


def as_exit_input(feature: Feature, is_token_model: bool) -> tuple[Tensor, ...]:
    if isinstance(feature, tuple):
        return feature
    return (feature.flatten(2).transpose(1, 2),) if is_token_model and feature.ndim == 4 else (feature,)


@torch.no_grad()
def probe_stages(backbone: Any, image_size: int) -> tuple[bool, str, dict[int, Stage]]:
    """Is it a token model, which format its features come in, and its stages by number.

    Hierarchical models: the last features that are 4, 8, 16 and 32 times smaller than the picture. Isotropic models of
    depth d: blocks 1, 3, d - 3, d - 1 (evenly spread below depth 7). This is the published choice for every model the
    paper used; a CNN whose final convolution widens stage 4 (MobileNetV2: 320 -> 1280) ends its stage there.
    """
    training = backbone.training
    backbone.eval()
    images = torch.zeros(1, 3, image_size, image_size)
    try:
        final, features = backbone.forward_intermediates(images)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise BadInput(
            f"the student cannot take pictures of {image_size} px ({first_line(error)}); try its own size"
        ) from None
    last = final[-1] if isinstance(final, list | tuple) else final
    is_token_model = last.ndim == 3 or getattr(backbone, "output_fmt", None) == "NHWC"
    output_format = "NCHW"
    if is_token_model:
        try:
            tokens = run_stages(backbone, images, None, "NLC")[1][-1]
            count = (tokens[0] if isinstance(tokens, tuple) else tokens).shape[1]
            if count == features[-1][0, 0].numel():  # MViT leaves its class token among them: take its maps
                output_format = "NLC"
        except AssertionError:
            pass  # timm's way to say that the model offers maps only
    backbone.train(training)

    info = backbone.feature_info
    reductions = [entry["reduction"] for entry in (info if isinstance(info, list) else info.info)]
    found: dict[int, Stage] = {}
    for number, index in _stage_indices(reductions).items():
        _, channels, height, width = features[index].shape
        if number == 4 and not is_token_model and last.shape[1] != channels:
            index, (_, channels, height, width) = -1, last.shape
        found[number] = Stage(number, index, channels, (height, width))
    return is_token_model, output_format, found


def _stage_indices(reductions: list[int]) -> dict[int, int]:
    """Stage number -> position among the features."""
    depth = len(reductions)
    if len(set(reductions)) == 1 and depth >= 4:
        ends = [1, 3, depth - 3, depth - 1] if depth >= 7 else [-(-depth * k // 4) - 1 for k in ALL_STAGES]
        return dict(zip(ALL_STAGES, ends, strict=True))
    return {REDUCTIONS[r]: i for i, r in enumerate(reductions) if r in REDUCTIONS}
