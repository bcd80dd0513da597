"""A cache that grows, moves or is replaced while runs use it: a run continues with the views it started with."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastofa.data.open import open_dataset
from fastofa.runs import recipes
from fastofa.runs.checkpoint import checkpoints
from fastofa.runs.config import TrainConfig
from fastofa.runs.run import Run, open_run
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.distributed import World
from fastofa.training.epochs import Epochs
from fastofa.training.evaluate import evaluate
from fastofa.training.loop import train
from runs import newest, same_run

CPU = torch.device("cpu")


@pytest.fixture
def grow(photos: Path, photo_cache: TeacherCache, tmp_path: Path) -> Callable[[int], Path]:
    """grow(n) -> a copy of the photographs' cache with n views."""

    def grown(views: int) -> Path:
        if not (tmp_path / "cache").exists():
            shutil.copytree(photo_cache.path, tmp_path / "cache")
        teacher = str(photo_cache.path.parent / "teacher")
        return precompute(PrecomputeConfig(str(photos), teacher, tmp_path / "cache", views, topk=2, workers=0)).path

    return grown


def back(run: Path, steps: int = 3) -> None:
    """Reset the run to the state before its newest checkpoint."""
    newest(run).unlink()
    assert load_tensors(newest(run))[1]["step"] == 3 * steps


def test_a_run_continues_with_the_views_it_started_with(on_photos, grow, capsys):
    """Four epochs of two views; the cache gets two more meanwhile, which does not change the weights."""
    given = {"epochs": 4, "checkpoint_every": 3, "keep": 2, "eval_every": 4}
    straight, grown = on_photos("straight", **given), on_photos("grown", cache=grow(2), **given)
    train(straight)
    train(grown)
    back(grown.out)
    grow(4)
    capsys.readouterr()
    train(dataclasses.replace(grown, resume=True))
    assert "cache: has 4 views now; this run continues with the 2 it started with" in capsys.readouterr().err
    same_run(grown.out, straight.out)
    assert len(open_run(grown.out).view_digests) == 2


def test_an_unfinished_cache_serves_its_finished_views(on_photos, grow, capsys):
    """A run reports and replays three of four views, to its end, even if the fourth is finished meanwhile."""
    cache = grow(4)
    fourth = (cache / view_file(3)).read_bytes()
    (cache / view_file(3)).unlink()
    config = on_photos(cache=cache, epochs=5, checkpoint_every=3, keep=9, eval_every=5)
    train(config)
    assert f"cache {cache}: finished views: 3 of 4; this run replays 3 until it ends" in capsys.readouterr().err
    assert open_run(config.out).view_digests == TeacherCache.open(cache).digests(3)
    (cache / view_file(3)).write_bytes(fourth)
    back(config.out, 4)
    train(dataclasses.replace(config, resume=True))
    assert len(open_run(config.out).view_digests) == 3


def test_views_that_no_epoch_uses_may_change(on_photos, grow, capsys):
    """A run of one epoch needs one view."""
    cache = grow(2)
    config = on_photos(cache=cache, epochs=1)
    train(config)
    assert len(open_run(config.out).view_digests) == 1
    (cache / view_file(1)).unlink()
    capsys.readouterr()
    train(dataclasses.replace(config, resume=True))
    assert "replays" not in capsys.readouterr().err


def test_a_cache_other_than_the_runs_is_refused(on_photos, grow):
    """A view with other predictions, one view fewer, or no cache: each is named, and nothing is written."""
    cache = grow(2)
    config = on_photos(cache=cache, checkpoint_every=3)
    train(config)
    resumed, before = dataclasses.replace(config, resume=True), (config.out / "config.json").read_bytes()
    kept = (cache / view_file(1)).read_bytes()
    tensors, said = load_tensors(cache / view_file(1))
    tensors["log_probs"][0] -= 0.5
    save_tensors(cache / view_file(1), tensors, said)
    with pytest.raises(
        BadInput, match=r"cache: .*cache does not contain the predictions that the run started with \(view 1 changed\)"
    ):
        train(resumed)
    (cache / view_file(1)).unlink()
    with pytest.raises(BadInput, match="expected 2 views, finished: 1 of 2; run `fastofa precompute` again"):
        train(resumed)
    assert (config.out / "config.json").read_bytes() == before
    grow(2)  # as the line says
    assert (cache / view_file(1)).read_bytes() == kept
    train(resumed)
    with pytest.raises(BadInput, match=r"these differ: .*cache: None here, .*cache there"):
        train(dataclasses.replace(resumed, cache=None, method="scratch"))


def test_resume_compares_the_validation_images(on_photos, photos, photo_cache, tmp_path):
    """Including their labels; the training images are the same."""
    data = Path(shutil.copytree(photos, tmp_path / "photos"))
    config = on_photos(data=str(data), cache=None, method="scratch", epochs=1)
    train(config)
    val = data / "val"
    (val / "china" / "000.jpg").rename(val / "flower" / "100.jpg")
    message = f"these differ: data: the validation images of {data} are not those the run started with"
    with pytest.raises(BadInput, match=message):
        train(dataclasses.replace(config, resume=True))
    (val / "flower" / "100.jpg").rename(val / "china" / "000.jpg")
    train(dataclasses.replace(config, resume=True))


def test_relative_paths_of_a_run_work_from_any_folder(on_photos, grow, photos, monkeypatch, tmp_path):
    """For evaluation from another folder, including agreement with the teacher."""
    grow(2)
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    config: TrainConfig = on_photos(data="photos", cache="cache", out=Path("run"), epochs=1)
    train(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = open_run(tmp_path / "run")
    assert (run.data, run.cache) == (str(tmp_path / "photos"), str(tmp_path / "cache"))
    assert (run.config.data, run.config.cache) == ("photos", "cache")
    assert evaluate(tmp_path / "run", str(photos), workers=0).agreement is not None
    monkeypatch.chdir(tmp_path)
    train(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize(
    ("data", "found"),
    [("digits:100", "digits:100"), ("cifar100:c", "cifar100:{}/c"), ("c", "{}/c"), ("a:b", "{}/a:b"), ("gone", "gone")],
)
def test_the_path_of_a_runs_data(data, found, tmp_path):
    """Built-in names are unchanged, even if there is a folder of that name."""
    for name in ("100", "c", "a:b"):
        (tmp_path / name).mkdir()
    config = recipes.digits(data=data, student="test_resnet", out=tmp_path)
    assert Run(tmp_path, config, ("a",), 0, "", folder=str(tmp_path)).data == found.format(tmp_path)


@pytest.mark.parametrize("state", ["replaced", "cut short", "grown", "moved"])
def test_evaluate_uses_the_predictions_that_the_run_started_with(
    on_photos, grow, photo_cache, photos, capsys, state, tmp_path
):
    """If the cache has other predictions, fewer views or is missing, a notice states why there is no agreement."""
    config = on_photos(cache=grow(2))
    train(config)
    cache = tmp_path / "cache"
    if state == "replaced":
        shutil.rmtree(cache)
        teacher = str(photo_cache.path.parent / "teacher")
        precompute(PrecomputeConfig(str(photos), teacher, cache, 2, topk=2, seed=1, workers=0))
    elif state == "cut short":
        (cache / view_file(1)).unlink()
    elif state == "grown":
        grow(3)
    else:
        cache.rename(tmp_path / "other")
    capsys.readouterr()
    found = evaluate(config.out, str(photos), workers=0)
    said = capsys.readouterr().err
    assert (found.agreement is not None) is (state == "grown")
    expected = {
        "replaced": f"agreement with the teacher not measured: {cache} does not contain the predictions",
        "cut short": "agreement with the teacher not measured: .*expected 2 views, finished: 1 of 2",
        "grown": "",
        "moved": f"agreement with the teacher not measured: {cache}: expected a teacher cache",
    }[state]
    assert all(part in said for part in expected.split(".*"))


def test_a_damaged_cache_is_not_reported_as_divergence(on_photos, grow):
    """It is detected when the view is opened, at the start or later; then the run can be resumed."""
    cache = grow(2)
    kept = (cache / view_file(1)).read_bytes()
    tensors, said = load_tensors(cache / view_file(1))
    tensors["log_probs"][4, 0] = float("nan")
    save_tensors(cache / view_file(1), tensors, said)
    config = on_photos(cache=cache, checkpoint_every=3)
    with pytest.raises(
        BadInput, match=rf"{view_file(1)}: expected finite log_probs, got \[nan, .*\] for sample 4; delete"
    ):
        train(config)
    assert len(checkpoints(config.out)) == 1
    (cache / view_file(1)).write_bytes(kept)
    (cache / VAL).write_bytes((cache / VAL).read_bytes()[:-1])
    with pytest.raises(BadInput, match=f"{VAL}: .*truncated or damaged"):
        train(dataclasses.replace(config, resume=True))


def test_ranks_use_the_views_that_all_of_them_see(on_photos, grow, monkeypatch):
    """A view may be finished after one rank and before another has looked."""
    monkeypatch.setattr(World, "sum", lambda _, mine: mine + torch.tensor([0, 2]))  # the other rank sees two
    config, cache = on_photos(cache=grow(3), epochs=5), TeacherCache.open(grow(3))
    epochs = Epochs(config, open_dataset(config.data), World(0, 2), CPU, cache)
    assert epochs.view_digests == TeacherCache.open(grow(3)).digests(2)
