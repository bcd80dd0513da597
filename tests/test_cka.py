"""CKA against its definitions in float64; the layers that are compared; `fastofa cka` as a user meets it."""

import itertools
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from fastofa import cli
from fastofa.data.open import open_dataset
from fastofa.models.blocks import find_blocks
from fastofa.models.cka import CKA, gram
from fastofa.pipelines import open_pipeline
from fastofa.reports.heat_map import draw_heat_map
from fastofa.system.errors import BadInput
from fastofa.training.compare_networks import compare_networks, open_network
from fastofa.views.order import epoch_order
from fastofa.views.table import center_views
from test_evaluate_export import lively, make_run

# --- The number itself ------------------------------------------------------------------------------------------------


def song(k: np.ndarray, m: np.ndarray) -> float:
    """Equation 4 of Song et al., term by term."""
    n = len(k)
    k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
    one = np.ones(n)
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    trace = (k * m.T).sum()  # of k @ m
    return (trace + sums - 2 / (n - 2) * ((one @ k) @ (m @ one))) / (n * (n - 3))


def u_statistic(k: np.ndarray, m: np.ndarray) -> float:
    """HSIC's definition as an expectation over four different images, averaged over all of them (Song et al., 5)."""
    fours = list(itertools.permutations(range(len(k)), 4))
    return math.fsum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in fours) / len(fours)


def exact(x: Tensor, y: Tensor) -> float:
    """CKA of all images at once, in float64."""
    a, b = (features.double().flatten(1).numpy() for features in (x, y))
    k, m = a @ a.T, b @ b.T
    return song(k, m) / math.sqrt(song(k, k) * song(m, m))


def streamed(x: Tensor, y: Tensor, batch: int) -> float:
    sums = CKA()
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        sums.update(gram(a)[None], gram(b)[None])
    return sums.matrix().item()


def related(images: int, noise: float, widths: tuple[int, int] = (48, 80)) -> tuple[Tensor, Tensor]:
    """Features of two layers that see the same 16 things, each with noise of its own."""
    seen = torch.randn(images, 16)
    x, y = ((seen @ torch.randn(16, width)).relu() + noise * torch.randn(images, width) for width in widths)
    return x, y


@given(images=st.integers(4, 40), width=st.integers(1, 20), noise=st.floats(0, 3), seed=st.integers(0, 999))
def test_one_batch_is_the_formula(images, width, noise, seed):
    torch.manual_seed(seed)
    x, y = related(images, noise, (width, 7))
    own = [song(*2 * [(f.double() @ f.double().T).numpy()]) for f in (x, y)]
    if min(own) > 1e-3 * max(own):  # else the quotient is that of two rounding errors
        assert streamed(x.double(), y.double(), images) == pytest.approx(exact(x, y), abs=1e-9)


def test_the_formula_is_the_mean_over_all_fours_of_images():
    x, y = related(6, 1.0)
    a, b = (features.double().numpy() for features in (x, y))
    k, m = a @ a.T, b @ b.T
    hsic = [u_statistic(k, m), u_statistic(k, k), u_statistic(m, m)]
    assert streamed(x.double(), y.double(), 6) == pytest.approx(hsic[0] / math.sqrt(hsic[1] * hsic[2]), abs=1e-12)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_batches_give_what_all_images_at_once_give(noise):
    x, y = related(4096, noise, (256, 256))
    assert streamed(x, y, 256) == pytest.approx(exact(x, y), abs=1e-3)


def test_the_error_falls_with_images_and_batch_size():
    """Batches of B use about N B of the N N pairs of N images: the error is in proportion to sqrt((1/B - 1/N) / N),
    more precisely with B - 3 and N - 3 in place of B and N, the degrees of freedom of unbiased HSIC."""

    def law(images: int, batch: int) -> float:
        return math.sqrt((1 / (batch - 3) - 1 / (images - 3)) / images)

    def rms(images: int, batch: int) -> float:
        pairs = [[f.double() for f in related(images, 1.0)] for _ in range(150)]
        return math.sqrt(np.mean([(streamed(x, y, batch) - streamed(x, y, images)) ** 2 for x, y in pairs]))

    first = rms(64, 8) / law(64, 8)
    for images, batch in ((64, 32), (256, 8), (256, 32)):
        assert rms(images, batch) / law(images, batch) == pytest.approx(first, rel=0.35)


def test_every_image_counts_the_same_if_the_last_batch_is_smaller():
    """The HSIC of a batch is weighted by its number of images, not by its number of pairs."""
    x, y = (f.double() for f in related(40, 1.0))
    hsic = np.zeros(3)
    for a, b in zip(x.split(25), y.split(25), strict=True):
        k, m = (a @ a.T).numpy(), (b @ b.T).numpy()
        hsic += [len(a) * song(*pair) for pair in ((k, m), (k, k), (m, m))]
    assert streamed(x, y, 25) == pytest.approx(hsic[0] / math.sqrt(hsic[1] * hsic[2]), abs=1e-12)


def test_batches_are_unbiased():
    """Sums over batches of 16 of 256 images, averaged over many orders, are those of all 256; the biased estimator's
    are far off."""
    x, y = related(256, 3.0)
    sums, biased = CKA(), np.zeros(3)
    centre = np.eye(16) - 1 / 16
    for _ in range(400):
        order = torch.randperm(256)
        for ids in order.split(16):
            grams = gram(x[ids]), gram(y[ids])
            sums.update(grams[0][None], grams[1][None])
            k, m = (centre @ g.double().numpy() @ centre for g in grams)
            biased += [(k * m).sum(), (k * k).sum(), (m * m).sum()]
    assert sums.matrix().item() == pytest.approx(exact(x, y), abs=5e-3)
    assert abs(biased[0] / math.sqrt(biased[1] * biased[2]) - exact(x, y)) > 0.1


@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), offset=st.floats(-100, 100), batch=st.integers(4, 64))
@settings(max_examples=30)
def test_rotation_scale_and_offset_do_not_matter(seed, scale, offset, batch):
    torch.manual_seed(seed)
    images = 64 - 64 % batch  # batches of one size
    x, y = (features[:images] for features in related(64, 1.0))
    rotation, _ = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))
    moved = scale * (x.double() @ rotation + offset)
    expected = streamed(x, y, batch)
    if batch >= 16:
        assert streamed(moved.float(), y, batch) == pytest.approx(expected, abs=1e-3)
        assert streamed(moved.float(), x, batch) == pytest.approx(1, abs=1e-3)
    assert streamed(moved, y.double(), batch) == pytest.approx(streamed(x.double(), y.double(), batch), abs=1e-6)


def test_another_basis_that_is_no_rotation_matters():
    x, y = related(64, 1.0)
    stretched = x * torch.linspace(0.01, 3, 48)
    assert abs(streamed(stretched, y, 64) - streamed(x, y, 64)) > 0.01


def test_all_pairs_at_once():
    layers = [torch.randn(32, width) + torch.randn(32, 1) for width in (3, 5, 9, 11)]
    sums = CKA()
    for ids in torch.arange(32).split(16):
        grams = torch.stack([gram(layer[ids]) for layer in layers])
        sums.update(grams[:3], grams)
    matrix = sums.matrix()
    assert matrix.dtype == torch.float64
    expected = [[streamed(a, b, 16) for b in layers] for a in layers[:3]]
    np.testing.assert_allclose(matrix.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(matrix.numpy()[:, :3].diagonal(), 1, atol=1e-12)


def test_unrelated_features_have_none():
    assert abs(streamed(torch.randn(4096, 20), torch.randn(4096, 30), 256)) < 0.01


def test_a_large_common_part_costs_no_digits():
    """A thousand times the differences: without care, fp32 would lose all of them when the Gram matrix is centred."""
    x, y = related(64, 1.0)
    common = 1000 * torch.randn(1, 48)
    assert streamed(x + common, y, 64) == pytest.approx(exact(x, y), abs=1e-4)


def test_features_that_are_the_same_for_every_image_have_no_cka():
    constant = torch.randn(1, 5).expand(16, 5)
    sums = CKA()
    sums.update(torch.stack([gram(constant), gram(torch.randn(16, 5))]), gram(torch.randn(16, 5))[None])
    undefined = sums.matrix().isnan().flatten().tolist()
    assert undefined == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_a_layers_features_does_not_matter(dtype):
    maps = torch.randn(8, 6, 5, 4).to(dtype)
    expected = maps.double().flatten(1) @ maps.double().flatten(1).T
    centre = torch.eye(8).double() - 1 / 8
    for same in (maps, maps.to(memory_format=torch.channels_last), maps.permute(0, 2, 3, 1).contiguous()):
        found = gram(same)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(centre @ found.double() @ centre, centre @ expected @ centre, atol=1e-3)


# --- The layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet18", 8, "layer1.0", "layer4.1"),
        ("resnet50", 16, "layer1.0", "layer4.2"),
        ("mobilenetv2_100", 17, "blocks.0.0", "blocks.6.0"),
        ("regnetx_002", 13, "s1.b1", "s4.b7"),
        ("densenet121", 58, "features.denseblock1.denselayer1", "features.denseblock4.denselayer16"),
        ("convnext_tiny", 18, "stages.0.blocks.0", "stages.3.blocks.2"),
        ("deit_tiny_patch16_224", 12, "blocks.0", "blocks.11"),
        ("swin_tiny_patch4_window7_224", 12, "layers.0.blocks.0", "layers.3.blocks.1"),
        ("pvt_v2_b0", 8, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("mixer_b16_224", 12, "blocks.0", "blocks.11"),
        ("resmlp_12_224", 12, "blocks.0", "blocks.11"),
    ],
)
def test_every_block_is_found(name, count, first, last):
    with torch.device("meta"):
        names = list(find_blocks(timm.create_model(name), name))
    assert (len(names), names[0], names[-1]) == (count, first, last)


def test_a_model_without_blocks_has_timms_features():
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    assert list(find_blocks(model, "vgg11")) == [info["module"] for info in model.feature_info]
    with pytest.raises(BadInput, match="linear"):
        find_blocks(nn.Linear(3, 4), "linear")


def saved(folder: Path, name: str, size: int, **arguments: Any) -> Path:
    """A model with random weights, in timm's format."""
    torch.manual_seed(len(name))
    model = lively(timm.create_model(name, num_classes=10, **arguments))
    config = {"input_size": (3, size, size), "test_crop_pct": 1.0}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=config, model_args=arguments or None)
    return folder


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("cnn") / "cnn", "test_resnet", 32)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("vit") / "vit", "test_vit", 48, img_size=48)


def features_in_plain_timm(folder: Path, images: Tensor, names: list[str]) -> list[Tensor]:
    """Of these blocks, and the logits, for uint8 images."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config, found = model.pretrained_cfg, {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        logits = model((images / 255 - mean) / std)
    return [*(found[name] for name in names), logits]


def test_two_architectures_of_two_sizes(cnn, transformer):
    """All layers of both, on the same images, against float64 on the features of plain timm."""
    comparison = compare_networks(cnn, transformer, "digits", images=48, batch_size=48, device="cpu", workers=0)
    assert comparison.images == 48
    dataset = open_dataset("digits", "val")
    order = epoch_order(len(dataset), seed=0, epoch=0)[:48]
    features = []
    for folder, size, network in ((cnn, 32, comparison.a), (transformer, 48, comparison.b)):
        batches = open_pipeline("resident", dataset, size, 48).epoch(center_views(dataset.sizes, 1.0), order)
        names = [layer.name for layer in network.layers]
        assert names[-1] == "logits"
        features.append(features_in_plain_timm(folder, next(batches).images.float(), names[:-1]))
    expected = [[exact(x, y) for y in features[1]] for x in features[0]]
    np.testing.assert_allclose(comparison.cka, expected, atol=1e-4)
    assert [layer.part for layer in comparison.a.layers] == [*(f"stage {i}" for i in (1, 2, 3, 4)), "logits"]
    assert len(comparison.b.layers) == 7


def test_a_batch_holds_images_of_all_classes(cnn, monkeypatch):
    """A dataset is stored class by class, and batches of one class each would not estimate the CKA of all images."""
    sizes: list[int] = []
    digits = open_dataset("digits", "val")
    network = open_network(str(cnn))
    pipeline = open_pipeline("resident", digits, 32, len(digits))
    pixels = next(pipeline.epoch(center_views(digits.sizes, 1.0), np.arange(len(digits)))).images
    labels = {image.numpy().tobytes(): label for image, label in zip(pixels, digits.labels.tolist(), strict=True)}

    def look(self: Any, images: Tensor) -> dict[str, Tensor]:
        if len(images) == 64:
            sizes.append(len({labels[image.contiguous().numpy().tobytes()] for image in images}))
        return grams(self, images)

    grams = type(network).grams
    monkeypatch.setattr(type(network), "grams", look)
    compare_networks(cnn, cnn, "digits", images=256, batch_size=64, device="cpu", workers=0)
    assert len(sizes) == 8
    assert min(sizes) >= 9


def test_means_by_stages(cnn, transformer):
    comparison = compare_networks(transformer, cnn, "digits", images=64, batch_size=32, device="cpu", workers=0)
    rows, columns, means = comparison.by_parts()
    assert rows == ["stage 1", "stage 2", "stage 3", "stage 4", "logits"] == columns
    for i, j in itertools.product(range(5), range(5)):
        inside = [
            comparison.cka[r, c]
            for (r, row), (c, column) in itertools.product(
                enumerate(comparison.a.layers), enumerate(comparison.b.layers)
            )
            if (row.part, column.part) == (rows[i], columns[j])
        ]
        assert means[i, j] == pytest.approx(np.mean(inside))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mobilenetv2_100", [3, 3, 7, 4]), ("repvgg_a0", [2, 4, 14, 1]), ("deit_tiny_patch16_224", [2, 2, 6, 2])],
)
def test_stages_are_those_of_the_exits(tmp_path, name, blocks):
    """MobileNetV2's first block, 2 times smaller than the image, is in stage 1; RepVGG's stage 4 ends after a last
    convolution, which is no block; DeiT's end at blocks 1, 3, 9 and 11."""
    size = {"img_size": 64} if name.startswith("deit") else {}
    network = open_network(str(saved(tmp_path / name, name, 64, **size)))
    parts = [layer.part for layer in network.layers]
    assert parts == [*(f"stage {i}" for i, count in enumerate(blocks, 1) for _ in range(count)), "logits"]


def test_a_network_with_itself(transformer):
    comparison = compare_networks(transformer, transformer, "digits", batch_size=64, device="cpu", workers=0)
    np.testing.assert_allclose(comparison.cka.diagonal(), 1, atol=1e-9)
    np.testing.assert_allclose(comparison.cka, comparison.cka.T, atol=1e-9)
    assert comparison.images == 599


def test_a_few_images_left_over_are_left_out(cnn):
    """599 = 4 x 149 + 3, and unbiased HSIC has no value for three."""
    assert compare_networks(cnn, cnn, "digits", batch_size=149, device="cpu", workers=0).images == 596
    assert compare_networks(cnn, cnn, "digits", batch_size=119, device="cpu", workers=0).images == 599


def test_a_runs_exits(tmp_path):
    """They are the student's own heads; without them, the run is what it exports."""
    run = make_run(tmp_path / "run", student="test_resnet")
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    network = open_network(str(run.path))
    names = [layer.name for layer in network.layers]
    assert names[-5:] == ["exit 1", "exit 2", "exit 3", "exit 4", "logits"]
    grams = network.grams(images)
    with torch.inference_mode():
        heads = run.trained_student()(images)
    for name, logits in zip(names[-5:], heads, strict=True):
        np.testing.assert_allclose(grams[name], gram(logits), rtol=1e-3, atol=1e-3)
    without = open_network(str(run.path), exits=False)
    assert [layer.name for layer in without.layers] == [*names[:-5], "logits"]
    for name, expected in without.grams(images).items():
        np.testing.assert_allclose(grams[name], expected, rtol=1e-3, atol=1e-3)


def test_bf16_is_for_the_networks_only(cnn):
    """The Gram matrices are those of float64 on the layer's bf16 features."""
    network = open_network(str(cnn), precision="bf16")
    kept: dict[str, Tensor] = {}
    for name, module in network.blocks.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out.double().flatten(1)}))
    found = network.grams(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    centre = torch.eye(8).double() - 1 / 8
    for name, features in kept.items():
        assert found[name].dtype == torch.float32
        expected = centre @ features @ features.T @ centre
        np.testing.assert_allclose(centre @ found[name].double() @ centre, expected, atol=1e-4 * expected.abs().max())


def test_no_layers_features_are_kept(cnn):
    """So that the memory is that of one layer's features and the Gram matrices."""
    network = open_network(str(cnn))
    alive: list[weakref.ref[Tensor]] = []
    for module in network.blocks.values():
        module.register_forward_hook(lambda _m, _i, out: alive.append(weakref.ref(out)))
    grams = network.grams(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert len(alive) == 4
    assert [kept() for kept in alive] == [None] * 4
    assert {matrix.shape for matrix in grams.values()} == {(4, 4)}


# --- The command ------------------------------------------------------------------------------------------------------


def command(*argv: object) -> int:
    """Its exit code."""
    try:
        cli.main([str(argument) for argument in argv])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command(cnn, transformer, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("cka", "--a", cnn, "--b", transformer, "--data", "digits", "--images", 100, "--out", out) == 0
    printed = capsys.readouterr()
    assert "images/s" in printed.err
    assert "stage" in printed.out
    result = json.loads((out / "cka.json").read_text())
    assert (result["images"], result["data"], result["batch_size"]) == (100, "digits", 128)
    matrix = np.array(result["cka"])
    assert matrix.shape == (len(result["a"]["layers"]), len(result["b"]["layers"])) == (5, 7)
    expected = compare_networks(cnn, transformer, "digits", images=100, device="cpu", workers=0)
    np.testing.assert_allclose(matrix, expected.cka, atol=1e-5)
    np.testing.assert_allclose(result["parts"]["mean_cka"], expected.by_parts()[2], atol=1e-5)
    assert result["a"]["image_size"] == 32
    assert result["environment"]["cpu"]
    with Image.open(out / "cka.png") as picture:
        assert min(picture.size) > 300


def test_the_picture_has_the_first_layer_at_the_bottom(tmp_path):
    matrix = np.array([[0.0, 0.0, 0.0], [np.nan, 1.0, 1.0]])
    draw_heat_map(matrix, (["a", "b"], ["$c", "d", "e"]), ("x_$", "y"), ([1], [2]), "title", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        gray = np.array(picture.convert("L"))
    middle = gray[:, gray.shape[1] // 2]
    dark = np.flatnonzero(middle < 30)
    assert len(dark) > 50  # the cell of 0
    assert dark.mean() > len(middle) / 2


REFUSED = {
    "unknown model": (("--a", "resnet1888"), "resnet1888"),
    "too few images": (("--images", "3"), "images"),
    "too small batches": (("--batch-size", "3"), "batch-size"),
    "no data": (("--data", "nowhere"), "nowhere"),
    "no such device": (("--device", "gpu"), "gpu"),
}


@pytest.mark.parametrize(("given", "word"), REFUSED.values(), ids=list(REFUSED))
def test_bad_input_is_one_line(cnn, tmp_path, capsys, given, word):
    argv = {"--a": cnn, "--b": cnn, "--data": "digits", "--out": tmp_path / "out"}
    argv |= dict([given])
    assert command("cka", *itertools.chain(*argv.items())) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastofa: error: ")
    assert error.count("\n") == 1
    assert word in error
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder(cnn, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert command("cka", "--a", cnn, "--b", cnn, "--data", "digits", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "out").read_text() == "mine"


def test_features_that_are_not_finite(cnn, tmp_path):
    """The first layer that gives them is named."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text((cnn / "config.json").read_text())
    tensors = load_file(cnn / "model.safetensors")
    tensors["layer3.0.conv2.weight"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"layer3\.0"):
        compare_networks(cnn, folder, "digits", device="cpu", workers=0)


def test_blocks_that_give_no_row_per_image(tmp_path):
    """TNT's blocks return the pixels' tokens, [B x patches, ...], first."""
    folder = saved(tmp_path / "tnt", "tnt_s_patch16_224", 224)
    with pytest.raises(BadInput, match=r"blocks\.0.*392"):
        open_network(str(folder))


def test_a_data_set_that_is_too_small(cnn, photos, tmp_path):
    for split in ("train", "val"):
        for name in ("china", "flower"):
            (tmp_path / "few" / split / name).mkdir(parents=True)
            source = photos / split / name / "000.jpg"
            (tmp_path / "few" / split / name / "000.jpg").write_bytes(source.read_bytes())
    with pytest.raises(BadInput, match="4 validation images, got 2"):
        compare_networks(cnn, cnn, str(tmp_path / "few"), device="cpu", workers=0)
