"""RandAugment's table against timm's code: the notation, and the distributions of operations and amounts."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from timm.data import auto_augment as timm

from fastofa.system.errors import BadInput
from fastofa.views.rand_augment import COLUMNS, OPS, RandAugment, amounts, choose, parse

# timm's names, in the order of `OPS` without "none".
PLAIN = timm._RAND_TRANSFORMS
INCREASING = timm._RAND_INCREASING_TRANSFORMS


def drawn(text: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    policy = parse(text)
    return choose(policy, np.random.default_rng(seed).random((count, policy.layers, COLUMNS)))


def by_timm(text: str, count: int, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, float]]]:
    """(operation, first argument) of every operation that timm applies to each of these images."""
    found: list[list[tuple[str, float]]] = []
    transform = timm.rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    for op in transform.ops:
        name = OPS[1 + [*PLAIN, *INCREASING].index(op.name) % len(PLAIN)]

        def record(image, *args, name=name, **_):
            found[-1].append((name, args[0] if args else 0.0))
            return image

        op.aug_fn = record
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what timm draws from
    for _ in range(count):
        found.append([])
        transform(Image.new("RGB", (2, 2)))
    return found


def test_the_operations_are_timms():
    """In timm's order, so that a number means the same operation in both lists."""
    words = [name.removesuffix("Increasing").removesuffix("Rel") for name in PLAIN]
    assert [name.removesuffix("Increasing").removesuffix("Rel") for name in INCREASING] == words
    assert [name.replace("_", "") for name in OPS[1:]] == [word.lower() for word in words]


@settings(max_examples=200, deadline=None)
@given(magnitude=st.floats(0, 10), side=st.sampled_from([-1, 1]), increasing=st.booleans())
def test_amounts_are_timms(magnitude, side, increasing):
    """Equal to LEVEL_TO_ARG of a magnitude, for all operations and both signs."""
    ops = np.arange(1, len(OPS))
    ours = amounts(ops, np.full(len(ops), magnitude), np.full(len(ops), side), increasing)
    original, timm.random.random = timm.random.random, lambda: 0.0 if side > 0 else 1.0
    try:
        functions = [timm.LEVEL_TO_ARG[name] for name in (INCREASING if increasing else PLAIN)]
        theirs = [function(magnitude, {})[0] if function else 0.0 for function in functions]
    finally:
        timm.random.random = original
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m7-mstd0.5", "rand-m5-n3-p0.8", "rand-m10-mstd2-inc1"])
def test_draws_are_distributed_like_timms(text, monkeypatch):
    """Number and kinds of an image's operations (chi-square), and their amounts (Kolmogorov-Smirnov)."""
    count = 6000
    ops, given = drawn(text, count)
    theirs = by_timm(text, count, monkeypatch)
    layers = ops.shape[1]
    policy = parse(text)

    number = np.bincount((ops > 0).sum(axis=1), minlength=layers + 1)
    chance = [policy.probability, 1 - policy.probability]
    expected = np.array([1.0])
    for _ in range(layers):
        expected = np.convolve(expected, chance[::-1])
    assert chisquare(number, expected * count).pvalue > 1e-3
    assert chisquare(np.bincount([len(done) for done in theirs], minlength=layers + 1), expected * count).pvalue > 1e-3

    for layer in range(layers):
        which = np.bincount(ops[:, layer], minlength=len(OPS))[1:]
        assert chisquare(which).pvalue > 1e-3
    for number, name in enumerate(OPS[1:], start=1):
        mine = given[ops == number]
        other = np.array([value for done in theirs for op, value in done if op == name])
        assert ks_2samp(mine, other.astype(np.float32)).pvalue > 1e-4, name
        if not policy.std:
            assert set(mine.tolist()) == set(other.astype(np.float32).tolist()), name


def test_layers_and_magnitudes_are_independent():
    """The operations of one image, and their amounts, do not depend on each other."""
    ops, given = drawn("rand-m5-mstd2", 20_000)
    both = (ops > 0).all(axis=1)
    table = np.histogram2d(ops[both, 0], ops[both, 1], bins=15)[0]
    assert chisquare(table.ravel()).pvalue > 1e-3
    rotate = OPS.index("rotate")
    of_first = np.abs(given[ops[:, 0] == rotate, 0])
    followed = ops[ops[:, 0] == rotate, 1] > 0
    assert ks_2samp(of_first[followed], of_first[~followed]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment(9, 0.5, True, 2, 0.5)),
        ("rand-m7-mstd0.5", RandAugment(7, 0.5, False, 2, 0.5)),
        ("rand-inc0-n3-p0.25-m0", RandAugment(0, 0.0, False, 3, 0.25)),
        ("rand-m10-p1-mstd0.5", RandAugment(10, 0.5, False, 2, 1.0)),
    ],
)
def test_the_notation_is_parsed_as_by_timm(text, policy):
    assert parse(text) == policy
    transform = timm.rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    (settings_,) = {(op.magnitude, op.prob, op.magnitude_std) for op in transform.ops}
    assert settings_ == (policy.magnitude, policy.probability, policy.std)
    assert transform.num_layers == policy.layers
    assert any("Increasing" in op.name for op in transform.ops) == policy.increasing


@pytest.mark.parametrize(
    "text",
    [
        "rand", "rand-", "augmix-m9", "original", "rand-m", "rand-m11", "rand-m-1", "rand-m9-m8", "rand-m9-mstd101",
        "rand-mstd0.5", "rand-m9-n0", "rand-m9-n1.5", "rand-m9.5", "rand-m9-p1.1", "rand-m9-inc2", "rand-m9-x1", "m9",
        "rand-m9-tweights", "rand-m9-mmax20", "rand-m9--inc1", "Rand-m9", "rand-m9 ", "rand_m9", "-", "rand-m9-incl",
        "rand-m9-mstd.5",
    ],
)  # fmt: skip
def test_another_notation_is_refused(text):
    with pytest.raises(BadInput, match=r"auto-augment: expected rand-mM\[-mstdS\].* got") as error:
        parse(text)
    assert repr(text) in str(error.value)
