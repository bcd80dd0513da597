"""The online teacher: its targets against those of a cache and of timm alone, whole runs, and what is refused."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor

import fastofa.teacher.compiled_teacher
import fastofa.training.step
from fastofa.commands.parse import parse
from fastofa.data.open import open_dataset
from fastofa.models.timm_models import weights_sha256
from fastofa.pipelines import Batch, open_pipeline
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.log import read_metrics
from fastofa.runs.predictions import PREDICTIONS
from fastofa.runs.recipes import CIFAR_MEAN
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, read_json
from fastofa.system.interrupt import Stopped
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.model import open_teacher
from fastofa.teacher.online import OnlineTeacher, open_teacher_of
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.distributed import World
from fastofa.training.epochs import Epochs
from fastofa.training.evaluate import evaluate
from fastofa.training.loop import train
from fastofa.training.plan import plan
from fastofa.training.step import Step
from fastofa.views.order import epoch_order, pair_order
from runs import newest, same_run, stop_at

CPU, DATA, SIZE, BATCH = torch.device("cpu"), "digits:100", 32, 20
NAMES = tuple("0123456789")
# What every view of the digits has, and what a recipe adds.
NONE = {"auto_augment": "", "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "bicubic": 0.0}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "crop, flip and filter": {"flip": 0.5, "bicubic": 0.5},
    "RandAugment": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "erasing": {"erase": 0.5},
    "all": {"recipe": "imagenet_stronger", "flip": 0.5, "erase": 0.25},  # with mixing and repeated augmentation
}
pytestmark = pytest.mark.usefixtures("no_report")


def save_teacher(folder: Path, seed: int = 1, name: str = "test_efficientnet") -> Path:
    """A teacher of digits whose random weights are large enough for its predictions to differ from image to image."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    save_for_hf(model, str(folder), safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("online") / "teacher")


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """config(method, ...) -> two epochs of four steps on a hundred digits."""

    def make(method: str = "ofa", **given: Any) -> TrainConfig:
        values = {
            "data": DATA, "student": "test_resnet", "online_teacher": str(folder), "method": method,
            "out": tmp_path / "run", "epochs": 2, "batch_size": 25, "warmup_epochs": 0, "log_every": 1,
        }  # fmt: skip
        return recipes.digits(**{**values, **given})

    return make


# --- Targets ----------------------------------------------------------------------------------------------------------


def in_class_order(classes: Tensor, log_probs: Tensor) -> Tensor:
    """fp32 [B, C]: the log-probability of every class."""
    return torch.full(classes.shape, torch.nan).scatter(1, classes.long(), log_probs.float())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_they_equal_those_of_a_cache_of_the_same_views(name, folder, tmp_path, monkeypatch):
    """On the student's own batches, on one, two and four ranks: to 1e-4 before the cache rounds to float16, and then
    within that rounding."""
    exact: list[Tensor] = []
    stored = fastofa.teacher.compiled_teacher.best_classes

    def best_classes(log_probs: Tensor, topk: int) -> Any:
        exact.append(log_probs.clone())
        return stored(log_probs, topk)

    monkeypatch.setattr(fastofa.teacher.compiled_teacher, "best_classes", best_classes)
    given = AUGMENTATIONS[name] if "recipe" in AUGMENTATIONS[name] else {**NONE, **AUGMENTATIONS[name]}
    views = 3 if name == "all" else 1
    cache = precompute(PrecomputeConfig(DATA, str(folder), tmp_path / "cache", views, topk=10, batch_size=48, **given))
    dataset = open_dataset(DATA)
    online = OnlineTeacher(open_teacher(str(folder), NAMES), {"all classes"}, compile_=False)
    of_views = torch.cat(exact)[-views * len(dataset) :]
    worst = 0.0
    pipeline = open_pipeline("resident", dataset, SIZE, BATCH // 2)
    for view in range(views):
        table = cache.targets(view)[0]
        order = pair_order(table, None if dataset.spans is None else dataset.spans[:, 0])
        expected = of_views[view * len(order) :][: len(order)][np.argsort(order)]
        cached = DeviceTargets(cache.table(view).predictions, CPU, dense=True)
        seen = []
        for ranks in (1, 2, 4):
            for rank in range(ranks):
                mine = epoch_order(len(dataset), 0, view, rank, ranks, partner=table.partner)
                for batch in pipeline.epoch(table, mine):
                    targets, rounded = online.of(batch), cached.of(batch)
                    found = in_class_order(targets.classes, targets.log_probs)
                    worst = max(worst, (found - expected[batch.rows]).abs().max().item())
                    torch.testing.assert_close(targets.all_log_probs, found)
                    assert (targets.log_probs.diff(dim=1) <= 0).all()
                    near = in_class_order(rounded.classes, rounded.log_probs)
                    torch.testing.assert_close(near, found, rtol=2**-10, atol=1e-4)
                    assert torch.equal(targets.sample_ids, rounded.sample_ids)
                    seen += batch.rows.tolist()
        assert sorted(seen) == sorted(3 * list(range(len(dataset))))
    print(f"{name}: largest difference of log-probabilities {worst:.1e}")
    assert worst < 1e-4
    assert expected.exp().std(dim=0).mean() > 0.01


@pytest.mark.parametrize("side", [SIZE, 24, 48])
def test_they_are_those_of_timms_model_at_its_own_size_and_normalisation(tmp_path, side):
    """Images of another size are resized with antialiasing; classes are in the data's order, not in the teacher's."""
    folder = save_teacher(tmp_path / "teacher")
    values = json.loads((folder / "config.json").read_text())
    values["label_names"] = list(reversed(NAMES))
    values["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "config.json").write_text(json.dumps(values))
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    online = OnlineTeacher(open_teacher(str(folder), NAMES), {"pooled vector"}, compile_=False)

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8, generator=generator)
    targets = online.of(Batch(images, torch.arange(5), torch.arange(5) + 7, torch.arange(5)))
    pixels = images.double()
    if side != SIZE:
        pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    with torch.no_grad():
        features = model.double().forward_features((pixels / 255 - mean) / std)
        logits = model.forward_head(features).flip(1)
    found = in_class_order(targets.classes, targets.log_probs)
    torch.testing.assert_close(found.double(), logits.log_softmax(1), rtol=1e-4, atol=1e-4)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(targets.pooled.double(), pooled, rtol=1e-4, atol=1e-4)
    assert targets.sample_ids.tolist() == [7, 8, 9, 10, 11]
    assert targets.all_log_probs is None
    assert targets.stages is None
    assert not any(value.requires_grad or value.is_inference() for value in targets if value is not None)


def test_the_views_are_new_in_every_epoch_as_without_a_teacher(config):
    dataset, mixing = open_dataset(DATA), {"recipe": "imagenet_vit_mlp", "batch_size": 20}
    online, scratch = (
        Epochs(c, dataset, World(), CPU, None)
        for c in (config(**mixing), config("scratch", online_teacher=None, **mixing))
    )
    crops = [online.load(epoch).views.crop for epoch in range(3)]
    assert all(np.array_equal(crop, scratch.load(epoch).views.crop) for epoch, crop in enumerate(crops))
    assert not np.array_equal(crops[0], crops[1])


def test_a_cifar_recipe_normalises_the_teachers_input_as_published(config):
    assert open_teacher_of(config(), NAMES, CPU).mean != CIFAR_MEAN
    assert open_teacher_of(config(recipe="cifar_cnn"), NAMES, CPU).mean == CIFAR_MEAN


# --- A whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given"),
    [("ofa", {}), ("ofa+fitnet+dkd+rsd", {"accumulate": 2, "recipe": "imagenet_vit_mlp"})],
)
def test_a_run_resumes_to_the_same_bits(config, method, given, tmp_path, monkeypatch):
    """Interrupted in the second epoch; with parts, and with mixed images. The log has the loss of each method."""
    options = {"ema": 0.9, "batch_size": 24, **given}
    straight, stopped = config(method, **options), config(method, **options, out=tmp_path / "stopped")
    train(straight)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            train(stopped)
    train(parse("train", ["--resume", str(stopped.out)]))
    same_run(stopped.out, straight.out)
    rows = [row for row in read_metrics(straight.out) if row["kind"] == "step"]
    assert len(rows) == 8
    assert all(row[name] > 0 for row in rows for name in method.split("+"))


def test_the_teacher_is_recorded_and_is_no_part_of_the_training(config, folder, monkeypatch):
    """config.json names it with the digest of timm's weights; the checkpoint has no tensor of it, and it does not
    change."""
    seen: list[tuple[OnlineTeacher, dict[str, Tensor]]] = []
    original = OnlineTeacher.__init__

    def init(self: OnlineTeacher, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        seen.append((self, copy.deepcopy(self.teacher.model.state_dict())))

    monkeypatch.setattr(OnlineTeacher, "__init__", init)
    c = config("rsd", checkpoint_every=1)
    train(c)
    (online, before), model = seen[0], timm.create_model(f"local-dir:{folder}", pretrained=True)
    after = online.teacher.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not online.teacher.model.training
    recorded = read_json(c.out / "config.json")
    assert recorded["config"]["online_teacher"] == str(folder)
    assert (recorded["teacher"]["name"], recorded["teacher"]["sha256"]) == ("test_efficientnet", weights_sha256(model))
    saved = load_tensors(newest(c.out))[0]
    student = timm.create_model("test_resnet", num_classes=10)
    backbone = {name.removeprefix("student.backbone.") for name in saved if name.startswith("student.backbone.")}
    assert backbone == student.state_dict().keys()
    others = {name.split(".")[1] for name in saved if name.startswith("student.")} - {"backbone"}
    assert others == {"methods"}


def test_evaluate_compares_with_the_teacher_as_a_cache_of_it_would(config, folder, tmp_path, capsys):
    """The same top-1 of the teacher and the same agreement; a notice instead if its weights are no longer the same."""
    c = config("kd", online_teacher=str(shutil.copytree(folder, tmp_path / "teacher")), epochs=4)
    train(c)
    cache = precompute(PrecomputeConfig(DATA, str(folder), tmp_path / "cache", views=1, topk=10))
    best = cache.val_targets().classes[:, 0].long().numpy()
    found, labels = evaluate(c.out), open_dataset(DATA, "val").labels
    assert found.teacher_top1 == pytest.approx(float((best == labels).mean()))
    own = load_tensors(c.out / PREDICTIONS)[0]["best"][:, 0].numpy()
    assert found.agreement == pytest.approx(float((own == best).mean()))
    assert 0 < found.agreement < 1

    save_teacher(tmp_path / "teacher", seed=2)
    capsys.readouterr()
    assert (evaluate(c.out).teacher_top1, evaluate(c.out).agreement) == (None, None)
    assert "other weights than when the run started" in capsys.readouterr().err


def test_a_plan_runs_the_teacher_in_the_steps_that_it_times(config, monkeypatch):
    called, timed = [], []
    original, step = OnlineTeacher.of, Step.__call__
    monkeypatch.setattr(OnlineTeacher, "of", lambda self, batch: called.append(1) or original(self, batch))
    monkeypatch.setattr(Step, "__call__", lambda self, *given: timed.append(1) or step(self, *given))
    estimate, _ = plan(config("fitnet", plan=True))
    assert len(called) == len(timed) > 0
    assert estimate.cache_bytes == 0


def test_the_teachers_size_is_reported_if_the_images_have_another(config, capsys):
    train(config("kd", epochs=1, image_size=40))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "in every step" in line]
    assert line.startswith("teacher test_efficientnet: ")
    assert "from 40 to 32 px" in line


# --- What is refused --------------------------------------------------------------------------------------------------


def test_other_weights_are_refused_when_a_run_is_resumed(config, tmp_path):
    """Both are named with their digests; the same weights in another folder are accepted."""
    c = config("kd", epochs=1)
    train(c)
    begun = read_json(c.out / "config.json")["teacher"]["sha256"]
    other = save_teacher(tmp_path / "other", seed=2)
    with pytest.raises(BadInput) as error:
        train(parse("train", ["--resume", str(c.out), "--online-teacher", str(other), "--epochs", "2"]))
    said, new = str(error.value), weights_sha256(timm.create_model(f"local-dir:{other}", pretrained=True))
    assert "\n" not in said
    for text in (c.online_teacher, str(other), begun[:8], new[:8]):
        assert text in said
    moved = shutil.copytree(c.online_teacher, tmp_path / "moved")
    train(parse("train", ["--resume", str(c.out), "--online-teacher", str(moved), "--epochs", "2"]))
    values = json.loads((moved / "config.json").read_text())
    values["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (moved / "config.json").write_text(json.dumps(values))
    with pytest.raises(BadInput, match=r"online-teacher: .* another mean"):
        train(parse("train", ["--resume", str(c.out), "--epochs", "3"]))


def test_a_cache_cannot_replace_the_teacher_of_a_resumed_run(config, folder, tmp_path):
    c = config("kd", epochs=1)
    train(c)
    cache = precompute(PrecomputeConfig(DATA, str(folder), tmp_path / "cache", views=1, topk=10))
    changed = dataclasses.replace(c, online_teacher=None, cache=cache.path, resume=True, epochs=2)
    with pytest.raises(BadInput, match=r"cache: .* here, None there; online-teacher: none here, .* there"):
        train(changed)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache": Path("cache")}, "online-teacher: expected no --cache with it"),
        ({"method": "scratch"}, "online-teacher: expected a --method that learns from it, got scratch"),
        ({"online_teacher": None, "teacher_checkpoint": Path("f")}, "teacher-checkpoint: expected --online-teacher"),
        ({"online_teacher": ""}, "online-teacher: expected a name"),
        ({"online_teacher": None}, "expected --cache, made by .*, or --online-teacher; or --method scratch"),
        ({"online_teacher": "resnet1888"}, "unknown model 'resnet1888'.*resnet18"),
        ({"online_teacher": "resnet18", "teacher_checkpoint": Path("nowhere.pth")}, "nowhere.pth: expected a file"),
        ({"method": "rsd", "online_teacher": "deit_tiny_distilled_patch16_224"}, "it has 2 classifiers"),
        (
            {"method": "fitnet", "student": "crossvit_tiny_240", "image_size": None},
            "fitnet.stages: .* student has none",
        ),
    ],
)
def test_it_is_refused_in_one_line(config, given, said, monkeypatch):
    monkeypatch.setattr(timm, "create_model", without_weights(timm.create_model))
    with pytest.raises(BadInput, match=said) as error:
        train(config(**given))
    assert "\n" not in str(error.value)
    assert not (config().out / "config.json").exists()


def without_weights(create: Callable[..., Any]) -> Callable[..., Any]:
    """timm's function, which downloads nothing; a published model gets ten outputs."""

    def create_model(name: str, pretrained: bool = False, **given: Any) -> Any:
        published = pretrained and name.startswith("deit")
        return create(
            name, pretrained=pretrained and not published, **({"num_classes": 10} if published else {}), **given
        )

    return create_model


def test_fitnet_needs_an_online_teacher(config, folder, tmp_path):
    cache = precompute(PrecomputeConfig(DATA, str(folder), tmp_path / "cache", views=1, topk=10))
    with pytest.raises(BadInput, match=r"method fitnet: expected the features .* give --online-teacher") as error:
        train(config("ofa+fitnet", online_teacher=None, cache=cache.path))
    assert "\n" not in str(error.value)
