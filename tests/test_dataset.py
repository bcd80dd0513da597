"""Datasets are opened by their specification, identified by a fingerprint, and refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fastofa.data.dataset import Dataset, fingerprint_of, from_array
from fastofa.data.names import Names
from fastofa.data.open import open_dataset
from folders import assert_same, refusal, save_random


def test_unknown_specs_and_splits(tmp_path: Path) -> None:
    for spec in ("nonsense", "cifar100", "cifar100:", "cifar10:DIR", str(tmp_path / "none")):
        assert "digits" in refusal(spec)
    assert "train or val" in refusal("digits", "test")


def test_fingerprint_covers_names_bytes_labels_and_order() -> None:
    names, sizes, labels = ["a", "b", "c"], np.array([1, 2, 3]), np.array([0, 0, 1])
    content = np.arange(6, dtype=np.uint8).reshape(3, 2)
    prints = {
        fingerprint_of(names, sizes, labels, content),
        fingerprint_of(["a", "b", "d"], sizes, labels, content),
        fingerprint_of(["b", "a", "c"], sizes, labels, content),
        fingerprint_of(names, np.array([1, 2, 4]), labels, content),
        fingerprint_of(names, sizes, np.array([0, 1, 1]), content),
        fingerprint_of(names, sizes, labels, content[::-1]),
        fingerprint_of(names[:2], sizes[:2], labels[:2], content[:2]),
    }
    assert len(prints) == 7
    # Whatever holds the names and numbers.
    assert fingerprint_of(Names.of(names), sizes.astype(np.int32), labels.astype(">i8"), content) in prints


def test_fingerprint_of_an_array_covers_its_pixels(digits: Dataset) -> None:
    assert digits.pixels is not None
    prints = set()
    for change in (0, 1):
        pixels = digits.pixels.copy()
        pixels[50, 3, 3, 0] ^= change
        prints.add(from_array("digits", "train", digits.classes, list(digits.names), digits.labels, pixels).fingerprint)
    assert len(prints) == 2
    assert digits.fingerprint in prints


@pytest.mark.parametrize("spec", ["digits", "digits:100", "cifar100:data"])
def test_a_folder_named_like_a_built_in_dataset_is_ambiguous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    """It is refused with the spelling of each; both spellings work."""
    monkeypatch.chdir(tmp_path)
    save_random(tmp_path / spec / "train" / "a" / "1.png", 8, 8)
    text = refusal(spec)
    assert str(tmp_path / spec) in text
    assert f"give ./{spec} for the folder" in text
    for given in (f"./{spec}", str(tmp_path / spec), *([f"{spec}/"] if "digits" in spec else [])):
        assert open_dataset(given).names == ["a/1.png"]
    if spec == "digits":
        assert "digits: for the built-in one" in text
        assert len(open_dataset("digits:")) == 1198
    elif spec == "digits:100":
        (tmp_path / spec).rename(tmp_path / "other")
        assert len(open_dataset(spec)) == 100


def test_invalid_paths(tmp_path: Path) -> None:
    """A name that is too long, a link to itself, a NUL."""
    (tmp_path / "loop").symlink_to("loop")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    assert "unknown dataset" in refusal(tmp_path / "loop")
    assert "unknown dataset" in refusal("a\0b")


# --- Digits -----------------------------------------------------------------------------------------------------------


def test_digits_splits() -> None:
    """1,198 and 599 images, which are disjoint and complete."""
    train, val = open_dataset("digits"), open_dataset("digits", "val")
    assert (len(train), len(val)) == (1198, 599)
    assert len({*train.names, *val.names}) == 1797
    assert train.classes == val.classes == tuple("0123456789")
    assert train.fingerprint != val.fingerprint


@pytest.mark.parametrize("split", ["train", "val"])
def test_digits_pixels_and_labels_are_sklearns(split: Any) -> None:
    """Names are scikit-learn's positions; levels 0 to 16 become 0 to 255."""
    source, digits = load_digits(), open_dataset("digits", split)
    rows = [int(name) for name in digits.names]
    assert (digits.labels == source.target[rows]).all()
    assert digits.labels.dtype == np.int64
    assert digits.pixels is not None
    assert digits.pixels.dtype == np.uint8
    assert digits.pixels.shape == (len(digits), 8, 8, 3)
    assert np.abs(digits.pixels - source.images[rows][..., None] * 255 / 16).max() <= 0.5
    assert digits.pixels.max() == 255
    assert (digits.sizes == 8).all()
    assert digits.sizes.shape == (len(digits), 2)


@pytest.mark.parametrize("spec", ["digits", "digits:100"])
def test_digits_are_ordered_by_class_then_name(spec: str) -> None:
    digits = open_dataset(spec)
    keys = list(zip(digits.labels.tolist(), digits.names, strict=True))
    assert keys == sorted(keys)


@pytest.mark.parametrize("count", [10, 100, 1120])
def test_few_digits_are_balanced_and_part_of_all(count: int) -> None:
    few, train = open_dataset(f"digits:{count}"), open_dataset("digits")
    assert np.bincount(few.labels).tolist() == [count // 10] * 10
    assert set(few.names) <= set(train.names)
    assert few.pixels is not None
    assert train.pixels is not None
    rows = [train.names.index(name) for name in few.names]
    assert (few.pixels == train.pixels[rows]).all()
    assert_same(open_dataset(f"digits:{count}", "val"), open_dataset("digits", "val"))


@pytest.mark.parametrize("count", ["0", "5", "15", "-10", "1.5", "ten", "1130", "10000", "²0"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_number_of_digits(count: str, split: Any) -> None:
    text = refusal(f"digits:{count}", split)
    assert "multiple of 10" in text
    assert count in text
