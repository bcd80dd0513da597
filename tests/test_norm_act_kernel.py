"""Batch norm, residual, activation and maximum against float64: on a GPU if there is one, else in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.kernels import channel_statistics, norm_act, norm_act_pool, reference, triton_norm_act
from fastofa.kernels.triton_norm_act import tiling

# The interpreter computes what lies outside of the maps, too.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Beyond the error that the twin makes in the same dtype, relative to the greatest number of the truth. The interpreter
# cuts off where it stores bf16.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
NAMES = ("y", "running mean", "running variance", "dx", "dweight", "dbias", "dresidual")


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(
    B: int = 2, C: int = 8, H: int = 5, W: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Channels with means far from 0, weights of both signs, and one of 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, H, W, generator=generator) + 3 * torch.randn(C, 1, 1, generator=generator)
    weight = 0.5 + torch.rand(C, generator=generator)
    weight[1::3] *= -1
    weight[2::5] = 0
    case = {"x": x.to(dtype), "residual": torch.randn(B, C, H, W, generator=generator).to(dtype)}
    case |= {"weight": weight, "bias": torch.randn(C, generator=generator)}
    case |= {"running_mean": torch.randn(C, generator=generator), "running_var": torch.rand(C, generator=generator)}
    layout = {4: torch.channels_last, 1: torch.contiguous_format}
    return {name: t.to(DEVICE).contiguous(memory_format=layout[t.ndim]) for name, t in case.items()}


def run(case: dict[str, Tensor], impl: str, double: bool, pool: bool, residual: bool, **options) -> list[Tensor]:
    """Results, running statistics and all gradients, in float64, for the same gradient of y."""
    given = {name: t.double() if double else t.clone() for name, t in case.items()}
    leaves = {name: given[name].requires_grad_() for name in ("x", "weight", "bias", *["residual"] * residual)}
    given = {**given, **leaves}
    if not residual:
        del given["residual"]
    y = (norm_act_pool if pool else norm_act)(**given, **options, momentum=0.3, impl=impl)
    assert y.dtype == given["x"].dtype
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(case["x"].dtype).to(DEVICE)
    y.backward(slope.to(y.dtype))
    gradients = [leaf.grad for leaf in leaves.values()]
    return [t.double() for t in (y.detach(), given["running_mean"], given["running_var"], *gradients)]


def check(case: dict[str, Tensor], pool: bool = False, residual: bool = False, **options) -> None:
    """|truth - kernel| <= |truth - twin in the same dtype| + tolerance, for results, statistics and gradients."""
    exact, plain, got = (
        run(case, impl, double, pool, residual, **options)
        for impl, double in (("torch", True), ("torch", False), ("triton", False))
    )
    for name, truth, twin, value in zip(NAMES, exact, plain, got, strict=False):
        assert value.shape == truth.shape, name
        assert not value.isnan().any(), name
        error, allowed = (value - truth).abs().amax(), (twin - truth).abs().amax()
        rounded = name in ("y", "dx", "dresidual")
        tolerance = TOLERANCE[case["x"].dtype if rounded else torch.float32] * (1 + truth.abs().amax())
        assert error <= allowed + tolerance, (name, error.item(), allowed.item(), tolerance.item())


# --- Against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_equals_float64(dtype, residual, activation):
    case = make_case(dtype=dtype)
    if dtype != torch.float32 and residual and activation:  # rounding must not decide what passes
        away = F.batch_norm(case["x"].double(), None, None, case["weight"].double(), case["bias"].double(), True)
        near = (away + case["residual"].double()).abs()
        near = torch.minimum(near, (away + case["residual"].double() - 6).abs()) < 0.05
        case["residual"] = torch.where(near, case["residual"] + 0.5, case["residual"])
    check(case, residual=residual, activation=activation)


@pytest.mark.kernel
@pytest.mark.parametrize("C", [1, 3, 8, 24, 72])
@pytest.mark.parametrize(("B", "H", "W"), [(2, 1, 1), (1, 1, 4), (3, 5, 7)])
def test_every_size(C, B, H, W):
    check(make_case(B, C, H, W), activation="relu", residual=True)


@pytest.mark.kernel
def test_many_programs_and_tiles(monkeypatch):
    """Work that one program does in the other tests is split: rows over three programs, several tiles each."""
    for kernel, programs in (("STATISTICS", 6), ("SUMS", 6), ("APPLY", 4), ("GRADIENT", 4)):
        monkeypatch.setattr(triton_norm_act, kernel, (256, programs))
    monkeypatch.setattr(triton_norm_act, "BLOCK_P", 2)
    assert tiling(70, 200, (256, 6)).parts == 1
    assert tiling(70, 40, (256, 6)).parts == 2
    check(make_case(2, 8, 5, 7), activation="relu6", residual=True)
    check(make_case(2, 40, 5, 7), activation="relu")


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_maximum_equals_float64(dtype):
    check(make_case(2, 8, 6, 7, dtype), pool=True)


@pytest.mark.kernel
@pytest.mark.parametrize("C", [3, 24])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 4), (2, 1), (3, 3), (5, 6), (8, 8)])
def test_the_maximum_of_every_size(C, H, W):
    check(make_case(2, C, H, W), pool=True)


@pytest.mark.kernel
def test_the_maximum_over_several_tiles_strips_and_images(monkeypatch):
    monkeypatch.setattr("fastofa.kernels.triton_depthwise.ROWS", 2)
    check(make_case(1, 200, 9, 17), pool=True)
    monkeypatch.setattr("fastofa.kernels.triton_depthwise.PROGRAMS", 1)
    check(make_case(5, 8, 1, 4), pool=True)


@pytest.mark.kernel
@pytest.mark.parametrize("pool", [False, True])
def test_ties_are_pytorchs(pool):
    """x has three different values, so that windows contain ties; the first maximum gets the gradient."""
    case = make_case(2, 8, 7, 6)
    case["x"] = (
        torch.randint(-1, 2, case["x"].shape, device=DEVICE).float().contiguous(memory_format=torch.channels_last)
    )
    case["bias"] += 0.5
    check(case, pool=pool, **({} if pool else {"activation": "relu"}))


@pytest.mark.kernel
def test_a_mean_far_from_zero_loses_no_precision():
    """With mean 4096 and standard deviation 1, sums of squares would lose the variance in fp32."""
    case = make_case(4, 8, 6, 6)
    case["x"] = case["x"] + 4096
    mean, var = channel_statistics(case["x"], impl="triton")
    expected = torch.var_mean(case["x"].double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close((var.double(), mean.double()), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.kernel
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pool", [False, True])
def test_values_that_are_not_finite_affect_only_their_channel(number, pool):
    case = make_case(2, 8, 4, 4)
    del case["residual"]
    case["x"][1, 3, 2, 1] = number
    y = (norm_act_pool if pool else norm_act)(**case, impl="triton", **({} if pool else {"activation": "relu"}))
    assert y[:, 3].isnan().all()
    assert not y[:, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


@pytest.mark.kernel
@pytest.mark.parametrize("pool", [False, True])
def test_results_are_deterministic(pool):
    """No sum depends on the order in which programs finish."""
    case = make_case(3, 24, 8, 8)
    first, second = (run(case, "triton", False, pool, residual=not pool) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("pool", [False, True])
def test_any_memory_format_is_accepted_and_channels_last_returned(pool):
    case = make_case()
    del case["residual"]
    function = norm_act_pool if pool else norm_act
    expected = function(**{k: t.clone() for k, t in case.items()}, impl="triton")
    got = function(**{**case, "x": case["x"].contiguous()}, impl="triton")
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.kernel
def test_statistics_have_a_gradient():
    case = make_case()

    def gradient(impl: str, dtype: torch.dtype) -> Tensor:
        x = case["x"].to(dtype, copy=True).requires_grad_()
        mean, var = channel_statistics(x, impl)
        (mean * torch.arange(8, device=DEVICE) + var.sqrt()).sum().backward()
        return x.grad.double()

    torch.testing.assert_close(gradient("triton", torch.float32), gradient("torch", torch.float64), rtol=0, atol=1e-6)


# --- As operators of PyTorch ------------------------------------------------------------------------------------------


def arguments(case: dict[str, Tensor]) -> tuple[Tensor, ...]:
    mean, var = reference.channel_statistics(case["x"])
    return mean, var, case["weight"], case["bias"]


@pytest.mark.kernel
def test_are_operators_of_pytorch():
    """opcheck: schema, fake tensors, autograd registration, compilation with dynamic shapes."""
    case = make_case(2, 3, 3, 2)
    x, (mean, var, weight, bias) = case["x"].requires_grad_(), arguments(make_case(2, 3, 3, 2))
    ops = torch.ops.fastofa
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(ops.channel_statistics, (x,))
    running = case["running_mean"], case["running_var"]
    torch.library.opcheck(ops.update_statistics, (x.detach(), *running, 0.1))
    residual = case["residual"].requires_grad_()
    torch.library.opcheck(ops.norm_act, (x, mean, var, weight, bias, residual, 1e-5, "relu", None))
    torch.library.opcheck(ops.norm_act, (x, mean, var, weight, bias, None, 1e-5, None, None))
    torch.library.opcheck(ops.norm_act_pool, (x, mean, var, weight, bias, 1e-5, None))
    quick = {"test_utils": ("test_schema", "test_faketensor")}  # the others are in the forward operators'
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    y = case["residual"].detach()
    norm = (mean, var, weight, bias)
    torch.library.opcheck(ops.norm_act_sums, (y, x, y, *norm, 1e-5, "relu6"), **quick)
    torch.library.opcheck(ops.norm_act_sums, (y, x, None, *norm, 1e-5, "relu"), **quick)
    torch.library.opcheck(ops.norm_act_gradient, (y, x, *norm, weight, bias, 1e-5, "relu"), **quick)
    pooled, _, places = ops.norm_act_pool(x, *norm, 1e-5, None)
    given = (pooled, places, x, mean, var, weight, weight, bias, 1e-5)
    torch.library.opcheck(ops.norm_act_pool_gradient, given, **quick)


@pytest.mark.kernel
@pytest.mark.parametrize("pool", [False, True])
def test_compiles_as_one_graph(pool):
    results = []
    for compiled in (False, True):
        case = make_case(2, 8, 4, 4)
        if pool:
            del case["residual"]

        def function(case: dict[str, Tensor]) -> Tensor:
            return 2 * (norm_act_pool if pool else norm_act)(**case, impl="triton")

        leaves = [t.requires_grad_() for name, t in case.items() if "running" not in name]
        run_it = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        y = run_it(case)
        y.square().sum().backward()
        results.append([y.detach(), case["running_mean"], *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


# --- The twins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_twin_is_pytorchs_batch_norm(training, residual):
    case = {name: t.double().cpu() for name, t in make_case().items()}
    other = case.pop("residual")
    kept = {name: t.clone() for name, t in case.items()}
    y = norm_act(**case, training=training, activation="relu6", residual=other if residual else None)
    expected = F.batch_norm(*(kept[k] for k in ("x", "running_mean", "running_var", "weight", "bias")), training)
    torch.testing.assert_close(y, F.relu6(expected + other if residual else expected))
    torch.testing.assert_close(case, kept)
    pooled = norm_act_pool(**case, training=training)
    expected = F.batch_norm(*(kept[k] for k in ("x", "running_mean", "running_var", "weight", "bias")), training)
    torch.testing.assert_close(pooled, F.max_pool2d(F.relu(expected), 3, 2, 1))


@pytest.mark.parametrize("op", ["norm_act", "norm_act with residual", "norm_act_pool"])
def test_gradcheck(op):
    """The closed forms of the twins, which implement the operators on a CPU, through the batch statistics."""
    case = {name: t.double().cpu() for name, t in make_case(2, 3, 3, 4).items()}
    x, weight, bias, residual = (case[k].requires_grad_() for k in ("x", "weight", "bias", "residual"))

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, var = reference.channel_statistics(x.detach())
        if op == "norm_act_pool":
            return torch.ops.fastofa.norm_act_pool(x, mean, var, weight, bias, 1e-5, None)[0]
        return torch.ops.fastofa.norm_act(x, mean, var, weight, bias, residual, 1e-5, "relu6", None)

    with torch.no_grad():
        weight[weight == 0] = 0.7  # where nothing is equal
    torch.autograd.gradcheck(function, (x, weight, bias, *[residual] * ("residual" in op)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, r"x: expected floating \[B, C, H, W\], got torch.float32 \(2, 8, 3\)"),
        ({"weight": torch.zeros(7)}, r"weight: expected floating \[8\], got torch.float32 \(7,\)"),
        ({"residual": torch.zeros(2, 8, 5, 6)}, r"residual: expected torch.float32 \(2, 8, 5, 7\) on"),
        ({"activation": "gelu"}, "activation: expected one of"),
        ({"x": torch.zeros(1, 8, 1, 1), "residual": None}, "Expected more than 1 value per channel when training"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    case = {name: t.cpu() for name, t in make_case().items()}
    with pytest.raises(ValueError, match=message):
        norm_act(**{**case, **change})
