"""Images per second of RandAugment from a table and of timm's on Pillow images, with the same crops and operations.

OMP_NUM_THREADS=1 python -m bench.augment            writes bench/results/augment.json

timm starts from Pillow images and ends with arrays, as its loader does; drawing the operations is not timed.
"""

import statistics
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm

from bench.lib import command_line
from bench.lib.record import write_record
from bench.lib.timing import interleaved_ms, median_ratio
from fastofa.data.dataset import from_array
from fastofa.pipelines import open_pipeline
from fastofa.pipelines.augment import augment
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy
from fastofa.views.rand_augment import OPS
from fastofa.views.table import Views

BATCH, SIZE, ROUNDS = 256, 224, 9
TEXT = "rand-m9-mstd0.5-inc1"
WHOLE = ("posterize", "solarize", "solarize_add")
CPU = torch.device("cpu")


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


def main() -> None:
    args = command_line.parser(__doc__).parse_args()
    photos = np.stack([p[:427, :427] for p in load_sample_images().images])[np.arange(BATCH) % 2]
    names = [f"{i:03d}" for i in range(BATCH)]
    dataset = from_array("photographs", "train", ("photo",), names, np.zeros(BATCH, dtype=np.int64), photos)
    policies = {
        "randaugment": ViewPolicy(auto_augment=TEXT),
        "all": ViewPolicy(auto_augment=TEXT, mixup=0.8, cutmix=1.0, erase=0.25),
    }
    tables = {name: draw_views(policy, dataset.sizes, 0, 0) for name, policy in policies.items()}
    crops = Views(tables["all"].crop, tables["all"].flip)
    rows = np.arange(BATCH)
    (batch,) = open_pipeline("resident", dataset, SIZE, BATCH).epoch(crops, rows)
    images = [Image.fromarray(image.numpy()) for image in batch.images.permute(0, 2, 3, 1).contiguous()]

    first = augment(batch.images.clone(), tables["randaugment"], rows, BATCH).permute(0, 2, 3, 1).int()
    difference = (first - torch.from_numpy(np.stack(by_timm(images, tables["randaugment"]))).int()).abs()
    steps = {
        "timm_randaugment": lambda: by_timm(images, tables["randaugment"]),
        **{
            name: lambda table=table: augment(batch.images.clone(), table, rows, BATCH)
            for name, table in tables.items()
        },
    }
    times = interleaved_ms(steps, CPU, ROUNDS, calls=1, warmup=1)
    result: dict[str, Any] = {
        "policy": TEXT,
        "batch": BATCH,
        "size": SIZE,
        "rounds": ROUNDS,
        "images_per_second": {name: BATCH / statistics.median(t) * 1e3 for name, t in times.items()},
        "randaugment_over_timm": median_ratio(times, "randaugment", "timm_randaugment"),
        "pixels_that_differ": (difference > 0).float().mean().item(),
        "largest_difference": difference.max().item(),
    }
    write_record("augment", result, args.out)


if __name__ == "__main__":
    main()
