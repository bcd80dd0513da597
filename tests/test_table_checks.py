"""A view's file may contain everything that `precompute` writes, and no value that a teacher or policy cannot give."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.table_checks import targets_fault, views_fault
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy
from fastofa.views.rand_augment import OPS, limits

N, K, C = 40, 3, 10
EVERYTHING = ViewPolicy(auto_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, erase=0.9)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_drawn_views_are_accepted(data):
    """Any policy, images of any shape (also longer than a box of 1/65535 can resolve), odd numbers of samples."""
    count = data.draw(st.integers(1, 30))
    sides = st.one_of(st.integers(1, 20), st.integers(1, 200_000))
    sizes = np.array(data.draw(st.lists(st.tuples(sides, sides), min_size=count, max_size=count)))
    policy = data.draw(
        st.builds(
            ViewPolicy, flip=st.floats(0, 1), erase=st.floats(0, 1), mixup=st.floats(0, 3), cutmix=st.floats(0, 3),
            auto_augment=st.sampled_from(["", "rand-m9", "rand-m7-n3-p0.9", "rand-m10-mstd5-inc1-p1"]),
        )
    )  # fmt: skip
    views = draw_views(policy, sizes, seed=data.draw(st.integers(0, 9)), view=0)
    assert views_fault(views.columns(), policy, count) == ""


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.floats(0, 100), st.booleans(), st.data())
def test_predictions_are_accepted(B, C, scale, equal, data):
    """Peaked and flat predictions, all classes kept or some, equal logits."""
    topk = data.draw(st.integers(1, C))
    logits = torch.randn(B, C, generator=torch.Generator().manual_seed(C)) * scale
    targets = topk_targets((logits * 0 if equal else logits).log_softmax(-1), topk)
    assert targets_fault(targets._asdict(), B, topk, C) == ""


@pytest.mark.parametrize("C", [65_536, 70_000])
def test_flat_predictions_of_many_classes_are_accepted(C):
    """Their mass, with each value rounded to float16, is still near 1."""
    targets = topk_targets(torch.randn(3, C).log_softmax(-1), C)
    assert targets_fault(targets._asdict(), 3, C, C) == ""


def test_limits_are_those_of_the_published_operations():
    low, high = (dict(zip(OPS, ends.tolist(), strict=True)) for ends in limits())
    assert {name: (low[name], high[name]) for name in ("none", "rotate", "posterize", "solarize", "solarize_add")} == {
        "none": (0, 0), "rotate": (-30, 30), "posterize": (0, 4), "solarize": (0, 256), "solarize_add": (0, 110),
    }  # fmt: skip
    assert (low["color"], high["color"]) == pytest.approx((0.1, 1.9))
    assert (low["shear_x"], high["translate_y"]) == pytest.approx((-0.3, 0.45))


def put(table: Any, row: Any, value: Any) -> Any:
    changed = table.clone() if isinstance(table, torch.Tensor) else table.copy()
    changed[row] = torch.as_tensor(value, dtype=changed.dtype) if isinstance(changed, torch.Tensor) else value
    return changed


PREDICTIONS = {
    "a class that does not exist": (
        "classes",
        lambda t: put(t, 7, [1, 2, 10]),
        r"classes from 0 to 9, got \[1, 2, 10\]",
    ),
    "a class twice": ("classes", lambda t: put(t, 7, [1, 4, 1]), r"each class once, got \[1, 4, 1\] for sample 7"),
    "not a number": ("log_probs", lambda t: put(t, (7, 1), torch.nan), r"finite log_probs, got \[.*nan.* for sample 7"),
    "infinite": ("log_probs", lambda t: put(t, (7, 2), -torch.inf), r"finite log_probs, got \[.*-inf.* for sample 7"),
    "above 1": (
        "log_probs",
        lambda t: put(t, 7, [0.5, -9, -9]),
        r"log_probs of at most 0, got \[0\.5, .* for sample 7",
    ),
    "not sorted": ("log_probs", lambda t: put(t, 7, [-2, -1, -3]), r"largest of log_probs first, got .* for sample 7"),
    "too much mass": ("log_probs", lambda t: put(t, 7, [-0.5, -0.5, -2]), r"a sum of at most 1, got .* for sample 7"),
    "another dtype": ("log_probs", lambda t: t.double(), r"log_probs float16 \[40, 3\], got float64 \[40, 3\]"),
    "signed": ("classes", lambda t: t.to(torch.int64), r"classes uint16 \[40, 3\], got int64 \[40, 3\]"),
    "fewer rows": ("classes", lambda t: t[:-1], r"classes uint16 \[40, 3\], got uint16 \[39, 3\]"),
    "more classes": ("log_probs", lambda t: t.repeat(1, 2), r"log_probs float32 \[40, 3\], got float32 \[40, 6\]"),
    "one dimension": ("log_probs", lambda t: t[:, 0], r"log_probs float32 \[40, 3\], got float32 \[40\]"),
    "nothing": ("log_probs", lambda _: None, "expected classes and log_probs, but log_probs is missing"),
}


@pytest.mark.parametrize(("name", "change", "message"), PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_impossible_predictions_are_refused(name: str, change: Callable, message: str):
    tensors: dict[str, Any] = topk_targets(torch.randn(N, C).log_softmax(-1), K)._asdict()
    assert targets_fault(tensors, N, K, C) == ""
    changed = {**tensors, name: change(tensors[name])}
    fault = targets_fault({key: value for key, value in changed.items() if value is not None}, N, K, C)
    assert re.search(message, fault), fault


def test_the_mass_of_all_classes_is_one():
    tensors = topk_targets(torch.randn(N, C).log_softmax(-1), C)._asdict()
    tensors["log_probs"][3] -= 0.1
    assert "probabilities of all classes with a sum of 1" in targets_fault(tensors, N, C, C)
    few = {name: tensor[:, :K].contiguous() for name, tensor in tensors.items()}
    assert targets_fault(few, N, K, C) == ""


def test_negative_classes_of_a_signed_type_are_refused():
    tensors = topk_targets(torch.randn(2, 70_000).log_softmax(-1), K)._asdict()
    tensors["classes"][1, 2] = -1
    assert "classes from 0 to 69999" in targets_fault(tensors, 2, K, 70_000)


VIEWS = {
    "beyond the edge": ("crop", lambda c: put(c, 5, [60_000, 0, 10_000, 9]), "crop to be a box inside the image"),
    "an empty crop": (
        "crop",
        lambda c: put(c, 5, [0, 0, 0, 9]),
        r"crop to be a box inside the image, got \[0, 0, 0, 9\] for sam",
    ),
    "crops of another dtype": ("crop", lambda c: c.astype(np.int32), r"crop uint16 \[40, 4\], got int32 \[40, 4\]"),
    "two numbers a crop": ("crop", lambda c: c[:, :2], r"crop uint16 \[40, 4\], got uint16 \[40, 2\]"),
    "flip by number": ("flip", lambda c: c.astype(np.uint8), r"flip bool \[40\], got uint8 \[40\]"),
    "no such operation": (
        "ops",
        lambda c: put(c, (5, 1), len(OPS)),
        f"ops from 0 to {len(OPS) - 1}, got .* for sample 5",
    ),
    "more operations": ("ops", lambda c: c.repeat(2, axis=1), r"ops uint8 \[40, 2\], got uint8 \[40, 4\]"),
    "too much": (
        "amounts",
        lambda c: put(c, (5, 0), 1000),
        "amounts within the ranges of the operations, got .* for sample 5",
    ),
    "no amount": (
        "amounts",
        lambda c: put(c, (5, 0), np.nan),
        "amounts within the ranges of the operations, got .*nan",
    ),
    "no involution": ("partner", lambda c: put(c, 5, (c[5] + 1) % N), "partner to be mutual"),
    "no such partner": ("partner", lambda c: put(c, 5, N), "partner to be mutual, got 40 for sample 5"),
    "a partner before the first": ("partner", lambda c: put(c, 5, -1), "partner to be mutual, got -1"),
    "more than the whole": ("mix", lambda c: put(c, 5, 1.5), "mix from 0 to 1 and equal for both partners, got 1.5"),
    "no share": ("mix", lambda c: put(c, 5, np.nan), "mix from 0 to 1 and equal for both partners, got nan"),
    "one partner's share": ("mix", lambda c: put(c, 5, 0.123), "mix from 0 to 1 and equal for both partners"),
    "a box beyond the edge": (
        "mix_box",
        lambda c: put(c, 5, [65_535, 0, 5, 5]),
        "mix_box to be a box inside the image",
    ),
    "one partner's box": ("mix_box", lambda c: put(c, 5, [1, 1, 1, 1]), "mix_box .* equal for both partners"),
    "erased beyond the edge": (
        "erase",
        lambda c: put(c, 5, [0, 65_000, 9, 9_999]),
        "erase to be a box inside the image, got .* 5",
    ),
    "noise of another dtype": ("noise", lambda c: c.astype(np.int64), r"noise int32 \[40\], got int64"),
    "a column less": ("noise", lambda _: None, "expected the columns amounts, .*, got "),
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    return draw_views(EVERYTHING, np.full((N, 2), 100), seed=0, view=0).columns()


@pytest.mark.parametrize(("name", "change", "message"), VIEWS.values(), ids=VIEWS.keys())
def test_impossible_views_are_refused(drawn, name, change, message):
    changed = {**drawn, name: change(drawn[name])}
    fault = views_fault({key: value for key, value in changed.items() if value is not None}, EVERYTHING, N)
    assert re.search(message, fault), fault


def test_columns_outside_the_policy_are_refused(drawn):
    plain = dataclasses.replace(EVERYTHING, mixup=0, cutmix=0)
    assert "expected the columns amounts, crop, erase, flip, noise, ops, got amounts, crop," in views_fault(
        drawn, plain, N
    )
    assert "got crop, flip" in views_fault({name: drawn[name] for name in ("crop", "flip")}, EVERYTHING, N)


def test_the_row_is_named_in_large_tables_too():
    """Rows are checked in blocks; partners may be in another block."""
    count = 50_001
    columns = draw_views(EVERYTHING, np.full((count, 2), 100), seed=0, view=0).columns()
    assert views_fault(columns, EVERYTHING, count) == ""
    columns["crop"][49_999] = [65_000, 0, 1_000, 9]
    assert views_fault(columns, EVERYTHING, count).endswith("for sample 49999")
    tensors = topk_targets(torch.randn(count, 5).log_softmax(-1), 2)._asdict()
    tensors["log_probs"][49_999, 0] = torch.nan
    assert targets_fault(tensors, count, 2, 5).endswith("for sample 49999")
