"""Batch norms that share their statistics between two ranks with half of a batch each, against one process."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastofa.kernels import norm_act, norm_act_pool
from fastofa.kernels.norm_act import batch_statistics
from fastofa.student.exits import ConvExit
from fastofa.student.fused_depthwise import FoldedBatchNorm2d, use_depthwise_kernel
from fastofa.student.fused_norms import NormAct2d, use_norm_kernels
from fastofa.student.fused_stem import NormActPool2d, use_stem_kernels
from fastofa.student.shared_norms import SharedBatchNorm2d, SharedBatchNormAct2d, share_statistics
from fastofa.system.errors import BadInput
from test_distributed import Ranks
from test_fused_depthwise import assert_same, randomize, step
from test_norm_act_kernel import make_case

HALF = 3  # images of a rank
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8}
KINDS = {SharedBatchNorm2d, SharedBatchNormAct2d, NormAct2d, NormActPool2d, FoldedBatchNorm2d}
MODELS = [  # name, with kernels, compiled as one graph
    ("resnet18", False, False),
    ("resnet18", False, True),
    ("resnet18", True, False),
    ("resnet18", True, True),
    ("exit", True, True),
    ("mobilenetv2_035", True, False),
    ("test_efficientnet", False, True),
    ("test_efficientnet", True, False),  # whose SiLU stays beside the batch norms
]
FUNCTIONS = ["norm_act", "norm_act with residual", "norm_act_pool", "batch_statistics"]
PER_IMAGE = {"out", "dx", "dresidual"}  # results that are split over the ranks; gradients are added


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What each of two connected ranks computed of its half of the batch: results by model and by function."""
    folder = tmp_path_factory.mktemp("halves")
    with Ranks(2, folder, _compute_halves, folder) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return first, second


def _compute_halves(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    found: dict[Any, Any] = {model: train_half(rank, *model) for model in MODELS}
    if not torch.cuda.is_available():  # on a GPU, Triton's interpreter is off
        found |= {function: run_function(rank, function, torch.float32, "triton") for function in FUNCTIONS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def joined(halves: tuple[dict, dict], case: Any) -> dict[str, Tensor]:
    """The results of the whole batch."""
    first, second = (half[case] for half in halves)
    assert first.keys() == second.keys()
    found = {}
    for name, value in first.items():
        if name in PER_IMAGE:
            found[name] = torch.cat([value, second[name]])
        elif name.startswith("gradient"):
            found[name] = value + second[name]
        else:
            assert torch.equal(value, second[name]), name
            found[name] = value
    return found


# --- Models -----------------------------------------------------------------------------------------------------------


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "exit":
        return randomize(ConvExit(2, 3, 12, 5)).cpu().double()
    options = RESNET if name == "resnet18" else {}
    return randomize(timm.create_model(name, num_classes=5, **options)).cpu().double()


def make_images() -> Tensor:
    """Images with unlike means, so that the halves' statistics differ."""
    images = torch.randn(2 * HALF, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return images + torch.arange(2 * HALF, dtype=torch.float64)[:, None, None, None]


def train(model: nn.Module, part: slice) -> dict[str, Tensor]:
    """Results of one forward and backward pass on a part of the images."""
    model.train()
    images = make_images()[part].requires_grad_()
    out = model(images)
    slopes = torch.linspace(-1, 1, 2 * HALF * out.shape[1], dtype=out.dtype).view(2 * HALF, -1)
    (out * slopes[part]).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {"out": out.detach(), "dx": images.grad, **gradients, **dict(model.named_buffers())}


def train_half(rank: int, name: str, kernels: bool, compiled: bool) -> dict[str, Tensor]:
    model = make_model(name)
    if kernels:
        for switch in (use_depthwise_kernel, use_stem_kernels, use_norm_kernels):
            switch(model)
    share_statistics(model, dist.group.WORLD.group_name)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds <= KINDS, kinds
    if compiled:
        model.compile(fullgraph=True, backend="aot_eager")
    return train(model, slice(rank * HALF, (rank + 1) * HALF))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_model_on_two_ranks_is_the_model_with_the_whole_batch(halves, model):
    """Outputs, gradients and running statistics, in float64, which is the twins'."""
    assert_same(joined(halves, model), train(make_model(model[0]), slice(None)), 1e-7)


def test_names_and_evaluation_stay():
    model = make_model("test_efficientnet")
    shared = copy.deepcopy(model)
    share_statistics(shared, "nobody")
    assert list(shared.state_dict()) == list(model.state_dict())
    assert_same(step(shared, make_images(), False), step(model, make_images(), False), 1e-12)
    assert {type(m) for m in copy.deepcopy(shared).modules()} == {type(m) for m in shared.modules()}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=None)])
def test_other_batch_norms_are_refused(norm):
    with pytest.raises(BadInput, match=rf"sync-bn: expected .* got 0, a {type(norm).__name__}, .*; leave sync-bn out"):
        share_statistics(nn.Sequential(norm), "nobody")


# --- Kernels ----------------------------------------------------------------------------------------------------------


def run_function(rank: int | None, function: str, dtype: torch.dtype, impl: str) -> dict[str, Tensor]:
    """Results for a rank's half of a batch or, without a rank, for the whole batch; the halves' means are far apart."""
    case = {name: t.cpu() for name, t in make_case(4, 8, 6, 5).items()}
    case["x"][:2] += 300 * torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(2))
    part, group = slice(None), None
    if rank is not None:
        part, group = slice(2 * rank, 2 * rank + 2), dist.group.WORLD.group_name
    x, residual = (case[name][part].to(dtype).requires_grad_() for name in ("x", "residual"))
    weight, bias = (case[name].to(dtype).requires_grad_() for name in ("weight", "bias"))
    running = {name: case[name].to(dtype) for name in ("running_mean", "running_var")}
    options: dict[str, Any] = {**running, "momentum": 0.3, "group": group, "impl": impl}
    if function == "batch_statistics":
        mean, var = batch_statistics(x, **options)
        out = x * (weight * var.rsqrt())[:, None, None] - (mean * bias)[:, None, None]
    elif function == "norm_act_pool":
        out = norm_act_pool(x, weight, bias, **options)
    else:
        other = residual if "residual" in function else None
        out = norm_act(x, weight, bias, **options, activation="relu", residual=other)
    slopes = torch.randn(4, *out.shape[1:], generator=torch.Generator().manual_seed(3)).to(dtype)
    out.backward(slopes[part])
    found = {"out": out.detach(), "dx": x.grad, "gradient of weight": weight.grad, "gradient of bias": bias.grad}
    found |= {"dresidual": residual.grad} if "residual" in function else {}
    return {name: value.double() for name, value in (found | running).items()}


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU for each of two ranks, or the interpreter")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_on_two_ranks_equal_float64_with_the_whole_batch(halves, function):
    """As closely as the twin in fp32 with the whole batch."""
    got = joined(halves, function)
    exact, plain = (run_function(None, function, dtype, "torch") for dtype in (torch.float64, torch.float32))
    for name, truth in exact.items():
        error, allowed = ((other[name] - truth).abs().max() for other in (got, plain))
        assert error <= allowed + 1e-5 * (1 + truth.abs().max()), (name, error, allowed)
