"""A run's folder: what is kept of it, what it goes on from, and what it says of how it was made."""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastofa
import fastofa.train
from fastofa.checkpoint import BEST, FOLDER, checkpoints, forget_best_after
from fastofa.errors import BadInput
from fastofa.files import load_tensors
from fastofa.losses import Objective
from fastofa.metrics import read_metrics
from fastofa.run import open_run
from fastofa.step import Step
from fastofa.train import train
from runs import newest, same_run


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_run_goes_on_from_before_a_damaged_checkpoint_to_the_same_weights(on_photos, damage, capsys):
    """Step 4 of 6 is damaged, step 2 is whole: it says so and ends as if nothing had been. Pictures grow meanwhile."""
    given = {
        "checkpoint_every": 2, "keep": 3, "log_every": 3, "ema": 0.9, "drop_path": 0.2, "image_size": 64,
        "start_size": 32, "growth": (0.0, 1.0),
    }  # fmt: skip
    straight = on_photos("straight", **given)
    train(straight)
    assert [load_tensors(file)[1]["step"] for file in checkpoints(straight.out)] == [6, 4, 2]
    resumed = on_photos("resumed", resume=True, **given)
    shutil.copytree(straight.out, resumed.out)
    newest(resumed.out).unlink()
    damage(newest(resumed.out))
    capsys.readouterr()
    train(resumed)
    assert "step-00000004.safetensors: " in capsys.readouterr().err
    same_run(resumed.out, straight.out)
    assert checkpoints(resumed.out)[1].read_bytes() == checkpoints(straight.out)[1].read_bytes()


def test_the_best_evaluations_weights_are_kept(on_photos, monkeypatch):
    """The first of equally good ones, also where a run that goes on is worse from then on."""
    hits, evaluated = iter([3, 6, 4, 6, 5, 2]), []

    def predict(student: nn.Module, pipeline: Any, dataset: Any, *_: Any, **__: Any) -> np.ndarray:
        evaluated.append(copy.deepcopy(student.state_dict()))
        right, wrong = dataset.labels, 1 - dataset.labels
        first = np.where(np.arange(len(right)) < next(hits), right, wrong)
        return np.stack([first, 1 - first], axis=1)

    monkeypatch.setattr(fastofa.train, "predict", predict)
    config = on_photos(epochs=4, ema=0.5, checkpoint_every=9)
    train(config)
    assert [row["top1"] for row in rows(config.out, "epoch")] == pytest.approx([3 / 12, 6 / 12, 4 / 12, 6 / 12])

    def assert_second_is_best() -> None:
        weights, info = load_tensors(config.out / FOLDER / BEST)
        assert (info["step"], info["epoch"], info["top1"]) == (6, 1, 0.5)
        student = open_run(config.out).trained_student(best=True).state_dict()
        for name, value in evaluated[1].items():
            assert torch.equal(weights[f"student.{name}"], value)
            assert torch.equal(student[name], value)
        assert not torch.equal(evaluated[1]["backbone.classifier.weight"], evaluated[3]["backbone.classifier.weight"])

    assert_second_is_best()
    newest(config.out).unlink()
    train(on_photos(epochs=4, ema=0.5, checkpoint_every=9, resume=True))
    assert rows(config.out, "epoch")[-1]["top1"] == pytest.approx(5 / 12)
    assert_second_is_best()


def test_predictions_are_those_of_the_last_evaluation(on_photos):
    """Beside the labels, so that a confusion can be drawn without the student."""
    config = on_photos(epochs=3, eval_every=2)
    train(config)
    tensors, info = load_tensors(config.out / "val_predictions.safetensors")
    last = rows(config.out, "epoch")[-1]
    assert (info["step"], info["top1"]) == (9, last["top1"])
    assert (tensors["best"][:, 0] == tensors["labels"]).double().mean() == pytest.approx(last["top1"])
    assert tensors["best"].shape == (12, 2)


# --- Numbers that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch) -> Callable[[int, str], None]:
    """poison(n, what): the n-th loss of all, or its gradient alone, is not a number."""

    def at(count: int, what: str) -> None:
        original, calls = Objective.__call__, iter(range(1, 100))

        def call(self: Objective, logits: Tensor, *arguments: Any) -> Tensor:
            losses = original(self, logits, *arguments)
            if next(calls) != count:
                return losses
            return losses * torch.nan if what == "loss" else losses + (logits.sum() * 0).sqrt()

        monkeypatch.setattr(Objective, "__call__", call)

    return at


@pytest.mark.parametrize(("what", "step"), [("loss", 5), ("loss", 6), ("gradient", 6)])
def test_a_number_that_is_not_finite_ends_the_run_before_it_is_saved(on_photos, poison, what, step):
    """The steps are named, and the last good checkpoint, from which it goes on as if nothing had been."""
    straight = on_photos("straight", epochs=3, log_every=3)
    train(straight)
    config = on_photos("run", epochs=3, log_every=3, checkpoint_every=2)
    poison(step, what)
    with pytest.raises(BadInput) as error:
        train(config)
    good = config.out / "checkpoints" / "step-00000004.safetensors"
    assert str(error.value) == (
        f"the {what} is no longer finite between steps 3 and 6; lower --lr or set --clip, then go on from {good} by "
        "--resume"
    )
    assert newest(config.out) == good
    tensors, info = load_tensors(good)
    assert [name for name, value in tensors.items() if not value.isfinite().all()] == []
    assert info["position"]["summed"] == 1
    assert [row["step"] for row in rows(config.out, "step")] == [3]
    train(dataclasses.replace(config, resume=True))
    same_run(config.out, straight.out)


def test_weights_that_are_not_finite_are_not_saved(on_photos, monkeypatch):
    """An update can spoil them though loss and gradient were fine; the checkpoint before it stays the newest."""
    original = Step.__call__

    def spoil(self: Step, *arguments: Any) -> None:
        original(self, *arguments)
        if self.steps == 4:
            with torch.no_grad():
                self.parameters[0].fill_(torch.inf)

    monkeypatch.setattr(Step, "__call__", spoil)
    config = on_photos("run", epochs=3, log_every=3, checkpoint_every=2, keep=1)
    with pytest.raises(BadInput, match=r"the weights are no longer finite .* go on from .*step-00000002"):
        train(config)
    assert newest(config.out).name == "step-00000002.safetensors"


def test_a_damaged_checkpoint_of_a_discarded_future_does_not_displace_a_whole_one(on_photos):
    """Killed again before it comes by that step, the run still has something to go on from."""
    config = on_photos("run", epochs=3, checkpoint_every=1, keep=2)
    train(config)
    last = newest(config.out)
    truncate(last)  # the one before it is whole
    shutil.copyfile(last, config.out / FOLDER / "step-00000020.safetensors")
    train(dataclasses.replace(config, resume=True, keep=1))
    assert checkpoints(config.out) == [last]
    load_tensors(last)


def test_checkpoints_without_their_configuration_are_not_taken_over(on_photos):
    config = on_photos("run")
    train(config)
    (config.out / "config.json").unlink()
    for resume in (False, True):
        with pytest.raises(BadInput, match=r"holds checkpoints of a run without its config\.json"):
            train(dataclasses.replace(config, resume=resume))


def test_best_weights_of_a_future_that_was_given_up_are_forgotten(on_photos):
    """On a GPU the run may not come by them again; here it does."""
    config = on_photos("run", epochs=3, checkpoint_every=1, keep=9)
    train(config)
    best = config.out / FOLDER / BEST
    step = load_tensors(best)[1]["step"]
    forget_best_after(config.out, step)
    assert best.exists()
    forget_best_after(config.out, step - 1)
    assert not best.exists()


def test_without_a_checkpoint_it_says_so(on_photos, poison):
    poison(1, "loss")
    with pytest.raises(BadInput, match=r"between steps 0 and 1; .*then start anew \(there is no checkpoint yet\)"):
        train(on_photos())


# --- Where it was made ------------------------------------------------------------------------------------------------


def test_each_start_is_noted_with_machine_and_versions(on_photos):
    """Beginning, going on, and being asked again when it is finished."""
    config = on_photos(checkpoint_every=4)
    train(config)
    newest(config.out).unlink()
    for _ in range(2):
        train(on_photos(checkpoint_every=4, resume=True))
    launches = json.loads((config.out / "environment.json").read_text())
    assert [launch["step"] for launch in launches] == [0, 4, 6]
    for launch in launches:
        assert (launch["ranks"], launch["fastofa"]) == (1, fastofa.__version__)
        assert torch.__version__.startswith(launch["torch"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", launch["date"])
        assert {"cpu", "cores", "threads", "gpu", "python", "torchvision", "timm", "numpy"} <= launch.keys()
    assert not any(str(Path.home()) in str(launch) for launch in launches)
