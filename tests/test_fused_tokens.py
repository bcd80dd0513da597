"""Token models whose MLPs run the kernel, against the same models as made."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import nn

from fastofa.student.exits import TokenExit
from fastofa.student.fused_tokens import FusedMlp, use_token_kernels
from test_fused_depthwise import DEVICE, assert_same, step

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
MIXER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 2, "num_classes": 5}
RESMLP: dict[str, Any] = {**MIXER, "mlp_ratio": 4, "block_layer": ResBlock, "norm_layer": Affine}
SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 2),
}  # fmt: skip
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# A student of timm's, how it is made small, and the number of its MLPs that are switched. timm's own names of mixers
# cannot be made small, their class can.
STUDENTS: list[tuple[str | type, dict[str, Any], int]] = [
    (MlpMixer, MIXER, 4),
    (MlpMixer, RESMLP, 2),
    ("deit_tiny_patch16_224", {**VIT, "drop_path_rate": 0.1}, 2),
    ("vit_so400m_patch14_siglip_224", {**VIT, "mlp_ratio": 3}, 3),  # the tanh form; also in its attention pooling
    ("swin_tiny_patch4_window7_224", SWIN, 3),
    ("convnext_atto", CONVNEXT, 0),  # 1x1 convolutions
    ("convnext_tiny", {**CONVNEXT, "act_layer": "gelu_tanh"}, 4),
    ("test_vit", {"img_size": 32, "act_layer": "relu"}, 0),
    ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}, 0),
]


def create(student: str | type, options: dict[str, Any]) -> nn.Module:
    if isinstance(student, str):
        return timm.create_model(student, num_classes=5, **options)
    return student(**options)


def fused(model: nn.Module, switched: int) -> nn.Module:
    model = copy.deepcopy(model)
    assert use_token_kernels(model) == switched
    return model


@pytest.mark.parametrize(("student", "options", "switched"), STUDENTS)
def test_timm_students_are_the_same(student, options, switched):
    """Outputs, gradients and names; in float64, which is the twin's."""
    model = create(student, options).to("cpu", torch.float64)
    other = fused(model, switched)
    assert use_token_kernels(other) == 0
    assert list(other.state_dict()) == list(model.state_dict())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        results = []
        for each in (other, model):
            torch.manual_seed(0)
            results.append(step(each, images, training))
        assert_same(*results, 1e-9)


def make_model() -> nn.Module:
    """A student's backbone and an exit, in one small model."""
    torch.manual_seed(1)
    mixer = MlpMixer(**{**MIXER, "num_classes": 0, "global_pool": ""})
    return nn.Sequential(mixer, TokenExit(4, (4, 4), 24, 16, 5, class_token=False)).to(DEVICE)


@pytest.mark.kernel
def test_with_kernels_the_results_are_the_same():
    model, images = make_model(), torch.randn(2, 3, 32, 32).to(DEVICE)
    both = fused(model, 5)
    expected = step(copy.deepcopy(model).double(), images.double(), True)
    plain, got = step(model, images, True), step(both, images, True)
    for name, value in expected.items():
        error, allowed = ((other[name] - value).abs().max().item() for other in (got, plain))
        assert error <= 4 * allowed + 1e-5 * max(value.abs().max().item(), 0.1), (name, error, allowed)


@pytest.mark.kernel
def test_mixed_precision_is_as_close_to_fp32():
    """Under autocast to bf16, with the same dtypes everywhere."""
    model, images = make_model(), torch.randn(2, 3, 32, 32).to(DEVICE)
    exact = step(copy.deepcopy(model), images, True)
    got = step(fused(model, 5), images, True, torch.bfloat16)
    plain = step(model, images, True, torch.bfloat16)
    for name, value in exact.items():
        assert got[name].dtype == plain[name].dtype, name
        error, allowed = ((other[name] - value).norm().item() for other in (got, plain))
        assert error <= 2 * allowed + 2**-7 * value.norm().item(), (name, error, allowed)


@pytest.mark.slow
@pytest.mark.kernel
def test_compiles_without_a_graph_break():
    model, images = make_model(), torch.randn(2, 3, 32, 32).to(DEVICE)
    compiled = fused(model, 5)
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, images, True), step(model, images, True), 1e-4)


@pytest.mark.slow
def test_the_twin_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr("fastofa.student.fused_tokens.can_run_triton", lambda x: False)
    model, images = make_model(), torch.randn(2, 3, 32, 32).to(DEVICE)
    compiled = fused(model, 5)
    compiled.compile(fullgraph=True)
    assert_same(step(compiled, images, True), step(model, images, True), 1e-4)


def test_copies_are_fused_and_a_checkpoint_goes_either_way():
    model = make_model()
    switched = fused(model, 5)
    again = copy.deepcopy(switched)
    model.load_state_dict(switched.state_dict())
    assert [type(m) for m in again.modules()] == [type(m) for m in switched.modules()]
    assert sum(type(m) is FusedMlp for m in again.modules()) == 5


@pytest.mark.parametrize(
    "mlp",
    [
        Mlp(8, bias=False),
        Mlp(8, act_layer=nn.SiLU),
        Mlp(8, use_conv=True),
        GluMlp(8, hidden_features=8),
    ],
)
def test_other_mlps_stay(mlp):
    kind = type(mlp)
    assert use_token_kernels(mlp) == 0
    assert type(mlp) is kind


def test_dropout_and_the_norm_of_an_mlp_stay():
    model = Mlp(8, norm_layer=nn.LayerNorm, drop=0.5).double()
    other, x = fused(model, 1), torch.randn(2, 3, 8, dtype=torch.float64)
    results = []
    for each in (model, other):
        torch.manual_seed(0)
        results.append(each(x))
    torch.testing.assert_close(*results)
