"""Comparing implementations: what counts as correct, and what is timed."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastofa.kernels.comparison import Comparison, compare, describe, random_like

SIZE = 64


def by(**ms: float) -> Callable:
    """A timer that reports these milliseconds, whatever the calls take; it runs every call once."""

    def timer(calls: dict) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: ms[name] for name in calls}

    return timer


def square(x: Tensor, weight: Tensor) -> Tensor:
    return x * x * weight


def comparison(run: Callable, dtype: torch.dtype = torch.float32, leaves: tuple[int, ...] = (0, 1)) -> Comparison:
    inputs = random_like(torch.empty(SIZE, dtype=dtype), torch.empty(SIZE))
    return Comparison("square", "64", inputs, {"fast": run, "torch": square}, leaves)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * x * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy * x * weight, dy * x * x  # the first lacks a factor of 2


def nan_at_one_place(x: Tensor, weight: Tensor) -> Tensor:
    y = square(x, weight)
    return torch.where(torch.arange(SIZE) == 5, torch.nan, y)


def raises(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("no such\ninstruction")


def test_the_fastest_of_the_correct_ones():
    found = compare(comparison(lambda x, weight: weight * x**2), by(fast=1.0, torch=2.0))
    assert (found.fastest, found.ms, found.dropped) == ("fast", {"fast": 1.0, "torch": 2.0}, {})
    assert compare(comparison(square), by(fast=3.0, torch=2.0)).fastest == "torch"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x, weight: 1.01 * square(x, weight), "expected an error of at most 0.002, got 0.01"),
        (lambda x, weight: square(x, weight)[:32], "shape .*64.*32"),
        (nan_at_one_place, "got nan"),
        (WrongGradient.apply, "result 1: .* got 0.5"),
        (raises, "RuntimeError: no such instruction"),
    ],
)
def test_a_wrong_one_is_dropped_however_fast(run, reason):
    found = compare(comparison(run), by(fast=0.1, torch=2.0))
    assert found.fastest == "torch"
    assert found.correct == ("torch",)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.dropped["fast"])


def test_a_gradient_is_checked_only_where_it_is_needed():
    assert compare(comparison(WrongGradient.apply, leaves=()), by(fast=1.0, torch=2.0)).fastest == "fast"
    assert compare(comparison(WrongGradient.apply, leaves=(1,)), by(fast=1.0, torch=2.0)).fastest == "fast"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_allowed_in_half_precision(dtype):
    """Both round differently; an error of one part in twenty is wrong in every dtype."""

    def other(x: Tensor, weight: Tensor) -> Tensor:
        return (x * weight.to(dtype)) * x

    assert not compare(comparison(other, dtype), by(fast=1.0, torch=2.0)).dropped
    wrong = compare(comparison(lambda x, weight: 1.05 * square(x, weight), dtype), by(fast=1.0, torch=2.0))
    assert set(wrong.dropped) == {"fast"}


def test_an_implementation_that_updates_its_input_does_not_disturb_the_others():
    def counting(x: Tensor, count: Tensor) -> Tensor:
        y = x + 0
        count.add_(1)
        return y

    inputs = random_like(torch.empty(SIZE), torch.empty(1))
    found = compare(Comparison("count", "64", inputs, {"a": counting, "torch": counting}), by(a=1.0, torch=2.0))
    assert not found.dropped


@pytest.mark.slow
def test_what_the_compiler_fuses_is_compiled():
    """Which shows here as a wrong result."""

    def other(x: Tensor) -> Tensor:
        return x.sin() + (2 if torch.compiler.is_compiling() else 1)

    ways = {"other": other, "torch": lambda x: x.sin() + 1}
    given = Comparison("sine", "64", random_like(torch.empty(SIZE)), ways, fused=("other",))
    timer = by(other=1.0, torch=2.0)
    assert compare(given, timer).fastest == "other"
    assert compare(dataclasses.replace(given, fused=()), timer, compiled=True).fastest == "other"
    assert set(compare(given, timer, compiled=True).dropped) == {"other"}


def test_random_inputs_have_shape_dtype_and_layout():
    maps = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16)
    x, nothing, weight = random_like(maps, None, torch.empty(3))()
    assert (x.shape, x.dtype, nothing, weight.dtype) == (maps.shape, torch.bfloat16, None, torch.float32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert describe(maps, None, torch.empty(3), stride=2) == "2x3x4x5 bfloat16, none, 3 float32, stride 2"
