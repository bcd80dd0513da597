"""Bias and GELU against float64: on a GPU if there is one, else in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.kernels import bias_gelu, triton_gelu

# What is far out overflows in the interpreter as on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Beyond the error that PyTorch makes in the same dtype, relative to the greatest number of the truth. The interpreter
# cuts off where it stores bf16.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}


@pytest.fixture(autouse=True)
def _poisoned():
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    case = {"x": 3 * torch.randn(*shape, generator=generator), "bias": torch.randn(shape[-1], generator=generator)}
    case["dy"] = torch.randn(*shape, generator=generator).to(dtype)
    return {name: t.to(DEVICE, t.dtype if name == "bias" else dtype) for name, t in case.items()}


def run(case: dict[str, Tensor], approximate: str, impl: str | None) -> dict[str, Tensor]:
    """Result and gradients, by the kernel, or by PyTorch (`impl` None) in the case's dtypes."""
    x, bias = (case[name].clone().requires_grad_() for name in ("x", "bias"))
    y = F.gelu(x + bias.to(x.dtype), approximate=approximate) if impl is None else bias_gelu(x, bias, approximate, impl)
    assert y.dtype == x.dtype
    y.backward(case["dy"])
    return {"y": y.detach(), "dx": x.grad, "dbias": bias.grad}


def check(case: dict[str, Tensor], approximate: str = "none") -> None:
    """|truth - kernel| <= |truth - PyTorch in the same dtype| + tolerance."""
    exact = run({name: t.double() for name, t in case.items()}, approximate, None)
    plain, got = run(case, approximate, None), run(case, approximate, "triton")
    for name, truth in exact.items():
        assert got[name].shape == truth.shape, name
        error, allowed = ((other[name].double() - truth).abs().amax() for other in (got, plain))
        tolerance = TOLERANCE[torch.float32 if name == "dbias" else case["x"].dtype] * (1 + truth.abs().amax())
        assert error <= allowed + tolerance, (name, error.item(), allowed.item(), tolerance.item())


# --- Against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_equals_float64(dtype, approximate):
    check(make_case(3, 7, 24, dtype=dtype), approximate)


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (3, 7), (2, 5, 33), (130, 1), (2, 3, 2, 200)])
def test_every_size(shape):
    check(make_case(*shape))


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(70, 8), (70, 200)])
def test_many_programs_and_tiles(shape, monkeypatch):
    """What one program does in the other tests is shared: rows over three programs, several tiles each."""
    monkeypatch.setattr(triton_gelu, "FORWARD", (256, 6))
    monkeypatch.setattr(triton_gelu, "BACKWARD", (256, 6))
    check(make_case(*shape))


@pytest.mark.kernel
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_rows(impl):
    got = run(make_case(0, 8), "none", impl)
    assert got["y"].shape == got["dx"].shape == (0, 8)
    assert torch.equal(got["dbias"], torch.zeros(8, device=DEVICE))


@pytest.mark.kernel
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_over_the_whole_range_of_numbers(approximate):
    """Within a few units of fp32 at 1, or of the result's last digits; far out, nothing overflows."""
    far = [-3e38, -1e20, -1e5, -40.0, -0.0, 1e-30, 40.0, 1e20, 3e38]
    u = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor(far)]).to(DEVICE)[:, None].requires_grad_()
    y = bias_gelu(u, torch.zeros(1, device=DEVICE), approximate, impl="triton")
    y.sum().backward()
    exact = u.detach().double().requires_grad_()
    truth = F.gelu(exact, approximate=approximate)
    truth.sum().backward()
    torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=6e-7)
    near = slice(0, 4801)  # PyTorch's own gradient of the tanh form is NaN far out
    torch.testing.assert_close(u.grad[near].double(), exact.grad[near], rtol=1e-6, atol=1e-6)
    assert not u.grad.isinf().any()


@pytest.mark.kernel
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_nan_stays_where_it_is(approximate):
    case = make_case(6, 8)
    case["x"][2, 3] = float("nan")
    got = run(case, approximate, "triton")
    expected = torch.zeros(6, 8, dtype=torch.bool, device=DEVICE)
    expected[2, 3] = True
    assert torch.equal(got["y"].isnan(), expected)
    assert torch.equal(got["dx"].isnan(), expected)
    assert torch.equal(got["dbias"].isnan(), expected.any(dim=0))


@pytest.mark.kernel
def test_gives_the_same_numbers_every_time():
    """No sum is in the order in which programs happen to finish."""
    case = make_case(500, 24)
    first, second = (run(case, "none", "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.kernel
def test_any_strides_come_in():
    """As a mixer's transposed tokens, and a gradient that is expanded."""
    case = make_case(6, 8)
    x = case["x"].T.contiguous().T.requires_grad_()
    y = bias_gelu(x, case["bias"], impl="triton")
    y.sum().backward()
    expected = run({**case, "dy": torch.ones(6, 8, device=DEVICE)}, "none", "triton")
    assert torch.equal(y, expected["y"])
    assert torch.equal(x.grad, expected["dx"])


# --- As operators of PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_are_operators_of_pytorch():
    """opcheck: schema, fake tensors, autograd registration, compilation with dynamic shapes."""
    case = make_case(2, 3, 8)
    x, bias = case["x"].requires_grad_(), case["bias"].requires_grad_()
    torch.library.opcheck(torch.ops.fastofa.bias_gelu, (x, bias, "none"))
    torch.library.opcheck(torch.ops.fastofa.bias_gelu, (x.detach().double().requires_grad_(), bias, "tanh"))
    quick = {"test_utils": ("test_schema", "test_faketensor")}  # the others are in the forward operator's
    given = (case["dy"], x.detach(), bias.detach(), "none")
    torch.library.opcheck(torch.ops.fastofa.bias_gelu_backward, given, **quick)


@pytest.mark.kernel
def test_compiles_as_one_graph():
    results = []
    for compiled in (False, True):
        case = make_case(4, 6, 8)
        x, bias = case["x"].requires_grad_(), case["bias"].requires_grad_()

        def function(x: Tensor, bias: Tensor) -> Tensor:
            return 2 * bias_gelu(x, bias, impl="triton")

        run_it = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        y = run_it(x, bias)
        y.backward(case["dy"])
        results.append([y.detach(), x.grad, bias.grad])
    torch.testing.assert_close(*results)


# --- The twins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_twin_is_pytorchs_gelu(approximate):
    case = {name: t.double().cpu() for name, t in make_case(3, 5, 6).items()}
    torch.testing.assert_close(run(case, approximate, "torch"), run(case, approximate, None))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck(approximate):
    """Of the twins' closed forms, which are the operators on a CPU in float64."""
    case = {name: t.double().cpu().requires_grad_() for name, t in make_case(3, 4, 3).items()}
    torch.autograd.gradcheck(
        lambda x, bias: torch.ops.fastofa.bias_gelu(x, bias, approximate), (case["x"], case["bias"])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.long)}, r"x: expected floating \[..., C\], got torch.int64 \(3, 8\)"),
        ({"bias": torch.zeros(7)}, r"bias: expected floating \[8\], got torch.float32 \(7,\)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias: expected on cpu, got meta"),
        ({"approximate": "sigmoid"}, "approximate: expected one of"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64), "impl": "triton"}, "impl: expected"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(**{"x": torch.zeros(3, 8), "bias": torch.zeros(8), **change})
