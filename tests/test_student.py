"""Students: exits with exactly the published parameters, and gradients that reach all of any timm model."""

import math
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import PatchMerging as TimmPatchMerging
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastofa.student.exits import ConvExit, PatchMerging, SepConv, TokenExit
from fastofa.student.model import Student
from fastofa.system.errors import BadInput

CLASSES = 10


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Images are so small that a second thread would only slow the tests down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def student(name: str, image_size: int | None = 32, **options: Any) -> Student:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, about its own models
        return Student(name, CLASSES, image_size=image_size, **options)


# --- The published exits ----------------------------------------------------------------------------------------------

IMAGENET = 1000  # classes


def conv_exit_count(stage: int, channels: int, dim: int) -> int:
    """Per block two depthwise 3x3 and two 1x1 convolutions without biases and two batch norms; a linear layer."""
    widths = [channels * 2**i for i in range(4 - stage)] + [dim]
    blocks = sum(9 * a + a * a + 2 * a + 9 * a + a * b + 2 * b for a, b in pairwise(widths))
    return (channels * dim + dim if stage == 4 else blocks) + dim * IMAGENET + IMAGENET


def token_exit_count(stage: int, channels: int, dim: int, merges: int) -> int:
    """Mergings of 4 to 1 with a norm, transformer blocks (12 D^2 + 10 D each: qkv without bias), a linear layer."""
    merging = sum(4 * width * dim + 8 * width for width in ([channels] + [dim] * 2)[:merges])
    return merging + max(4 - stage, 1) * (12 * dim**2 + 10 * dim) + dim * IMAGENET + IMAGENET


@pytest.mark.parametrize(
    ("name", "teacher_dim", "channels", "dim", "merges", "count", "millions", "more_macs"),
    [
        ("resnet18", 192, [64, 128, 256, 512], 512, None, 3_041_184, 3.0, 0.041),
        ("resnet18", 768, [64, 128, 256, 512], 768, None, 4_394_656, 4.4, 0.051),
        ("resnet50", 768, [256, 512, 1024, 2048], 2048, None, 23_703_456, 23.7, 0.28),
        ("mobilenetv2_100", 192, [24, 32, 96, 1280], 1280, None, 7_140_896, 7.1, 0.36),
        ("deit_tiny_patch16_224", 768, [192] * 4, 192, [1] * 4, 4_477_984, 4.5, 0.17),
        ("resmlp_12_224", 768, [384] * 4, 384, [1] * 4, 16_324_768, 16.3, 0.24),
        ("swin_tiny_patch4_window7_224", 768, [96, 192, 384, 768], 768, [3, 2, 1, 0], 61_841_056, 61.8, 0.79),
        ("swin_nano_patch4_window7_224", 768, [64, 128, 256, 512], 512, [3, 2, 1, 0], 28_187_040, 28.2, 1.13),
        ("swin_pico_patch4_window7_224", 768, [48, 96, 192, 384], 384, [3, 2, 1, 0], 16_250_656, 16.3, 1.10),
    ],
)
def test_exits_have_the_published_size_and_cost(
    name: str,
    teacher_dim: int,
    channels: list[int],
    dim: int,
    merges: list[int] | None,
    count: int,
    millions: float,
    more_macs: float,
) -> None:
    """At 224 px and a thousand classes: exactly the parameters, and the multiplications within 2.5 percentage points.

    (The published shares omit the attention in the exits. A CNN's last exit is published as a 1x1 convolution of the
    whole map, followed by its mean; ours is of the mean: the same logits for 1/49 of the multiplications.)
    """
    with torch.device("meta"):
        model = Student(name, IMAGENET, teacher_dim=teacher_dim).eval()
        images = torch.zeros(1, 3, 224, 224)
        with FlopCounterMode(display=False) as whole:
            model(images)
        with FlopCounterMode(display=False) as backbone:
            model.backbone(images)
    if merges is None:
        expected = [conv_exit_count(s, c, dim) for s, c in enumerate(channels, 1)]
    else:
        expected = [token_exit_count(s, c, dim, m) for s, (c, m) in enumerate(zip(channels, merges, strict=True), 1)]
    assert [parameter_count(exit_) for exit_ in model.exits] == expected
    assert sum(expected) == count
    assert round(count / 1e6, 1) == millions
    spared = 0 if merges else 2 * channels[-1] * dim * (7 * 7 - 1)
    assert (whole.get_total_flops() + spared) / backbone.get_total_flops() - 1 == pytest.approx(more_macs, abs=0.025)


def test_blocks_of_the_exits() -> None:
    """CNN: 4 - k SepConvs, none at stage 4; tokens: max(4 - k, 1) blocks of four heads at the student's last width."""
    with torch.device("meta"):
        convolutional, tokens = Student("resnet18", IMAGENET), Student("swin_tiny_patch4_window7_224", IMAGENET)
    assert [sum(isinstance(m, SepConv) for m in exit_.modules()) for exit_ in convolutional.exits] == [3, 2, 1, 0]
    assert [len(exit_.blocks) for exit_ in tokens.exits] == [3, 2, 1, 1]
    assert [len(exit_.merge) for exit_ in tokens.exits] == [3, 2, 1, 0]
    assert {block.attn.num_heads for exit_ in tokens.exits for block in exit_.blocks} == {4}
    assert {exit_.head.in_features for exit_ in tokens.exits} == {768}


def test_sep_conv_halves_rounding_up() -> None:
    for side, half in ((8, 4), (7, 4), (2, 1), (1, 1)):
        assert SepConv(6, 10)(torch.randn(2, 6, side, side)).shape == (2, 10, half, half)


def test_conv_exit_pools_and_classifies() -> None:
    """The last layer gets the mean of the map."""
    exit_ = ConvExit(4, 6, 8, CLASSES)
    x = torch.randn(2, 6, 3, 5)
    mean = x.mean(dim=(2, 3)) @ exit_.blocks.weight[:, :, 0, 0].T + exit_.blocks.bias  # 1x1 and mean may change places
    torch.testing.assert_close(exit_(x), mean @ exit_.head.weight.T + exit_.head.bias)


@pytest.mark.parametrize("teacher_dim", [0, 100, 768, 2048])
def test_a_cnns_exits_have_the_larger_width_of_student_and_teacher(teacher_dim: int) -> None:
    model = student("resnet18", teacher_dim=teacher_dim)
    assert [exit_.head.in_features for exit_ in model.exits] == [max(512, teacher_dim)] * 4
    assert model(torch.randn(2, 3, 32, 32)).shape == (5, 2, CLASSES)
    assert model.backbone.num_features == 512


def test_a_token_models_exits_have_its_own_width() -> None:
    model = student("test_vit", teacher_dim=2048)
    assert {exit_.head.in_features for exit_ in model.exits} == {64}


def test_patch_merging_is_swins() -> None:
    """Same weights, same order of the four neighbours, same zeros at odd sides."""
    ours, swins = PatchMerging(6, 16, nn.Identity()), TimmPatchMerging(6, 16)
    nn.init.uniform_(ours.norm.weight)
    nn.init.uniform_(ours.norm.bias)
    swins.load_state_dict(ours.state_dict())
    for height, width in ((4, 4), (6, 2), (7, 8), (8, 7), (7, 7), (1, 1), (1, 2)):
        x = torch.randn(2, height, width, 6)
        torch.testing.assert_close(ours(x), swins(x), rtol=0, atol=0)
    gelu = PatchMerging(6, 16, nn.GELU())
    gelu.load_state_dict(ours.state_dict())
    torch.testing.assert_close(gelu(x), nn.functional.gelu(swins(x)))


def test_token_exit_classifies_the_class_token_or_the_mean() -> None:
    """Without merging, the mean does not depend on the order of tokens; other prefix tokens take part."""
    tokens, prefix = torch.randn(2, 9, 8), torch.randn(2, 2, 8)
    by_mean, by_token = (TokenExit(4, (3, 3), 8, 8, CLASSES, class_token).eval() for class_token in (False, True))
    shuffled = tokens[:, torch.randperm(9)]
    torch.testing.assert_close(by_mean(tokens), by_mean(shuffled))
    torch.testing.assert_close(by_token(tokens, prefix), by_token(shuffled, prefix))
    by_token.load_state_dict(by_mean.state_dict())
    torch.testing.assert_close(by_token(tokens), by_mean(tokens))  # a model that keeps its class token to itself
    assert not torch.allclose(by_token(tokens, prefix), by_token(tokens, prefix.flip(1)))
    assert not torch.allclose(by_token(tokens, prefix), by_token(tokens, prefix[:, :1]))
    by_token.blocks = by_mean.blocks = nn.Sequential()
    torch.testing.assert_close(by_token(tokens, prefix), by_token.head(prefix[:, 0]))
    torch.testing.assert_close(by_mean(tokens), by_mean.head(tokens.mean(dim=1)))


@pytest.mark.parametrize(("side", "merges"), [(1, 0), (7, 0), (13, 0), (14, 1), (16, 1), (24, 1), (28, 2), (56, 3)])
def test_tokens_are_merged_down_to_a_grid_of_about_7(side: int, merges: int) -> None:
    """Between 7 and 13 per side, unless the grid is smaller from the start."""
    exit_ = TokenExit(2, (side, side), 4, 8, CLASSES, False)
    left = []
    exit_.blocks.register_forward_pre_hook(lambda _, arguments: left.append(arguments[0].shape))
    assert exit_(torch.randn(1, side * side, 4)).shape == (1, CLASSES)
    expected = math.ceil(side / 2**merges)
    assert left == [(1, expected**2, 8)]
    assert expected == side or 7 <= expected <= 13


# --- How the exits start ----------------------------------------------------------------------------------------------


@cache
def exits_of(kind: type[nn.Module]) -> list[Any]:
    """All layers of a type in the exits of a CNN, a hierarchical and an isotropic token model."""
    names = ("resnet18", "swin_nano_patch4_window7_224", "deit_tiny_patch16_224")
    return [module for name in names for module in student(name, 64).exits.modules() if isinstance(module, kind)]


def test_convolutions_are_initialised_kaiming_normal_by_fan_out() -> None:
    """Zero mean, variance 2 / fan-out, where the fan-out of a depthwise layer ignores its groups."""
    layers = exits_of(nn.Conv2d)
    assert len(layers) == 4 * (3 + 2 + 1) + 1
    for layer in layers:
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        scaled = layer.weight.detach().flatten() * math.sqrt(fan_out / 2)
        error = 5 / math.sqrt(len(scaled))
        assert abs(scaled.mean()) < error
        assert abs(scaled.std() - 1) < error
        assert scaled.abs().max() > 2.5  # normal, not uniform


def test_linear_layers_are_initialised_truncated_normal() -> None:
    """Standard deviation 0.02, nothing beyond 2; biases zero.

    By mean and median: about one in 2^24 of torch's numbers is the limit itself, which affects the standard deviation.
    """
    layers = exits_of(nn.Linear)
    assert len(layers) > 60
    for layer in layers:
        scaled = layer.weight.detach().flatten() / 0.02
        error = 7 / math.sqrt(len(scaled))
        assert abs(scaled.clamp(-9, 9).mean()) < error
        assert abs(scaled.abs().median() - 0.6745) < error
        assert scaled.abs().max() <= 2 / 0.02
        assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.LayerNorm])
def test_norms_are_initialised_as_identity(kind: type[nn.Module]) -> None:
    layers = exits_of(kind)
    assert len(layers) >= 12
    for layer in layers:
        assert (layer.weight == 1).all()
        assert not layer.bias.any()


def test_exits_do_not_change_the_backbones_initial_weights() -> None:
    """The same seed gives the same backbone with and without exits."""
    models = []
    for stages in ((), (1, 2, 3, 4)):
        torch.manual_seed(3)
        models.append(student("test_vit", stages=stages).backbone.state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


# --- Which features the exits get -------------------------------------------------------------------------------------


def reached_by_exits(model: Student, image_size: int) -> list[set[str]]:
    """For each exit, the backbone's parameters that its gradient reaches."""
    logits = model(torch.randn(2, 3, image_size, image_size))
    names, parameters = zip(*model.backbone.named_parameters(), strict=True)
    reached = []
    for exit_logits in logits[:-1]:
        gradients = torch.autograd.grad(exit_logits.square().sum(), parameters, retain_graph=True, allow_unused=True)
        reached.append({n for n, g in zip(names, gradients, strict=True) if g is not None and g.any()})
    return reached


@pytest.mark.parametrize(
    ("name", "image_size", "ends"),
    [
        ("resnet18", 32, ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("convnext_atto", 32, ["stages.0", "stages.1", "stages.2", "stages.3"]),
        ("mobilenetv2_050", 32, ["blocks.1.1", "blocks.2.2", "blocks.4.2", "bn2"]),
        ("swin_nano_patch4_window7_224", 32, ["layers.0", "layers.1", "layers.2", "layers.3"]),
        ("deit_tiny_patch16_224", 32, ["blocks.1", "blocks.3", "blocks.9", "blocks.11"]),
        ("resmlp_12_224", 32, ["blocks.1", "blocks.3", "blocks.9", "blocks.11"]),
        ("cait_xxs24_224", 32, ["blocks.1", "blocks.3", "blocks.21", "blocks.23"]),
        ("mixer_s32_224", 64, ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]),
        ("test_vit", 32, ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]),
    ],
)
def test_an_exit_depends_on_its_stage_and_nothing_after_it(name: str, image_size: int, ends: list[str]) -> None:
    """Gradients reach exactly the layers up to the published end of the stage."""
    model = student(name, image_size)
    order = [n for n, _ in model.backbone.named_parameters()]
    for reached, end in zip(reached_by_exits(model, image_size), ends, strict=True):
        assert max(reached, key=order.index).startswith(f"{end}.")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "cait_xxs24_224", "test_vit2", "gmlp_ti16_224"])
def test_isotropic_models_end_their_stages_at_blocks_1_3_and_the_last_third_and_first(name: str) -> None:
    """Blocks 1, 3, d - 3 and d - 1 for d = 12, 24, 8 and 30."""
    with torch.device("meta"):
        model = student(name)
    depth = len(model.backbone.blocks)
    assert depth == {"deit": 12, "cait": 24, "test": 8, "gmlp": 30}[name.split("_")[0]]
    assert [stage.index for stage in model.stages] == [1, 3, depth - 3, depth - 1]


def test_mobilenets_stage_4_is_its_wide_head() -> None:
    """1280 channels at 7x7, not the 320 before; for models without such a head it is the last stage."""
    with torch.device("meta"):
        mobilenet, resnet = student("mobilenetv2_100", 224), student("resnet18", 224)
    assert [stage.channels for stage in mobilenet.stages] == [24, 32, 96, 1280]
    assert [stage.grid for stage in mobilenet.stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [stage.channels for stage in resnet.stages] == [64, 128, 256, 512]


def test_stage_4_of_a_mobilenet_is_the_input_of_its_pooling() -> None:
    model = student("mobilenetv2_100", 64, stages=(4,)).eval()
    images, seen = torch.randn(2, 3, 64, 64), []
    model.exits[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(images)
    torch.testing.assert_close(seen[0], model.backbone.forward_features(images))


@pytest.mark.parametrize(
    ("name", "found", "image_size"),
    [
        ("levit_128s", (3, 4), 64),
        ("nest_tiny", (1, 2, 3), 64),
        ("pit_ti_224", (2, 3, 4), 64),
        ("visformer_tiny", (2, 3, 4), 64),
        ("volo_d1_224", (2, 3), 64),
    ],
)
def test_models_with_fewer_stages_list_them(name: str, found: tuple[int, ...], image_size: int) -> None:
    """They work with those stages."""
    with pytest.raises(BadInput) as error:
        student(name, image_size)
    text = str(error.value)
    assert name in text
    assert f"it has {', '.join(map(str, found))} (" in text
    assert f"--stages {' '.join(map(str, found))}" in text
    assert "\n" not in text
    model = student(name, image_size, stages=found)
    assert [stage.number for stage in model.stages] == list(found)
    logits = model(torch.randn(2, 3, image_size, image_size))
    assert logits.shape == (1 + len(found), 2, CLASSES)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.exits.parameters())


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "sequencer2d_s"])
def test_models_without_stages_are_refused_except_without_exits(name: str) -> None:
    with pytest.raises(BadInput, match=r"has none .* choose another student"):
        student(name, None)
    model = student(name, None, stages=())
    size = model.image_size
    with torch.no_grad():
        assert model(torch.randn(2, 3, size, size)).shape == (1, 2, CLASSES)


@pytest.mark.parametrize("stages", [(5,), (0, 1), (1, 2, 3, 4, 5)])
def test_invalid_stages(stages: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="it has 1, 2, 3, 4"):
        student("resnet18", stages=stages)


@pytest.mark.parametrize("stages", [(), (1,), (4,), (2, 3), (4, 1), (1, 2, 3, 4)])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_any_choice_of_stages(name: str, stages: tuple[int, ...]) -> None:
    """Heads are in stage order for any order of the argument, and the last one is the model's own."""
    model = student(name, stages=stages).eval()
    assert [stage.number for stage in model.stages] == sorted(stages)
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (1 + len(stages), 2, CLASSES)
    torch.testing.assert_close(logits[-1], model.backbone(images))


def test_images_of_an_invalid_size() -> None:
    with pytest.raises(BadInput, match="does not accept images of 64 px"):
        student("efficientformer_l1", 64)
    with pytest.raises(BadInput, match="unknown model"):
        student("resnet19")


# --- Pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_uint8_images_are_normalised_with_the_models_own_mean_and_std(name: str) -> None:
    """Those of timm's configuration, which differ between the two models; floating-point images are not changed."""
    model = student(name).eval()
    config = model.backbone.pretrained_cfg
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    normalised = (images.float() / 255 - mean) / std
    torch.testing.assert_close(model.normalize(images), normalised)
    torch.testing.assert_close(model(images), model(normalised))
    assert model.normalize(normalised) is normalised


def test_another_normalisation() -> None:
    model = student("test_resnet", mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert model.normalize(white)[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0]
    assert {"mean", "std"}.isdisjoint(model.state_dict())  # checkpoints fit either way


def test_the_default_image_size_is_the_models_own() -> None:
    with torch.device("meta"):
        assert student("deit_tiny_patch16_224", None).image_size == 224
        assert student("deit_tiny_patch16_224", 96).image_size == 96


def test_layout_and_precision_do_not_change_the_result() -> None:
    """channels_last as in the training step; bf16 within its rounding."""
    for name in ("test_resnet", "test_vit"):
        model, images = student(name).eval(), torch.randn(2, 3, 32, 32)
        logits = model(images)
        last = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(images.to(memory_format=torch.channels_last)), logits, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(last(images).float(), logits, rtol=0.05, atol=0.05)


# --- Weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_tiny_patch16_224", ["cls_token", "pos_embed"]),
        ("cait_xxs24_224", ["cls_token", "pos_embed"]),
        ("swinv2_tiny_window8_256", ["layers.0.blocks.1.attn.logit_scale", "layers.3.blocks.0.attn.cpb_mlp.2.weight"]),
        ("swin_nano_patch4_window7_224", ["layers.0.blocks.1.attn.relative_position_bias_table"]),
        ("beit_base_patch16_224", ["cls_token", "blocks.11.attn.relative_position_bias_table"]),
        ("xcit_nano_12_p16_224", ["cls_token", "pos_embed.token_projection.weight"]),
        ("resnet18", []),
        ("mixer_s32_224", []),
    ],
)
def test_names_without_weight_decay_are_those_of_parameters(name: str, expected: list[str]) -> None:
    """Exactly those that timm exempts in the plain model (by name or pattern), under the student's names."""
    with torch.device("meta"):
        model = student(name, 64)
    plain = getattr(model.backbone, "no_weight_decay", set)()
    exempt = {n for n, _ in model.named_parameters() if any(fnmatch(n, pattern) for pattern in model.no_weight_decay())}
    names = [n for n, _ in model.backbone.named_parameters() if any(fnmatch(n, pattern) for pattern in plain)]
    assert exempt == {f"backbone.{n}" for n in names}
    assert {f"backbone.{n}" for n in expected} <= exempt
    assert bool(exempt) == bool(expected)


# --- The sweep: any timm model ----------------------------------------------------------------------------------------

CNNS = """
    resnet18 resnetv2_18 skresnet18 legacy_seresnet18 cspdarknet53 dpn48b densenet121 dla46_c
    mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobileone_s0 ghostnet_050
    efficientnet_lite0 tf_efficientnetv2_b0 mnasnet_small lcnet_035 rexnet_100 hardcorenas_a repghostnet_050
    regnetx_002 regnety_002 convnext_atto convnextv2_atto inception_next_atto rdnet_tiny repvgg_a0 repvit_m0_9
    starnet_s050 fasternet_t0 hgnetv2_b0 hrnet_w18_small ese_vovnet19b_slim_dw selecsls42 test_nfnet
    inception_v3 ghostnetv2_100 mambaout_femto
"""
TRANSFORMERS = """
    deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 test_vit3 eva02_tiny_patch14_224 test_vit_relpos
    convit_tiny tnt_s_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 pvt_v2_b0
    swin_nano_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 twins_svt_small coat_lite_tiny
    coat_tiny hiera_tiny_224 focalnet_tiny_srf davit_tiny gcvit_xxtiny test_maxvit
"""
MLPS = "mixer_s32_224 resmlp_12_224 gmlp_ti16_224"
HYBRIDS = """
    mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientformerv2_s0 efficientformer_l1 test_coatnet
    tiny_vit_5m_224 fastvit_t8 nextvit_small caformer_s18 poolformer_s12 efficientvit_b0
    swiftformer_xs vit_tiny_r_s16_p8_224 botnet26t_256 mobilenetv4_hybrid_medium
"""
LARGE = """
    vgg11 convmixer_768_32 beit_base_patch16_224 vitamin_small_224 mvitv2_small_cls
"""
SWEEP = " ".join([CNNS, TRANSFORMERS, MLPS, HYBRIDS]).split()
SIZES = {"inception_v3": 96, "ghostnetv2_100": 64, "efficientformerv2_s0": 64, "efficientformer_l1": 224}  # others: 32


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
    """Gradients of the sum of the heads' mean squares."""
    model.zero_grad(set_to_none=True)
    logits.square().flatten(1).mean(dim=1).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def dead(found: dict[str, Tensor | None], tolerance: float = 0.0) -> set[str]:
    """Names of parameters without a gradient, or with one that is below a fraction of the largest everywhere."""
    tops = {name: 0.0 if gradient is None else float(gradient.abs().max()) for name, gradient in found.items()}
    return {name for name, top in tops.items() if top <= tolerance * max(tops.values())}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SWEEP, *LARGE.split()])
def test_any_timm_model(name: str) -> None:
    """Heads of the right shape, gradients wherever the plain model has them, and the model's own logits last."""
    size = SIZES.get(name, 32)
    model = student(name, size, teacher_dim=192)
    with torch.no_grad():  # layers that start at zero, as timm likes them, would hide what is not connected
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(4, 3, size, size)

    # What the plain model leaves without a gradient: layers it does not use, biases before a norm (rounding errors).
    unused = dead(gradients(model.backbone, model.backbone(images)[None]), 1e-6)
    logits = model(images)
    assert logits.shape == (5, 4, CLASSES)
    assert logits.isfinite().all()
    assert (logits.amax(dim=1) > logits.amin(dim=1)).any(dim=1).all()  # every head tells the images apart
    found = gradients(model, logits)
    assert all(gradient.isfinite().all() for gradient in found.values() if gradient is not None)
    assert {n for n in dead(found) if n.startswith("exits.")} == set()
    assert {n.removeprefix("backbone.") for n in dead(found)} <= unused
    assert len(unused) < len(found) / 4

    model.eval()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(logits[-1], model.backbone(model.normalize(images)))


# --- Sizes and parameters ---------------------------------------------------------------------------------------------


def test_a_cnn_accepts_images_of_other_sizes_and_is_unchanged() -> None:
    student = Student("test_efficientnet", 10, 64).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.check_sizes([32, 64, 96, 100])
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_transformer_of_fixed_size_refuses_other_sizes() -> None:
    student = Student("test_vit", 10, 64).train()
    student.check_sizes([64, 64])
    message = "the student, built for images of 64 px, does not accept .* 32 px .*omit --start-size and --eval-size"
    with pytest.raises(BadInput, match=message):
        student.check_sizes([64, 96, 32])
    assert student.training


@pytest.mark.parametrize("stages", [(), (1, 2, 3, 4)])
def test_parameters_that_no_head_depends_on_are_found(stages: tuple[int, ...]) -> None:
    """None in the models; those of a layer that exists but is not called. The batch norms do not change."""
    student = Student("test_efficientnet", 10, 32, stages=stages).train()
    assert student.unused_parameters() == []
    student.backbone.left_over = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert [id(p) for p in student.unused_parameters()] == [id(p) for p in student.backbone.left_over.parameters()]
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
