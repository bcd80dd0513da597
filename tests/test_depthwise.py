"""The depthwise convolution against float64: on a GPU if there is one, else in Triton's interpreter."""

import itertools

import pytest
import torch
from torch import Tensor

from fastofa.kernels import depthwise_conv3x3
from fastofa.kernels.depthwise import Passes
from fastofa.kernels.triton_depthwise import tiling

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Beyond the error that the twin makes in the same dtype, relative to the greatest number of the truth. The interpreter
# cuts off where it stores bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
HALVES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "dx", "dweight", "dscale", "dshift")


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(B=2, C=8, H=5, W=7, dtype=torch.float32, folded=True, seed=0) -> list[Tensor]:
    """x, weight, and scale and shift if folded. Values before the activation are not near its kinks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, H, W, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(C, 1, 3, 3, generator=generator)
    if not folded:
        return [x.to(DEVICE), weight.to(DEVICE)]
    scale = 1 + 0.5 * torch.rand(C, generator=generator)
    scale[::3] *= -3
    return [t.to(DEVICE) for t in (x, weight, scale, torch.randn(C, generator=generator))]


def run(
    case: list[Tensor], impl: str | Passes, dtype: torch.dtype, stride: int, activation: str | None
) -> list[Tensor]:
    """y and the gradients of all inputs, in float64, for a gradient of y that is the same for all."""
    double = dtype == torch.float64
    x, *others = ((t.double() if double else t.clone()).requires_grad_() for t in case)
    y = depthwise_conv3x3(x, others[0], stride, *others[1:], activation=activation, impl=impl)
    assert y.dtype == x.dtype
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case[0].dtype).to(DEVICE)
    y.backward(slope.to(y.dtype))
    return [t.double() for t in (y.detach(), *(leaf.grad for leaf in (x, *others)))]


def check(case: list[Tensor], stride: int = 1, activation: str | None = None, impl: str | Passes = "triton") -> None:
    """|truth - kernel| <= |truth - twin in the same dtype| + tolerance, for y and all gradients."""
    dtype = case[0].dtype
    results = [
        run(case, *how, stride, activation) for how in (("torch", torch.float64), ("torch", dtype), (impl, dtype))
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


@pytest.mark.parametrize("stride", [1, 2])
def test_several_tiles_strips_images_and_blocks_of_channels(stride, monkeypatch):
    """Work that one program does in the other tests is split: columns by 9, channels 200, strips of 3 rows."""
    monkeypatch.setattr("fastofa.kernels.triton_depthwise.ROWS", 3)
    check(make_case(1, 200, 8 * stride - 1, 9 * stride), stride, "relu6")
    monkeypatch.setattr("fastofa.kernels.triton_depthwise.PROGRAMS", 1)
    assert tiling(5, 1, 1, 8, stride).images == 3
    check(make_case(5, 8, 1, 2 * stride), stride, "relu")  # of five images a program takes three, the next two


def test_tiles_waste_little():
    """For the maps of students and exits: at most a quarter of the computed columns and channels is outside."""
    for width, channels in ((112, 32), (112, 96), (56, 64), (56, 144), (28, 128), (28, 192), (14, 256), (14, 576)):
        t = tiling(256, width, width, channels, 1)
        covered = -(-width // t.block_w) * t.block_w * t.blocks * t.block_c
        assert width * channels >= 0.74 * covered, (width, channels, t)
        assert t.parts * t.blocks >= 528


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch(stride):
    y, dx, dweight, dscale, dshift = run(make_case(B=0), "triton", torch.float32, stride, "relu")
    assert y.shape == (0, 8, -(-5 // stride), -(-7 // stride))
    assert dx.shape == (0, 8, 5, 7)
    assert not any(sums.any() for sums in (dweight, dscale, dshift))


def test_results_are_deterministic():
    """No sum depends on the order in which programs finish."""
    case = make_case(B=3, C=24, H=8, W=8)
    first, second = (run(case, "triton", torch.float32, 1, "relu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_memory_format_is_accepted_and_channels_last_returned():
    x, *others = make_case()
    expected = depthwise_conv3x3(x, *others[:1], 1, *others[1:], activation="relu", impl="triton")
    got = depthwise_conv3x3(x.contiguous(), *others[:1], 1, *others[1:], activation="relu", impl="triton")
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_nan_is_propagated(activation):
    x, weight, scale, shift = make_case()
    x[0, 0, 2, 2] = float("nan")
    y = depthwise_conv3x3(x, weight, 1, scale, shift, activation, impl="triton")
    assert y[0, 0, 1:4, 1:4].isnan().all()
    assert y.isnan().sum() == 9


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(("stride", "passes"), [(1, ["triton"] * 3), (2, ["triton"] * 3), (2, ["torch"] * 3)])
def test_is_an_operator_of_pytorch(folded, stride, passes):
    """opcheck: schema, fake tensors, autograd registration, compilation with dynamic shapes."""
    x, weight, *rest = (t.requires_grad_() for t in make_case(B=2, C=3, H=3, W=2, folded=folded))
    options = (stride, *(rest or (None, None)), "relu" if folded else None)
    torch.library.opcheck(torch.ops.fastofa.depthwise_conv3x3, (x, weight, *options, *passes))
    given = [t.detach() if isinstance(t, Tensor) else t for t in (x, weight, *options)]
    slope = torch.randn(2, 3, -(-3 // stride), -(-2 // stride)).to(DEVICE)
    torch.library.opcheck(torch.ops.fastofa.depthwise_conv3x3_input_gradient, (slope, *given))
    torch.library.opcheck(torch.ops.fastofa.depthwise_conv3x3_weight_gradient, (slope, *given))


@pytest.mark.parametrize("impl", list(itertools.product(["triton", "torch"], repeat=3)))
@pytest.mark.parametrize("folded", [True, False])
def test_each_pass_has_its_own_implementation(impl, folded):
    """All eight combinations against float64."""
    check(make_case(folded=folded), 2, "relu" if folded else None, Passes(*impl))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton", "torch", Passes("torch", "triton", "torch")])
def test_compiles_without_a_graph_break(impl):
    def function(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return depthwise_conv3x3(2 * x, weight, 2, scale, shift, "relu", impl) + 1

    results = []
    for run_it in (function, torch.compile(function, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in make_case(B=1, C=8, H=3, W=4)]
        y = run_it(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
@pytest.mark.parametrize("activation", ["not folded", None, "relu", "relu6"])
def test_on_a_cpu_the_operators_are_the_twin(activation, monkeypatch):
    """As in an exported program: closed-form gradients equal autograd's."""
    monkeypatch.delenv("TRITON_INTERPRET")
    folded = activation != "not folded"
    leaves = [t.requires_grad_() for t in make_case(folded=folded)]
    x, weight, *rest = leaves
    options = (2, *(rest or (None, None)), activation if folded else None)
    got = torch.ops.fastofa.depthwise_conv3x3(x, weight, *options, *["triton"] * 3)
    expected = depthwise_conv3x3(x, weight, *options)
    torch.testing.assert_close(got, expected)
    slope = torch.randn(got.shape)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, slope), torch.autograd.grad(expected, leaves, slope))


BAD = {
    r"x: expected floating \[B, C, H, W\], got torch.int64": {"x": torch.zeros(2, 8, 5, 7, dtype=torch.int64)},
    r"x: expected floating \[B, C, H, W\], got torch.float32 \(8, 5, 7\)": {"x": torch.zeros(8, 5, 7)},
    "x: expected at least one channel and one pixel": {"x": torch.zeros(2, 8, 0, 7)},
    r"weight: expected floating \[8, 1, 3, 3\], got .*\(8, 1, 5, 5\)": {"weight": torch.zeros(8, 1, 5, 5)},
    "stride: expected 1 or 2, got 3": {"stride": 3},
    r"activation: expected one of .*, got 'gelu'": {"activation": "gelu"},
    "scale and shift: expected both or neither": {"scale": None},
    "activation: expected scale and shift with 'relu'": {"scale": None, "shift": None},
    r"scale: expected floating \[8\], got torch.float32 \(7,\)": {"scale": torch.zeros(7)},
    r"shift: expected floating \[8\], got torch.int64": {"shift": torch.zeros(8, dtype=torch.int64)},
    "expected all tensors on one device": {"scale": torch.zeros(8, device="meta")},
    "impl: expected one of": {"impl": "cudnn"},
    "impl: expected fp32, bf16 or fp16 for 'triton', got torch.float64": {
        "x": torch.zeros(1, 8, 2, 2, dtype=torch.float64, device=DEVICE),
        "impl": "triton",
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    given = dict(zip(("x", "weight", "scale", "shift"), make_case(), strict=True))
    changed = {name: value for name, value in BAD[message].items()}
    for name, value in changed.items():
        if isinstance(value, Tensor) and value.device.type != "meta":
            changed[name] = value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        depthwise_conv3x3(**{**given, "activation": "relu", **changed})
