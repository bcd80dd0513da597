"""Folders of images for tests: build and damage them, and compare the datasets opened from them."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.system.errors import BadInput


def refusal(spec: object, split: Any = "train", skip_corrupt: bool = False) -> str:
    """The message with which a dataset is refused: one line."""
    with pytest.raises(BadInput) as error:
        open_dataset(str(spec), split, skip_corrupt)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(a: Dataset, b: Dataset) -> None:
    assert a.names == b.names
    assert a.classes == b.classes
    assert (a.labels == b.labels).all()
    assert (a.sizes == b.sizes).all()
    assert a.fingerprint == b.fingerprint


def index_of(folder: Path, split: str = "train") -> Path:
    return folder / ".fastofa" / f"{split}.safetensors"


def save_random(path: Path, height: int, width: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def add(folder: Path, *names: str) -> None:
    """Copy a real image to these names in the training split."""
    for name in names:
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "train" / "flower" / "004.jpg", path)


def cut(path: Path) -> None:
    """Keep the header and half of the pixels."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_in_place(path: Path) -> None:
    """Overwrite the image with other bytes of the same length."""
    path.write_bytes(b"nonsense" * (path.stat().st_size // 8) + b"x" * (path.stat().st_size % 8))


def special(path: Path, kind: str) -> None:
    """Create a link or special file; opening it may block forever."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    else:
        path.symlink_to({"nowhere": "none.jpg", "circle": path.name, "device": "/dev/zero"}[kind])


SPECIAL = {
    "fifo": "a FIFO, not a file", "socket": "a socket, not a file", "device": "a device, not a file",
    "nowhere": "a broken link", "circle": "a circular link",
}  # fmt: skip
