"""Synthetic photographs with the statistics of real ones (1/f noise), in memory or as JPEGs."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import write_jpeg

from fastofa.data.dataset import Dataset, from_array

SIDE, QUALITY = 256, 90
# (height, width) of twenty images: most of ImageNet's have a longer side of 500 pixels, some are larger.
SIZES = [(375, 500)] * 10 + [(333, 500)] * 4 + [(500, 375)] * 3 + [(500, 333)] * 2 + [(600, 800)]
GROWTH = 1.1  # ratio of the amplitudes of each scale and the next finer one; it yields JPEGs of 109 kB
CLASSES = 10


def photographs(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [count, 3, height, width]: noise of every scale, stronger at coarser ones; JPEGs as large as ImageNet's."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, height, width)
    for level in range(8):
        coarse = torch.randn(count, 3, height >> level or 1, width >> level or 1, generator=generator)
        total += F.interpolate(coarse, (height, width), mode="bilinear") * GROWTH**level
    return (total / total.std() * 50 + 118).clamp(0, 255).to(torch.uint8)


def write_folder(out: Path, count: int, sizes: list[tuple[int, int]]) -> None:
    """Write OUT/train/CLASS/NAME.jpg, with these sizes (height, width) in turn; uses all cores."""
    for label in range(min(CLASSES, count)):
        (out / "train" / str(label)).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork"), torch.set_num_threads, (1,)) as pool:
        for _ in pool.map(partial(_write, out, sizes), range(count), chunksize=16):
            pass


def _write(out: Path, sizes: list[tuple[int, int]], i: int) -> None:
    (image,) = photographs(1, *sizes[i % len(sizes)], seed=i)
    write_jpeg(image, str(out / "train" / str(i % CLASSES) / f"{i:05d}.jpg"), quality=QUALITY)


def in_memory(count: int, side: int = SIDE, split: str = "train") -> Dataset:
    """`count` images of SIDE x SIDE pixels, of which at most 64 differ."""
    pixels = photographs(min(count, 64), side, side).permute(0, 2, 3, 1).numpy()
    pixels = np.tile(pixels, (-(-count // len(pixels)), 1, 1, 1))[:count]
    names, labels = [f"{i:05d}" for i in range(count)], np.arange(count) % CLASSES
    return from_array("photographs", split, tuple(map(str, range(CLASSES))), names, labels, pixels)
