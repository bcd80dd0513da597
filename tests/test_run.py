"""A run's folder: what is saved in it, from what a run resumes, and how it records each start."""

import copy
import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastofa
import fastofa.training.evaluate_in_training
import fastofa.training.live_report
from fastofa.methods.method import Outputs
from fastofa.methods.objective import Objective
from fastofa.models.normalized import Normalized
from fastofa.runs.checkpoint import BEST, BEST_EMA, FOLDER, best_top1, checkpoints
from fastofa.runs.config import Weights
from fastofa.runs.log import read_metrics
from fastofa.runs.run import open_run
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.system.interrupt import Stopped
from fastofa.training.evaluate import evaluate
from fastofa.training.loop import train
from fastofa.training.step import Step
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
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(on_photos, damage, capsys):
    """Step 4 of 6 is damaged, step 3 intact: this is reported, and the weights are the same. Image sizes grow
    meanwhile.
    """
    given = {
        "checkpoint_every": 2, "keep": 3, "log_every": 3, "ema": 0.9, "drop_path": 0.2, "image_size": 64,
        "start_size": 32, "growth": (0.0, 1.0),
    }  # fmt: skip
    straight = on_photos("straight", **given)
    train(straight)
    assert [load_tensors(file)[1]["step"] for file in checkpoints(straight.out)] == [6, 4, 3]
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
    """The first of equally good ones, also if a resumed run is worse afterwards."""
    hits = iter(
        [(3, 1), (6, 2), (4, 7), (6, 7), (4, 7), (5, 2)]
    )  # of the weights, of their average; the last two after resuming
    evaluated: list[list[dict[str, Tensor]]] = []

    def best_classes_each(
        students: list[nn.Module], pipeline: Any, dataset: Any, *_: Any, **__: Any
    ) -> list[np.ndarray]:
        evaluated.append([copy.deepcopy(student.state_dict()) for student in students])
        right, found = dataset.labels, next(hits)
        first = [np.where(np.arange(len(right)) < count, right, 1 - right) for count in found]
        return [np.stack([best, 1 - best], axis=1) for best in first]

    monkeypatch.setattr(fastofa.training.evaluate_in_training, "best_classes_each", best_classes_each)
    config = on_photos(epochs=4, ema=0.5)
    train(config)
    epochs = rows(config.out, "epoch")
    for name, expected in (("top1_raw", [3, 6, 4, 6]), ("top1_ema", [1, 2, 7, 7]), ("top1", [3, 6, 7, 7])):
        assert [row[name] for row in epochs] == pytest.approx([count / 12 for count in expected])

    def assert_best(weights: Weights, file: str, student: dict[str, Tensor], top1: float, epoch: int) -> None:
        tensors, info = load_tensors(config.out / FOLDER / file)
        assert (info["step"], info["epoch"], info["top1"]) == (3 * epoch + 3, epoch, pytest.approx(top1))
        loaded = open_run(config.out).trained_student(weights).state_dict()
        for name, value in student.items():
            assert torch.equal(tensors[f"student.{name}"], value)
            assert torch.equal(loaded[name], value)

    def assert_both_are_best() -> None:
        assert_best("best-raw", BEST, evaluated[1][0], 6 / 12, 1)
        assert_best("best-ema", BEST_EMA, evaluated[2][1], 7 / 12, 2)
        assert_best("best", BEST_EMA, evaluated[2][1], 7 / 12, 2)

    assert_both_are_best()
    newest(config.out).unlink()
    (config.out / "metrics.jsonl").unlink()  # the best are known without it
    train(on_photos(epochs=4, ema=0.5, resume=True))
    assert rows(config.out, "epoch")[-1]["top1"] == pytest.approx(5 / 12)
    assert_both_are_best()


def test_last_is_the_better_of_weights_and_average(on_photos, monkeypatch):
    """By the newest evaluation: an average over more steps than the run has is still near the initial weights."""
    config = on_photos(epochs=1, ema=0.9999)
    result = train(config)
    (row,) = rows(config.out, "epoch")
    assert result.top1 == row["top1"] == max(row["top1_raw"], row["top1_ema"])
    tensors, _ = load_tensors(newest(config.out))
    log = config.out / "metrics.jsonl"
    text = log.read_text()
    for raw, ema, part in ((0.75, 0.5, "student"), (0.5, 0.75, "ema"), (0.5, 0.5, "ema")):
        changed = {**row, "top1": max(raw, ema), "top1_raw": raw, "top1_ema": ema}
        log.write_text(text.replace(json.dumps(row), json.dumps(changed)))
        weights = open_run(config.out).trained_student().state_dict()
        assert all(torch.equal(value, tensors[f"{part}.{name}"]) for name, value in weights.items())
    log.unlink()
    weights = open_run(config.out).trained_student().state_dict()
    assert all(torch.equal(value, tensors[f"ema.{name}"]) for name, value in weights.items())


def test_an_average_and_a_warm_up_longer_than_the_run_are_reported(on_photos, capsys):
    train(on_photos(epochs=1, ema=0.9999, warmup_epochs=20))
    said = capsys.readouterr().err
    assert "ema 0.9999: the average is over 10,000 steps, but the run has 3" in said
    assert "warmup-epochs 20: the run has 1 epoch," in said


# --- Order of saving --------------------------------------------------------------------------------------------------


def test_a_run_that_ended_between_saving_and_evaluating_evaluates_when_resumed(on_photos, monkeypatch):
    """In the middle and at the end; log, best weights and predictions are those of an uninterrupted run."""
    straight = on_photos("straight", ema=0.5)
    train(straight)
    config = on_photos("run", ema=0.5)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fastofa.training.evaluate_in_training, "best_classes_each", fail)
        for resume in (False, True):
            with pytest.raises(RuntimeError, match="out of memory"):
                train(dataclasses.replace(config, resume=resume))
            assert newest(config.out).name == "step-00000003.safetensors"
            assert not (config.out / FOLDER / BEST).exists()
    original = fastofa.training.evaluate_in_training.save_predictions
    calls = iter([original, fail])
    monkeypatch.setattr(
        fastofa.training.evaluate_in_training, "save_predictions", lambda *arguments: next(calls)(*arguments)
    )
    with pytest.raises(RuntimeError, match="out of memory"):  # in the last one
        train(dataclasses.replace(config, resume=True))
    monkeypatch.setattr(fastofa.training.evaluate_in_training, "save_predictions", original)
    train(dataclasses.replace(config, resume=True))
    same_run(config.out, straight.out)
    predictions = [load_tensors(c.out / "val_predictions.safetensors")[0]["best"] for c in (config, straight)]
    assert torch.equal(*predictions)


def test_a_signal_at_an_epochs_end_does_not_wait_for_the_evaluation(on_photos, monkeypatch):
    straight = on_photos("straight")
    train(straight)
    config = on_photos("run")
    original = Step.__call__

    def step(self: Step, *arguments: Any) -> None:
        original(self, *arguments)
        if self.steps == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        patch.setattr(
            fastofa.training.evaluate_in_training, "best_classes_each", lambda *_, **__: pytest.fail("evaluated")
        )
        with pytest.raises(Stopped, match="saved step 3 of 6"):
            train(config)
    train(dataclasses.replace(config, resume=True))
    same_run(config.out, straight.out)


def test_a_report_that_fails_does_not_end_the_run(on_photos, monkeypatch, capsys):
    monkeypatch.undo()  # on_photos draws no report
    monkeypatch.setattr(fastofa.training.live_report, "draw_curves", lambda _: 1 / 0)
    monkeypatch.setattr(fastofa.training.live_report, "EVERY_S", 0)
    config = on_photos()
    train(config)
    assert len(rows(config.out, "epoch")) == 2
    said = capsys.readouterr().err
    assert said.count("could not write the report and curves (division by zero); the run continues") == 1


def test_predictions_are_those_of_the_last_evaluation(on_photos):
    """With the labels, so that the confusion matrix can be computed without the student."""
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
    """poison(n, what): the n-th loss of all, or only its gradient, is NaN."""

    def at(count: int, what: str) -> None:
        original, calls = Objective.forward, iter(range(1, 100))

        def call(self: Objective, outputs: Outputs, *arguments: Any) -> Tensor:
            losses = original(self, outputs, *arguments)
            if next(calls) != count:
                return losses
            return losses * torch.nan if what == "loss" else losses + (outputs.heads.sum() * 0).sqrt()

        monkeypatch.setattr(Objective, "forward", call)

    return at


@pytest.mark.parametrize(("what", "step"), [("loss", 5), ("loss", 6), ("gradient", 6)])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(on_photos, poison, what, step):
    """The steps are named, and the last good checkpoint, from which the run can be resumed unchanged."""
    straight = on_photos("straight", epochs=3, log_every=3)
    train(straight)
    config = on_photos("run", epochs=3, log_every=3, checkpoint_every=2)
    poison(step, what)
    with pytest.raises(BadInput) as error:
        train(config)
    good = config.out / "checkpoints" / "step-00000004.safetensors"
    assert str(error.value) == (
        f"the {what} is no longer finite between steps 3 and 6; start again with a lower --lr or --clip and another "
        f"--out; or retry from {good} with --resume"
    )
    assert newest(config.out) == good
    tensors, info = load_tensors(good)
    assert [name for name, value in tensors.items() if not value.isfinite().all()] == []
    assert info["position"]["summed"] == 1
    assert [row["step"] for row in rows(config.out, "step")] == [3]
    train(dataclasses.replace(config, resume=True))
    same_run(config.out, straight.out)


def test_weights_that_are_not_finite_are_not_saved(on_photos, monkeypatch):
    """An update can produce them although loss and gradient are finite; the previous checkpoint remains the newest."""
    original = Step.__call__

    def spoil(self: Step, *arguments: Any) -> None:
        original(self, *arguments)
        if self.steps == 4:
            with torch.no_grad():
                self.parameters[0].fill_(torch.inf)

    monkeypatch.setattr(Step, "__call__", spoil)
    config = on_photos("run", epochs=3, log_every=3, checkpoint_every=2, keep=1)
    with pytest.raises(BadInput, match=r"the weights are no longer finite .* from .*step-00000003"):
        train(config)
    assert newest(config.out).name == "step-00000003.safetensors"


def test_a_damaged_later_checkpoint_does_not_replace_an_intact_one(on_photos):
    """If the run is killed again before it reaches that step, it can still resume."""
    config = on_photos("run", epochs=3, checkpoint_every=1, keep=2)
    train(config)
    last = newest(config.out)
    truncate(last)  # the one before it is whole
    shutil.copyfile(last, config.out / FOLDER / "step-00000020.safetensors")
    train(dataclasses.replace(config, resume=True, keep=1))
    assert checkpoints(config.out) == [last]
    load_tensors(last)


def test_checkpoints_without_their_configuration_are_refused(on_photos):
    config = on_photos("run")
    train(config)
    (config.out / "config.json").unlink()
    for resume in (False, True):
        with pytest.raises(BadInput, match=r"contains checkpoints of a run without its config\.json"):
            train(dataclasses.replace(config, resume=resume))


def test_best_weights_of_a_later_step_are_deleted(on_photos, capsys):
    """On a GPU the resumed run may not reach them again; here it does. Damaged ones are reported and do not stop it."""
    config = on_photos("run", epochs=3, keep=9)
    train(config)
    best = config.out / FOLDER / BEST
    whole, info = best.read_bytes(), load_tensors(best)[1]
    assert best_top1(config.out, info["step"]) == info["top1"]
    assert best_top1(config.out, info["step"] - 1) == -1
    assert not best.exists()
    assert best_top1(config.out, 9) == -1
    best.write_bytes(whole[:-9])
    assert best_top1(config.out, 9) == -1
    assert not best.exists()
    assert "could not be read and is deleted" in capsys.readouterr().err


def test_a_missing_checkpoint_is_reported(on_photos, poison):
    poison(1, "loss")
    with pytest.raises(BadInput, match=r"between steps 0 and 1; start again with a lower --lr or --clip and .* --out$"):
        train(on_photos())


@pytest.mark.parametrize("part", ["student", "ema"])
def test_weights_that_are_not_finite_are_not_evaluated(on_photos, monkeypatch, part):
    """Nor saved as the best ones: top-1 of NaN logits would be that of the first class."""
    original = Step.__call__

    def spoil(self: Step, *arguments: Any) -> None:
        original(self, *arguments)
        if self.steps == 3:
            with torch.no_grad():
                model = self.student if part == "student" else self.ema.module  # type: ignore[union-attr]
                next(model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(Step, "__call__", spoil)
    config = on_photos(ema=0.9, checkpoint_every=2)
    with pytest.raises(BadInput, match="the weights are no longer finite"):
        train(config)
    assert [file.name for file in (config.out / FOLDER).iterdir()] == ["step-00000002.safetensors"]
    assert not (config.out / "val_predictions.safetensors").exists()
    assert rows(config.out, "epoch") == []


def test_logits_that_are_not_finite_are_refused(on_photos, monkeypatch):
    """Finite weights can overflow in the evaluation only: the run ends, and so does `fastofa evaluate`."""

    def overflow(original: Any) -> Any:
        def call(model: nn.Module, images: Tensor) -> Tensor:
            logits = original(model, images)
            logits[:2, 1] = torch.inf
            return logits

        return call

    monkeypatch.setattr(Student, "classify", overflow(Student.classify))
    monkeypatch.setattr(Normalized, "forward", overflow(Normalized.forward))
    config = on_photos()
    with pytest.raises(BadInput, match=r"the student gives NaN or infinity for \d+ of 12 validation images"):
        train(config)
    assert not (config.out / FOLDER / BEST).exists()
    with pytest.raises(BadInput, match="it diverged, train again with a lower --lr or --clip"):
        evaluate(config.out, config.data, workers=0)


def test_initial_weights_that_are_not_finite_are_refused(on_photos, tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=2)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    config = on_photos(init=str(tmp_path / "start.safetensors"))
    with pytest.raises(BadInput, match=r"start.safetensors: expected finite weights"):
        train(config)
    assert not config.out.exists()


# --- Where it was made ------------------------------------------------------------------------------------------------


def test_each_start_is_recorded_with_machine_and_versions(on_photos):
    """The first one, a resumption, and a start after the run is finished."""
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
