"""config.json of a teacher's folder is untrusted: possible values are used, all others are refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models import save_for_hf

from fastofa.models.model_config import read_model_config
from fastofa.models.timm_models import open_model_folder
from fastofa.system.errors import BadInput

NAME = "test_vit"  # of fixed size, with many arguments
ARGUMENTS = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "class_token": False, "global_pool": "avg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = timm.create_model(NAME, num_classes=3, **ARGUMENTS)
    settings = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2), "crop_pct": 0.8}
    save_for_hf(model, str(path), {"label_names": ["a", "b", "c"]}, safe_serialization=True, data_config=settings)
    return path


def edited(folder: Path, out: Path, change: dict[str, Any]) -> Path:
    """The folder with changed values, such as "model_args.depth": 9."""
    config = json.loads((folder / "config.json").read_text())
    for path, value in change.items():
        *parents, name = path.split(".")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    return out


def test_possible_values_are_used(folder):
    config = read_model_config(folder / "config.json")
    assert (config.architecture, config.num_classes) == (NAME, 3)
    assert config.arguments == {**ARGUMENTS, "in_chans": 3, "img_size": (32, 32)}
    assert config.preprocessing == {
        "input_size": (3, 32, 32),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.2, 0.2, 0.2),
        "crop_pct": 0.8,
        "interpolation": "bicubic",
    }
    assert config.label_names == {0: "a", 1: "b", 2: "c"}
    model, _ = open_model_folder(folder)
    assert (model.embed_dim, len(model.blocks), model.pretrained_cfg["mean"]) == (48, 2, (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # What would load, fetch or wrap something.
        ({"model_args.pretrained": True}, "got 'pretrained'; remove it"),
        ({"model_args.checkpoint_path": "x"}, "got 'checkpoint_path'; remove it"),
        ({"model_args.checkpoint_path": "/etc/passwd"}, "model_args 'checkpoint_path'"),
        ({"model_args.pretrained_cfg": {"url": "http://x"}}, "model_args 'pretrained_cfg'"),
        ({"model_args.pretrained_cfg_overlay": {"file": "x"}}, "model_args 'pretrained_cfg_overlay'"),
        ({"model_args.cache_dir": "x"}, "got 'cache_dir'"),
        ({"model_args.features_only": True}, "got 'features_only'"),
        ({"model_args.scriptable": True}, "got 'scriptable'"),
        ({"model_args.no_such_argument": 1}, "got 'no_such_argument'"),
        ({"architecture": "hf-hub:timm/resnet18"}, "unknown model 'hf-hub:timm/resnet18'"),
        ({"architecture": "local-dir:/tmp"}, "unknown model 'local-dir:/tmp'"),
        ({"architecture": "resnet18.hf-hub:x"}, "unknown model"),
        ({"architecture": ["test_vit"]}, "architecture to be a timm model's name"),
        ({"architecture": ""}, "unknown model"),
        # Sizes out of bounds.
        ({"model_args.embed_dim": 10**9}, "model_args 'embed_dim' to be"),
        ({"model_args.embed_dim": 16368}, "got one of [0-9,]+; restore the original files"),
        ({"model_args.depth": 10**6}, "model_args 'depth' to be"),
        ({"model_args.img_size": 10**6}, "model_args 'img_size' to be"),
        ({"model_args.img_size": [10**6, 10**6]}, "model_args 'img_size' to be"),
        ({"model_args.img_size": [32] * 1000}, "model_args 'img_size' to be"),
        ({"model_args.num_heads": [[[1]]]}, "model_args 'num_heads' to be"),
        ({"model_args.depth": {"a": 1}}, "model_args 'depth' to be"),
        ({"model_args.depth": float("nan")}, "model_args 'depth' to be"),
        ({"model_args.act_layer": "a.b; c"}, "model_args 'act_layer' to be"),
        ({"model_args.depth": 9}, "does not match the model: missing blocks"),
        ({"model_args.num_heads": 7}, "could not build test_vit from it"),
        ({"model_args.num_heads": 0}, "could not build test_vit from it"),
        ({"model_args": [1]}, "model_args to be an object"),
        ({"num_classes": 10**9}, "num_classes to be 0 to 200,000"),
        ({"num_classes": -1}, "num_classes to be"),
        ({"num_classes": True}, "num_classes to be"),
        ({"num_classes": 3.0}, "num_classes to be"),
        # Preprocessing that cannot be.
        ({"pretrained_cfg.input_size": [3, 10**6, 10**6]}, "input_size to be"),
        ({"pretrained_cfg.input_size": [3, 32, 48]}, "input_size to be .* got .3, 32, 48"),
        ({"pretrained_cfg.input_size": [3, 0, 0]}, "input_size to be"),
        ({"pretrained_cfg.input_size": "big"}, "input_size to be"),
        ({"pretrained_cfg.input_size": [3]}, "input_size to be"),
        ({"pretrained_cfg.input_size": []}, "input_size to be"),
        ({"pretrained_cfg.mean": [0.5]}, "mean to be three numbers"),
        ({"pretrained_cfg.mean": [0.5, 0.5, float("nan")]}, "mean to be three numbers"),
        ({"pretrained_cfg.mean": [128, 128, 128]}, "mean to be three numbers from 0 to 1, got .128, 128, 128"),
        ({"pretrained_cfg.mean": ["0.5"] * 3}, "mean to be three numbers"),
        ({"pretrained_cfg.std": [0, 0, 0]}, "std to be three numbers"),
        ({"pretrained_cfg.std": [0.2, -0.2, 0.2]}, "std to be three numbers"),
        ({"pretrained_cfg.std": [0.2, 0.2, float("inf")]}, "std to be three numbers"),
        ({"pretrained_cfg.crop_pct": 0}, "crop_pct to be a number"),
        ({"pretrained_cfg.crop_pct": 50}, "crop_pct to be a number"),
        ({"pretrained_cfg.crop_pct": "all"}, "crop_pct to be a number"),
        ({"pretrained_cfg.interpolation": "evil"}, "interpolation to be one of"),
        ({"pretrained_cfg.interpolation": ["bilinear"]}, "interpolation to be one of"),
        ({"pretrained_cfg": 3}, "pretrained_cfg to be an object"),
        # Names.
        ({"label_names": ["a", "b"]}, "label_names to be 3 names, one per class, got '2'"),
        ({"label_names": [1, 2, 3]}, "label_names to be words"),
        ({"label_names": {"9": "a"}}, "label_names to be of outputs below 3"),
        ({"label_names": {"one": "a"}}, "label_names to be of outputs below 3"),
        ({"label_names": "abc"}, "label_names to be a list"),
        ({"label_descriptions": ["a"]}, "label_descriptions to be"),
        # One channel.
        ({"model_args.in_chans": 1}, "one for 1 channel"),
        ({"pretrained_cfg.input_size": [1, 32, 32], "model_args.in_chans": 1}, "one for 1 channel"),
    ],
)
def test_impossible_values_are_refused(folder, tmp_path, change, message):
    with pytest.raises(BadInput, match=message) as error:
        open_model_folder(edited(folder, tmp_path, change))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"pretrained_cfg.url": "http://x", "pretrained_cfg.file": "/x", "pretrained_cfg.source": "hf-hub"},
        {"pretrained_cfg.custom_load": True, "pretrained_cfg.num_classes": 5, "pretrained_cfg.first_conv": "x"},
        {"pretrained_cfg.crop_pct": None, "label_names": {"0": "a", "2": "c"}},
        {"model_args.drop_path_rate": 0.1, "anything": {"else": 1}},
    ],
)
def test_unknown_settings_are_ignored(folder, tmp_path, change):
    """Nothing is downloaded, and the weights are those of the folder."""
    model, _ = open_model_folder(edited(folder, tmp_path, change))
    plain, _ = open_model_folder(folder)
    assert all((a == b).all() for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert model.num_classes == 3
    assert not {"url", "file"} & {k for k, v in model.pretrained_cfg.items() if v in ("http://x", "/x")}


def test_the_flat_format_of_old_timm_versions(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    flat = {**config.pop("pretrained_cfg"), **config, "labels": config.pop("label_names")}
    flat.pop("label_names", None)
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert read_model_config(tmp_path / "config.json").preprocessing["mean"] == (0.1, 0.2, 0.3)
    assert read_model_config(tmp_path / "config.json").label_names == {0: "a", 1: "b", 2: "c"}
