"""Layer norm with a residual against float64: on a GPU if there is one, else in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.kernels import layer_norm, reference, triton_layer_norm

# The interpreter computes what lies outside of the rows, too.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Beyond the error that PyTorch makes in the same dtypes, relative to the greatest number of the truth. The interpreter
# cuts off where it stores bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned():
    """What a kernel forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(
    *shape: int, dtype: torch.dtype = torch.float32, residual: torch.dtype | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Rows with means far from 0, weights of both signs."""
    generator = torch.Generator().manual_seed(seed)
    case = {"x": torch.randn(shape, generator=generator) + 3 * torch.randn(*shape[:-1], 1, generator=generator)}
    case["x"] = case["x"].to(dtype)
    if residual is not None:
        case["residual"] = torch.randn(shape, generator=generator).to(residual)
    case |= {name: torch.randn(shape[-1], generator=generator) for name in ("weight", "bias")}
    return {name: t.to(DEVICE) for name, t in case.items()}


def run(case: dict[str, Tensor], impl: str | None, dtype: torch.dtype, with_stream: bool = True) -> dict[str, Tensor]:
    """Results and gradients, by the kernel, or by PyTorch's layer norm (`impl` None)."""
    given = {name: t.clone().requires_grad_() for name, t in case.items()}
    if impl is None:
        x, residual = given["x"], given.get("residual")
        stream = x if residual is None else x + residual
        wide = torch.promote_types(stream.dtype, torch.float32)
        y = F.layer_norm(stream.to(wide), x.shape[-1:], given["weight"], given["bias"], 1e-6).to(dtype)
    else:
        stream, y = layer_norm(**given, eps=1e-6, dtype=dtype, impl=impl)
    assert y.dtype == dtype
    assert stream.dtype == torch.promote_types(case["x"].dtype, case.get("residual", case["x"]).dtype)
    slopes = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(DEVICE)
    torch.autograd.backward(
        [stream, y] if with_stream else [y], [slopes[0].to(stream.dtype), slopes[1].to(dtype)][not with_stream :]
    )
    return {"stream": stream.detach(), "y": y.detach(), **{f"d{name}": t.grad for name, t in given.items()}}


def check(case: dict[str, Tensor], dtype: torch.dtype = torch.float32, with_stream: bool = True) -> None:
    """|truth - kernel| <= |truth - PyTorch in the same dtypes| + tolerance."""
    exact = run({name: t.double() for name, t in case.items()}, None, torch.float64, with_stream)
    plain, got = (run(case, impl, dtype, with_stream) for impl in (None, "triton"))
    for name, truth in exact.items():
        assert got[name].shape == truth.shape, name
        assert got[name].dtype == plain[name].dtype, name
        error, allowed = ((other[name].double() - truth).abs().amax() for other in (got, plain))
        tolerance = TOLERANCE[got[name].dtype] * (1 + truth.abs().amax())
        assert error <= allowed + tolerance, (name, error.item(), allowed.item(), tolerance.item())


# --- Against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
def test_equals_float64(dtype, residual):
    check(make_case(3, 5, 24, dtype=dtype, residual=residual), torch.promote_types(dtype, residual or dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("with_stream", [True, False])
def test_a_stream_of_fp32_and_a_norm_of_bf16(with_stream):
    """As in a transformer under autocast; without a gradient of the stream, as before a head."""
    check(make_case(7, 24, residual=torch.bfloat16), torch.bfloat16, with_stream)
    check(make_case(7, 24), torch.bfloat16, with_stream)


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 2), (3, 7), (2, 3, 192), (1, 384), (130, 33), (2, 768), (1, 3000)])
def test_every_size(shape):
    check(make_case(*shape, residual=torch.float32))


@pytest.mark.kernel
def test_many_programs_and_tiles(monkeypatch):
    """What one program does in the other tests is shared: rows over three programs, several tiles each."""
    monkeypatch.setattr(triton_layer_norm, "ELEMENTS", 64)
    monkeypatch.setattr(triton_layer_norm, "PROGRAMS", 3)
    check(make_case(71, 24, residual=torch.bfloat16), torch.bfloat16)


@pytest.mark.kernel
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_rows(impl):
    got = run(make_case(0, 8, residual=torch.float32), impl, torch.float32)
    assert got["stream"].shape == got["y"].shape == got["dx"].shape == (0, 8)
    assert torch.equal(got["dweight"], torch.zeros(8, device=DEVICE))


@pytest.mark.kernel
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(number):
    case = make_case(6, 8)
    case["x"][2, 3] = number
    got = run(case, "triton", torch.float32)
    assert got["y"][2].isnan().all()
    assert not got["y"][[0, 1, 3, 4, 5]].isnan().any()
    assert got["dx"][2].isnan().all()
    assert not got["dx"][[0, 1, 3, 4, 5]].isnan().any()
    assert got["dweight"].isnan().all()


@pytest.mark.kernel
def test_gives_the_same_numbers_every_time():
    """No sum is in the order in which programs happen to finish."""
    case = make_case(300, 24, residual=torch.float32)
    first, second = (run(case, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.kernel
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_only_the_stream_is_used(residual):
    case = {name: t.requires_grad_() for name, t in make_case(3, 8, residual=residual).items()}
    layer_norm(**case, impl="triton")[0].sum().backward()
    assert torch.equal(case["x"].grad, torch.ones(3, 8, device=DEVICE))
    assert case["weight"].grad is None


# --- As operators of PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_are_operators_of_pytorch():
    """opcheck: schema and fake tensors; the gradient is an autograd function over them."""
    case = make_case(2, 3, 8, residual=torch.float32)
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    x, residual, weight, bias = (case[name] for name in ("x", "residual", "weight", "bias"))
    ops = torch.ops.fastofa
    torch.library.opcheck(ops.layer_norm, (x, residual, weight, bias, 1e-5, torch.bfloat16), **quick)
    torch.library.opcheck(ops.layer_norm, (x, None, weight, bias, 1e-5, torch.float32), **quick)
    doubles = [t.cpu().double() for t in (x, residual, weight, bias)]  # a GPU never gets any: they are the twin's
    torch.library.opcheck(ops.layer_norm, (*doubles, 1e-5, torch.float64), **quick)
    stream, y, mean, inverse = ops.layer_norm(x, residual, weight, bias, 1e-5, torch.bfloat16)
    given = (stream, weight, mean, inverse, torch.float32)
    torch.library.opcheck(ops.layer_norm_backward, (y, stream, *given, torch.bfloat16), **quick)
    torch.library.opcheck(ops.layer_norm_backward, (y, None, *given, None), **quick)


@pytest.mark.kernel
@pytest.mark.parametrize("residual", [None, torch.bfloat16])
def test_compiles_as_one_graph(residual):
    results = []
    for compiled in (False, True):
        case = {name: t.requires_grad_() for name, t in make_case(4, 6, 8, residual=residual).items()}

        def function(case: dict[str, Tensor]) -> Tensor:
            stream, y = layer_norm(**case, dtype=torch.bfloat16, impl="triton")
            return stream + 2 * y

        run_it = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        out = run_it(case)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in case.values())])
    torch.testing.assert_close(*results)


# --- The twins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [None, torch.float32])
def test_the_twin_is_pytorchs_layer_norm(residual):
    case = {name: t.double().cpu() for name, t in make_case(3, 5, 6, residual=residual).items()}
    torch.testing.assert_close(run(case, "torch", torch.float64), run(case, None, torch.float64))


@pytest.mark.parametrize("with_stream", [True, False])
def test_the_twins_closed_form_is_autograds(with_stream):
    x, dy, dstream = torch.randn(3, 4, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 5, dtype=torch.float64).unbind()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = (F.layer_norm(x, (5,), weight, bias, 1e-3) * dy).sum() + with_stream * (x * dstream).sum()
    expected = torch.autograd.grad(loss, leaves)
    x, weight = x.detach(), weight.detach()
    got = reference.layer_norm_gradients(
        dy, dstream if with_stream else None, x, weight, *reference.row_statistics(x, 1e-3)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.long)}, r"x: expected floating \[..., C\], got torch.int64 \(3, 8\)"),
        ({"weight": torch.zeros(7)}, r"weight: expected floating \[8\] on cpu, got torch.float32 \[7\] on cpu"),
        ({"residual": torch.zeros(1, 8)}, r"residual: expected floating \[3, 8\] on cpu, got"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64), "impl": "triton"}, "impl: expected"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**{"x": torch.zeros(3, 8), "weight": torch.zeros(8), "bias": torch.zeros(8), **change})
