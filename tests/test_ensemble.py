"""Several teachers predict as one: each from its own pixels, by class name, the mean of their probabilities."""

import dataclasses
import json
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tv
from timm.models import save_for_hf
from torch import Tensor, nn

from fastofa.commands import cache as cache_command
from fastofa.commands.arguments import CacheConfig
from fastofa.commands.parse import parse
from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.pipelines import open_pipeline
from fastofa.runs import recipes
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.system.interrupt import Stopped
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.ensemble import Ensemble, open_teachers
from fastofa.teacher.fidelity import read_fidelity
from fastofa.teacher.model import Teacher, open_teacher
from fastofa.teacher.parts import PARTS
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views, center_views

CPU, DIGITS = torch.device("cpu"), tuple("0123456789")


@pytest.fixture(scope="module")
def make_teacher(tmp_path_factory: pytest.TempPathFactory):
    """make_teacher(name, size, crop, mean, classes, names) -> the folder of a teacher with large random weights."""

    def make(name: str, size: int = 32, crop: float = 0.9, mean: float = 0.5, names: tuple[str, ...] = DIGITS) -> str:
        torch.manual_seed(len(name) + size)
        model = timm.create_model(name, num_classes=len(names))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
        config = {"input_size": (3, size, size), "crop_pct": crop, "mean": (mean,) * 3, "std": (0.3,) * 3}
        folder = tmp_path_factory.mktemp(name)
        save_for_hf(
            model, str(folder), safe_serialization=True, data_config=config, model_args={"num_classes": len(names)}
        )
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "label_names": list(names)}))
        return str(folder)

    return make


@pytest.fixture(scope="module")
def small(make_teacher) -> str:
    return make_teacher("test_efficientnet")


@pytest.fixture(scope="module")
def large(make_teacher) -> str:
    """Another architecture, image size, crop and normalisation."""
    return make_teacher("test_resnet", size=48, crop=0.6, mean=0.2)


@pytest.fixture(scope="module")
def make(small, large, tmp_path_factory: pytest.TempPathFactory):
    """make(out, ...) -> a cache of 40 digits, by default of both teachers with weights .25 and .75."""

    def cache(out: Path | None = None, **given) -> TeacherCache:
        values = {"teacher": (small, large), "teacher_weights": (0.25, 0.75), "views": 1, "topk": 4, **given}
        return precompute(PrecomputeConfig("digits:40", out=out or tmp_path_factory.mktemp("cache"), **values))

    return cache


@pytest.fixture(scope="module")
def both(make) -> TeacherCache:
    """Tests must not change it."""
    return make()


def tables(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def pixels(dataset: Dataset, views: Views, size: int) -> Tensor:
    """uint8 images of a view of one size by torchvision's transforms, one after the other."""
    images = []
    for i, (box, flip) in enumerate(zip(views.boxes(dataset.sizes).tolist(), views.flip, strict=True)):
        assert dataset.pixels is not None
        image = torch.from_numpy(dataset.pixels[i]).permute(2, 0, 1)
        image = tv.resized_crop(image, *box, [size, size], antialias=True)
        images.append(tv.horizontal_flip(image) if flip else image)
    return torch.stack(images)


def mean_by_hand(of_small: Tensor, of_large: Tensor) -> Tensor:
    """In float64, without logsumexp."""
    return (0.25 * of_small.double().exp() + 0.75 * of_large.double().exp()).log()


# --- What is stored ---------------------------------------------------------------------------------------------------


def test_each_teacher_sees_its_own_pixels_and_the_mean_is_stored(both, small, large):
    """A view and the validation images, recomputed with each teacher alone at its own size, crop and normalisation."""
    teachers = [open_teacher(folder, DIGITS) for folder in (small, large)]
    assert [t.image_size for t in teachers] == [32, 48]
    val, stored = open_dataset("digits:40", "val"), both.val_targets()
    views, *targets = both.targets(0)
    for dataset, tables_, (classes, log_probs) in (
        (open_dataset("digits:40"), [views, views], targets),
        (val, [center_views(val.sizes, crop) for crop in (0.9, 0.6)], stored),
    ):
        each = [t.log_probs(pixels(dataset, v, t.image_size)) for t, v in zip(teachers, tables_, strict=True)]
        expected = mean_by_hand(*each)
        best = expected.topk(4)
        torch.testing.assert_close(log_probs.double(), best.values, rtol=0.02, atol=0.02)  # half a packed step
        torch.testing.assert_close(expected.gather(1, classes.long()), best.values, rtol=2e-3, atol=2e-3)
        assert not torch.allclose(log_probs[:, 0].double(), each[0].double().amax(dim=1), atol=0.05)


def test_the_header_names_all_teachers_with_their_weights(both, small, large):
    header = json.loads((both.path / HEADER).read_text())
    assert [t["name"] for t in header["teachers"]] == ["test_efficientnet", "test_resnet"]
    assert [t["image_size"] for t in header["teachers"]] == [32, 48]
    assert header["teacher_weights"] == [0.25, 0.75]
    assert header["config"]["teacher"] == [small, large]
    widths = [open_teacher(folder, DIGITS).model.num_features for folder in (small, large)]
    assert both.teacher_dim == max(widths)
    assert load_tensors(both.path / view_file(0))[0].keys() == {"crop", "flip", "predictions"}


def test_classes_are_matched_by_name_for_each_teacher(make_teacher, small):
    """A teacher whose outputs are in another order gives, with itself, what it gives alone."""
    other = make_teacher("test_efficientnet", names=DIGITS[::-1])
    alone, twice = (
        open_teachers(PrecomputeConfig("digits", names, Path("c"), 1, 1), DIGITS, CPU)
        for names in (other, (other,) * 2)
    )
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    expected = open_teacher(small, DIGITS[::-1]).log_probs(images)  # the same weights: output c is class 9 - c
    torch.testing.assert_close(alone.mean(alone.each(images)), expected)
    torch.testing.assert_close(twice.mean(twice.each(images, images)), expected)


def test_one_teacher_in_a_list_is_one_teacher(make, small):
    """Every table byte for byte, and the header but for the way it was given."""
    one, listed = make(teacher=small, teacher_weights=None), make(teacher=(small,), teacher_weights=(1.0,))
    assert tables(one.path) == tables(listed.path)
    assert "teacher_weights" not in one.header
    assert one.header["teachers"] == listed.header["teachers"]


def test_equal_weights_are_the_default_and_other_weights_another_cache(make, tmp_path):
    cache = make(tmp_path / "cache", teacher_weights=None)
    assert cache.header["teacher_weights"] == [0.5, 0.5]
    with pytest.raises(BadInput, match=r"teacher_weights \(cached: \[0.5, 0.5\], given: \[0.25, 0.75\]\)"):
        make(tmp_path / "cache")
    assert make(tmp_path / "cache", teacher_weights=(0.5, 0.5), views=2).views == 2


def test_a_stopped_ensemble_continues_to_the_same_bytes(make, tmp_path, monkeypatch):
    """In the middle of a view, with mixing and erasing at two image sizes."""
    given = {"batch_size": 20, "recipe": "imagenet_vit_mlp"}
    straight = make(tmp_path / "straight", **given)
    original, seen = Ensemble.mean, [0]

    def mean(self: Ensemble, each: list[Tensor]) -> Tensor:
        seen[0] += len(each[0])
        if seen[0] == 40 + 599 + 20:  # images held back, validation, one batch of two
            signal.raise_signal(signal.SIGTERM)
        return original(self, each)

    monkeypatch.setattr(Ensemble, "mean", mean)
    with pytest.raises(Stopped):
        make(tmp_path / "cache", **given)
    (part,) = (tmp_path / "cache").glob(PARTS)
    assert len(load_tensors(part)[0]["classes"]) == 20
    make(tmp_path / "cache", **given)
    assert seen[0] == 599 + 40 + 40
    assert tables(tmp_path / "cache") == tables(straight.path)


def test_the_accuracy_of_each_teacher_and_of_their_mean(make, small, large, capsys):
    """As computed from the pixels of each."""
    capsys.readouterr()
    cache = make()
    lines = [line for line in capsys.readouterr().err.splitlines() if "top-1" in line]
    val = open_dataset("digits:40", "val")
    expected = []
    for folder in (small, large):
        teacher = open_teacher(folder, DIGITS)
        images = pixels(val, center_views(val.sizes, teacher.crop), teacher.image_size)
        expected.append((teacher.log_probs(images).argmax(dim=1).numpy() == val.labels).mean())
    expected.append((cache.val_targets().classes[:, 0].long().numpy() == val.labels).mean())
    said = [float(line.rpartition(": near")[0].split(": ")[-1].split("%")[0] if ": near" in line
                  else line.split(": ")[-1].split("%")[0]) / 100 for line in lines]  # fmt: skip
    assert said == pytest.approx(expected, abs=0.002)
    assert [folder in line for folder, line in zip((small, large), lines, strict=False)] == [True, True]


# --- Pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "reads"), [((32, 32, 32), 1), ((32, 48, 32), 2)])
def test_teachers_of_one_image_size_share_the_pixels(small, sizes, reads, monkeypatch):
    """Each distinct size is one pass of the pipeline."""
    dataset = open_dataset("digits:40")
    opened = open_teacher(small, DIGITS)
    teachers = tuple(dataclasses.replace(opened, image_size=size) for size in sizes)
    ensemble = Ensemble(teachers, (1 / 3,) * 3, ("a", "b", "c"))
    pipeline = open_pipeline("resident", dataset, 32, batch_size=16)
    passes, epoch = [], pipeline.epoch
    monkeypatch.setattr(pipeline, "epoch", lambda *given: passes.append(given) or epoch(*given))
    views = draw_views(ViewPolicy(), dataset.sizes, 0, 0)
    batches = list(ensemble.batches(pipeline, ensemble.same(views), np.arange(40), start=16))
    assert len(passes) == reads
    assert [len(batch[0].images) for batch in batches] == [16, 8]
    assert all(tuple(b.images.shape[-1] for b in batch) == sizes for batch in batches)
    assert torch.equal(batches[0][0].images, pixels(dataset, views, 32)[16:32])


# --- Compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_programs_give_the_same(small, large, monkeypatch):
    """Also for a smaller last batch. Dynamo traces the programs; the code is run as it is, without a C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    ensemble = Ensemble(tuple(open_teacher(f, DIGITS) for f in (small, large)), (0.25, 0.75), ("a", "b"))
    compiled, eager = (ensemble.program(3, 6, compile_, "none") for compile_ in (True, False))
    for count in (6, 4):
        images = [torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8) for side in (32, 48)]
        got, expected = compiled(*images), eager(*images)
        assert got.keys() == expected.keys()
        torch.testing.assert_close(got["log_probs"], expected["log_probs"], rtol=2e-3, atol=2e-3)
        assert len(got["classes"]) == count


# --- Use --------------------------------------------------------------------------------------------------------------


def test_a_student_learns_from_an_ensemble_and_info_shows_it(both, tmp_path, capsys, no_report):
    run = recipes.digits(
        data="digits:40", cache=both.path, student="test_resnet", out=tmp_path / "run", epochs=1, batch_size=20,
        warmup_epochs=0,
    )  # fmt: skip
    assert 0 <= train(run).top1 <= 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("normalisation"))
    assert ["0.5" in part or "0.2" in part for part in line.split("; teacher ")[1:]] == [True, True]
    assert re.search(r"teacher 1 \(test_efficientnet\) mean .*; teacher 2 \(test_resnet\) mean ", line)
    cache_command.main(CacheConfig("info", (str(both.path),)))
    said = " ".join(capsys.readouterr().out.split())
    assert "0.25 of test_efficientnet at 32 px" in said
    assert "0.75 of test_resnet at 48 px" in said
    assert read_fidelity(both.path, both.header).images == 40


def test_the_command_line_takes_teachers_one_by_one(both, small, large, tmp_path):
    """Also as one list; with a configuration from a file, those given replace its own."""
    common = ["--data", "digits", "--out", "cache", "--views", "1", "--topk", "4"]
    for flags in (["--teacher", "a", "--teacher", "b"], ["--teacher", "a", "b"], ["--teacher=a", "--teacher=b"]):
        config = parse("precompute", [*flags, *common, "--teacher-weights", "0.3", "0.7"])
        assert (config.teacher, config.teacher_weights) == (("a", "b"), (0.3, 0.7))
    assert parse("precompute", ["--teacher", "a", *common]).teacher == "a"
    file = ["--config", str(both.path / HEADER), "--out", str(tmp_path)]
    assert parse("precompute", file).teacher == (small, large)
    replaced = parse("precompute", [*file, "--teacher", "c", "--teacher", "d"])
    assert (replaced.teacher, replaced.teacher_weights, replaced.topk) == (("c", "d"), (0.25, 0.75), 4)


def test_a_header_of_another_folder_finds_its_teachers(both, small, large, tmp_path, monkeypatch):
    """Relative paths are relative to the folder in which the cache was made."""
    header = json.loads((both.path / HEADER).read_text())
    root = Path(small).parent
    config = {**header["config"], "teacher": [str(Path(f).relative_to(root)) for f in (small, large)]}
    (tmp_path / "cache.json").write_text(json.dumps({"config": config, "folder": str(root)}))
    monkeypatch.chdir(tmp_path)
    got = parse("precompute", ["--config", "cache.json", "--out", "new"])
    assert got.teacher == (small, large)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"features": "pooled"}, "features: expected none with several teachers"),
        ({"teacher_checkpoint": Path("w.pth")}, "teacher-checkpoint: expected one --teacher with it, got 2"),
        ({"teacher_weights": (1.0,)}, r"teacher-weights: expected 2, one per --teacher, got 1 \(1\)"),
        ({"teacher_weights": (0.5, 0.3)}, "teacher-weights: expected numbers above 0 with a sum of 1, got 0.5 0.3"),
        ({"teacher_weights": (1.5, -0.5)}, "teacher-weights: expected numbers above 0"),
        ({"teacher_weights": (float("nan"), 0.5)}, "teacher-weights: expected numbers above 0"),
        ({"teacher": ()}, "teacher: expected at least one"),
    ],
)
def test_impossible_values_are_refused(given, said):
    with pytest.raises(BadInput, match=said):
        PrecomputeConfig(**{"data": "digits", "teacher": ("a", "b"), "out": Path("c"), "views": 1, "topk": 1, **given})


def test_rounded_weights_are_rescaled():
    config = PrecomputeConfig("digits", ("a", "b", "c"), Path("c"), 1, 1, teacher_weights=(0.333, 0.333, 0.333))
    assert config.weights == pytest.approx((1 / 3,) * 3)


def test_a_teacher_of_other_classes_is_named(make, make_teacher, small, tmp_path):
    other = make_teacher("test_efficientnet", names=tuple("abcdefghij"))
    fewer = make_teacher("test_efficientnet", names=DIGITS[:7])
    for folder in (other, fewer):
        with pytest.raises(BadInput, match=f"teacher {folder}: expected the dataset's 10 classes"):
            make(tmp_path / "cache", teacher=(small, folder))
        assert not (tmp_path / "cache" / HEADER).exists()


def test_a_teacher_that_predicts_nan_is_named(make, small, large, tmp_path, monkeypatch):
    """The other one is not."""
    original = Teacher.log_probs

    def log_probs(self: Teacher, images: Tensor) -> Tensor:
        found = original(self, images).clone()
        if self.image_size == 48 and len(images) == 7:
            found[3] = torch.nan
        return found

    monkeypatch.setattr(Teacher, "log_probs", log_probs)
    with pytest.raises(BadInput, match=r"predicts NaN for \S+ \(1 of 7 images\)") as error:
        make(tmp_path / "cache", batch_size=7)
    assert f"teacher {large}:" in str(error.value)
    assert small not in str(error.value)
    assert not (tmp_path / "cache" / VAL).exists()


@pytest.mark.parametrize("weights", [None, [1.0], [0.5, "a"], [0.5, -0.5], [0.2, 0.3, 0.5]])
def test_an_edited_header_is_refused(both, tmp_path, weights):
    header = json.loads((both.path / HEADER).read_text())
    (tmp_path / HEADER).write_text(json.dumps({**header, "teacher_weights": weights}))
    with pytest.raises(BadInput, match="for teachers"):
        TeacherCache.open(tmp_path)
