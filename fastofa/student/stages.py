"""Find the four stages of a timm model by running it, and compute their features."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastofa.models.timm_models import first_line
from fastofa.system.errors import BadInput

REDUCTIONS = {4: 1, 8: 2, 16: 3, 32: 4}  # image size over the size of features -> number of the stage
ALL_STAGES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Stage:
    """The end of a stage of the backbone."""

    number: int
    index: int
    """Index into the backbone's intermediate features; -1 for its final feature map."""
    channels: int
    grid: tuple[int, int]
    """Height and width of the features."""


Feature = Tensor | tuple[Tensor, Tensor]


def run_stages(
    backbone: Any, images: Tensor, indices: list[int] | None, output_format: str
) -> tuple[Tensor, list[Feature]]:
    """The backbone's final features and those of the stages: [B, C, H, W], or tokens [B, L, C], with prefix tokens if
    there are any."""
    arguments = {"return_prefix_tokens": True} if output_format == "NLC" and has_prefix(backbone) else {}
    return backbone.forward_intermediates(images, indices=indices, output_fmt=output_format, **arguments)


def run_found_stages(
    backbone: Any, images: Tensor, stages: Iterable[Stage], output_format: str
) -> tuple[Tensor, dict[int, Feature]]:
    """The backbone's final features, and those of some of its stages, by number of the stage; see `run_stages`."""
    stages = list(stages)
    indices = sorted({stage.index for stage in stages if stage.index >= 0}) or [0]  # timm needs at least one
    final, features = run_stages(backbone, images, indices, output_format)
    by_index = dict(zip(indices, features, strict=True))
    return final, {stage.number: by_index.get(stage.index, final) for stage in stages}


def as_map(feature: Feature) -> Tensor:
    """The features as a map [B, C, H, W], without prefix tokens. Images are square, and so are the grids of tokens."""
    tokens = feature[0] if isinstance(feature, tuple) else feature
    if tokens.ndim == 4:
        return tokens
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def has_prefix(backbone: Any) -> bool:
    """Whether the backbone can return its class and register tokens separately."""
    offers = "return_prefix_tokens" in inspect.signature(backbone.forward_intermediates).parameters
    return offers and backbone.num_prefix_tokens > 0


def as_exit_input(feature: Feature, is_token_model: bool) -> tuple[Tensor, ...]:
    if isinstance(feature, tuple):
        return feature
    return (feature.flatten(2).transpose(1, 2),) if is_token_model and feature.ndim == 4 else (feature,)


@torch.no_grad()
def probe_stages(backbone: Any, image_size: int) -> tuple[bool, str, dict[int, Stage]]:
    """Find the stages of a backbone.

    The stages of a hierarchical model end at the last features that are 4, 8, 16 and 32 times smaller than the image;
    those of an isotropic model of depth d end at blocks 1, 3, d - 3, d - 1 (evenly spaced below depth 7). This agrees
    with the published choice for every model of the paper. If a CNN's final convolution widens stage 4 (MobileNetV2:
    320 -> 1280), the stage ends after it.

    Returns:
        Whether it is a token model; the format of its features, "NCHW" or "NLC"; and its stages by number.

    Raises:
        BadInput: the backbone does not accept images of this size.
    """
    training = backbone.training
    backbone.eval()
    images = next(backbone.parameters()).new_zeros(1, 3, image_size, image_size)
    try:
        final, features = backbone.forward_intermediates(images)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise BadInput(
            f"the student does not accept images of {image_size} px ({first_line(error)}); try its own size"
        ) from None
    last = final[-1] if isinstance(final, list | tuple) else final
    is_token_model = last.ndim == 3 or getattr(backbone, "output_fmt", None) == "NHWC"
    output_format = "NCHW"
    if is_token_model:
        try:
            tokens = run_stages(backbone, images, None, "NLC")[1][-1]
            count = (tokens[0] if isinstance(tokens, tuple) else tokens).shape[1]
            if count == features[-1][0, 0].numel():  # else use maps: MViT's tokens include its class token
                output_format = "NLC"
        except AssertionError:
            pass  # raised by timm if the model can only return maps
    backbone.train(training)

    info = backbone.feature_info
    reductions = [entry["reduction"] for entry in (info if isinstance(info, list) else info.info)]
    stages: dict[int, Stage] = {}
    for number, index in _stage_indices(reductions).items():
        _, channels, height, width = features[index].shape
        if number == 4 and not is_token_model and last.shape[1] != channels:
            index, (_, channels, height, width) = -1, last.shape
        stages[number] = Stage(number, index, channels, (height, width))
    return is_token_model, output_format, stages


def channels(stages: dict[int, Stage]) -> dict[int, int]:
    """The channels of each stage, by its number."""
    return {number: stage.channels for number, stage in stages.items()}


def _stage_indices(reductions: list[int]) -> dict[int, int]:
    """Stage number -> index into the features, from the reduction of each."""
    depth = len(reductions)
    if len(set(reductions)) == 1 and depth >= 4:
        ends = [1, 3, depth - 3, depth - 1] if depth >= 7 else [-(-depth * k // 4) - 1 for k in ALL_STAGES]
        return dict(zip(ALL_STAGES, ends, strict=True))
    return {REDUCTIONS[r]: i for i, r in enumerate(reductions) if r in REDUCTIONS}
