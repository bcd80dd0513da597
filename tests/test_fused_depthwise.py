"""Models with the depthwise kernel and folded batch norms equal the same models without them."""

import copy

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn

from fastofa.student.exits import ConvExit
from fastofa.student.fused_depthwise import DepthwiseConv2d, FoldedBatchNorm2d, use_depthwise_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def fused(model: nn.Module, switched: int) -> nn.Module:
    model = copy.deepcopy(model)
    assert use_depthwise_kernel(model) == switched
    return model


def randomize(model: nn.Module) -> nn.Module:
    """Give batch norms weights, biases and running statistics other than 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(DEVICE, memory_format=torch.channels_last)


def step(model: nn.Module, images: Tensor, training: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after one forward and backward pass, by name."""
    model.train(training)
    images = images.clone().requires_grad_()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        out = model(images)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"out": out.detach(), "gradient of images": images.grad, **gradients, **buffers}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """To `tolerance` of each tensor's largest value, or of a tenth of the largest gradient if that is more.

    The gradient of a bias before a batch norm is 0 except for rounding errors.
    """
    assert got.keys() == expected.keys()
    floor = max(v.abs().max().item() for name, v in expected.items() if name.startswith("gradient")) / 10
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        error = (got[name] - value).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), floor), (name, error)


def make_exit() -> nn.Module:
    """Two SepConvs: four depthwise convolutions, of which the first has no batch norm before it."""
    return randomize(ConvExit(2, 8, 12, 5))


def make_blocks() -> nn.Module:
    """MobileNet's two kinds, with stride 1 and 2."""
    return randomize(
        nn.Sequential(
            DepthwiseSeparableConv(8, 8, act_layer=nn.ReLU6),
            InvertedResidual(8, 12, stride=2, exp_ratio=2, act_layer=nn.ReLU6),
            InvertedResidual(12, 12, exp_ratio=2, act_layer=nn.ReLU),
        )
    )


@pytest.mark.kernel
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "switched"), [(make_exit, 4), (make_blocks, 3)])
def test_with_kernels_the_results_are_the_same(make, switched, training):
    model, images = make(), torch.randn(3, 8, 8, 8).to(DEVICE)
    assert_same(step(fused(model, switched), images, training), step(model, images, training), 1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "switched"),
    [("mobilenetv2_035", 17), ("mobilenetv1_100", 13), ("mobilenetv4_conv_small_035", 9), ("efficientnet_lite0", 7)],
)
def test_mobilenets_are_the_same(name, switched, training):
    """In float64, which the twin supports: in fp32, some of so many activations are at a ReLU's kink."""
    model = randomize(timm.create_model(name, num_classes=5)).to("cpu", torch.float64)
    model.eval()  # some drop classes' inputs
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for each in (fused(model, switched), model):
        torch.manual_seed(0)
        results.append(step(each, images, training))
    assert_same(*results, 1e-8)


def test_the_features_of_the_stages_are_the_same():
    """A batch norm is folded only where its result goes nowhere else."""
    for name, switched in (("mobilenetv2_035", 17), ("mobilenetv1_100", 13)):
        model = randomize(timm.create_model(name, num_classes=5)).to("cpu", torch.float64).train()
        images, stages = torch.randn(2, 3, 64, 64, dtype=torch.float64), [1, 2, 3, 4]
        got, expected = (m.forward_intermediates(images, indices=stages) for m in (fused(model, switched), model))
        torch.testing.assert_close(got, expected)


@pytest.mark.kernel
def test_mixed_precision_is_as_close_to_fp32():
    """Under autocast to bf16, folding rounds less often."""
    model, images = make_exit(), torch.randn(3, 8, 8, 8).to(DEVICE)
    exact = step(copy.deepcopy(model), images, True)
    got = step(fused(model, 4), images, True, torch.bfloat16)
    plain = step(model, images, True, torch.bfloat16)
    for name, value in exact.items():
        assert got[name].dtype == plain[name].dtype, name
        error, allowed = ((other[name] - value).abs().max().item() for other in (got, plain))
        assert error <= 1.5 * allowed + 2**-7 * value.abs().max().item(), (name, error, allowed)


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    model, images = randomize(ConvExit(3, 8, 8, 5)), torch.randn(2, 8, 4, 4).to(DEVICE)
    compiled = fused(model, 2)
    compiled.compile(fullgraph=True)
    assert_same(step(compiled, images, training), step(model, images, training), 1e-4)


def test_parameters_names_and_copies_are_kept():
    """Checkpoints can be exchanged between both, and the moving average's copy is fused, too."""
    model = make_exit()
    switched = fused(model, 4)
    assert {k: v.shape for k, v in switched.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.load_state_dict(switched.state_dict())
    again = copy.deepcopy(switched)
    for kind, count in ((DepthwiseConv2d, 4), (FoldedBatchNorm2d, 3)):
        assert sum(isinstance(module, kind) for module in again.modules()) == count
    parameters = zip(again.parameters(), switched.parameters(), strict=True)
    assert all(a is not b and torch.equal(a, b) for a, b in parameters)


def test_switching_twice_changes_nothing():
    assert use_depthwise_kernel(fused(make_exit(), 4)) == 0


@pytest.mark.parametrize(
    ("name", "convolutions", "folded"),
    [
        ("mobilenetv1_100", 13, 9),
        ("mobilenetv2_100", 17, 17),
        ("mobilenetv3_large_100", 9, 2),
        ("mobilenetv4_conv_small", 9, 7),
        ("efficientnet_b0", 7, 0),
        ("efficientnet_lite0", 7, 7),
        ("resnet18", 0, 0),
    ],
)
def test_which_layers_are_switched(name, convolutions, folded):
    """Not 5x5, not in other kinds of blocks; batch norms only before ReLU and ReLU6, and within their stage."""
    model = fused(timm.create_model(name), convolutions)
    assert sum(isinstance(module, FoldedBatchNorm2d) for module in model.modules()) == folded


def test_one_value_per_channel_is_refused_as_by_batch_norm():
    model, images = make_exit(), torch.randn(1, 8, 2, 2).to(DEVICE)
    for each in (model, fused(model, 4)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            each.train()(images)
