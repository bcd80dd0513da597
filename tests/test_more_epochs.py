"""A resumed run may train for more epochs; its learning rate then follows the schedule of the new length."""

import dataclasses
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastofa.commands.parse import parse
from fastofa.reports.page import write_report
from fastofa.runs.checkpoint import checkpoints
from fastofa.runs.log import read_metrics
from fastofa.runs.run import open_run
from fastofa.system.errors import BadInput
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train
from fastofa.training.schedule import learning_rate, lengthened
from runs import same_run

STEPS = 3  # of an epoch


def logged(run: Path) -> dict[int, float]:
    """The learning rate of every step, counted from 0."""
    return {row["step"] - 1: row["lr"] for row in read_metrics(run) if row["kind"] == "step"}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
@pytest.mark.parametrize("mid_epoch", [True, False])
def test_the_rate_follows_the_new_length_from_that_step_on(on_photos, schedule, mid_epoch, capsys):
    """From the end of the run, or from a checkpoint in its last epoch; the notice contains both rates."""
    given = {"warmup_epochs": 1, "decay_epochs": 1.5, "decay_rate": 0.3, "checkpoint_every": 4, "keep": 9}
    config = on_photos(schedule=schedule, min_lr=1e-5, **given)
    train(config)
    before = logged(config.out)
    if mid_epoch:
        for file in checkpoints(config.out)[:-2]:
            file.unlink()
    at = max(int(file.stem.partition("-")[2]) for file in checkpoints(config.out))
    assert at == (4 if mid_epoch else 6)
    capsys.readouterr()
    longer = parse("train", ["--resume", str(config.out), "--epochs", "5"])
    train(longer)
    (line,) = re.findall("^.*epochs 2 -> 5.*$", capsys.readouterr().err, re.MULTILINE)
    assert f"step {at}" in line
    old, new = (learning_rate(c, at, STEPS) for c in (config, longer))
    assert f"{new:.3g}" in line
    assert (f"{old:.3g}" in line) or schedule == "step"
    rates = logged(config.out)
    assert sorted(rates) == list(range(5 * STEPS))
    for step, rate in rates.items():
        assert rate == pytest.approx(learning_rate(config if step < at else longer, step, STEPS)), step
    assert {step: rates[step] for step in range(at)} == {step: before[step] for step in range(at)}
    if schedule == "step":
        assert old == new
    else:
        assert new > old
        assert all(a >= b for a, b in pairwise(rates[step] for step in range(at, 5 * STEPS)))


def test_with_a_step_schedule_it_equals_a_run_of_that_length(on_photos):
    """Only the schedule depends on the number of epochs: the same weights, log and best weights."""
    given = {"schedule": "step", "decay_epochs": 1, "eval_every": 1, "keep": 9}
    short, straight = on_photos("short", **given), on_photos("straight", epochs=4, **given)
    train(short)
    train(straight)
    train(dataclasses.replace(short, epochs=4, resume=True))
    same_run(short.out, straight.out)
    assert open_run(short.out).config == dataclasses.replace(straight, out=short.out, resume=True, order="random")


def test_log_and_report_have_the_final_epochs(on_photos):
    config = on_photos()
    train(config)
    result = train(dataclasses.replace(config, epochs=3, resume=True))
    rows = [row for row in read_metrics(config.out) if row["kind"] == "epoch"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 3), (1, 6), (2, 9)]
    assert result.top1 == rows[-1]["top1"]
    assert open_run(config.out).config.epochs == 3
    write_report(config.out)
    assert "3 epochs, finished" in (config.out / "report.html").read_text()


def test_the_following_views_are_used(on_photos, photos, photo_cache: TeacherCache, tmp_path):
    """As in a run of that length: a new view for each epoch if the cache has enough, else modulo their number."""
    shutil.copytree(photo_cache.path, tmp_path / "cache")
    teacher = str(photo_cache.path.parent / "teacher")
    cache = precompute(PrecomputeConfig(str(photos), teacher, tmp_path / "cache", 4, topk=2, workers=0))
    config = on_photos(cache=cache.path)
    train(config)
    assert open_run(config.out).view_digests == cache.digests(2)
    train(dataclasses.replace(config, epochs=3, resume=True))
    assert open_run(config.out).view_digests == cache.digests(3)
    few = on_photos("few", epochs=3)
    train(few)
    train(dataclasses.replace(few, epochs=4, resume=True))
    assert open_run(few.out).view_digests == photo_cache.digests(2)


def test_fewer_epochs_are_refused(on_photos):
    """Nothing is written."""
    config = on_photos(epochs=2)
    train(config)
    before = {file.name: file.read_bytes() for file in config.out.iterdir() if file.is_file()}
    with pytest.raises(BadInput, match=r"these differ: epochs: 1 here, 2 there; only more epochs are allowed"):
        train(dataclasses.replace(config, epochs=1, resume=True))
    assert before == {file.name: file.read_bytes() for file in config.out.iterdir() if file.is_file()}


def test_growing_image_sizes_are_reported_too(on_photos):
    config: Any = on_photos(epochs=10, start_size=32, image_size=64, growth=(0.0, 1.0))
    longer = dataclasses.replace(config, epochs=20)
    line = lengthened(config, longer, 9 * STEPS, STEPS, 64)
    assert "at this step 32 px instead of 64 px" in line
    assert "px" not in lengthened(
        dataclasses.replace(config, start_size=None), dataclasses.replace(longer, start_size=None), 3, STEPS, 64
    )
