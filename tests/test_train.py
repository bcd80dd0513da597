"""Training: the published step, on the cache's views, logged, averaged, evaluated and saved."""

import copy
import dataclasses
import functools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.layers import DropPath
from torch import Tensor, nn

import fastofa.training.evaluate_in_training
import fastofa.training.job
import fastofa.training.loop
import fastofa.training.plan
import fastofa.training.step
from fastofa.commands.train import main
from fastofa.data.open import open_dataset
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.methods.method import Outputs
from fastofa.methods.objective import Objective
from fastofa.methods.targets import Targets
from fastofa.models.timm_models import VARIANTS
from fastofa.pipelines import torchvision_loader
from fastofa.pipelines.augment import shares
from fastofa.runs import recipes
from fastofa.runs.checkpoint import checkpoints
from fastofa.runs.config import TrainConfig
from fastofa.runs.log import read_metrics
from fastofa.runs.recipes import default_policy
from fastofa.runs.run import open_run
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.distributed import World
from fastofa.training.evaluate import evaluate
from fastofa.training.export import export
from fastofa.training.job import open_job
from fastofa.training.loop import Result, train
from fastofa.training.optim import create_optimizer
from fastofa.training.predict_files import open_classifier, predict
from fastofa.training.schedule import learning_rate
from fastofa.views.draw import draw_views
from fastofa.views.order import epoch_order, epoch_rows
from fastofa.views.table import Views, center_views, join_views
from runs import make_cache, newest, same_run

SIZE = 32
METHODS = ["ofa", "kd", "scratch"]


@pytest.fixture(scope="module")
def digit_cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return make_cache("digits:100", 10, tmp_path_factory.mktemp("digits"), topk=4)


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def saved(run: Path, part: str) -> dict[str, Tensor]:
    """Tensors of the newest checkpoint whose names begin with `part`."""
    tensors, _ = load_tensors(newest(run))
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


# --- A whole run ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Finished:
    config: TrainConfig
    result: Result

    @property
    def path(self) -> Path:
        return self.config.out


@pytest.fixture(scope="module", params=METHODS)
def finished(request, digit_cache, tmp_path_factory) -> Finished:
    """A short run on digits by each method. Tests must not change it."""
    config = recipes.digits(
        data="digits:100", student="test_efficientnet", cache=None if request.param == "scratch" else digit_cache.path,
        method=request.param, out=tmp_path_factory.mktemp(request.param) / "run", epochs=2, eval_every=2, log_every=1,
        eps=(1.3,), smoothing=0.1, gt_weight=0.5, kd_weight=2.0, ofa_weight=0.1,
    )  # fmt: skip
    return Finished(config, train(config))


def test_the_files_of_a_run(finished):
    """No temporary files; config.json gives the same configuration, with classes and the teacher's width."""
    names = sorted(file.name for file in finished.path.iterdir())
    assert names == [
        "checkpoints",
        "config.json",
        "curves.png",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "tensorboard",
        "val_predictions.safetensors",
    ]
    kept = sorted(file.name for file in (finished.path / "checkpoints").iterdir())
    assert kept == ["best.safetensors", "step-00000004.safetensors"]
    run = open_run(finished.path)
    assert run.config == dataclasses.replace(finished.config, order="random")
    assert run.classes == tuple("0123456789")
    assert run.teacher_dim == (0 if finished.config.cache is None else 256)
    assert json.loads((finished.path / "config.json").read_text()).keys() == {
        "fastofa",
        "config",
        "classes",
        "teacher",
        "teacher_dim",
        "val_fingerprint",
        "folder",
        "fingerprint",
        "pages",
        "view_digests",
    }


def test_metrics_have_a_row_for_each_step_and_epoch(finished):
    """The schedule's learning rate, the method's parts, the loss as their weighted sum, accuracy after evaluations, and
    a speed if a step was timed.
    """
    c = finished.config
    steps, epochs = rows(c.out, "step"), rows(c.out, "epoch")
    assert [(row["step"], row["epoch"]) for row in steps] == [(s + 1, s // 2) for s in range(4)]
    assert [(row["step"], row["epoch"]) for row in epochs] == [(2, 0), (4, 1)]
    for row in steps:
        assert row["lr"] == pytest.approx(learning_rate(c, row["step"] - 1, 2))
        parts = {"ofa": {"gt", "kd", "ofa"}, "kd": {"gt", "kd"}, "scratch": {"gt"}}[c.method]
        assert (
            {name for name in ("gt", "kd", "ofa") if row.get(name, 0) > 0} == parts == row.keys() & {"gt", "kd", "ofa"}
        )
        weighted = 0.5 * row["gt"] + 2 * row.get("kd", 0) + 0.1 * row.get("ofa", 0)
        assert row["loss"] == pytest.approx(weighted, rel=1e-5)
    assert [("top1" in row, "top5" in row) for row in epochs] == [(False, False), (True, True)]
    assert 0 <= epochs[1]["top1"] <= epochs[1]["top5"] <= 1
    assert [row["step"] for row in steps + epochs if "images_per_second" not in row] == [1]  # which compiles
    assert all(row["images_per_second"] > 0 and 0 <= row["loader_share"] <= 1 for row in steps[1:] + epochs)


def test_epochs_are_timed_from_start_to_start(finished):
    """Together they are not longer than the run; an evaluation is a part of its epoch."""
    first, last = rows(finished.path, "epoch")
    assert "eval_seconds" not in first
    assert 0 < last["eval_seconds"] < last["epoch_seconds"]
    assert 0 < first["epoch_seconds"] + last["epoch_seconds"] < finished.result.seconds


def test_an_epoch_that_was_interrupted_is_not_timed(on_photos):
    """Since the time between both starts of the run is not known; the next epoch is."""
    config = on_photos(checkpoint_every=2, keep=9)
    train(config)
    for checkpoint in checkpoints(config.out):
        if checkpoint.name != "step-00000002.safetensors":
            checkpoint.unlink()
    train(dataclasses.replace(config, resume=True))
    assert ["epoch_seconds" in row for row in rows(config.out, "epoch")] == [False, True]


def test_the_result_is_the_last_evaluation(finished):
    last = rows(finished.path, "epoch")[-1]
    got = finished.result
    assert (got.top1, got.top5, got.images_per_second) == (last["top1"], last["top5"], last["images_per_second"])
    assert got.seconds > 0


def test_the_curves_are_an_image(finished):
    with Image.open(finished.path / "curves.png") as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1200, 480))
        assert len(image.getcolors(1 << 20)) > 50


def test_tensorboard_has_the_same_values(finished):
    """Every value of metrics.jsonl under kind/name, at its step."""
    board = EventAccumulator(str(finished.path / "tensorboard"))
    board.Reload()
    found = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    expected: dict[str, dict[int, float]] = {}
    for row in read_metrics(finished.path):
        for name in row.keys() - {"kind", "step"}:
            expected.setdefault(f"{row['kind']}/{name}", {})[row["step"]] = row[name]
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-6)


def test_resuming_a_finished_run_returns_the_same_and_changes_nothing(finished, tmp_path):
    config = dataclasses.replace(
        finished.config, out=Path(shutil.copytree(finished.path, tmp_path / "run")), resume=True
    )
    again = train(config)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(finished.result, seconds=0)
    for name in ("metrics.jsonl", "val_predictions.safetensors", "checkpoints/best.safetensors"):
        assert (config.out / name).read_bytes() == (finished.path / name).read_bytes()
    assert newest(config.out).name == newest(finished.path).name
    assert newest(config.out).read_bytes() == newest(finished.path).read_bytes()


def test_the_checkpoint_has_an_exit_for_each_stage_that_learns(finished):
    heads = {
        name.partition(".")[2].split(".")[0] for name in saved(finished.path, "student") if name.startswith("exits")
    }
    assert heads == ({"0", "1", "2", "3"} if finished.config.method == "ofa" else set())


# --- The step ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gradients(monkeypatch) -> list[dict[str, Tensor]]:
    """The clipped gradients by name, of every step of a run."""
    found: list[dict[str, Tensor]] = []

    def create(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = create_optimizer(model, config)
        optimizer.register_step_pre_hook(
            lambda *_: found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        )
        return optimizer

    monkeypatch.setattr(fastofa.training.step, "create_optimizer", create)
    return found


def dense_loss(c: TrainConfig, logits: Tensor, labels: Tensor, classes: Tensor, log_probs: Tensor) -> Tensor:
    """The published formula with the teacher's whole distribution: [loss, gt, kd, ofa]."""
    C, K = logits.shape[-1], classes.shape[1]
    known = log_probs.float().exp()
    p = ((1 - known.sum(1)).clamp(min=0) / (C - K))[:, None].repeat(1, C).scatter(1, classes.long(), known)
    p = p ** (1 / c.temperature)
    p = p / p.sum(1, keepdim=True)
    m = nn.functional.one_hot(labels, C)
    heads = [
        -(((p + m) ** eps - m) * (z / c.temperature).log_softmax(-1)).sum(-1).mean()
        for z, eps in zip(logits, c.eps, strict=True)
    ]
    soft = (1 - c.smoothing) * m + c.smoothing / C
    gt, kd, ofa = -(soft * logits[-1].log_softmax(-1)).sum(-1).mean(), heads[-1], torch.stack(heads[:-1]).sum()
    return torch.stack([c.gt_weight * gt + c.kd_weight * kd + c.ofa_weight * ofa, gt, kd, ofa])


@pytest.mark.usefixtures("in_float64", "no_report")
def test_an_ofa_run_equals_a_plain_loop(digit_cache, gradients, tmp_path):
    """Pixels by torchvision's transforms, dense float loss, clipping and Nesterov SGD by formula, two views replayed.

    The gradients of the first step, the losses of every step and the final weights are equal.
    """
    c = recipes.digits(
        data="digits:100", cache=digit_cache.path, student="test_efficientnet", out=tmp_path / "run", epochs=3, seed=3,
        batch_size=40, optimizer="sgd", lr=0.05, warmup_epochs=1, weight_decay=0.01, clip=2.0,
        eps=(0.8, 1.0, 1.2, 1.4, 1.6), temperature=2.0,
        gt_weight=0.7, kd_weight=1.5, ofa_weight=0.4, smoothing=0.1, mean=(0.3, 0.3, 0.3),
        std=(0.4, 0.3, 0.2), eval_every=3, log_every=1,
    )  # fmt: skip
    train(c)

    dataset = open_dataset("digits:100")
    torch.manual_seed(3)
    student = Student(c.student, 10, SIZE, digit_cache.teacher_dim).to(memory_format=torch.channels_last).train()
    parameters = dict(student.named_parameters())
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    first: dict[str, Tensor] = {}
    losses = []
    for step in range(6):
        epoch, place = divmod(step, 2)
        ids = epoch_order(100, 3, epoch)[40 * place :][:40]
        views, classes, log_probs = digit_cache.targets(epoch % 2)
        boxes = views.boxes(dataset.sizes)
        images = torch.stack(
            [
                tv.resized_crop(
                    torch.from_numpy(dataset.pixels[i]).permute(2, 0, 1), *boxes[i], [SIZE] * 2, antialias=True
                )
                for i in ids
            ]
        )
        logits = student(tv.normalize(images / 255, list(c.mean), list(c.std)))
        rows_ = torch.from_numpy(ids)
        labels = torch.from_numpy(dataset.labels)[rows_]
        parts = dense_loss(c, logits, labels, classes.to(torch.int32)[rows_], log_probs[rows_])
        losses.append(parts.tolist())
        found = dict(zip(parameters, torch.autograd.grad(parts[0], list(parameters.values())), strict=True))
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in found.values()))
        found = {name: g * min(1, 2.0 / norm) for name, g in found.items()}
        first = first or found
        lr = 1e-6 + step / 2 * (0.05 - 1e-6) if step < 2 else 0.05 * 0.5 * (1 + math.cos(math.pi * step / 6))
        with torch.no_grad():
            for name, p in parameters.items():
                g = found[name] + (0.01 * p if p.ndim > 1 else 0)
                momentum[name] = 0.9 * momentum[name] + g
                p -= lr * (g + 0.9 * momentum[name])

    assert gradients[0].keys() == first.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-5)
    logged = [[row[name] for name in ("loss", "gt", "kd", "ofa")] for row in rows(c.out, "step")]
    np.testing.assert_allclose(logged, losses, rtol=1e-3)
    for name, value in saved(c.out, "student").items():
        torch.testing.assert_close(value, student.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_gradients_are_clipped_to_their_norm(on_photos, gradients):
    def norms() -> list[float]:
        found = [math.sqrt(sum(float(g.double().pow(2).sum()) for g in step.values())) for step in gradients]
        gradients.clear()
        return found

    train(on_photos("free", epochs=1, clip=None))
    free = norms()
    train(on_photos("clipped", epochs=1, clip=min(free) / 2))
    assert norms()[0] == pytest.approx(min(free) / 2, rel=1e-3)
    logged = [row["grad_norm"] for row in rows(on_photos("clipped").out, "step")]
    assert logged[0] == pytest.approx(free[0], rel=1e-5)  # as they were before clipping


@pytest.mark.usefixtures("in_float64", "no_report")
def test_parts_of_a_step_do_not_change_it(digit_cache, tmp_path, monkeypatch):
    """Losses agree to 1e-6 in one, two or five parts, for a student without batch norm.

    A run may be resumed with another number of parts.
    """
    sizes, call = [], Objective.forward

    def spy(self: Objective, outputs: Outputs, *arguments: Any) -> Tensor:
        sizes.append(outputs.heads.shape[1])
        return call(self, outputs, *arguments)

    monkeypatch.setattr(Objective, "forward", spy)
    losses = {}
    for parts in (1, 2, 5):
        c = recipes.digits(
            data="digits:100", cache=digit_cache.path, student="test_vit", out=tmp_path / f"{parts}", epochs=1,
            batch_size=20, optimizer="sgd", lr=0.01, log_every=1, accumulate=parts,
        )  # fmt: skip
        sizes.clear()
        train(c)
        assert sizes == [20 // parts] * (5 * parts)
        losses[parts] = [[row[name] for name in ("loss", "gt", "kd", "ofa")] for row in rows(c.out, "step")]
        train(dataclasses.replace(c, resume=True, accumulate=4))
    for parts in (2, 5):
        np.testing.assert_allclose(losses[parts], losses[1], rtol=1e-6)


def test_the_loop_waits_for_the_device_only_when_needed(on_photos, monkeypatch):
    """At the first step, which compiles, and at the end of an epoch."""
    calls = []
    original = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        if self.shape[-1:] == (5,):
            calls.append(1)
        return original(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    train(on_photos(epochs=2, eval_every=2, log_every=1000))
    assert len(calls) == 1 + 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_every_optimizer_trains(on_photos, optimizer):
    """All weights have changed, and repeating the run gives the same checkpoint, byte for byte."""
    config = on_photos(optimizer=optimizer, lr=0.01, epochs=1)
    train(config)
    torch.manual_seed(0)
    before = dict(Student("test_efficientnet", 2, SIZE, 256).named_parameters())
    after = saved(config.out, "student")
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []
    again = on_photos("again", optimizer=optimizer, lr=0.01, epochs=1)
    train(again)
    assert newest(again.out).read_bytes() == newest(config.out).read_bytes()


def test_bf16(on_photos, monkeypatch):
    """The student's logits are bf16 in training and evaluation, loss and weights fp32; the run is close to the fp32
    run.
    """
    dtypes, call = [], Objective.forward

    def spy(self: Objective, outputs: Outputs, *arguments: Any) -> Tensor:
        dtypes.append(outputs.heads.dtype)
        return call(self, outputs, *arguments)

    monkeypatch.setattr(Objective, "forward", spy)
    exact, rough = on_photos("fp32"), on_photos("bf16", precision="bf16")
    train(exact)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    train(rough)
    assert set(dtypes) == {torch.bfloat16}
    a, b = (rows(config.out, "step")[0]["loss"] for config in (exact, rough))
    assert a != b
    assert a == pytest.approx(b, rel=0.03)
    assert {value.dtype for value in saved(rough.out, "student").values()} == {torch.float32, torch.int64}


def test_a_log_row_is_the_mean_since_the_last(on_photos):
    """The same run with a row for every step and for every second step."""
    each, second = on_photos("each"), on_photos("second", log_every=2)
    train(each)
    train(second)
    a, b = rows(each.out, "step"), rows(second.out, "step")
    assert [row["step"] for row in b] == [2, 4, 6]
    for name in ("loss", "gt", "kd", "ofa"):
        pairs = [(a[i][name] + a[i + 1][name]) / 2 for i in (0, 2, 4)]
        assert [row[name] for row in b] == pytest.approx(pairs, rel=1e-6)


def test_some_stages_only(on_photos, monkeypatch):
    """Two exits, in stage order whatever order was given, each with its eps."""
    shapes, call = [], Objective.forward

    def spy(self: Objective, outputs: Outputs, *arguments: Any) -> Tensor:
        shapes.append((outputs.heads.shape, self.methods[0].eps.tolist()))
        return call(self, outputs, *arguments)

    monkeypatch.setattr(Objective, "forward", spy)
    config = on_photos(stages=(4, 2), eps=(1.1, 1.2, 1.3), epochs=1)
    train(config)
    assert {shape for shape, _ in shapes} == {(3, 8, 2)}
    assert shapes[0][1] == pytest.approx([1.2, 1.1, 1.3])
    student = open_run(config.out).trained_student()
    assert [stage.number for stage in student.stages] == [2, 4]
    assert rows(config.out, "step")[0]["ofa"] > 0


def test_drop_path(on_photos):
    """Stochastic depth affects the backbone: blocks are dropped in training, so the losses differ."""
    plain, dropping = (on_photos(f"{p}", student="test_vit", image_size=SIZE, drop_path=p) for p in (0.0, 0.5))
    for config in (plain, dropping):
        train(config)
    modules = open_run(dropping.out).build_student().backbone.modules()
    assert max(module.drop_prob for module in modules if isinstance(module, DropPath)) == pytest.approx(0.5)
    assert rows(plain.out, "step")[0]["gt"] != rows(dropping.out, "step")[0]["gt"]


def test_drop_path_is_0_unless_set(on_photos):
    """Although timm's default for Swin is 0.1, which None selects."""

    def rates(name: str, **given: Any) -> list[float]:
        job = open_job(on_photos(name, student="swin_pico_patch4_window7_224", image_size=32, **given), World())
        modules = job.step.student.backbone.modules()
        return [module.drop_prob for module in modules if isinstance(module, DropPath) and module.drop_prob]

    assert rates("default") == []
    assert max(rates("timm", drop_path=None)) == pytest.approx(0.1)
    assert max(rates("set", drop_path=0.2)) == pytest.approx(0.2)


def test_the_students_own_crop_and_filter_in_evaluation(on_photos, photos, evaluated, capsys):
    """Those of its configuration in timm, here 0.95 and bicubic; in training, `evaluate`, `predict` and `export`."""
    config = on_photos(student="test_vit", eval_crop=None, eval_interpolation="student", epochs=1)
    result = train(config)
    sizes = open_dataset(str(photos), "val").sizes
    evaluate(config.out)
    assert len(evaluated) == 2
    for views in evaluated:
        np.testing.assert_array_equal(views.crop, center_views(sizes, 0.95).crop)
        assert views.is_bicubic.all()
    stored = open_run(config.out).config
    assert (stored.eval_crop, stored.eval_interpolation) == (0.95, "bicubic")
    export(config.out, config.out.parent / "model")
    written = json.loads((config.out.parent / "model" / "config.json").read_text())["pretrained_cfg"]
    assert (written["crop_pct"], written["interpolation"]) == (0.95, "bicubic")
    for model in (config.out, config.out.parent / "model"):
        classifier = open_classifier(model)
        assert (classifier.crop, classifier.bicubic) == (0.95, True)
        found = list(predict(model, photos / "val"))
        assert np.mean([p.classes[0] == p.file.parent.name for p in found]) == pytest.approx(result.top1)
    train(dataclasses.replace(config, resume=True, epochs=2))  # the same run


def test_the_normalisation_of_student_and_teacher_is_reported(on_photos, capsys):
    train(on_photos(epochs=1, mean=(0.5, 0.25, 0.125), std=(1.0, 1.0, 0.2673)))
    said = " ".join(capsys.readouterr().err.split())
    student, teacher = "mean 0.5 0.25 0.125, std 1 1 0.2673", "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    assert f"normalisation: student {student}; teacher {teacher}" in said


def test_init_gives_the_initial_weights(on_photos, tmp_path):
    """With learning rate 0 they are unchanged: the file's backbone, and exits as determined by the seed."""
    weights = Student("test_efficientnet", 2, SIZE).backbone.state_dict()
    torch.save(weights, tmp_path / "start.pth")
    config = on_photos(init=str(tmp_path / "start.pth"), lr=0.0, epochs=1, warmup_epochs=0)
    train(config)
    after = saved(config.out, "student")
    kept = {name for name in weights if torch.equal(after[f"backbone.{name}"], weights[name])}
    assert kept >= {name for name, _ in Student("test_efficientnet", 2, SIZE).backbone.named_parameters()}


# --- Image sizes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> list[tuple[bool, int]]:
    """(in training?, side) of every batch that the student gets."""
    found = []
    normalize = Student.normalize

    def spy(self: Student, images: Tensor) -> Tensor:
        if len(images) > 1:
            found.append((self.training, images.shape[-1]))
        return normalize(self, images)

    monkeypatch.setattr(Student, "normalize", spy)
    return found


def test_image_sizes_grow_and_evaluation_uses_its_own(on_photos, seen, photos):
    """32, 32, 64 and 64 px in training, 96 px in evaluation, also by `fastofa evaluate`; compiling steps
    are not timed.
    """
    config = on_photos(epochs=4, image_size=64, start_size=32, growth=(0.0, 1.0), eval_size=96)
    result = train(config)
    assert [size for training, size in seen if training] == [32] * 6 + [64] * 6
    assert {size for training, size in seen if not training} == {96}
    assert [row["step"] for row in rows(config.out, "step") if "images_per_second" not in row] == [1, 7]
    assert open_classifier(config.out).image_size == 96
    found = evaluate(config.out, str(photos), workers=0)
    assert (found.top1, found.top5) == (result.top1, result.top5)


@pytest.mark.parametrize("given", [{"start_size": 32}, {"eval_size": 96}])
def test_a_student_of_fixed_size_refuses_other_sizes_before_anything_is_written(on_photos, given):
    config = on_photos(student="test_vit", image_size=64, **given)
    with pytest.raises(BadInput, match=r"built for images of 64 px, does not accept .* (32|96) px .*choose a CNN"):
        train(config)
    assert not config.out.exists()


# --- Views ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def crops(monkeypatch) -> list[np.ndarray]:
    """The crops of each epoch's table, for 24 training images."""
    found = []
    epoch = torchvision_loader.Pipeline.epoch

    def spy(self, views, order, *given, **named) -> Iterator:
        if len(order) == 24:
            found.append(views.crop)
        return epoch(self, views, order, *given, **named)

    monkeypatch.setattr(torchvision_loader.Pipeline, "epoch", spy)
    return found


@pytest.fixture
def evaluated(monkeypatch) -> list[Views]:
    """The table of each evaluation of the 12 validation images."""
    found = []
    epoch = torchvision_loader.Pipeline.epoch

    def spy(self, views, order, *given, **named) -> Iterator:
        if len(order) == 12:
            found.append(views)
        return epoch(self, views, order, *given, **named)

    monkeypatch.setattr(torchvision_loader.Pipeline, "epoch", spy)
    return found


def test_epoch_e_replays_view_e_modulo_the_caches_views(on_photos, photo_cache, crops):
    config = on_photos(epochs=5, eval_every=2)
    train(config)
    assert [row["epoch"] + 1 for row in rows(config.out, "epoch") if "top1" in row] == [2, 4, 5]
    stored = [photo_cache.targets(view)[0].crop for view in range(2)]
    assert len(crops) == 5
    for epoch, crop in enumerate(crops):
        np.testing.assert_array_equal(crop, stored[epoch % 2])


def test_scratch_with_a_cache_replays_it_too(on_photos, photo_cache, crops):
    """So that it is comparable: the same images, but labels only."""
    config = on_photos(method="scratch")
    train(config)
    for view, crop in enumerate(crops):
        np.testing.assert_array_equal(crop, photo_cache.targets(view)[0].crop)
    assert "kd" not in rows(config.out, "step")[0]


def test_scratch_without_a_cache_draws_a_view_for_each_epoch(on_photos, photos, crops):
    """From the run's seed, by the policy for the dataset with the given changes."""
    train(on_photos(method="scratch", cache=None, epochs=3, eval_every=3, seed=5, scale=(0.5, 1.0)))
    policy = dataclasses.replace(default_policy(str(photos)), scale=(0.5, 1.0))
    sizes = open_dataset(str(photos)).sizes
    assert len(crops) == 3
    for epoch, crop in enumerate(crops):
        np.testing.assert_array_equal(crop, draw_views(policy, sizes, 5, epoch).crop)


def test_the_seed_determines_weights_and_order(on_photos):
    first = []
    for seed in (0, 0, 1):
        config = on_photos(f"{len(first)}", seed=seed, epochs=1)
        train(config)
        first.append([row["loss"] for row in rows(config.out, "step")])
    assert first[0] == first[1] != first[2]


# --- Moving average ---------------------------------------------------------------------------------------------------


def test_the_moving_average_is_kept_evaluated_and_used(on_photos, monkeypatch):
    """The average of the weights after each step, from the first on; student and average are both evaluated."""
    after_steps: list[dict[str, Tensor]] = []
    evaluated: list[list[dict[str, Tensor]]] = []

    def create(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = create_optimizer(model, config)
        optimizer.register_step_post_hook(lambda *_: after_steps.append(copy.deepcopy(model.state_dict())))
        return optimizer

    def best_classes_each(students: list[nn.Module], *arguments: Any, **given: Any) -> list[np.ndarray]:
        evaluated.append([copy.deepcopy(student.state_dict()) for student in students])
        return original(students, *arguments, **given)

    original = fastofa.training.evaluate_in_training.best_classes_each
    monkeypatch.setattr(fastofa.training.step, "create_optimizer", create)
    monkeypatch.setattr(fastofa.training.evaluate_in_training, "best_classes_each", best_classes_each)
    config = on_photos(ema=0.7, lr=0.01)
    train(config)

    ema, student = saved(config.out, "ema"), saved(config.out, "student")
    for name, value in ema.items():
        expected = after_steps[0][name].double()
        for weights in after_steps[1:]:
            expected = 0.7 * expected + 0.3 * weights[name].double()
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(student[name], evaluated[-1][0][name])
        assert torch.equal(value, evaluated[-1][1][name])
        assert torch.equal(student[name], after_steps[-1][name])
    assert not torch.equal(ema["backbone.classifier.weight"], student["backbone.classifier.weight"])
    trained = open_run(config.out).trained_student("ema").state_dict()
    assert all(torch.equal(trained[name], value) for name, value in ema.items())


def test_without_a_moving_average_the_student_itself_is_evaluated(on_photos, monkeypatch):
    evaluated = []
    original = fastofa.training.evaluate_in_training.best_classes_each

    def best_classes_each(students, *arguments, **given):
        (student,) = students
        evaluated.append(copy.deepcopy(student.state_dict()))
        return original(students, *arguments, **given)

    monkeypatch.setattr(fastofa.training.evaluate_in_training, "best_classes_each", best_classes_each)
    config = on_photos()
    train(config)
    weights = saved(config.out, "student")
    assert all(torch.equal(evaluated[-1][name], value) for name, value in weights.items())
    assert saved(config.out, "ema") == {}


# --- Compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_step_and_evaluation_are_one_graph_each(on_photos, monkeypatch, capsys):
    """Student, exits and loss trace without a break and only once, the evaluations, too, of 8 and 4 images, as another
    graph. The compiled run has the eager run's losses and accuracy, and reports what it compiles."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager, compiled = on_photos("eager"), on_photos("compiled", compile="on")
    train(eager)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    train(compiled)
    assert len(graphs) == 2
    a, b = ([row["loss"] for row in rows(config.out, "step")] for config in (eager, compiled))
    assert a == pytest.approx(b, rel=1e-4)
    a, b = ([row["top1"] for row in rows(config.out, "epoch")] for config in (eager, compiled))
    assert a == b
    said = capsys.readouterr().err
    for what in ("training step at 32 px", "evaluation"):
        assert re.findall(rf"^{what}: compiled and run for the first time in \d+ s$", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_compiled_for_the_cpu(on_photos, monkeypatch):
    """By inductor, half a minute for the smallest Transformer: the first losses are the eager run's."""
    monkeypatch.setitem(VARIANTS, "tiny_vit", ("test_vit", {"depth": 1, "embed_dim": 32, "num_heads": 1}))
    given = {"student": "tiny_vit", "method": "kd", "optimizer": "sgd", "lr": 0.01, "epochs": 1}
    eager, compiled = on_photos("eager", compile="off", **given), on_photos("compiled", compile="on", **given)
    for config in (eager, compiled):
        train(config)
    a, b = ([row["loss"] for row in rows(config.out, "step")] for config in (eager, compiled))
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a == pytest.approx(b, rel=1e-3)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_longer_finite_stops_the_run(on_photos):
    """The message names the steps and the checkpoint to resume from, which is earlier and finite."""
    config = on_photos(
        optimizer="sgd", lr=1e18, clip=None, epochs=4, log_every=2, checkpoint_every=1, student="test_resnet"
    )
    with pytest.raises(BadInput, match=r"loss .*finite .*steps \d+ and \d+.*--lr") as error:
        train(config)
    last = rows(config.out, "step")
    assert all(math.isfinite(row["loss"]) for row in last)
    assert f"{newest(config.out)} with --resume" in str(error.value)
    tensors, info = load_tensors(newest(config.out))
    assert all(map(math.isfinite, info["position"]["sums"]))
    first, last = map(int, re.findall(r"steps (\d+) and (\d+)", str(error.value))[0])
    assert first <= info["step"] < last
    assert [name for name, value in tensors.items() if not value.isfinite().all()] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 25}, r"batch-size: .*\b24\b.*\b25\b"),
        ({"flip": 0.0}, r"flip=0.0\b.*flip=0.5\b"),
        ({"data": "digits:100"}, r"\b10 classes.*digits:100.*\b2\b"),
        ({"pipeline": "resident"}, "resident: .*size"),
    ],
)
def test_contradictory_input_is_refused_before_anything_is_written(on_photos, given, message):
    config = on_photos(**given)
    with pytest.raises(BadInput, match=message):
        train(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99': .*auto, cpu"),
        ({"optimizer": "apex_sgd", "device": "cpu"}, "optimizer apex_.*: .*GPU"),
        ({"cache": None}, "ofa: .*--cache.*--method scratch"),
        ({"cache": None, "method": "kd"}, "kd: .*--cache"),
        ({"cache": Path("nowhere")}, "nowhere: .*fastofa precompute"),
        ({"student": "test_resnetx"}, "'test_resnetx'"),
        ({"init": "nowhere.pth"}, "nowhere.pth: "),
        ({"pipeline": "pytorch"}, "'pytorch': .*auto.*resident"),
        ({"workers": -1}, "workers: .*0.*-1"),
        ({"accumulate": 3}, r"batch-size: .*\b3\b.*\b8\b"),
        ({"wandb": "mine"}, "wandb: .*pip install wandb"),
        ({"out": "begun"}, "begun: .*--resume.*--out"),
    ],
)
def test_impossible_input_is_refused_before_the_data_are_indexed(on_photos, tmp_path, monkeypatch, given, message):
    """Indexing takes many minutes if there are many images."""
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    (tmp_path / "begun/checkpoints/step-00000001.safetensors").touch()
    (tmp_path / "begun" / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(fastofa.training.job, "open_dataset", lambda *_: pytest.fail("opened the data"))
    config = on_photos(**{**given, **({"out": tmp_path / given["out"]} if "out" in given else {})})
    with pytest.raises(BadInput, match=message):
        train(config)
    assert config.out.exists() == ("out" in given)


def test_a_plan_reports_what_it_times_and_writes_nothing(on_photos, monkeypatch, capsys):
    monkeypatch.setattr(fastofa.training.plan, "SECONDS", 0.01)
    config = on_photos(plan=True, ema=0.9, image_size=64, start_size=32, growth=(0.0, 1.0))
    main(config)
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if line.startswith("plan: ")] == [
        "plan: timing training steps at 32 px",
        "plan: timing the pipeline at 32 px",
        "plan: timing training steps at 64 px",
        "plan: timing the pipeline at 64 px",
        "plan: timing evaluation",
    ]
    assert "estimated cost on this machine" in said.out
    assert "no run was started" in said.out
    assert not config.out.exists()


def test_skip_corrupt_skips_unreadable_images_of_both_splits(photos, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(photos, data, ignore=shutil.ignore_patterns(".fastofa"))
    for name in ("train/china/003.jpg", "val/flower/001.jpg"):
        (data / name).write_bytes((data / name).read_bytes()[:500])
    config = recipes.photos(
        data=str(data), student="test_efficientnet", method="scratch", out=tmp_path / "run", image_size=SIZE, epochs=1,
        workers=0, skip_corrupt=True,
    )  # fmt: skip
    train(config)
    said = capsys.readouterr().err
    assert "003.jpg" in said
    assert "001.jpg" in said
    assert len(load_tensors(tmp_path / "run" / "val_predictions.safetensors")[0]["labels"]) == 11


def test_values_chosen_by_the_data_are_kept_when_resuming(photos, photo_cache, tmp_path, capsys):
    """24 images: batches of 8; the learning rate by their square root, the warm-up by the epochs."""
    config = recipes.photos(
        data=str(photos), cache=photo_cache.path, student="test_efficientnet", out=tmp_path / "run", image_size=SIZE,
        epochs=2, workers=0,
    )  # fmt: skip
    train(config)
    kept = open_run(config.out).config
    assert (kept.epochs, kept.batch_size, kept.lr, kept.warmup_epochs) == (2, 8, 2.5e-4, 0.1)
    said = "by the number of training images: --batch-size 8 --lr 0.00025 --warmup-epochs 0.1"
    assert said in capsys.readouterr().err
    newest(config.out).unlink()
    train(dataclasses.replace(config, resume=True))
    with pytest.raises(BadInput, match=r"batch_size: 4\b.*\b8\b"):
        train(dataclasses.replace(config, resume=True, batch_size=4, lr=2.5e-4))


def test_another_run_is_not_overwritten(on_photos):
    """Without --resume never; with it only by the same run."""
    config = on_photos(epochs=1)
    train(config)
    before = {file.name: file.read_bytes() for file in config.out.iterdir() if file.is_file()}
    for other, message in (
        (config, "already contains a run; continue it with --resume or choose another --out"),
        (dataclasses.replace(config, resume=True, lr=0.5), "these differ: lr: 0.5 here, 0.002 there"),
    ):
        with pytest.raises(BadInput, match=message):
            train(other)
    assert before == {file.name: file.read_bytes() for file in config.out.iterdir() if file.is_file()}


def test_a_run_that_saved_nothing_starts_over(on_photos, capsys):
    """For example, it stopped in its first epoch because of an unreadable image."""
    straight, again = on_photos("straight", epochs=1), on_photos("again", epochs=1)
    train(straight)
    train(dataclasses.replace(again, lr=0.5))
    for file in checkpoints(again.out):
        file.unlink()
    (again.out / "checkpoints/best.safetensors").unlink()
    capsys.readouterr()
    train(again)
    assert "contains a run without a checkpoint; starting it again" in capsys.readouterr().err
    assert newest(straight.out).read_bytes() == newest(again.out).read_bytes()
    assert open_run(again.out).config.lr == straight.lr


def test_resume_without_a_checkpoint_starts_from_the_beginning(on_photos, capsys):
    straight, resumed = on_photos("straight", epochs=1), on_photos("resumed", epochs=1, resume=True)
    train(straight)
    capsys.readouterr()
    train(resumed)
    assert "no checkpoint yet, starting from the beginning" in capsys.readouterr().err
    assert newest(straight.out).read_bytes() == newest(resumed.out).read_bytes()


def test_differences_from_the_recipe_are_reported_at_the_start(on_photos, capsys):
    values = {f.name: getattr(on_photos(), f.name) for f in dataclasses.fields(TrainConfig)}
    given = {name: values[name] for name in ("data", "cache", "student", "batch_size", "image_size", "workers")}
    for name, said in (("cifar_vit_mlp", True), ("cifar_cnn", False)):
        train(recipes.RECIPES[name](**given, out=values["out"].with_name(name), epochs=1, warmup_epochs=0))
        missing = (
            "its published views have bicubic 0.5 (not 0.0), auto-augment rand-m9-mstd0.5-inc1 (not none), mixup 0.8"
        )
        assert (missing in capsys.readouterr().err) is said


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("name", ["imagenet_vit_mlp", "imagenet_stronger"])
def test_mixed_views_reach_the_loss(name, digit_cache, tmp_path, monkeypatch):
    """Epoch by epoch: the teacher's predictions for the same images, partner labels and shares; also repeated."""
    views, teacher = 6, str(digit_cache.path.parent / "teacher")
    cache = precompute(PrecomputeConfig("digits:50", teacher, tmp_path / "cache", views, topk=10, recipe=name))
    seen: list[tuple[Tensor, Tensor, Targets, Tensor, Tensor]] = []
    monkeypatch.setattr(
        Objective, "forward", lambda self, outputs, *given: (seen.append(given), outputs.heads.sum() * torch.ones(4))[1]
    )
    config = {"data": "digits:50", "student": "test_resnet", "cache": cache.path, "image_size": SIZE, "epochs": 5}
    train(recipes.RECIPES[name](**config, out=tmp_path / "run", batch_size=16, optimizer="adamw", compile="off"))

    repeats, seed = cache.policy.repeats, 0
    length = epoch_rows(cache.policy, 50) // 16 * 16
    assert len(seen) == 5 * length // 16
    labels = torch.from_numpy(open_dataset("digits:50").labels)
    for epoch in range(5):
        first = epoch // repeats * repeats % views
        tables = [cache.targets(view) for view in range(first, first + repeats)]
        table = join_views([t[0] for t in tables])
        order = epoch_order(50, seed, epoch, partner=table.partner, repeats=repeats)[:length]
        log_probs = torch.stack([t[2] for t in tables]).float().log_softmax(dim=-1).flatten(0, 1)[order]
        classes = torch.stack([t[1].long() for t in tables]).flatten(0, 1)[order]
        given = seen[epoch * length // 16 :][: length // 16]
        assert torch.equal(torch.cat([g[0] for g in given]), labels[order % 50])
        assert torch.equal(torch.cat([g[1].classes for g in given]).long(), classes)
        torch.testing.assert_close(torch.cat([g[1].log_probs for g in given]), log_probs)
        assert torch.equal(torch.cat([g[2] for g in given]), labels[table.partner[order] % 50])
        assert np.array_equal(torch.cat([g[3] for g in given]).numpy(), shares(table, order, SIZE))


def test_batches_that_split_pairs_are_refused(tmp_path):
    config = {"data": "digits:100", "student": "test_resnet", "method": "scratch", "out": tmp_path / "run"}
    with pytest.raises(BadInput, match=r"batch-size: .*\b2\b.*\b25\b"):
        train(recipes.imagenet_vit_mlp(**config, batch_size=25))
    with pytest.raises(BadInput, match=r"batch-size: .*\b96\b.*digits:100.*\b98\b"):
        train(recipes.imagenet_stronger(**config, batch_size=98))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_report")
def test_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    """Also without a cache, which would detect it itself."""
    given: dict[str, Any] = {"student": "test_resnet", "method": "scratch", "out": tmp_path / "run", "epochs": 1}
    train(recipes.digits(data="digits:50", **given))
    with pytest.raises(BadInput, match="data: the training images of digits:100 are not those the run started with"):
        train(recipes.digits(data="digits:100", resume=True, **given))


# --- The order --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_beton(on_photos, photos, tmp_path, monkeypatch) -> Callable[..., TrainConfig]:
    """on_beton(name, memory, ...) -> configuration of a run on a .beton with pages of five images, on a machine with
    `memory` bytes.
    """
    write(WriteConfig(str(photos), tmp_path / "x.beton", raw=True, max_size=64))
    monkeypatch.setattr("fastofa.data.dataset.PAGE", 1 << 16)
    monkeypatch.setattr("fastofa.views.order.WINDOW", 2)

    def config(name: str, memory: int = 10**12, **given: Any) -> TrainConfig:
        monkeypatch.setattr("fastofa.training.preflight.memory_bytes", lambda: memory)
        return on_photos(name, **{"data": str(tmp_path / "x.beton"), **given})

    return config


def test_auto_reads_by_pages_if_the_file_exceeds_the_memory(on_beton, tmp_path, capsys):
    """A notice says so. The weights are those of `--order pages`."""
    size = (tmp_path / "x.beton").stat().st_size
    weights: dict[str, list[bytes]] = {"random": [], "pages": []}
    for order, memory, expected in (
        ("auto", size, "random"), ("random", 1, "random"), ("auto", size - 1, "pages"), ("pages", 10**12, "pages"),
    ):  # fmt: skip
        config = on_beton(f"{order}-{expected}", memory, order=order, epochs=1)
        train(config)
        said = f"order pages: {config.data} has 0.0 GB, memory 0.0 GB" in capsys.readouterr().err
        assert said is (order == "auto" and expected == "pages")
        assert open_run(config.out).config.order == expected
        weights[expected].append(newest(config.out).read_bytes())
    assert weights["random"][0] == weights["random"][1] != weights["pages"][0] == weights["pages"][1]


@pytest.mark.parametrize(("began", "other", "memory"), [("pages", "random", 10**12), ("random", "pages", 1)])
@pytest.mark.parametrize("given", ["auto", "as it began"])
def test_a_resumed_run_keeps_its_order_whatever_the_memory(on_beton, monkeypatch, began, other, memory, given):
    straight = on_beton("straight", order=began)
    train(straight)
    config = on_beton("resumed", 1 if began == "pages" else 10**12, checkpoint_every=2)
    with monkeypatch.context() as patch:  # killed as the first epoch's last step is logged
        patch.setattr("fastofa.training.loop.Loop._log_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    with pytest.raises(BadInput, match=f"these differ: order: {other} here, {began} there"):
        train(on_beton("resumed", memory, resume=True, order=other))
    train(on_beton("resumed", memory, resume=True, order="auto" if given == "auto" else began))
    same_run(config.out, straight.out)


def test_a_run_by_pages_resumes_only_with_the_same_pages(on_beton, photos, tmp_path):
    """Other pages would change the order in the middle of an epoch; a random order does not depend on the form."""
    write(WriteConfig(str(photos), tmp_path / "larger.beton", raw=True))
    for order, problem in (
        ("pages", r"pages of .*larger.beton contain other samples than those the"),
        ("random", None),
    ):
        train(on_beton(order, order=order, epochs=1))
        moved = on_beton(order, order=order, epochs=1, resume=True, data=str(tmp_path / "larger.beton"))
        with pytest.raises(BadInput, match=problem) if problem else nullcontext():
            train(moved)


def test_a_run_by_pages_refuses_the_folder(on_beton, photos):
    """When it is resumed from the folder, even without --order."""
    train(on_beton("run", 1, epochs=1))
    with pytest.raises(BadInput, match=r"run: .*\.beton page by page.*--data.*photos"):
        train(on_beton("run", resume=True, epochs=1, data=str(photos)))


def test_only_a_beton_is_read_by_pages(on_beton, photos, tmp_path):
    """A folder is not a file, and pages of a pack contain few classes: auto means random for both."""
    write(WriteConfig(str(photos), tmp_path / "x.pack", size=128))
    for data in (photos, tmp_path / "x.pack"):
        config = on_beton("run", order="pages", data=str(data))
        with pytest.raises(BadInput, match=r"order: .*random.*pages.*fastofa write .*\.beton"):
            train(config)
        assert not config.out.exists()
    train(on_beton("auto", 1, data=str(tmp_path / "x.pack"), epochs=1))
    assert open_run(tmp_path / "auto").config.order == "random"


# --- After a review ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_report")
def test_a_run_resumes_with_a_moved_cache_but_not_with_another_one(digit_cache, tmp_path):
    """The predictions count, not the path."""
    config = recipes.digits(
        data="digits:100", student="test_resnet", cache=digit_cache.path, out=tmp_path / "run", epochs=1
    )
    train(config)
    shutil.copytree(digit_cache.path, tmp_path / "moved")
    train(dataclasses.replace(config, cache=tmp_path / "moved", resume=True))
    header = json.loads((tmp_path / "moved" / "cache.json").read_text())
    teacher = str(digit_cache.path.parent / "teacher")
    other = precompute(PrecomputeConfig("digits:100", teacher, tmp_path / "other", header["views"], 3, seed=5))
    with pytest.raises(BadInput, match=r"cache: .*other does not contain the predictions"):
        train(dataclasses.replace(config, cache=other.path, resume=True))


@pytest.mark.parametrize("given", [{"batch_size": 1}, {"batch_size": 2, "accumulate": 2}])
def test_a_part_of_one_image_is_refused_with_batch_norm(given, tmp_path):
    config = {"data": "digits:100", "student": "test_resnet", "method": "scratch", "out": tmp_path / "run"}
    with pytest.raises(BadInput, match=r"batch-size: .*test_resnet"):
        train(recipes.digits(**{**config, **given}))
    assert not (tmp_path / "run").exists()


def test_image_sizes_cannot_shrink(tmp_path):
    config = {"data": "digits:100", "student": "test_resnet", "method": "scratch", "out": tmp_path / "run"}
    with pytest.raises(BadInput, match=r"start-size: .*\b32\b.*\b64\b"):
        train(recipes.digits(**config, start_size=64))


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}])
def test_an_incomplete_torchrun_environment_is_reported(environment, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = {"data": "digits:100", "student": "test_resnet", "method": "scratch", "out": tmp_path / "run"}
    with pytest.raises(BadInput, match="WORLD_SIZE"):
        train(recipes.digits(**config))
