"""What tests share: real pictures written to a temporary folder, and a seed for every test."""

import os
from pathlib import Path

# Before torch is imported. One thread a process: tests run side by side, threads that wait for each other are slow,
# and a sum over two threads has other last bits than over one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TERM", "dumb")

import numpy as np
import pytest
import torch
from PIL import Image

from fastofa.dataset import Dataset, open_dataset


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def digits() -> Dataset:
    """A hundred training pictures of scikit-learn's digits, ten of each class."""
    return open_dataset("digits:100")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several sizes, cut from two photographs: two classes, 12 training and 6 validation pictures each."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(90, 160, 2)
                top, left = rng.integers(0, 200, 2)
                Image.fromarray(photo[top : top + height, left : left + width]).save(
                    root / split / name / f"{i:03d}.jpg", quality=92
                )
    return root
