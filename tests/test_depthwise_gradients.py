"""All gradients of the depthwise convolution in one pass, against float64: on a GPU or in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastofa.kernels import reference
from fastofa.kernels.triton_depthwise_gradients import all_gradients
from test_depthwise import DEVICE, HALVES, NAMES, TOLERANCE, make_case

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _poisoned():
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients_by_twin(*given: Any) -> tuple[Tensor, ...]:
    """Gradients of x, weight, scale and shift."""
    dx, *norm = reference.depthwise_input_gradient(*given)
    return dx, reference.depthwise_weight_gradient(*given), *norm


def check(case: list[Tensor], stride: int, activation: str | None) -> None:
    """|truth - kernel| <= |truth - twin in the same dtype| + tolerance."""
    x, weight, *norm = case
    scale, shift = norm or (None, None)
    size = (*x.shape[:2], -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    dy = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(x.dtype).to(DEVICE)
    given = (dy, x, weight, scale, shift)
    double = [None if t is None else t.double() for t in given]
    exact, plain = (gradients_by_twin(*tensors[:3], stride, *tensors[3:], activation) for tensors in (double, given))
    got = all_gradients(dy, x, weight, stride, scale, shift, activation)
    for name, truth, twin, value in zip(NAMES[1:], exact, plain, got, strict=True):
        assert value.shape == truth.shape, name
        assert value.dtype == (x.dtype if name == "dx" else torch.float32), name
        assert not value.isnan().any(), name
        if truth.numel():
            tolerance = TOLERANCE[x.dtype if name == "dx" else torch.float32] * truth.abs().amax()
            error, allowed = ((t.double() - truth).abs().amax() for t in (value, twin))
            assert error <= allowed + tolerance, (name, error.item(), allowed.item(), tolerance.item())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", ["not folded", None, "relu", "relu6"])
def test_equals_float64(dtype, stride, activation):
    folded = activation != "not folded"
    check(make_case(dtype=dtype, folded=folded), stride, activation if folded else None)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("C", [3, 24])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 4), (2, 1), (8, 8)])
def test_every_size(stride, C, H, W):
    check(make_case(1, C, H, W), stride, "relu")


@pytest.mark.parametrize("stride", [1, 2])
def test_several_tiles_strips_images_and_blocks_of_channels(stride, monkeypatch):
    monkeypatch.setattr("fastofa.kernels.triton_depthwise.ROWS", 3)
    check(make_case(1, 200, 8 * stride - 1, 9 * stride), stride, "relu6")
    monkeypatch.setattr("fastofa.kernels.triton_depthwise.PROGRAMS", 1)
    check(make_case(5, 8, 1, 2 * stride), stride, "relu")


def test_empty_batch():
    case = make_case(B=0)
    dx, *sums = all_gradients(case[0], *case[:2], 1, *case[2:], "relu")
    assert dx.shape == case[0].shape
    assert not any(total.any() for total in sums)
