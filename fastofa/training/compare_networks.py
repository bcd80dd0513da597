"""Compare the layers of two networks by CKA, on the same images, in one pass.

    comparison = compare_networks("teacher", "run", "digits")
    comparison.cka[0, -1]           the first block of `teacher` and the logits of `run`

The layers of a network are its blocks, then the exits of a run's student, then the logits. A layer's Gram matrix is
computed as soon as the layer has run, so that only one layer's features are held at a time.

Shapes: B images in a batch, S image side, C classes, H heads, L layers of network a, M layers of network b.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastofa.data.dataset import Dataset
from fastofa.data.headers import DEFAULT, Limits
from fastofa.data.open import open_dataset
from fastofa.models.blocks import feature_info, find_blocks, watching
from fastofa.models.cka import CKA, LEAST, gram
from fastofa.models.normalized import Normalized
from fastofa.models.timm_models import (
    check_channels,
    find_folder,
    first_line,
    input_size,
    normalization,
    published_model,
)
from fastofa.pipelines import open_pipeline
from fastofa.runs.run import is_run, open_run
from fastofa.student.stages import probe_stages
from fastofa.system.device import choose_bf16, choose_device, choose_workers
from fastofa.system.environment import environment
from fastofa.system.errors import BadInput
from fastofa.system.progress import track
from fastofa.training.predict_files import open_classifier
from fastofa.views.order import epoch_order
from fastofa.views.table import center_views

LOGITS = "logits"


@dataclass(frozen=True)
class Layer:
    name: str
    """The block's name in timm's model, "exit 1" to "exit 4", or "logits"."""
    part: str
    """The part of the network: "stage 1" to "stage 4", or "blocks" if timm does not know the model's stages; for exits
    and logits, the name."""


@dataclass(frozen=True)
class Network:
    """A network whose layers can be compared, as `open_network` returns it."""

    name: str
    blocks: dict[str, nn.Module]
    heads: tuple[str, ...]
    """Names of the H heads: exits and logits."""
    forward: Callable[[Tensor], Tensor]
    """uint8 [B, 3, S, S] -> logits of all heads, [H, B, C]."""
    layers: tuple[Layer, ...]
    """The layers in the order in which they run."""
    image_size: int
    """S, in pixels."""
    crop: float
    """Side of the central square, as a fraction of the image's shorter side."""
    bf16: bool
    """Whether the network computes in bf16 (autocast). The Gram matrices are fp32 either way."""

    @torch.inference_mode()
    def grams(self, images: Tensor) -> dict[str, Tensor]:
        """The Gram matrix of every layer that runs, fp32 [B, B], for images uint8 [B, 3, S, S] on its device.

        Raises:
            BadInput: a block does not return a tensor with a row for each image.
        """
        grams: dict[str, Tensor] = {}

        def visit(name: str, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output  # some also return a size
            if not isinstance(first, Tensor) or first.ndim < 2 or len(first) != len(images):
                got = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
                raise BadInput(
                    f"{self.name}: expected a tensor with a row per image from block {name}, got {got} for "
                    f"{len(images)} images; choose another model"
                )
            with torch.autocast(images.device.type, enabled=False):
                grams[name] = gram(first)

        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16), watching(self.blocks, visit):
            logits = self.forward(images)
        return grams | {name: gram(rows) for name, rows in zip(self.heads, logits, strict=True)}

    def finite_grams(self, images: Tensor) -> Tensor:
        """The Gram matrices of all layers, fp32 [L, B, B]. Raises BadInput unless all features are finite."""
        grams = self.grams(images)
        stacked = torch.stack([grams[layer.name] for layer in self.layers])
        infinite = (~stacked.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if infinite:
            remedy = "try --precision fp32, or choose another model" if self.bf16 else "choose another model"
            raise BadInput(
                f"{self.name}: expected finite features, got NaN or infinity from {self.layers[infinite[0]].name}; its "
                f"weights are damaged or its activations overflow: {remedy}"
            )
        return stacked

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "image_size": self.image_size,
            "crop": self.crop,
            "precision": "bf16" if self.bf16 else "fp32",
            "layers": [vars(layer) for layer in self.layers],
        }


@dataclass(frozen=True)
class Comparison:
    a: Network
    b: Network
    data: str
    images: int
    batch_size: int
    seconds: float
    """Time of the pass over the images, without opening networks and data."""
    cka: np.ndarray
    """float64 [L, M]; NaN where the features of a layer do not depend on the image."""

    @property
    def undefined(self) -> list[str]:
        """Descriptions of the layers whose features do not depend on the image."""
        rows = zip(self.a.layers, np.isnan(self.cka).all(axis=1), strict=True)
        columns = zip(self.b.layers, np.isnan(self.cka).all(axis=0), strict=True)
        found = ((self.a, rows), (self.b, columns))
        return [f"{network.name}: {layer.name}" for network, marks in found for layer, mark in marks if mark]

    def by_parts(self) -> tuple[list[str], list[str], np.ndarray]:
        """The parts of both networks, and the mean CKA of the layers of each pair of parts; NaN if all are
        undefined."""
        parts_a, parts_b = _parts(self.a), _parts(self.b)
        means = np.full((len(parts_a), len(parts_b)), np.nan)
        for i, rows in enumerate(parts_a.values()):
            for j, columns in enumerate(parts_b.values()):
                cells = self.cka[np.ix_(rows, columns)]
                if not np.isnan(cells).all():
                    means[i, j] = np.nanmean(cells)
        return list(parts_a), list(parts_b), means

    def to_json(self) -> dict[str, Any]:
        parts_a, parts_b, means = self.by_parts()
        return {
            "a": self.a.describe(),
            "b": self.b.describe(),
            "data": self.data,
            "images": self.images,
            "batch_size": self.batch_size,
            "seconds": round(self.seconds, 3),
            "cka": _without_nan(self.cka),
            "parts": {"a": parts_a, "b": parts_b, "mean_cka": _without_nan(means)},
            "environment": environment(),
        }


def _parts(network: Network) -> dict[str, list[int]]:
    """The indices of the layers of each part."""
    numbered = groupby(enumerate(network.layers), key=lambda pair: pair[1].part)
    return {part: [index for index, _ in members] for part, members in numbered}


def _without_nan(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(value, 6) for value in row] for row in matrix.tolist()]


def open_network(name: str, exits: bool = True, device: torch.device | None = None, precision: str = "auto") -> Network:
    """Open a network and run it on two black images.

    Args:
        name: a timm model; a folder with config.json and weights, as `fastofa export` or timm write it, also as
            local-dir:FOLDER; hf-hub:OWNER/NAME; or a run's folder.
        exits: include the exits of a run's student.
        device: where it computes; None for the CPU.
        precision: auto, bf16 or fp32.

    Raises:
        BadInput: there is no such model, its weights do not fit, or it has no blocks that can be compared.
    """
    device = device or torch.device("cpu")
    folder = find_folder(name)
    heads: tuple[str, ...] = (LOGITS,)
    if folder is not None and exits and is_run(folder):
        run = open_run(folder)
        module: Any = run.trained_student()
        model, side, crop = module.backbone, run.config.eval_size or module.image_size, run.config.eval_crop
        heads = (*(f"exit {stage.number}" for stage in module.stages), LOGITS)
        forward = module
    else:
        if folder is not None:
            classifier = open_classifier(name, device="cpu")
            module, side, crop = classifier.model, classifier.image_size, classifier.crop
        else:
            module, side, crop = _of_timm(name)
        model, forward = module.model, lambda images: module(images)[None]
    blocks = find_blocks(model, name)
    parts = _parts_of(model, blocks, side)
    module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    network = Network(name, blocks, heads, forward, (), side, crop, choose_bf16(precision, device))
    try:
        names = list(network.grams(torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device)))
    except BadInput:
        raise
    except Exception as error:  # a model from an unusual config.json can fail in many ways
        raise BadInput(f"{name}: does not run at {side} px ({first_line(error)}); choose another model") from None
    layers = tuple(Layer(layer, parts.get(layer, layer)) for layer in names)
    return Network(name, blocks, heads, forward, layers, side, crop, network.bf16)


def _limits(name: str | Path) -> Limits:
    """The limits within which images are accepted: those of a run's training."""
    folder = find_folder(str(name))
    return open_run(folder).config.limits() if folder is not None and is_run(folder) else DEFAULT


def _of_timm(name: str) -> tuple[Normalized, int, float]:
    """timm's model with its published weights, its input size and crop."""
    model = published_model(name)
    check_channels(model, name)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization(model))
    crop = min(float(model.pretrained_cfg.get("crop_pct") or 0.875), 1.0)  # VOLO's 1.15 would exceed the image
    return Normalized(model, mean, std), input_size(model), crop


def _parts_of(model: Any, blocks: Iterable[str], side: int) -> dict[str, str]:
    """The part that each block belongs to: the first stage that does not end before it in the model's definition, or
    "blocks" if the stages are unknown."""
    try:
        stages = probe_stages(model, side)[2] if hasattr(model, "forward_intermediates") else {}
    except BadInput:
        stages = {}
    modules = [entry["module"] for entry in feature_info(model)]
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ends: dict[int, int] = {}
    for number, stage in sorted(stages.items()):
        inside = [place for name, place in places.items() if f"{name}.".startswith(f"{modules[stage.index]}.")]
        if inside:
            ends[number] = max(inside) if stage.index >= 0 else len(places)
    if not ends:
        return dict.fromkeys(blocks, "blocks")
    return {block: f"stage {next((n for n in ends if places[block] <= ends[n]), max(ends))}" for block in blocks}


def compare_networks(
    a: str | Path,
    b: str | Path,
    data: str,
    images: int = 10_000,
    batch_size: int = 128,
    exits: bool = True,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
) -> Comparison:
    """CKA of every layer of network `a` with every layer of network `b`.

    Both see central crops of the same validation images, drawn at random with a fixed seed. Each network has its own
    normalisation, input size and crop.

    Args:
        a, b, exits: see `open_network`.
        data: dataset whose validation images are used.
        images: largest number of images.
        batch_size: images per batch; a last batch of fewer than 4 is left out.
        device: auto, cuda, cuda:1, cpu.
        precision: of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16 or fp32.
        workers: see the flags of `fastofa cka`.

    Raises:
        BadInput: a model or the dataset cannot be opened, there are fewer than 4 images, or features are not finite.
    """
    for name, value, least in (("images", images, LEAST), ("batch-size", batch_size, LEAST)):
        if value < least:
            raise BadInput(f"{name}: expected at least {least}, got {value}")
    on = choose_device(device)
    dataset = open_dataset(data, "val", limits=reduce(Limits.union, map(_limits, (a, b))))
    if len(dataset) < LEAST:
        raise BadInput(f"data {data}: expected at least {LEAST} validation images, got {len(dataset)}; add images")
    networks = [open_network(str(name), exits, on, precision) for name in (a, b)]
    order = epoch_order(len(dataset), seed=0, epoch=0)[:images]
    order = order[: len(order) - len(order) % batch_size] if len(order) % batch_size in range(1, LEAST) else order
    sums, began = CKA(), time.monotonic()
    batches = _batches(dataset, networks, order, batch_size, on, choose_workers(workers))
    with closing(batches):
        for pixels in track(batches, len(order), "cka", lambda pixels: len(pixels[0])):
            sums.update(*(network.finite_grams(part) for network, part in zip(networks, pixels, strict=True)))
    cka = sums.matrix().numpy()
    return Comparison(networks[0], networks[1], data, len(order), batch_size, time.monotonic() - began, cka)


def _batches(
    dataset: Dataset,
    networks: Sequence[Network],
    order: np.ndarray,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> Generator[list[Tensor], None, None]:
    """Yield each batch of images as every network sees it, uint8 [B, 3, S, S]; equal crops are read once."""
    crops = dict.fromkeys((network.image_size, network.crop) for network in networks)
    streams = [
        open_pipeline("auto", dataset, size, batch_size, device, workers).epoch(
            center_views(dataset.sizes, crop), order
        )
        for size, crop in crops
    ]
    try:
        for batches in zip(*streams, strict=True):
            by_crop = dict(zip(crops, (batch.images for batch in batches), strict=True))
            yield [by_crop[network.image_size, network.crop] for network in networks]
    finally:
        for stream in streams:
            stream.close()
