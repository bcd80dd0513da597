"""scikit-learn's 1,797 handwritten digits, 8 x 8 pixels."""

import numpy as np

from fastofa.data.dataset import Dataset, from_array
from fastofa.system.errors import BadInput


def open_digits(spec: str, split: str, count: str) -> Dataset:
    """See `fastofa.data.open.open_dataset`.

    Every third image belongs to the validation split (599), the others to the training split (1,198). `count` = "N"
    keeps the first N/10 training images of each class; "" keeps all.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    is_val = np.arange(len(digits.target)) % 3 == 0
    keep = np.flatnonzero(is_val if split == "val" else ~is_val)
    if count:
        smallest = np.bincount(digits.target[~is_val]).min()
        if not count.isdecimal() or int(count) % 10 or not 10 <= int(count) <= 10 * smallest:
            raise BadInput(f"digits:N: expected N a multiple of 10 from 10 to {10 * smallest}, got {count!r}")
    if count and split == "train":
        keep = np.concatenate([keep[digits.target[keep] == c][: int(count) // 10] for c in range(10)])
    grey = np.rint(digits.images[keep] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    names = [f"{i:04d}" for i in keep]
    return from_array(spec, split, tuple("0123456789"), names, digits.target[keep], pixels)
