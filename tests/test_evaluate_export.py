"""Evaluation equals a computation without fastofa, and the exported student works in plain timm."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, recall_score
from timm.models import save_for_hf
from torch import Tensor, nn

import fastofa.commands.evaluate
import fastofa.commands.export
import fastofa.training.evaluate
import fastofa.training.export
from fastofa.cli import main
from fastofa.commands.arguments import EvaluateConfig, ExportConfig
from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.pipelines import open_pipeline
from fastofa.runs import recipes
from fastofa.runs.checkpoint import save_best, save_checkpoint
from fastofa.runs.config import TrainConfig
from fastofa.runs.run import Run
from fastofa.system.errors import BadInput
from fastofa.system.files import write_json
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.model import open_teacher
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.compare_networks import compare_networks
from fastofa.training.evaluate import evaluate
from fastofa.training.export import export
from fastofa.training.predict_files import predict
from fastofa.training.validate import best_classes
from runs import newest

MEAN, STD = (0.2, 0.4, 0.6), (0.3, 0.25, 0.2)
DIGITS = tuple("0123456789")
TIES = 2.1 / 599  # of two classes that are as good to the last bits, each processor may choose another


def lively(model: nn.Module) -> nn.Module:
    """Random weights large enough for predictions that differ from image to image."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    return model


def make_run(out: Path, classes: tuple[str, ...] = DIGITS, ema: bool = False, save: bool = True, **given: Any) -> Run:
    """A run's folder as training writes it, with random weights (and other random weights as their average)."""
    values = {"data": "digits:100", "student": "test_efficientnet", "mean": MEAN, "std": STD, "eval_crop": 0.8}
    config: TrainConfig = recipes.digits(**{**values, "out": out, **given})
    run = Run(out, config, classes, teacher_dim=256, fingerprint="")
    torch.manual_seed(0)
    if not save:
        return run
    student = lively(run.build_student())
    average = lively(run.build_student()) if ema else None
    run.save()
    save_checkpoint(out, 0, student, torch.optim.SGD(student.parameters(), lr=0.1), average, {}, keep=1)
    return run


def pixels(dataset: Dataset, size: int, crop: float) -> Tensor:
    """The central squares, resized by torchvision's transforms, one after the other."""
    images = []
    for i, (height, width) in enumerate(dataset.sizes.tolist()):
        if dataset.pixels is None:
            image = tv.pil_to_tensor(Image.open(dataset.path(i)).convert("RGB"))
        else:
            image = torch.from_numpy(dataset.pixels[i]).permute(2, 0, 1)
        side = round(min(height, width) * crop)
        box = [(height - side) // 2, (width - side) // 2, side, side]
        images.append(tv.resized_crop(image, *box, [size, size], antialias=True))
    return torch.stack(images)


def plain_student(run: Run, part: str) -> nn.Module:
    """The run's backbone in plain timm, with the checkpoint's `part` ("student" or "ema")."""
    c, start = run.config, f"{part}.backbone."
    tensors = {k.removeprefix(start): v for k, v in load_file(newest(run.path)).items() if k.startswith(start)}
    model = timm.create_model(c.student, num_classes=len(run.classes))
    model.load_state_dict(tensors)
    return model.eval()


@torch.inference_mode()
def predict_by_hand(model: nn.Module, images: Tensor) -> np.ndarray:
    return model(tv.normalize(images / 255, list(MEAN), list(STD))).argsort(dim=1, descending=True).numpy()


# --- Evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digit_cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(7)
    model = lively(timm.create_model("test_efficientnet", num_classes=10))
    save_for_hf(model, str(folder / "teacher"), safe_serialization=True, data_config={"input_size": (3, 32, 32)})
    return precompute(PrecomputeConfig("digits:100", str(folder / "teacher"), folder / "cache", views=1, topk=3))


@pytest.fixture
def photo_run(photos: Path, tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", ("china", "flower"), data=str(photos))


@pytest.mark.parametrize("ema", [False, True])
def test_the_figures_equal_a_plain_loop(digit_cache, tmp_path, ema):
    """Top-1, top-5, agreement and the teacher's top-1 over 599 digits; of the moving average if there is one."""
    run = make_run(tmp_path / "run", ema=ema, cache=digit_cache.path)
    found = evaluate(run.path, "digits:100")

    val = open_dataset("digits:100", "val")
    best = predict_by_hand(plain_student(run, "ema" if ema else "student"), pixels(val, 32, 0.8))
    teacher = digit_cache.val_targets().classes[:, 0].long().numpy()
    assert found.images == 599
    assert found.top1 == pytest.approx((best[:, 0] == val.labels).mean(), abs=TIES)
    assert found.top5 == pytest.approx((best[:, :5] == val.labels[:, None]).any(1).mean(), abs=TIES)
    assert found.agreement == pytest.approx((best[:, 0] == teacher).mean(), abs=TIES)
    assert found.teacher_top1 == pytest.approx((teacher == val.labels).mean())
    figures = sorted([found.top1, found.top5, found.agreement, found.teacher_top1])
    assert min(b - a for a, b in itertools.pairwise(figures)) > TIES
    assert json.loads((run.path / "evaluation.json").read_text()) == {
        "data": "digits:100",
        "weights": "last",
        "images": 599,
        **{name: getattr(found, name) for name in ("top1", "top5", "teacher_top1", "agreement")},
    }


def test_the_runs_eval_flip_and_eval_size_are_used(tmp_path):
    """The mean of the logits of image and mirror image, at the run's --eval-size."""
    val = open_dataset("digits:100", "val")
    found = []
    for flip, size in ((False, 32), (True, 32), (True, 48)):
        run = make_run(tmp_path / f"{flip}-{size}", eval_flip=flip, eval_size=size)
        model, images = plain_student(run, "student"), pixels(val, size, 0.8)
        with torch.inference_mode():
            logits = [model(tv.normalize(shown / 255, list(MEAN), list(STD))) for shown in (images, images.flip(-1))]
        best = (sum(logits) / 2 if flip else logits[0]).argsort(dim=1, descending=True).numpy()
        got = evaluate(run.path, "digits:100")
        assert got.top1 == pytest.approx((best[:, 0] == val.labels).mean(), abs=TIES)
        assert got.top5 == pytest.approx((best[:, :5] == val.labels[:, None]).any(1).mean(), abs=TIES)
        found.append((got.top1, got.top5))
    assert min(max(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in itertools.combinations(found, 2)) > TIES


def test_best_classes_averages_image_and_mirror_image(digits):
    """The five best classes of every image; a second call gives the same."""
    run = make_run(Path("unused"), save=False)
    student = run.build_student().train()
    lively(student)
    pipeline = open_pipeline("resident", digits, 32, 30)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    got = [best_classes(student, pipeline, digits, 0.8, bf16=False, flip=True) for _ in range(2)]
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    images = tv.normalize(pixels(digits, 32, 0.8) / 255, list(MEAN), list(STD))
    with torch.inference_mode():
        logits = student.eval().backbone(images) + student.backbone(images.flip(-1))
        alone = student.backbone(images)
    expected = logits.argsort(dim=1, descending=True)[:, :5].numpy()
    np.testing.assert_array_equal(got[0], got[1])
    assert (got[0] == expected).mean() > 0.98  # but for ties
    assert (got[0] == alone.argsort(dim=1, descending=True)[:, :5].numpy()).mean() < 0.9


def test_the_best_weights_are_evaluated_and_exported_on_request(tmp_path):
    """Instead of the last ones; evaluation.json states which."""
    run = make_run(tmp_path / "run", ema=True)
    best = lively(run.build_student())
    save_best(run.path, best, {"step": 0})
    found = {weights: evaluate(run.path, "digits:100", weights=weights) for weights in ("last", "best")}
    assert json.loads((run.path / "evaluation.json").read_text())["weights"] == "best"
    assert found["last"] != found["best"]
    val = open_dataset("digits:100", "val")
    hits = predict_by_hand(best.eval().backbone, pixels(val, 32, 0.8))[:, 0] == val.labels
    assert found["best"].top1 == pytest.approx(hits.mean(), abs=TIES)
    export(run.path, tmp_path / "out", weights="best")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in best.backbone.state_dict().items())


def test_image_files_in_any_batch_size(photo_run, photos):
    """JPEGs of many sizes, two classes (so top-5 is 100%); without a teacher cache there is no agreement."""
    val = open_dataset(str(photos), "val")
    best = predict_by_hand(plain_student(photo_run, "student"), pixels(val, 32, 0.8))
    for batch_size in (5, 256):
        found = evaluate(photo_run.path, str(photos), batch_size=batch_size, workers=0)
        assert found.top1 == pytest.approx((best[:, 0] == val.labels).mean(), abs=1.1 / 12)
        assert (found.images, found.top5, found.agreement, found.teacher_top1) == (12, 1.0, None, None)


def test_a_student_agrees_with_itself(photo_run, photos, tmp_path):
    """Exported, used as a teacher and evaluated: images, normalisation and crop are the same throughout."""
    export(photo_run.path, tmp_path / "out")
    config = PrecomputeConfig(str(photos), str(tmp_path / "out"), tmp_path / "cache", views=1, topk=2, workers=0)
    cache = precompute(config)
    assert cache.header["teachers"][0]["crop"] == 0.8
    found = evaluate(make_run(photo_run.path, photo_run.classes, cache=cache.path).path, str(photos))
    assert found.agreement == 1.0
    assert found.teacher_top1 == found.top1


@pytest.mark.parametrize("state", ["gone", "unfinished", "of other images"])
def test_without_predictions_for_these_images_there_is_no_agreement(digit_cache, photos, tmp_path, capsys, state):
    """A notice states the reason; accuracy is still computed."""
    copy = Path(shutil.copytree(digit_cache.path, tmp_path / "cache"))
    if state == "gone":
        shutil.rmtree(copy)
    elif state == "unfinished":
        (copy / "val.safetensors").unlink()
    run = make_run(tmp_path / "run", ("china", "flower"), data=str(photos), cache=copy)
    found = evaluate(run.path, str(photos), workers=0)
    assert (found.agreement, found.teacher_top1) == (None, None)
    said = capsys.readouterr().err
    expected = {
        "gone": "no such folder",
        "unfinished": "is missing",
        "of other images": "other validation images",
    }
    assert f"agreement with the teacher not measured: {'' if state == 'of other images' else copy}" in said
    assert expected[state] in said


def test_without_data_a_run_is_evaluated_on_its_own_images(photos, tmp_path, monkeypatch, capsys):
    """Also from another folder; a notice names the data and whether they have changed."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".fastofa"))
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", ("china", "flower"), data="photos")
    dataclasses.replace(run, val_fingerprint=open_dataset("photos", "val").fingerprint).save()
    expected = evaluate(run.path, "photos", workers=0)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "elsewhere")
    place, line = str(tmp_path / "photos"), f"data {tmp_path / 'photos'}, which the run was trained on"
    assert evaluate(run.path, workers=0) == dataclasses.replace(expected, data=place)
    assert json.loads((run.path / "evaluation.json").read_text())["data"] == place
    assert capsys.readouterr().err.splitlines().count(line) == 1
    next((tmp_path / "photos" / "val" / "china").iterdir()).unlink()
    assert evaluate(run.path, workers=0).images == expected.images - 1
    assert f"{line}; its validation images have changed since" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(BadInput, match=f"{run.path}: could not open the run's own data, give --data: .*'photos'"):
        evaluate(run.path, workers=0)


@pytest.mark.parametrize("max_pixels", [0.001, 200.0])
def test_images_are_accepted_within_the_runs_limits(folder, tmp_path, max_pixels):
    """By evaluate, cka and predict. The images have 8,100 to 25,600 pixels."""
    run = make_run(tmp_path / "run", ("china", "flower"), data=str(folder), max_pixels=max_pixels).path
    uses: list[Callable[[], object]] = [
        lambda: evaluate(run, str(folder), workers=0),
        lambda: evaluate(run, workers=0),
        lambda: compare_networks(run, run, str(folder), exits=False, workers=0),
        lambda: list(predict(run, folder / "val", workers=0)),
    ]
    for use in uses:
        with nullcontext() if max_pixels > 1 else pytest.raises(BadInput, match=r"unreadable image|readable images"):
            use()


def test_evaluate_refuses(photo_run, photos, tmp_path):
    """No run, no checkpoint yet, data with other classes."""
    with pytest.raises(BadInput, match=r"expected a run made by `fastofa train`, found no config.json"):
        evaluate(tmp_path, str(photos))
    with pytest.raises(BadInput, match=r"expected the 2 classes that .* was trained on, got 10: missing china, flower"):
        evaluate(photo_run.path, "digits")
    newest(photo_run.path).unlink()
    with pytest.raises(BadInput, match=r"expected a checkpoint, found none yet; run `fastofa train` with --resume"):
        evaluate(photo_run.path, str(photos))
    assert not (photo_run.path / "evaluation.json").exists()


def test_evaluate_refuses_an_edited_run(photo_run, photos):
    for edit, message in (
        ({"config": {}}, r"config.json: expected the fields of this version"),
        ({"classes": None}, r"config.json: expected what `fastofa train` writes, but it lacks"),
    ):
        kept = json.loads((photo_run.path / "config.json").read_text())
        write_json(photo_run.path / "config.json", {**kept, **edit})
        with pytest.raises(BadInput, match=message):
            evaluate(photo_run.path, str(photos))
        write_json(photo_run.path / "config.json", kept)


def test_the_evaluate_command_prints_a_table(photo_run, photos, capsys):
    fastofa.commands.evaluate.main(EvaluateConfig(photo_run.path, str(photos), workers=0))
    found = json.loads((photo_run.path / "evaluation.json").read_text())
    printed = capsys.readouterr().out
    for text in ("top-1", "top-5", "teacher's", "agreement", f"{found['top1']:.2%}", "100.00%"):
        assert text in printed


def test_details_equal_scikit_learns(photos, tmp_path, capsys):
    """Recall of each class and the confusion matrix; a class without images has no recall."""
    photos = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".fastofa"))
    shutil.copytree(photos / "train" / "china", photos / "train" / "zebra")
    names = ("china", "flower", "zebra")
    run = make_run(tmp_path / "run", names, data=str(photos))
    out = tmp_path / "new" / "details.json"
    main(["evaluate", str(run.path), "--workers", "0", "--json", str(out)])
    details, summary = json.loads(out.read_text()), json.loads((run.path / "evaluation.json").read_text())
    assert {key: details[key] for key in summary} == summary
    assert summary.keys() | {"run", "classes", "confusion"} == details.keys()
    val = open_dataset(str(photos), "val")
    best = predict_by_hand(plain_student(run, "student"), pixels(val, 32, 0.8))[:, 0]
    expected = confusion_matrix(val.labels, best, labels=range(3))
    assert np.abs(np.array(details["confusion"]) - expected).sum() <= 2  # a tie
    if (np.array(details["confusion"]) == expected).all():
        recalls = recall_score(val.labels, best, labels=range(3), average=None, zero_division=0)
        assert [entry["recall"] for entry in details["classes"][:2]] == pytest.approx(recalls[:2].tolist())
    assert [(entry["name"], entry["images"]) for entry in details["classes"]] == list(
        zip(names, (6, 6, 0), strict=True)
    )
    assert details["classes"][2]["recall"] is None

    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run.path), "--workers", "0", "--json", str(tmp_path / "folder")])
    assert end.value.code == 2
    assert list((tmp_path / "folder").iterdir()) == []
    assert "folder: expected a file name, got a folder" in capsys.readouterr().err


# --- Export -----------------------------------------------------------------------------------------------------------

MODELS = {
    "cnn": ({"student": "test_resnet", "image_size": 48}, "test_resnet"),
    "mobilenet": ({"student": "mobilenetv2_100", "image_size": 64, "drop_path": 0.1}, "mobilenetv2_100"),
    "vit": ({"student": "deit_tiny_patch16_224", "image_size": 64, "method": "kd"}, "deit_tiny_patch16_224"),
    "swin": (
        {"student": "swin_nano_patch4_window7_224", "image_size": 64, "method": "kd"},
        "swin_tiny_patch4_window7_224",
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> tuple[Run, Path, str, str]:
    """(run, folder, the printed line, timm's name) of a CNN with exits and of Transformers at other sizes."""
    given, name = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    run = make_run(folder / "run", **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastofa.training.export.SAMPLE", 10)  # images: seconds
        line = export(run.path, folder / "out")
    return run, folder / "out", line, name


def test_plain_timm_gives_the_runs_logits(exported):
    """By the printed line, at the run's size, to 1e-5; without drop-path and exits."""
    run, out, line, _ = exported
    student = run.trained_student()
    size = run.config.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.inference_mode():
        expected = student(images)[-1]
    assert line == f'timm.create_model("local-dir:{out}", pretrained=True)'
    with torch.inference_mode():
        got = eval(line, {"timm": timm}).eval()(tv.normalize(images / 255, list(MEAN), list(STD)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_a_cnn_can_also_be_loaded_by_name_file_and_classes(tmp_path):
    run = make_run(tmp_path / "run", student="test_resnet")
    export(run.path, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    model = timm.create_model("test_resnet", checkpoint_path=str(weights), num_classes=10)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), run.trained_student()(images)[-1], rtol=1e-5, atol=1e-5)


def test_config_json_describes_the_model(exported):
    """timm's architecture and arguments, size, crop, normalisation, and class names in the order of the logits."""
    run, out, _, name = exported
    config = json.loads((out / "config.json").read_text())
    size = run.config.image_size
    assert (config["architecture"], config["num_classes"]) == (name, 10)
    assert config["label_names"] == list(DIGITS)
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_pct"], cfg["num_classes"]) == ([3, size, size], 0.8, 10)
    np.testing.assert_allclose(cfg["mean"], MEAN, rtol=1e-6)
    np.testing.assert_allclose(cfg["std"], STD, rtol=1e-6)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{out}"))
    assert data["input_size"] == (3, size, size)
    assert data["crop_pct"] == 0.8
    np.testing.assert_allclose(data["mean"], MEAN, rtol=1e-6)


def test_the_folder_contains_only_the_backbone(exported):
    run, out, _, _ = exported
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    weights, own = load_file(out / "model.safetensors"), run.build_student().backbone.state_dict()
    assert weights.keys() == own.keys()
    assert not [file for file in out.parent.iterdir() if file.name.startswith(".")]


def test_an_export_records_the_evaluation_size(tmp_path):
    """As timm's test_input_size, beside the training size."""
    export(make_run(tmp_path / "run", eval_size=48).path, tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["input_size"], cfg["test_input_size"]) == ([3, 32, 32], [3, 48, 48])
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'out'}"), use_test_size=True)
    assert data["input_size"] == (3, 48, 48)


def test_an_exported_model_is_a_teacher(exported):
    """At its own size, with its own crop and normalisation: the run's own log-probabilities."""
    run, out, _, name = exported
    teacher = open_teacher(str(out), DIGITS)
    assert (teacher.name, teacher.image_size, teacher.crop) == (name, run.config.image_size, 0.8)
    images = torch.randint(0, 256, (2, 3, teacher.image_size, teacher.image_size), dtype=torch.uint8)
    with torch.inference_mode():
        expected = run.trained_student()(images)[-1].log_softmax(-1)
    torch.testing.assert_close(teacher.log_probs(images), expected, rtol=1e-4, atol=1e-4)


def test_the_moving_average_is_exported(tmp_path):
    run = make_run(tmp_path / "run", ema=True)
    export(run.path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for part, same in (("ema", True), ("student", False)):
        expected = plain_student(run, part).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in expected.items()) is same


def test_export_refuses_and_leaves_nothing(photo_run, tmp_path, monkeypatch):
    """No run, an existing path, logits that differ from the run's."""
    with pytest.raises(BadInput, match="expected a run made by `fastofa train`"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(BadInput, match="taken: already exists; choose another path or remove it"):
        export(photo_run.path, tmp_path / "taken")
    create_model = timm.create_model

    def damaged(*arguments: Any, **given: Any) -> nn.Module:
        model = create_model(*arguments, **given)
        if str(arguments[0]).startswith("local-dir:"):
            model.get_classifier().bias.data += 1
        return model

    monkeypatch.setattr(timm, "create_model", damaged)
    with pytest.raises(BadInput, match="timm's logits differ from the model's by up to 1"):
        export(photo_run.path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "taken"]


def test_an_export_is_compared_on_images_preprocessed_by_timm(photo_run, tmp_path, capsys):
    """Its predictions for image files are those of the run's own evaluation."""
    evaluated = evaluate(photo_run.path, photo_run.config.data, workers=0)
    export(photo_run.path, tmp_path / "out")
    said = capsys.readouterr().err
    assert "top-1 on 12 validation images is " in said
    assert f" {evaluated.top1:.2%} in the run; " in said
    assert float(said.rpartition("; ")[2].partition("%")[0]) > 80  # percent of the predictions are equal
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["interpolation"], data["crop_mode"], data["crop_pct"]) == ("bilinear", "center", 0.8)


def test_a_lost_normalisation_is_refused(photo_run, tmp_path, monkeypatch):
    """Random tensors would not detect it. The labels are the run's predictions, so its accuracy is 100%."""
    own_predictions, save = fastofa.training.export._own_predictions, fastofa.training.export.save_for_hf

    def right_predictions(*arguments: Any) -> Any:
        sample = own_predictions(*arguments)
        return dataclasses.replace(sample, labels=sample.predictions)

    def forgetful(model: nn.Module, folder: str, data_config: dict[str, Any], **given: Any) -> None:
        save(model, folder, data_config={**data_config, "mean": (5.0, 0.0, -5.0), "std": (0.01, 1, 9)}, **given)

    monkeypatch.setattr(fastofa.training.export, "_own_predictions", right_predictions)
    export(photo_run.path, tmp_path / "right")
    monkeypatch.setattr(fastofa.training.export, "save_for_hf", forgetful)
    with pytest.raises(
        BadInput, match=r"top-1 on 12 .* is \d+\.\d+% through timm's own transform.*nothing was written"
    ):
        export(photo_run.path, tmp_path / "wrong")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["right", "run"]


def test_without_its_images_an_export_is_compared_on_tensors(photo_run, tmp_path, capsys):
    """A notice says so; the images may be on another machine or have changed."""
    for data, reason in (("nowhere", "there is no such folder"), ("digits", "the classes of digits have changed")):
        run = make_run(tmp_path / data, photo_run.classes, data=data)
        export(run.path, tmp_path / f"{data}-out")
        said = capsys.readouterr().err
        assert "compared with the run on random images only" in said
        assert reason in said


def test_the_export_command_prints_the_line(photo_run, tmp_path, capsys):
    fastofa.commands.export.main(ExportConfig(photo_run.path, tmp_path / "out"))
    first, line = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'out'}: load it with"
    assert eval(line, {"timm": timm}).num_classes == 2
