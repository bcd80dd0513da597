"""Predictions for image files equal those of the run's own evaluation and those of plain timm."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from timm.models import save_for_hf

import fastofa.training.evaluate
import fastofa.training.predict_files
from fastofa import cli, predict
from fastofa.data.image_files import image_files
from fastofa.runs.run import Run
from fastofa.system.errors import BadInput
from fastofa.training.evaluate import evaluate
from fastofa.training.export import export
from fastofa.training.predict_files import UnreadableImages, open_classifier
from test_evaluate_export import MEAN, STD, lively, make_run

NAMES = ("china", "flower")


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", NAMES, data=str(photos))


def command(*argv: object) -> int:
    """Run the command; returns its exit code."""
    try:
        cli.main([str(argument) for argument in argv])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def by_hand(file: Path, size: int, crop: float) -> torch.Tensor:
    """The normalised central square, by Pillow and torchvision."""
    image = tv.pil_to_tensor(Image.open(file).convert("RGB"))
    side = round(min(image.shape[1:]) * crop)
    top, left = ((extent - side) // 2 for extent in image.shape[1:])
    pixels = tv.resized_crop(image, top, left, side, side, [size, size], antialias=True)
    return tv.normalize(pixels / 255, list(MEAN), list(STD))


@pytest.mark.parametrize("given", [{}, {"eval_flip": True}, {"eval_size": 48, "eval_crop": 1.0}], ids=str)
def test_predictions_are_those_of_evaluate(photos, tmp_path, monkeypatch, given):
    """For each validation image the same classes in the same order, hence the same top-1."""
    run = make_run(tmp_path / "run", NAMES, data=str(photos), **given)
    seen: list[np.ndarray] = []
    original = fastofa.training.evaluate.best_classes
    monkeypatch.setattr(
        fastofa.training.evaluate, "best_classes", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    evaluation = evaluate(run.path, workers=0, batch_size=5)
    found = list(predict(run.path, photos / "val", workers=2, batch_size=5))
    assert [tuple(NAMES[i] for i in row) for row in seen[0]] == [p.classes for p in found]
    assert {p.classes[0] for p in found} == set(NAMES)
    assert np.mean([p.classes[0] == p.file.parent.name for p in found]) == evaluation.top1


@pytest.mark.parametrize("source", ["run", "exported", "local-dir"])
def test_predictions_are_those_of_plain_timm(run, photos, tmp_path, source):
    """Class names, order and probabilities, for images preprocessed independently."""
    export(run.path, tmp_path / "out")
    model = {"run": run.path, "exported": tmp_path / "out", "local-dir": f"local-dir:{tmp_path / 'out'}"}[source]
    files = sorted((photos / "val").rglob("*.jpg"))
    found = list(predict(model, files, workers=0))
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        expected = plain(torch.stack([by_hand(file, 32, 0.8) for file in files])).softmax(dim=1)
    assert [p.file for p in found] == files
    for prediction, shares in zip(found, expected, strict=True):
        order = shares.argsort(descending=True)
        np.testing.assert_allclose(prediction.probabilities, shares[order].numpy(), atol=1e-4)
        if shares.max() > 0.501:
            assert prediction.classes == tuple(NAMES[i] for i in order)


def test_workers_and_batches_make_no_difference(run, photos):
    expected = list(predict(run.path, photos, workers=0, batch_size=1))
    for workers, batch_size in ((0, 7), (3, 4), (1, 100)):
        found = list(predict(run.path, photos, workers=workers, batch_size=batch_size))
        assert [(p.file, p.classes) for p in found] == [(p.file, p.classes) for p in expected]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)


def test_images_are_read_in_the_background(run, photos, monkeypatch):
    """However many there are, memory holds a batch and the images that threads have read ahead."""
    read: list[Path] = []
    original = fastofa.training.predict_files.read_image

    def count(path: Path, *limits: Any) -> Any:
        read.append(path)
        return original(path, *limits)

    monkeypatch.setattr(fastofa.training.predict_files, "read_image", count)
    files = [photos / "val" / "china" / "000.jpg"] * 200
    found = predict(run.path, files, workers=0, batch_size=3)
    assert read == []
    next(found)
    assert len(read) == 3
    found = predict(run.path, files, workers=1, batch_size=3)
    next(found)
    assert len(read) < 50
    found.close()


# --- Which files ------------------------------------------------------------------------------------------------------


def test_folders_are_searched_to_any_depth(photos, tmp_path, capsys):
    """Sorted by path, without circular links; a file that is given itself may have any name."""
    image = photos / "val" / "china" / "000.jpg"
    for name in (
        "b/2.JPG",
        "b/deep/er/1.png",
        "a.webp",
        "train/0.jpeg",
        ".hidden.jpg",
        "c/.cache/9.jpg",
        "c/notes.txt",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "in" / name)
    (tmp_path / "in" / "b" / "back").symlink_to(tmp_path)
    shutil.copy(image, tmp_path / "odd")
    found = image_files([tmp_path / "odd", str(tmp_path / "in")])
    names = ["odd", "in/a.webp", "in/b/2.JPG", "in/b/deep/er/1.png", "in/train/0.jpeg"]
    assert found == [tmp_path / name for name in names]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'in'}: skipped 4 files and folders: ")
    for place in ([], [tmp_path / "gone.jpg"], [tmp_path / "in" / "c"]):
        with pytest.raises(BadInput, match="expected"):
            image_files(place)


def test_an_unreadable_image_is_named_and_all_others_are_predicted(run, photos, tmp_path, capsys):
    """The library raises an exception after the last one; the command exits with code 2, or 0 with --skip-corrupt."""
    folder = tmp_path / "in"
    shutil.copytree(photos / "val" / "china", folder)
    (folder / "001.jpg").write_bytes(b"no image")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    sound = [f"00{i}.jpg" for i in (0, 2, 3, 4, 5)]
    found = predict(run.path, folder, batch_size=2, workers=2)
    assert [next(found).file.name for _ in sound] == sound
    with pytest.raises(UnreadableImages, match=r"expected 7 readable images, but the 2 named above could not be read"):
        next(found)
    assert [p.file.name for p in predict(run.path, folder, skip_corrupt=True)] == sound

    for flags, code in (([], 2), (["--skip-corrupt"], 0)):
        capsys.readouterr()
        out = tmp_path / f"{code}.csv"
        assert command("predict", run.path, folder, "--csv", out, "--workers", 0, *flags) == code
        said = capsys.readouterr().err.splitlines()
        assert [line.partition(" (")[0] for line in said[:2]] == [
            f"unreadable image {folder / name}" for name in ("001.jpg", "gone.png")
        ]
        assert len(said) == 2 + (code == 2)
        with open(out, newline="") as file:
            assert [Path(row["file"]).name for row in csv.DictReader(file) if row["rank"] == "1"] == sound


# --- Models -----------------------------------------------------------------------------------------------------------


def test_classes_without_names_are_numbers(photos, tmp_path):
    model = lively(timm.create_model("test_resnet", num_classes=30))
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True, data_config={"input_size": (3, 32, 32)})
    (prediction,) = predict(tmp_path / "model", photos / "val" / "china" / "000.jpg", topk=100)
    assert sorted(prediction.classes, key=int) == [str(i) for i in range(30)]
    assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-4)
    assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)


def test_size_and_crop_are_those_of_evaluation(tmp_path):
    """For an export, the run's eval size, not timm's recommendations for its own weights."""
    export(make_run(tmp_path / "run", eval_size=48, eval_crop=0.6).path, tmp_path / "out")
    for model in (tmp_path / "run", tmp_path / "out"):
        classifier = open_classifier(model)
        assert (classifier.image_size, classifier.crop) == (48, 0.6)
    own = timm.get_pretrained_cfg("resnet18")
    assert own is not None
    assert own.test_crop_pct == 1.0
    config = {"input_size": (3, 64, 64), "crop_pct": 0.5}
    model = timm.create_model("resnet18", num_classes=3)
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True, data_config=config)
    classifier = open_classifier(tmp_path / "model")
    assert (classifier.image_size, classifier.crop) == (64, 0.5)


def test_predict_refuses_at_the_call(run, photos, tmp_path):
    """Before any image is read: no model, weights of a model that has only one set, numbers out of range."""
    export(run.path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for model, given, message in (
        (tmp_path / "nowhere", {}, "expected the folder of a run or of an exported model"),
        (tmp_path / "empty", {}, "there is no config.json in it"),
        (tmp_path / "out", {"weights": "best"}, "leave --weights out"),
        (run.path, {"topk": 0}, "topk: expected at least 1, got 0"),
        (run.path, {"batch_size": 0}, "batch-size: expected at least 1, got 0"),
        (run.path, {"device": "cuda:99"}, "device 'cuda:99'"),
    ):
        with pytest.raises(BadInput, match=message):
            predict(model, photos, **given)


def test_logits_that_are_not_finite_are_refused(run, photos, tmp_path):
    export(run.path, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    torch.nn.init.constant_(model.get_classifier().bias, float("nan"))
    save_for_hf(model, str(tmp_path / "bad"), safe_serialization=True, data_config={"input_size": (3, 32, 32)})
    with pytest.raises(BadInput, match=r"expected finite logits, got NaN or infinity for .*000.jpg"):
        next(predict(tmp_path / "bad", photos))


# --- The command ------------------------------------------------------------------------------------------------------


def test_a_csv_may_contain_any_name(run, photos, tmp_path, capsys):
    names = ["a,b.jpg", 'say "x".jpg', "two\nlines.jpg", "größe ☕.jpg", " space.jpg"]
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(photos / "val" / "china" / "000.jpg", tmp_path / "in" / name)
    assert command("predict", run.path, tmp_path / "in", "--csv", tmp_path / "out.csv", "--topk", 1) == 0
    printed = capsys.readouterr()
    assert f"{tmp_path / 'out.csv'}: predictions for 5 images" in printed.out
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text("utf-8").splitlines(keepends=True)))
    assert list(rows[0]) == ["file", "rank", "class", "probability"]
    assert sorted(Path(row["file"]).name for row in rows) == sorted(names)
    (expected,) = predict(run.path, tmp_path / "in" / "a,b.jpg", topk=1)
    for row in rows:
        assert (row["rank"], row["class"]) == ("1", expected.classes[0])
        assert float(row["probability"]) == pytest.approx(expected.probabilities[0], abs=1e-5)


def test_a_csv_appears_whole_or_not_at_all(run, photos, tmp_path, monkeypatch):
    """If the last batch fails, the old file is kept."""
    (tmp_path / "out.csv").write_text("old")
    taken: list[int] = []

    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        for prediction in predict(run.path, photos / "val"):
            yield prediction
            taken.append(1)
            if len(taken) == 5:
                raise BadInput("a failure")

    monkeypatch.setattr("fastofa.commands.predict.predict_images", fail)
    before = sorted(tmp_path.iterdir())
    assert command("predict", run.path, photos / "val", "--csv", tmp_path / "out.csv") == 2
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before
    assert len(taken) == 5
    assert command("predict", run.path, photos / "val", "--csv", photos) == 2


def test_the_table_names_files_and_classes(run, photos, monkeypatch, capsys):
    """Up to a limit; one line states how many more there are."""
    monkeypatch.setattr("fastofa.commands.predict.PRINTED", 4)
    monkeypatch.setenv("COLUMNS", "300")
    assert command("predict", run.path, photos / "val", "--workers", 0) == 0
    printed = capsys.readouterr().out
    found = list(predict(run.path, photos / "val"))
    for i, p in enumerate(found):
        cells = ", ".join(f"{name} {share:.1%}" for name, share in zip(p.classes, p.probabilities, strict=True))
        assert (str(p.file) in printed) is (i < 4)
        assert i >= 4 or cells in printed
    assert "8 more images; --csv FILE writes all" in printed


def test_config_json_of_an_export_names_the_classes(run, tmp_path, photos):
    """`predict` reads the names from it: renamed classes have their new names."""
    export(run.path, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "label_names": ["temple", "orchid"]}))
    found = list(predict(tmp_path / "out", photos / "val"))
    assert {name for p in found for name in p.classes} == {"temple", "orchid"}
