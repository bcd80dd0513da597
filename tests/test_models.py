"""timm models by name, and weights from files: matching weights are loaded completely, others refused in one line."""

import argparse
import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from fastofa.models.timm_models import (
    check_channels,
    create_model,
    evaluation_view,
    input_size,
    load_weights,
    normalization,
    open_model_folder,
    resolve,
    weights_sha256,
)
from fastofa.models.weights import read_weights
from fastofa.system.errors import BadInput

NAME, CLASSES = "test_resnet", 10  # timm's own small models, made for tests


@pytest.fixture(scope="module")
def source() -> Any:
    """The model whose weights the tests save; its batch norms have running statistics of images."""
    torch.manual_seed(1)
    model = create_model(NAME, CLASSES)
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


def other() -> Any:
    """The same architecture with other weights."""
    return create_model(NAME, CLASSES)


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(BadInput) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def load_file(model: nn.Module, path: Path) -> None:
    load_weights(model, read_weights(path))


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet-18", "resnet18"),
        ("swin_nano", "swin_nano_patch4_window7_224"),
        ("swin_pico_patch4_window7_256", "swin_pico_patch4_window7_224"),
        ("deit_tiny", "deit_tiny_patch16_224"),
    ],
)
def test_unknown_model_has_suggestions(name: str, near: str) -> None:
    text = refusal(create_model, name, CLASSES)
    assert repr(name) in text
    assert near in text.partition("similar names")[2]


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "hf-hub:timm/resnet18", "local-dir:x", "timm/no_such"])
def test_invalid_names_are_refused(name: str) -> None:
    """A name causes no access to the network or the disk."""
    assert "unknown model" in refusal(create_model, name, CLASSES)


def test_names_with_tags() -> None:
    """A tag selects published weights; without weights it changes only the configuration."""
    model = create_model("resnet18.a1_in1k", CLASSES)
    assert model.num_classes == CLASSES
    assert model.pretrained_cfg["tag"] == "a1_in1k"
    assert "no_such_tag" in refusal(create_model, "resnet18.no_such_tag", CLASSES)
    assert "no_such_tag" in refusal(resolve, "resnet18.no_such_tag")


@pytest.mark.parametrize(("name", "count"), [("swin_nano", 9_599_940), ("swin_pico", 5_506_996)])
def test_the_papers_small_swins(name: str, count: int) -> None:
    """9.60M and 5.51M parameters at a thousand classes, as published."""
    model = create_model(f"{name}_patch4_window7_224", 1000)
    assert parameter_count(model) == count
    assert input_size(model) == 224
    assert [len(layer.blocks) for layer in model.layers] == [2, 2, 2, 2]
    assert [layer.blocks[0].attn.num_heads for layer in model.layers] == [2, 4, 8, 16]


def test_variants_are_not_changed_by_use() -> None:
    """The arguments of one model do not affect the next."""
    name = "swin_pico_patch4_window7_224"
    before = copy.deepcopy(resolve(name))
    create_model(name, 3, image_size=64, drop_path=0.1)
    assert resolve(name) == before
    assert resolve("resnet18") == ("resnet18", {})


def test_image_size_reaches_models_that_need_it() -> None:
    """Models of a fixed size are built for it; CNNs accept any size."""
    assert create_model("test_vit", CLASSES, image_size=48).patch_embed.img_size == (48, 48)
    assert create_model("test_vit", CLASSES).patch_embed.img_size == (160, 160)
    assert "img_size" not in resolve("resnet18", image_size=48)[1]


def test_invalid_sizes_and_options() -> None:
    assert "at 0 px" in refusal(create_model, "test_vit", CLASSES, image_size=0)
    assert "drop_path_rate" in refusal(create_model, "vgg11", CLASSES, drop_path=0.1)


def test_drop_path_is_passed_on() -> None:
    rates = [
        m.drop_prob for m in create_model("test_vit", 3, drop_path=0.3).modules() if type(m).__name__ == "DropPath"
    ]
    assert max(rates) == pytest.approx(0.3)


def test_the_default_number_of_classes_is_the_models_own() -> None:
    assert create_model(NAME, None).num_classes == 1000
    assert create_model(NAME, 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_input_size_and_normalization() -> None:
    half = (0.5, 0.5, 0.5)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = {
        "resnet18": (224, imagenet),
        "mixer_b16_224": (224, (half, half)),
        "mobilenetv1_100": (224, (half, half)),
        "swin_nano_patch4_window7_224": (224, imagenet),
        "maxvit_pico_rw_256": (256, (half, half)),
    }
    for name, (size, own) in expected.items():
        with torch.device("meta"):
            model = create_model(name, 3)
        assert input_size(model) == size
        assert normalization(model) == own


# --- Weights from a file ----------------------------------------------------------------------------------------------


def save_safetensors(model: nn.Module, folder: Path) -> Path:
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def save_state_dict(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def save_old_format(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def save_nested(model: nn.Module, folder: Path) -> Path:
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "model.pt")
    return folder / "model.pt"


def save_from_parallel(model: nn.Module, folder: Path) -> Path:
    """As DataParallel and DistributedDataParallel name the weights."""
    torch.save({"state_dict": nn.DataParallel(model).state_dict()}, folder / "model.pth")
    return folder / "model.pth"


def save_by_timm(model: nn.Module, folder: Path) -> Path:
    """As timm's train.py does, with optimiser, epoch and command line beside the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = argparse.Namespace(model=NAME, lr=0.1, mean=[0.5], output=None)
    saver = CheckpointSaver(model, optimizer, args=arguments, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, metric=1.0)
    return folder / "last.pth.tar"


def save_average(model: nn.Module, folder: Path) -> Path:
    """A checkpoint that also contains an average of the weights, which is preferred."""
    zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.save({"state_dict": zeros, "state_dict_ema": model.state_dict()}, folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize(
    "save",
    [
        save_safetensors,
        save_state_dict,
        save_old_format,
        save_nested,
        save_from_parallel,
        save_by_timm,
        save_average,
    ],
)
def test_weights_are_loaded_from_every_format(
    source: Any, tmp_path: Path, save: Callable[[nn.Module, Path], Path]
) -> None:
    """Every tensor, batch statistics included, and the same checksum."""
    path, model = save(source, tmp_path), other()
    assert not equal(model, source)
    assert weights_sha256(model) != weights_sha256(source)
    load_file(model, path)
    assert equal(model, source)
    assert weights_sha256(model) == weights_sha256(source)


def without(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key not in names}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_missing_unexpected_and_reshaped_keys(source: Any, tmp_path: Path, suffix: str) -> None:
    """They are named, and the model is unchanged."""
    path, model = tmp_path / f"model.{suffix}", other()
    before, whole = weights_sha256(model), source.state_dict()

    def refused(weights: dict[str, Tensor]) -> str:
        (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(weights, path)
        text = refusal(load_file, model, path)
        assert text.startswith(str(path))
        assert weights_sha256(model) == before
        return text

    assert "missing fc.bias, unexpected none" in refused(without(whole, "fc.bias"))
    assert "missing none, unexpected exits.0.head.bias" in refused({**whole, "exits.0.head.bias": torch.zeros(1)})
    assert "missing fc.bias, fc.weight, unexpected none" in refused(without(whole, "fc.bias", "fc.weight"))
    assert "more" in refused({})
    text = refused({**whole, "fc.weight": torch.zeros(7, 96), "fc.bias": torch.zeros(7)})
    assert "expected fc.bias (10,), got (7,)" in text
    assert "2 such" in text


class Witness:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("name", ["model.pth", "model.pth.tar", "model.bin", "model", "model.safetensors"])
@pytest.mark.parametrize("kind", ["torch", "torch_old", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_refused_and_not_run(source: Any, tmp_path: Path, name: str, kind: str) -> None:
    path, witness = tmp_path / name, tmp_path / "ran"
    weights = {"state_dict": source.state_dict(), "extra": Witness(witness)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "torch")
    text = refusal(load_file, other(), path)
    assert str(path) in text
    assert "a pickle" in text or "weights-only" in text
    assert not witness.exists()


def test_the_class_that_a_checkpoint_refers_to_is_named(source: Any, tmp_path: Path) -> None:
    """A whole model instead of its weights is the usual mistake."""
    torch.save(source, tmp_path / "model.pth")
    text = refusal(load_file, other(), tmp_path / "model.pth")
    assert "timm.models.resnet.ResNet" in text
    assert "state_dict" in text


def test_safetensors_under_another_name_and_the_reverse(source: Any, tmp_path: Path) -> None:
    """The suffix determines how a file is read; a pickle named .safetensors is never opened as a pickle."""
    shutil.copy(save_state_dict(source, tmp_path), tmp_path / "pickle.safetensors")
    assert "a pickle" in refusal(load_file, other(), tmp_path / "pickle.safetensors")
    shutil.copy(save_safetensors(source, tmp_path), tmp_path / "model.pt")
    assert "safetensors" in refusal(load_file, other(), tmp_path / "model.pt")


def test_damaged_and_missing_weights(source: Any, tmp_path: Path) -> None:
    """Truncated anywhere, empty, text, random bytes, a folder, missing."""
    for save in (save_safetensors, save_state_dict, save_old_format):
        path = save(source, tmp_path)
        whole = path.read_bytes()
        cuts = [whole[: int(len(whole) * part)] for part in (0.001, 0.3, 0.9, 0.999)]
        for content in (
            *cuts,
            b"",
            b"P",
            b"text\n" * 9,
            bytes(100),
            b"\x80\x02",
            b"\x80\x02}q\x00K\x01N",
            b"PK\x03\x04",
        ):
            path.write_bytes(content)
            assert str(path) in refusal(load_file, other(), path)
    for path in (tmp_path, tmp_path / "none.pth", tmp_path / "none.safetensors"):
        assert str(path) in refusal(load_file, other(), path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_never_shows_a_traceback(source: Any, tmp_path: Path) -> None:
    """For random changes to the pickle in a checkpoint, whatever torch raises becomes BadInput."""
    path = tmp_path / "model.pth"
    torch.save({"fc.bias": source.state_dict()["fc.bias"]}, path)
    whole = path.read_bytes()
    start, end = whole.index(b"\x80\x02"), whole.index(b"fc.bias") + 150
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        position, change = (int(torch.randint(*r, (), generator=generator)) for r in ((start, end), (1, 256)))
        path.write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
        refusal(load_file, source, path)  # for want of the other keys, if nothing else


@pytest.mark.parametrize("value", [[1, 2], 3, "text", {"epoch": 3}, {0: 1}, {"state_dict": [1]}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "model.pth")
    assert "state_dict" in refusal(load_file, other(), tmp_path / "model.pth")


def test_keys_that_are_not_strings(tmp_path: Path) -> None:
    torch.save({0: torch.zeros(1)}, tmp_path / "model.pth")
    refusal(load_file, other(), tmp_path / "model.pth")


# --- Where a new model's weights start --------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_safetensors, save_by_timm])
def test_init_from_a_file(source: Any, tmp_path: Path, save: Callable[[nn.Module, Path], Path]) -> None:
    """All weights, including the classifier, although timm's own weights have a thousand classes."""
    model = create_model(NAME, CLASSES, init=str(save(source, tmp_path)))
    assert equal(model, source)
    assert "state_dict" not in model.pretrained_cfg


def test_init_with_other_classes_keeps_all_but_the_classifier(source: Any, tmp_path: Path) -> None:
    path = str(save_safetensors(source, tmp_path))
    model = create_model(NAME, 7, init=path)
    ours, theirs = model.state_dict(), source.state_dict()
    assert ours["fc.weight"].shape == (7, 96)
    assert 0.01 < ours["fc.weight"].std() < 0.03
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("fc."))
    assert equal(create_model(NAME, None, init=path), source)


def test_init_at_another_size_resizes_the_position_embedding(tmp_path: Path) -> None:
    """As timm does it for its own weights."""
    small, large = create_model("test_vit", 5, image_size=48), create_model("test_vit", 5, image_size=96)
    model = create_model("test_vit", 5, image_size=96, init=str(save_safetensors(small, tmp_path)))
    assert model.pos_embed.shape == large.pos_embed.shape != small.pos_embed.shape
    assert torch.equal(model.head.weight, small.head.weight)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, small.blocks[3].mlp.fc1.weight)


@pytest.mark.parametrize("classes", [CLASSES, 7, None])
def test_init_from_a_file_of_another_model_is_refused(source: Any, tmp_path: Path, classes: int | None) -> None:
    """A model is never left with random weights silently."""
    path = str(save_safetensors(source, tmp_path))
    assert path in refusal(create_model, "test_efficientnet", classes, init=path)
    safetensors.torch.save_file(without(source.state_dict(), "bn1.weight"), path)
    assert "bn1.weight" in refusal(create_model, NAME, classes, init=path)


def test_init_from_a_missing_file() -> None:
    assert "none.pth" in refusal(create_model, NAME, CLASSES, init="none.pth")


def test_published_weights_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    text = refusal(create_model, NAME, None, init="pretrained")
    assert NAME in text
    assert "local file" in text


# --- A folder with a model --------------------------------------------------------------------------------------------


def test_folder_as_timm_writes_it(source: Any, tmp_path: Path) -> None:
    """Same weights, same logits; label names and the rest of the configuration are read, too."""
    save_for_hf(source, str(tmp_path), model_config={"label_names": list("abcdefghij")}, safe_serialization="both")
    model, config = open_model_folder(tmp_path)
    assert equal(model, source)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), source(images))
    assert list(config.label_names.values()) == list("abcdefghij")
    assert (input_size(model), normalization(model)) == (input_size(source), normalization(source))


def test_folder_with_another_normalisation_and_size(source: Any, tmp_path: Path) -> None:
    own = {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    save_for_hf(source, str(tmp_path), safe_serialization=True, data_config=own)
    model, _ = open_model_folder(tmp_path)
    assert input_size(model) == 96
    assert normalization(model) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("name", ["swin_nano_patch4_window7_224", "test_vit"])
def test_folder_of_a_model_built_with_arguments(tmp_path: Path, name: str) -> None:
    """The paper's variant, at the size for which it was built."""
    source = create_model(name, 3, image_size=64).eval()
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    model, _ = open_model_folder(tmp_path)
    assert equal(model, source)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(images), source(images))


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (write("config.json", b"{"), "expected JSON"),
        (write("config.json", b"[1]"), "config.json"),
        (write("config.json", b"{}"), "architecture"),
        (write("model.safetensors", b"text"), "model.safetensors"),
        (write("model.safetensors", pickle.dumps({"x": 1})), "a pickle"),
        (edit(architecture="absent"), "architecture"),
        (edit(architecture="no_such_model"), "no_such_model"),
        (edit(architecture="test_vit"), "does not match"),
        (edit(num_classes="absent"), "num_classes"),
        (edit(num_classes=7), "fc.bias (7,), got (10,)"),
        (edit(num_classes="many"), "config.json"),
        (edit(pretrained_cfg="absent"), "pretrained_cfg"),
        (edit(pretrained_cfg=None), "config.json"),
        (edit(model_args={"no_such_argument": 1}), "no_such_argument"),
    ],
)
def test_contradictory_folder(source: Any, tmp_path: Path, change: Callable[[Path], None], expected: str) -> None:
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    change(tmp_path)
    assert expected in refusal(open_model_folder, tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    assert "config.json" in refusal(open_model_folder, tmp_path / "none")


def test_models_are_timms(source: Any) -> None:
    """They are the objects that timm creates, not wrappers."""
    assert type(source) is type(timm.create_model(NAME, num_classes=CLASSES))
    assert parameter_count(source) == parameter_count(timm.create_model(NAME, num_classes=CLASSES))


# --- What people have -------------------------------------------------------------------------------------------------


def officially(swin: bool, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights as in Microsoft's Swin and Facebook's ConvNeXt repositories, whose classifier is not
    `head.fc`.
    """
    renamed = {}
    for name, value in weights.items():
        if swin:
            name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        else:
            name = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
            name = re.sub(r"stem\.(\d)", r"downsample_layers.0.\1", name)
            name = re.sub(r"stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name).replace("head.norm", "norm")
            for theirs, timms in (("dwconv", "conv_dw"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2")):
                name = name.replace(timms, theirs)
        renamed[name.replace("head.fc", "head")] = value
    indices = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
    return {**renamed, **(indices if swin else {})}


@pytest.mark.parametrize("name", ["swin_pico_patch4_window7_224", "test_convnext"])
def test_a_checkpoint_from_its_publishers_repository(tmp_path: Path, name: str, capsys: Any) -> None:
    """timm's conversion is used; the classifier is kept, replaced if it has another size, or determines the size."""
    source = create_model(name, 5, 64)
    torch.save({"model": officially("swin" in name, source.state_dict())}, tmp_path / "official.pth")
    path = str(tmp_path / "official.pth")
    assert equal(create_model(name, 5, 64, init=path), source)
    assert equal(create_model(name, None, 64, init=path), source)
    other = create_model(name, 7, 64, init=path)
    theirs = source.state_dict()
    assert {k for k, v in other.state_dict().items() if not torch.equal(v, theirs[k])} == {
        "head.fc.weight",
        "head.fc.bias",
    }
    assert capsys.readouterr().err.splitlines() == [f"{path}: uses the weights called model"] * 3


def test_weights_without_a_classifier_initialise_a_student(source: Any, tmp_path: Path, capsys: Any) -> None:
    """For example, of self-supervised training; a notice says so. Other missing weights are refused."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(without(source.state_dict(), "fc.weight", "fc.bias"), path)
    model = create_model(NAME, CLASSES, init=str(path))
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, source.state_dict()[k])} <= {
        "fc.weight",
        "fc.bias",
    }
    assert capsys.readouterr().err == f"{path}: contains no classifier fc; it is initialised at random\n"
    assert "missing fc.bias, fc.weight" in refusal(load_file, other(), path)


def test_old_files_without_batch_counters(source: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({k: v for k, v in source.state_dict().items() if "num_batches" not in k}, path)
    model = other()
    load_file(model, path)
    assert torch.equal(model.fc.weight, source.fc.weight)


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_init_from_a_folder(source: Any, tmp_path: Path, form: str) -> None:
    """With model.safetensors or, as timm writes by default, pytorch_model.bin; of this architecture only."""
    for safe in (True, False):
        folder = tmp_path / str(safe)
        save_for_hf(source, str(folder), safe_serialization=safe)
        assert equal(create_model(NAME, CLASSES, init=form.format(folder)), source)
        assert equal(open_model_folder(folder)[0], source)
        text = refusal(create_model, "test_vit", CLASSES, init=form.format(folder))
        assert f"{folder}: expected the weights of test_vit, got those of test_resnet" in text
    assert "config.json" in refusal(create_model, NAME, CLASSES, init=form.format(tmp_path))
    assert "does not exist" in refusal(create_model, NAME, CLASSES, init=f"local-dir:{tmp_path}/none")


def test_a_model_of_the_hub(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are downloaded and then treated like those of a folder, as safetensors or as torch's own."""
    fetched: list[str] = []

    def hub(model_id: str, filename: str, **_: Any) -> str:
        fetched.append(f"{model_id}/{filename}")
        if not (tmp_path / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", hub)
    save_for_hf(source, str(tmp_path))
    assert equal(create_model(NAME, CLASSES, init="hf-hub:owner/model@main"), source)
    assert fetched == [f"owner/model/{name}" for name in ("config.json", "model.safetensors", "pytorch_model.bin")]
    (tmp_path / "config.json").unlink()
    assert "could not get hf-hub:owner/model (404); without" in refusal(
        create_model, NAME, CLASSES, init="hf-hub:owner/model"
    )


def test_the_hubs_names_of_timm_models() -> None:
    assert resolve("timm/resnet18.a1_in1k") == resolve("resnet18.a1_in1k")


def test_one_channel(tmp_path: Path) -> None:
    """fastofa reads RGB: a model of grey images is refused as such, not because of a shape."""
    grey = timm.create_model(NAME, num_classes=CLASSES, in_chans=1)
    expected = "one for 1 channel"
    safetensors.torch.save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    assert expected in refusal(create_model, NAME, CLASSES, init=str(tmp_path / "grey.safetensors"))
    save_for_hf(grey, str(tmp_path / "folder"), safe_serialization=True)
    assert expected in refusal(open_model_folder, tmp_path / "folder")
    assert expected in refusal(create_model, NAME, CLASSES, init=str(tmp_path / "folder"))
    assert expected in refusal(check_channels, grey, "student x")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_tiny_patch16_224", (0.9, "bicubic")),
        ("vit_small_patch16_224", (0.9, "bicubic")),
        ("swin_tiny_patch4_window7_224", (0.9, "bicubic")),
        ("swin_nano_patch4_window7_224", (0.9, "bicubic")),
        ("swin_pico_patch4_window7_224", (0.9, "bicubic")),
        ("mixer_b16_224", (0.875, "bicubic")),
        ("resmlp_12_224", (0.875, "bicubic")),
        ("mobilenetv2_100", (0.875, "bicubic")),
        ("resnet18.tv_in1k", (0.875, "bilinear")),
    ],
)
def test_evaluation_views_of_the_papers_students(name: str, expected: tuple[float, str]) -> None:
    """Crop and filter of timm 0.6.5, which the published code used. (timm's ResNet-18 without a tag is now another.)"""
    assert evaluation_view(name) == expected


def test_an_evaluation_view_never_exceeds_the_image() -> None:
    assert evaluation_view("volo_d1_224") == (0.96, "bicubic")
    assert evaluation_view("volo_d5_448")[0] == 1.0  # 1.15 in timm


def test_drop_path_of_zero_disables_a_models_own() -> None:
    """By default the model's own is kept. Models without drop path accept 0."""

    def rates(**given: Any) -> list[float]:
        return [m.drop_prob for m in create_model("swin_pico_patch4_window7_224", 3, 64, **given).modules()
                if type(m).__name__ == "DropPath"]  # fmt: skip

    assert max(rates()) == pytest.approx(0.1)  # timm's default
    assert max(rates(drop_path=0.2)) == pytest.approx(0.2)
    assert max(rates(drop_path=0.0), default=0) == 0
    assert "drop_path_rate" not in resolve(NAME)[1]
    with torch.device("meta"):
        assert create_model("vgg11", 3, drop_path=0.0).num_classes == 3
