"""model.onnx in onnxruntime gives the logits of plain timm on images that were normalised by hand."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tv

import fastofa.runs.quick_checks
import fastofa.training.export_onnx
from fastofa import cli
from fastofa.system.errors import BadInput
from fastofa.training.export import export
from test_evaluate_export import DIGITS, MEAN, STD, make_run

HOW = "needs onnxruntime and onnxscript: pip install 'fastofa[onnx]'"
with_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason=HOW
)
# torch.export's own warnings: of its internals, and of onnxscript's
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def open_session(file: Path) -> Any:
    return pytest.importorskip("onnxruntime", reason=HOW).InferenceSession(file, providers=["CPUExecutionProvider"])


@with_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"student": "test_resnet", "image_size": 48, "eval_size": 64},
        {"student": "deit_tiny_patch16_224", "image_size": 32, "method": "kd"},
        {"student": "swin_nano_patch4_window7_224", "image_size": 64, "method": "kd"},
    ],
    ids=lambda given: given["student"],
)
def test_the_graph_gives_timms_logits_for_raw_pixels(tmp_path, monkeypatch, given):
    """For any batch size, at the evaluation size; the only file that is added."""
    monkeypatch.setattr("fastofa.training.export.SAMPLE", 10)  # images: seconds
    run = make_run(tmp_path / "run", **given)
    export(run.path, tmp_path / "out", onnx=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "model.onnx"}
    session = open_session(tmp_path / "out" / "model.onnx")
    size = run.config.eval_size or run.config.image_size
    (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type, pixels.shape[1:]) == ("pixels", "tensor(uint8)", [3, size, size])
    assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [10])
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for count in (1, 2, 5):
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        with torch.inference_mode():
            expected = plain(tv.normalize(images / 255, list(MEAN), list(STD))).numpy()
        (got,) = session.run(None, {"pixels": images.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


@with_onnx
@pytest.mark.slow
def test_the_file_describes_its_input(tmp_path, capsys):
    """In its metadata, for users who have only the file; the command prints one line."""
    onnx = pytest.importorskip("onnx", reason=HOW)
    run = make_run(tmp_path / "run", eval_crop=0.75)
    assert cli.main(["export", str(run.path), str(tmp_path / "out"), "--onnx"]) is None
    assert "model.onnx, opset 18: uint8 RGB pixels [batch, 3, 32, 32]" in " ".join(capsys.readouterr().err.split())
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == list(DIGITS)
    assert json.loads(metadata["preprocessing"])["crop_pct"] == 0.75
    np.testing.assert_allclose(json.loads(metadata["normalization"])["mean"], MEAN, rtol=1e-6)
    assert "[batch, 3, 32, 32]" in metadata["input"]


@with_onnx
@pytest.mark.slow
def test_a_graph_with_other_logits_is_removed(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    original = fastofa.training.export_onnx._compare

    def other(file: Path, model: Any, pixels: torch.Tensor) -> str:
        model.mean += 0.1
        return original(file, model, pixels)

    monkeypatch.setattr(fastofa.training.export_onnx, "_compare", other)
    with pytest.raises(BadInput, match="expected the run's logits, but onnxruntime's differ by up to"):
        export(run.path, tmp_path / "out", onnx=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_package_is_named_first(tmp_path, monkeypatch, capsys):
    """By the command, even before it looks for the run, and by the library."""
    monkeypatch.setattr(fastofa.runs.quick_checks, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--onnx"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "found no onnxscript; pip install 'fastofa[onnx]'" in line
    with pytest.raises(BadInput, match="found no onnxscript"):
        export(tmp_path / "run", tmp_path / "out", onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_the_missing_comparison_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(fastofa.training.export_onnx, "find_spec", lambda _: None)
    line = fastofa.training.export_onnx._compare(tmp_path / "model.onnx", torch.nn.Identity(), torch.zeros(1))  # type: ignore[arg-type]
    assert "not compared" in line
