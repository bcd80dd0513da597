"""Open a dataset by its specification:

open_dataset("digits")              scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels
open_dataset("digits:100")          the same, with only 100 training images
open_dataset("cifar100:DIR")        DIR contains cifar-100-python.tar.gz or the folder it unpacks to
open_dataset("path/to/DIR")         DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg (JPEG, PNG, WebP)
open_dataset("photos.pack")         any of these, written by `fastofa write`: pixels of one size in one file
open_dataset("photos.beton")        the same in FFCV's format, next to photos.val.beton and photos.beton.safetensors
open_dataset("train.beton")         written by FFCV's own writer, next to val.beton
open_dataset("s3://b/photos.pack")  a .pack or .beton that `fastofa write` wrote, at any URL; downloaded once
"""

import os
from dataclasses import replace
from pathlib import Path

from fastofa.data.cifar import open_cifar100
from fastofa.data.dataset import FFCV, FORMS, Dataset, Split
from fastofa.data.digits import open_digits
from fastofa.data.folder import open_image_folder
from fastofa.data.headers import DEFAULT, Limits
from fastofa.data.staged import local_copy
from fastofa.data.written import open_written
from fastofa.system.errors import BadInput
from fastofa.system.urls import is_url


def open_dataset(
    spec: str, split: Split = "train", skip_corrupt: bool = False, check: bool = False, limits: Limits = DEFAULT
) -> Dataset:
    """Open one split of a dataset.

    Args:
        spec: see the top of this file.
        split: "train" or "val".
        skip_corrupt: decode every file once, list the unreadable ones and skip them (folders only).
        check: decode every file once and refuse unreadable ones (folders only; `fastofa write` has checked the others).
        limits: the limits within which images are accepted.

    Raises:
        BadInput: unknown dataset, missing folder, no images or unreadable ones; or the URL cannot be downloaded.
    """
    if split not in ("train", "val"):
        raise BadInput(f"unknown split {split!r}: expected train or val")
    if is_url(spec):
        return replace(open_written(local_copy(spec), split, limits), spec=spec)
    name, _, rest = spec.partition(":")
    is_digits, is_cifar100 = name == "digits" and "/" not in rest, name == "cifar100" and rest != ""
    is_folder = _is_folder(spec)
    if is_folder and (is_digits or is_cifar100):
        other = "rename the folder to use the built-in one" if rest else f"{name}: for the built-in one"
        raise BadInput(
            f"{spec}: expected one dataset with this name, got two: the built-in one and the folder "
            f"{os.path.abspath(spec)}; give {os.path.join('.', spec)} for the folder, or {other}"
        )
    if is_digits:
        return open_digits(spec, split, rest)
    if is_cifar100:
        return open_cifar100(spec, split, Path(rest))
    if Path(spec).suffix in FORMS + FFCV:
        return open_written(Path(spec), split, limits)
    if is_folder:
        return open_image_folder(spec, split, skip_corrupt, check, limits)
    raise BadInput(
        f"unknown dataset {spec!r}: expected digits, digits:N, cifar100:DIR, a folder with train/ and val/, or a "
        f"{' or '.join(FORMS)} that `fastofa write` wrote; there is no such folder"
    )


def _is_folder(spec: str) -> bool:
    """Whether it is a folder. Raises BadInput if a parent folder is not readable, or the name is too long."""
    try:
        return Path(spec).is_dir()
    except OSError as error:
        raise BadInput(f"could not open {spec}: {error.strerror}; give this user access or another path") from None
