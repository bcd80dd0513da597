"""Token models whose blocks run the layer norm kernel, against the same models as made."""

import copy
from functools import partial

import pytest
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import Block
from torch import nn

from fastofa.student.fused_layer_norms import use_layer_norm_kernels
from test_fused_depthwise import DEVICE, assert_same, step
from test_fused_tokens import MIXER, STUDENTS, create, make_model

# The number of blocks that are switched, by student.
BLOCKS = {
    "deit_tiny_patch16_224": 2,
    "vit_so400m_patch14_siglip_224": 2,
    "swin_tiny_patch4_window7_224": 3,
    "test_vit": 6,
}


def fused(model: nn.Module, switched: int) -> nn.Module:
    model = copy.deepcopy(model)
    assert use_layer_norm_kernels(model) == switched
    return model


@pytest.mark.parametrize(("student", "options"), [(student, options) for student, options, _ in STUDENTS])
def test_timm_students_are_the_same(student, options):
    """Outputs, gradients and names; in float64, which is the twin's."""
    model = create(student, options).to("cpu", torch.float64)
    switched = BLOCKS.get(student, 2 if student is MlpMixer and options is MIXER else 0)
    other = fused(model, switched)
    assert use_layer_norm_kernels(other) == 0
    assert list(other.state_dict()) == list(model.state_dict())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        results = []
        for each in (other, model):
            torch.manual_seed(0)
            results.append(step(each, images, training))
        assert_same(*results, 1e-9)


@pytest.mark.kernel
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_with_kernels_the_results_are_as_close_to_float64(precision):
    """In fp32 and under autocast to bf16, with the same dtypes everywhere."""
    model, images = make_model(), torch.randn(2, 3, 32, 32).to(DEVICE)
    exact = step(copy.deepcopy(model).double(), images.double(), True)
    got = step(fused(model, 3), images, True, precision)
    plain = step(model, images, True, precision)
    for name, value in exact.items():
        assert got[name].dtype == plain[name].dtype, name
        error, allowed = ((other[name] - value).norm().item() for other in (got, plain))
        rounding = 1e-5 if precision is None else 2**-7
        assert error <= 2 * allowed + rounding * max(value.norm().item(), 0.1), (name, error, allowed)


@pytest.mark.slow
@pytest.mark.kernel
def test_compiles_without_a_graph_break():
    model, images = make_model(), torch.randn(2, 3, 32, 32).to(DEVICE)
    compiled = fused(model, 3)
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, images, True), step(model, images, True), 1e-4)


def test_a_checkpoint_goes_either_way():
    model = make_model()
    switched = fused(model, 3)
    model.load_state_dict(switched.state_dict())
    assert [type(m) for m in copy.deepcopy(switched).modules()] == [type(m) for m in switched.modules()]


@pytest.mark.parametrize(
    "norm", [partial(nn.LayerNorm, bias=False), partial(nn.LayerNorm, elementwise_affine=False), nn.RMSNorm]
)
def test_other_norms_stay(norm):
    assert use_layer_norm_kernels(Block(8, 2, norm_layer=norm)) == 0
