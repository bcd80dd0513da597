"""Models with the kernels for batch norms and stems equal the same models without them."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from fastofa.student.exits import ConvExit
from fastofa.student.fused_depthwise import FoldedBatchNorm2d, use_depthwise_kernel
from fastofa.student.fused_norms import NormAct2d, use_norm_kernels
from fastofa.student.fused_stem import NormActPool2d, StridedConv2d, use_stem_kernels
from test_fused_depthwise import DEVICE, assert_same, randomize, step

# The interpreter computes what lies outside of the maps, too.
NOT_FINITE = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def fused(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    use_stem_kernels(model)
    use_norm_kernels(model)
    return model


# Student and how it is made small; its convolutions of pixels and pooled stems; its batch norms that are switched, and
# those that stay.
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8}
STUDENTS: list[tuple[str, dict[str, Any], int, int, int]] = [
    ("resnet18", RESNET, 2, 12, 0),
    ("resnet50", RESNET, 2, 16, 0),
    ("resnet26d", RESNET, 2, 18, 0),  # a stem of three convolutions
    ("seresnet18", RESNET, 2, 12, 0),  # attention before the residual
    ("mobilenetv2_035", {}, 1, 52, 0),
    ("test_efficientnet", {}, 1, 4, 9),  # SiLU
    ("regnety_002", {}, 1, 44, 0),
    ("vgg11_bn", {"mlp_ratio": 1 / 64}, 0, 8, 0),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 1, 0, 0),
    ("test_vit", {"img_size": 32}, 1, 0, 0),
]


@pytest.mark.parametrize(("name", "options", "stems", "switched", "left"), STUDENTS)
def test_timm_students_are_the_same(name, options, stems, switched, left):
    """Outputs, gradients, running statistics and names; in float64, which the twins support."""
    model = randomize(timm.create_model(name, num_classes=5, **options)).to("cpu", torch.float64)
    model.eval()  # some drop classes' inputs
    other = copy.deepcopy(model)
    assert use_stem_kernels(other) == stems
    assert use_norm_kernels(other) == switched
    assert use_stem_kernels(other) == use_norm_kernels(other) == 0
    norms = [m for m in other.modules() if isinstance(m, nn.BatchNorm2d | BatchNormAct2d)]
    assert sum(not isinstance(m, NormAct2d | NormActPool2d) for m in norms) == left
    assert list(other.state_dict()) == list(model.state_dict())
    # Batch norm of a few nearly equal values, as of a last stage of one pixel, would magnify rounding a million times.
    side = 32 if name == "test_vit" else 96
    images = torch.randn(4, 3, side, side, dtype=torch.float64)
    for training in (True, False):
        torch.manual_seed(0)
        got = step(other, images, training)
        torch.manual_seed(0)
        assert_same(got, step(model, images, training), 1e-7)


def make_model() -> nn.Module:
    """One small model: a stem with pooling, two residual blocks, and an exit's batch norms."""
    backbone = timm.create_model("resnet18", num_classes=0, global_pool="", **RESNET)
    return randomize(nn.Sequential(backbone, ConvExit(3, 32, 8, 5)))


@pytest.mark.kernel
@NOT_FINITE
def test_with_kernels_the_results_are_the_same():
    """Together with the exits' depthwise kernel, which keeps its batch norms."""
    torch.manual_seed(1)
    model, images = make_model(), torch.randn(2, 3, 48, 48).to(DEVICE)
    both = copy.deepcopy(model)
    use_depthwise_kernel(both)
    both = fused(both)
    kinds = [type(m) for m in both.modules()]
    assert {NormAct2d, NormActPool2d, FoldedBatchNorm2d, StridedConv2d} <= set(kinds)
    expected = step(copy.deepcopy(model).double(), images.double(), True)
    plain, got = step(model, images, True), step(both, images, True)
    for name, value in expected.items():
        error, allowed = ((other[name] - value).abs().max().item() for other in (got, plain))
        assert error <= 4 * allowed + 1e-4 * max(value.abs().max().item(), 0.1), (name, error, allowed)


@pytest.mark.kernel
@pytest.mark.slow
@NOT_FINITE
def test_compiles_without_a_graph_break():
    model, images = make_model(), torch.randn(2, 3, 48, 48).to(DEVICE)
    compiled = fused(model)
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, images, True), step(fused(model), images, True), 1e-4)


def test_copies_are_fused_and_checkpoints_can_be_exchanged():
    model = make_model()
    switched = fused(model)
    again = copy.deepcopy(switched)
    model.load_state_dict(switched.state_dict())
    assert [type(m) for m in again.modules()] == [type(m) for m in switched.modules()]


@pytest.mark.parametrize("kind", ["without weights", "cumulative", "dropped after"])
def test_other_batch_norms_are_not_replaced(kind):
    norm = {
        "without weights": lambda: nn.BatchNorm2d(4, affine=False),
        "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
        "dropped after": lambda: BatchNormAct2d(4, drop_layer=nn.Dropout),
    }[kind]()
    model = nn.Sequential(norm, nn.ReLU())
    assert use_norm_kernels(model) == 0
    assert type(model[1]) is nn.ReLU


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 4, 7, 2, 3),
        nn.Conv2d(3, 4, 3, 1, 1),
        nn.Conv2d(3, 4, 1, 2),
        nn.Conv2d(3, 3, 3, 2, 1, groups=3),
        nn.Conv2d(3, 4, 3, 2, 1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, 2, (1, 0)),
        nn.Conv2d(3, 4, 3, (2, 3), 1),
    ],
)
def test_other_convolutions_are_not_replaced(conv):
    assert use_stem_kernels(nn.Sequential(conv)) == 0
