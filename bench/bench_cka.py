"""Measure `fastofa cka`: its time, the error of an estimate from batches, and the invariances of CKA.

    python -m bench.bench_cka                         writes bench/results/cka_{cpu,gpu}.json

Time: a ResNet and a ViT with 24 blocks each and random weights, on made-up images in the format of CIFAR-100. `fastofa
cka` opens the networks, reads and crops the images, runs both networks, computes every layer's Gram matrix and compares
all pairs of layers. The baseline runs both networks on the same batches, which are already in memory, and nothing else.
Both run in every round. The target is twice the baseline. Processor time is recorded beside wall time, since it depends
less on what else the machine does.

Error: made-up features of two related layers, once in batches and once all together, in float64, for several draws.
Batches use about N B of the N N pairs of images, so the error is in proportion to sqrt((1/B - 1/N) / N).

Invariances: the largest change of the CKA of such features, in batches and in fp32 as in the product, and the
difference of a network's own CKA from 1.

Shapes: B images in a batch, N images in total, S image side.
"""

import itertools
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from bench.lib.timing import wait
from fastofa.data.open import open_dataset
from fastofa.models.cka import CKA, gram
from fastofa.pipelines import open_pipeline
from fastofa.training.compare_networks import Network, compare_networks, open_network
from fastofa.views.table import center_views

CLASSES = 100
TARGET = 2.0
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet34", {"layers": [4, 6, 10, 4]}),
    "vit": ("vit_tiny_patch16_224", {"depth": 24}),
}
FORWARDS, COMPARISON = "both forward passes", "fastofa cka"
IMAGES, BATCHES = (512, 2048), (32, 128, 256)  # N and B of the errors
NOISES = (0.3, 1.0, 3.0)  # of each layer, relative to what both see
DRAWS = 10


# --- Time -------------------------------------------------------------------------------------------------------------


def write_network(name: str, image_size: int, folder: Path) -> str:
    """Write one of NETWORKS with random weights as a folder for `fastofa cka`."""
    timm_name, arguments = NETWORKS[name]
    sized = {**arguments, "img_size": image_size} if name == "vit" else arguments
    torch.manual_seed(0)
    model = timm.create_model(timm_name, num_classes=CLASSES, **sized)
    config = {"input_size": (3, image_size, image_size), "test_crop_pct": 1.0}
    save_for_hf(model, str(folder / name), safe_serialization=True, data_config=config, model_args=sized)
    return str(folder / name)


def write_images(count: int, folder: Path) -> str:
    """Write random validation images in CIFAR-100's format; returns the data to give to `fastofa cka`."""
    names = [f"{i}.png" for i in range(count)]
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
    labels = [i % CLASSES for i in range(count)]
    contents = {
        "meta": {"fine_label_names": [f"class {i}" for i in range(CLASSES)]},
        "test": {"data": pixels, "fine_labels": labels, "filenames": names},
    }
    folder.mkdir()
    for name, value in contents.items():
        (folder / name).write_bytes(pickle.dumps(value, protocol=2))
    return f"cifar100:{folder}"


def forward_passes(networks: list[Network], data: str, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A function that runs the networks on all validation images, uint8 [B, 3, S, S] in memory."""
    dataset = open_dataset(data, "val")
    pipeline = open_pipeline("auto", dataset, networks[0].image_size, batch_size, device)
    views = center_views(dataset.sizes, networks[0].crop)
    batches = [batch.images for batch in pipeline.epoch(views, np.arange(len(dataset)))]

    @torch.inference_mode()
    def run() -> None:
        for images in batches:
            for network in networks:
                with torch.autocast(device.type, torch.bfloat16, enabled=network.bf16):
                    network.forward(images)

    return run


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of wall time, and of processor time of all of this process's threads."""
    wait(device)
    began, busy = time.perf_counter(), time.process_time()
    call()
    wait(device)
    return time.perf_counter() - began, time.process_time() - busy


def measure(images: int, image_size: int, batch_size: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds and processor seconds of both rows, one figure per round, and their median ratios; numbers of layers; the
    largest difference of the CKA of a layer with itself from 1, for each network."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_images(images, folder / "data")
        paths = [write_network(name, image_size, folder) for name in NETWORKS]
        networks = [open_network(path, device=device) for path in paths]
        steps = {
            FORWARDS: forward_passes(networks, data, batch_size, device),
            COMPARISON: lambda: compare_networks(*paths, data, images, batch_size, device=str(device)),
        }
        rounds_s = [{name: timed(step, device) for name, step in steps.items()} for _ in range(rounds)]
        own = {
            name: float(np.abs(compare_networks(path, path, data, 2 * batch_size, batch_size).cka.diagonal() - 1).max())
            for name, path in zip(NETWORKS, paths, strict=True)
        }
    found: dict[str, Any] = {"layers": [len(network.layers) for network in networks], "own_cka_from_1": own}
    for i, clock in enumerate(("seconds", "processor_seconds")):
        each = {name: [times[name][i] for times in rounds_s] for name in steps}
        ratios = [ours / base for ours, base in zip(each[COMPARISON], each[FORWARDS], strict=True)]
        found[clock] = {**each, "ratio": statistics.median(ratios)}
    return found


# --- Error and invariances --------------------------------------------------------------------------------------------


def features(images: int, noise: float, seed: int, width: int = 256) -> tuple[Tensor, Tensor]:
    """Features [N, width] of two layers that see the same 16 things, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    seen = random(images, 16)
    first, second = ((seen @ random(16, width)).relu() + noise * random(images, width) for _ in range(2))
    return first, second


def estimate(x: Tensor, y: Tensor, batch_size: int) -> float:
    sums = CKA()
    for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True):
        sums.update(gram(a)[None], gram(b)[None])
    return sums.matrix().item()


def errors() -> list[dict[str, float]]:
    """A row for each noise, N and B: the error of the estimate against all images at once."""
    rows = []
    for noise, images in itertools.product(NOISES, IMAGES):
        draws = [[values.double() for values in features(images, noise, seed)] for seed in range(DRAWS)]
        exact = [estimate(x, y, images) for x, y in draws]
        for size in BATCHES:
            found = np.array([estimate(x, y, size) - value for (x, y), value in zip(draws, exact, strict=True)])
            rms = float(np.sqrt(np.square(found).mean()))
            rows.append(
                {
                    "noise": noise,
                    "images": images,
                    "batch_size": size,
                    "rms": rms,
                    "largest": float(np.abs(found).max()),
                    "rms_over_law": rms / ((1 / size - 1 / images) / images) ** 0.5,
                }
            )
    return rows


def invariances(images: int = 2048, batch_size: int = 128) -> dict[str, float]:
    """The largest change of the CKA of two layers when one of them is changed, over all noises."""
    worst: dict[str, float] = {}
    for noise in NOISES:
        x, y = features(images, noise, seed=0)
        generator = torch.Generator().manual_seed(1)
        rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator)).Q
        before = estimate(x, y, batch_size)
        changed = {"rotation": x @ rotation, "scale of 1,000": 1000 * x, "offset of 100": x + 100}
        found = {name: abs(estimate(value, y, batch_size) - before) for name, value in changed.items()}
        found["a layer with itself, from 1"] = abs(estimate(x, x, batch_size) - 1)
        found["a layer with its rotation, from 1"] = abs(estimate(x @ rotation, x, batch_size) - 1)
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
    return worst


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = command_line.parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    found = measure(args.images, args.image_size, args.batch_size, args.rounds, device)
    result = {
        **{name: getattr(args, name) for name in ("images", "image_size", "batch_size", "rounds")},
        "networks": {name: {"model": model, **given} for name, (model, given) in NETWORKS.items()},
        "baseline": FORWARDS,
        "target": TARGET,
        **found,
        "errors": errors(),
        "invariances": invariances(),
    }
    write_record(f"cka_{'gpu' if device.type == 'cuda' else 'cpu'}", result, args.out)
    for clock in ("seconds", "processor_seconds"):
        medians = ", ".join(f"{name} {statistics.median(found[clock][name]):.1f}" for name in (COMPARISON, FORWARDS))
        print(f"{clock.replace('_', ' ')}: {medians}, median ratio {found[clock]['ratio']:.2f}")
    print(markdown_table(list(result["errors"][0]), [[f"{v:.3g}" for v in row.values()] for row in result["errors"]]))
    changes = {
        **result["invariances"],
        **{f"{name} with itself, from 1": v for name, v in found["own_cka_from_1"].items()},
    }
    print(markdown_table(["invariance", "change"], [[name, f"{value:.1e}"] for name, value in changes.items()]))


if __name__ == "__main__":
    main()
