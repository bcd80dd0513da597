"""Weights are found in the formats in which they are commonly saved, and a notice states which were loaded."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastofa.models.weights import SavedWeights, read_weights
from fastofa.system.errors import BadInput


def network(value: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model


OWN = network(1).state_dict()
OTHER = network(2).state_dict()


def under(prefix: str, weights: dict[str, Any] = OWN) -> dict[str, Any]:
    return {prefix + name: value for name, value in weights.items()}


def found(contents: dict[str, Any], key: str | None = None) -> float:
    """1 if the set OWN was loaded, 2 if OTHER."""
    tensors = SavedWeights("file", contents, key).of_model(OWN)
    assert tensors.keys() == OWN.keys()
    (value,) = {float(v) for tensor in tensors.values() for v in tensor.flatten()}
    return value


@pytest.mark.parametrize("name", ["net", "model", "state_dict", "state_dict_ema", "model_ema", "teacher", "my weights"])
def test_a_wrapped_state_dict(name, capsys):
    """Under any common name, beside whatever else a trainer saves."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(9)}}, "param_groups": [{"lr": 0.1}]}
    assert found({"epoch": 3, "rng": torch.zeros(5), "optimizer": optimizer, name: OWN}) == 1
    assert capsys.readouterr().err == f"file: uses the weights called {name}\n"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_without_meaning(prefix, capsys):
    assert found(under(prefix)) == 1
    assert found({"model": under(prefix)}) == 1
    assert capsys.readouterr().err == "file: uses the weights called model\n"


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "student.", "net.", "module.model.", "student.backbone."])
def test_prefixes_of_wrapping_modules(prefix, capsys):
    """Other weights beside them (projectors, a criterion) are ignored; a notice states which were loaded."""
    assert found({**under(prefix), "criterion.weight": torch.zeros(4), "exits.0.bias": torch.zeros(1)}) == 1
    called = prefix.removeprefix("module.").rstrip(".")
    assert capsys.readouterr().err == f"file: uses the weights called {called}\n"


def test_a_prefix_of_the_models_own_names_is_kept():
    model = nn.ModuleDict({"backbone": network(1), "head": nn.Linear(1, 1)})
    own = model.state_dict()
    assert SavedWeights("file", own).of_model(own).keys() == own.keys()
    assert SavedWeights("file", under("module.", own)).of_model(own).keys() == own.keys()


def test_pytorchs_own_average():
    """Its counter is not a weight."""
    assert found(AveragedModel(network(1)).state_dict()) == 1


@pytest.mark.parametrize(
    ("contents", "taken", "left"),
    [
        ({"state_dict": OTHER, "state_dict_ema": OWN}, "state_dict_ema", "state_dict"),
        ({"model": OTHER, "model_ema": under("module.")}, "model_ema", "model"),
        ({"student": under("backbone.", OTHER), "teacher": under("backbone.")}, "teacher.backbone", "student.backbone"),
        ({**under("student.backbone.", OTHER), **under("ema.backbone.")}, "ema.backbone", "student.backbone"),
        ({"first": {"x": torch.zeros(99)}, "second": OWN}, "second", "first"),
        ({"ema": {"x": torch.zeros(99)}, "net": OWN}, "net", "ema"),
    ],
)
def test_of_several_sets_the_best_match_then_the_average(contents, taken, left, capsys):
    """Unless another is requested."""
    assert found(contents) == 1
    said = capsys.readouterr().err
    assert said == f"file: uses the weights called {taken}, not {left}; to use others, save them in a separate file\n"
    assert found(contents, key=taken) == 1
    assert found(contents, key=taken.partition(".")[0]) == 1
    assert capsys.readouterr().err == ""
    if left not in ("first", "ema"):
        assert found(contents, key=left) == 2
    with pytest.raises(BadInput, match=rf"file: expected weights called nothing, got .*{left}"):
        found(contents, key="nothing")


def test_shapes_tell_a_student_from_a_larger_teacher():
    """All names are in both: the tensors of this model's shapes are taken, wherever they are."""
    larger = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30)).state_dict()
    for own, other in (("student", "teacher"), ("teacher", "student")):
        assert found({**under(f"module.{own}."), **under(f"module.{other}.", larger)}) == 1


def test_a_distillers_teacher_is_no_average(capsys):
    """Beside projectors, of two equal sets the student's is taken; the teacher's if asked for."""
    distiller = {
        **under("student."),
        **under("teacher.", OTHER),
        "projector.1.weight": torch.zeros(9),
        "projector.1.bias": torch.zeros(9),
    }
    for contents in (distiller, {"state_dict": under("module.", distiller)}):
        assert found(contents) == 1
        assert found(contents, key="teacher" if contents is distiller else "state_dict.teacher") == 2
    said = capsys.readouterr().err.splitlines()[0]
    assert said == (
        "file: uses the weights called student, not projector, teacher; to use others, save them in a separate file"
    )


def test_the_flag_that_chooses_is_named(capsys):
    SavedWeights("f", {"model": OWN, "model_ema": OWN}, flag="--teacher-checkpoint-key").of_model(OWN)
    assert capsys.readouterr().err.endswith("not model; --teacher-checkpoint-key chooses others\n")


@pytest.mark.parametrize("contents", [{"epoch": 3}, {0: torch.zeros(1)}, {"a": {"b": [1]}}, {"a": {0: {}}}])
def test_a_file_without_weights(contents):
    with pytest.raises(BadInput, match="file: expected a state_dict of tensors, found none in"):
        SavedWeights("file", contents).of_model(OWN)


def test_endless_wrappers():
    nested: dict[str, Any] = dict(OWN)
    for _ in range(500):
        nested = {"model": nested}
    with pytest.raises(BadInput, match="expected a state_dict of tensors"):
        SavedWeights("file", nested).of_model(OWN)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_special_files_are_not_opened(tmp_path, suffix):
    """Reading a pipe could block forever."""
    path = tmp_path / f"x.{suffix}"
    os.mkfifo(path)
    cases: dict[Path, str] = {path: "a pipe"}
    (tmp_path / f"loop.{suffix}").symlink_to(tmp_path / f"loop.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    cases[tmp_path / f"loop.{suffix}"] = "symbolic links"
    cases[tmp_path / f"folder.{suffix}"] = "a folder"
    cases[tmp_path / f"none.{suffix}"] = "does not exist"
    cases[path / "below"] = "Not a directory"
    for place, reason in cases.items():
        with pytest.raises(BadInput, match=rf"expected a file with weights, .*{reason}"):
            read_weights(place)
