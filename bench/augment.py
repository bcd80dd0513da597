"""Images per second of RandAugment from a table and of timm's on Pillow images, with the same crops and operations.

OMP_NUM_THREADS=1 python -m bench.augment            writes bench/results/augment.json, on a GPU augment_gpu.json

timm starts from Pillow images and ends with arrays, as its loader does; drawing the operations is not timed. On a GPU
the Triton kernels and their twin are timed, launches included, and a profiler counts the launches of each. The twin's
operators are counted on any machine, by running it on tensors without data.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lib import command_line
from bench.lib.record import write_record
from bench.lib.timing import interleaved_ms, median_ratio, wait
from bench.lib.turns import wait_for_turn
from fastofa.data.dataset import from_array
from fastofa.pipelines import open_pipeline
from fastofa.pipelines.augment import augment
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy
from fastofa.views.rand_augment import OPS
from fastofa.views.table import Views

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 224
TEXT = "rand-m9-mstd0.5-inc1"
WHOLE = ("posterize", "solarize", "solarize_add")


def by_timm(images: list[Image.Image], views: Views) -> list[np.ndarray]:
    assert views.ops is not None
    assert views.amounts is not None
    out = []
    options = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BILINEAR}
    for image, ops, amounts in zip(images, views.ops.tolist(), views.amounts.tolist(), strict=True):
        for op, amount in zip(ops, amounts, strict=True):
            if op:
                name = timm._RAND_TRANSFORMS[op - 1]
                arguments = () if timm.LEVEL_TO_ARG[name] is None else (int(amount) if OPS[op] in WHOLE else amount,)
                image = timm.NAME_TO_OP[name](image, *arguments, **options)
        out.append(np.array(image))
    return out


class _Operators(TorchDispatchMode):
    """Counts the operators that compute or copy a tensor on the device `meta`."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        on_device = isinstance(first, Tensor) and first.device.type == "meta"
        self.count += on_device and not operator.is_view and "empty" not in operator.name()
        return result


def operators(images: Tensor, views: Views) -> int:
    """The number of operators that the twin queues on a device for a batch, uploads included."""
    nothing = torch.empty(len(images), *images.shape[2:], 3, dtype=torch.uint8, device="meta").permute(0, 3, 1, 2)
    with _Operators() as counted:
        augment(nothing, views, np.arange(len(images)), len(images), impl="torch")
    return counted.count


def launches(call: Callable[[], object]) -> int:
    """The number of kernels and copies on the GPU."""
    call()  # compiles kernels and copies constants
    wait(DEVICE)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        wait(DEVICE)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=1024 if DEVICE.type == "cuda" else 256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    count = args.batch_size
    photos = np.stack([p[:427, :427] for p in load_sample_images().images])[np.arange(count) % 2]
    names = [f"{i:03d}" for i in range(count)]
    dataset = from_array("photographs", "train", ("photo",), names, np.zeros(count, dtype=np.int64), photos)
    policies = {
        "randaugment": ViewPolicy(auto_augment=TEXT),
        "all": ViewPolicy(auto_augment=TEXT, mixup=0.8, cutmix=1.0, erase=0.25),
    }
    tables = {name: draw_views(policy, dataset.sizes, 0, 0) for name, policy in policies.items()}
    crops = Views(tables["all"].crop, tables["all"].flip)
    rows = np.arange(count)
    (batch,) = open_pipeline("resident", dataset, SIZE, count).epoch(crops, rows)
    images = [Image.fromarray(image.numpy()) for image in batch.images.permute(0, 2, 3, 1).contiguous()]

    candidates = {
        f"{name}{suffix}": partial(augment, batch.images.to(DEVICE, copy=True), table, rows, count, impl)
        for name, table in tables.items()
        for suffix, impl in (("", "torch"), ("_triton", "triton"))
        if impl == "torch" or DEVICE.type == "cuda"
    }
    firsts = {name: candidate().cpu().clone() for name, candidate in candidates.items()}
    first = firsts["randaugment"].permute(0, 2, 3, 1).int()
    difference = (first - torch.from_numpy(np.stack(by_timm(images, tables["randaugment"]))).int()).abs()
    steps = {
        "timm_randaugment": lambda: by_timm(images, tables["randaugment"]),
        **candidates,
    }
    wait_for_turn()
    times = interleaved_ms(steps, DEVICE, args.rounds, calls=1, warmup=1)
    result: dict[str, Any] = {
        "policy": TEXT,
        "batch": count,
        "size": SIZE,
        "rounds": args.rounds,
        "images_per_second": {name: count / statistics.median(t) * 1e3 for name, t in times.items()},
        "randaugment_over_timm": median_ratio(times, "randaugment", "timm_randaugment"),
        "pixels_that_differ": (difference > 0).float().mean().item(),
        "largest_difference": difference.max().item(),
        "twin_operators": {name: operators(batch.images, table) for name, table in tables.items()},
    }
    if DEVICE.type == "cuda":
        result["milliseconds"] = {name: statistics.median(t) for name, t in times.items()}
        result["launches"] = {name: launches(candidate) for name, candidate in candidates.items()}
        result["same_bits"] = {name: torch.equal(firsts[name], firsts[f"{name}_triton"]) for name in tables}
    write_record("augment_gpu" if DEVICE.type == "cuda" else "augment", result, args.out)


if __name__ == "__main__":
    main()
