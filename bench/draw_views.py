"""Time to draw the views of one ImageNet epoch (1.28 million rows), all at once and, by torchvision, row by row.

OMP_NUM_THREADS=1 python -m bench.draw_views            writes bench/results/draw_views.json
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop

from bench.lib import command_line
from bench.lib.record import write_record
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy

ROWS = 1_281_167
SAMPLE = 20_000  # rows of the baseline, which is too slow for all
ROUNDS = 5


def main() -> None:
    args = command_line.parser(__doc__).parse_args()
    rng = np.random.default_rng(0)
    sizes = rng.integers(200, 600, (ROWS, 2))
    policy = ViewPolicy()
    image = torch.empty(1, 1, 1)
    ours, theirs = [], []
    for number in range(ROUNDS):
        began = time.perf_counter()
        draw_views(policy, sizes, 0, number)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        for height, width in sizes[:SAMPLE]:
            shaped = image.expand(1, int(height), int(width))
            RandomResizedCrop.get_params(shaped, list(policy.scale), list(policy.ratio))
        theirs.append((time.perf_counter() - began) * ROWS / SAMPLE)
    result: dict[str, Any] = {
        "rows": ROWS,
        "rounds": ROUNDS,
        "draw_views_s": statistics.median(ours),
        "torchvision_get_params_s": statistics.median(theirs),
        "torchvision_measured_rows": SAMPLE,
        "ratio": statistics.median(theirs) / statistics.median(ours),
    }
    write_record("draw_views", result, args.out)


if __name__ == "__main__":
    main()
