"""The depthwise convolution against float64: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from fastofa.kernels import depthwise_conv3x3

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Beyond the error that the twin makes in the same dtype, relative to the greatest number of the truth. The interpreter
# cuts off where it stores bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
HALVES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "dx", "dweight", "dscale", "dshift")


@pytest.fixture(autouse=True)
def _poisoned():
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(B=2, C=8, H=5, W=7, dtype=torch.float32, folded=True, seed=0) -> list[Tensor]:
    """x, weight, and scale and shift if folded. Values before the activation keep away from its corners."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, H, W, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(C, 1, 3, 3, generator=generator)
    if not folded:
        return [x.to(DEVICE), weight.to(DEVICE)]
    scale = 1 + 0.5 * torch.rand(C, generator=generator)
    scale[::3] *= -3
    return [t.to(DEVICE) for t in (x, weight, scale, torch.randn(C, generator=generator))]


def run(case: list[Tensor], impl: str, dtype: torch.dtype, stride: int, activation: str | None) -> list[Tensor]:
    """y and the gradients of all inputs, in float64, for a gradient of y that is the same for all."""
    double = dtype == torch.float64
    x, *others = ((t.double() if double else t.clone()).requires_grad_() for t in case)
    y = depthwise_conv3x3(x, others[0], stride, *others[1:], activation=activation, impl=impl)
    assert y.dtype == x.dtype
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case[0].dtype).to(DEVICE)
    y.backward(slope.to(y.dtype))
    return [t.double() for t in (y.detach(), *(leaf.grad for leaf in (x, *others)))]


def check(case: list[Tensor], stride: int = 1, activation: str | None = None) -> None:
    """|truth - kernel| <= |truth - twin in the same dtype| + tolerance, for y and all gradients."""
    dtype = case[0].dtype
    results = [
        run(case, *how, stride, activation) for how in (("torch", torch.float64), ("torch", dtype), ("triton", dtype))
    ]
    for name, exact, plain, got in zip(NAMES, *results, strict=False):
        assert got.shape == exact.shape, name
        error, allowed = (got - exact).abs(), (plain - exact).abs().amax()
        tolerance = TOLERANCE[dtype if name in ("y", "dx") else torch.float32] * exact.abs().amax()
        assert not error.isnan().any(), name
        assert error.amax() <= allowed + tolerance, (name, error.amax().item(), allowed.item(), tolerance.item())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", ["not folded", None, "relu", "relu6"])
def test_equals_float64(dtype, stride, activation):
    folded = activation != "not folded"
    check(make_case(dtype=dtype, folded=folded), stride, activation if folded else None)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("C", [3, 8, 24])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 4), (2, 1), (5, 7), (8, 8)])
def test_every_size(stride, C, H, W):
    check(make_case(1, C, H, W), stride, "relu")
