"""The learning rate equals that of timm's schedulers and ffcv-imagenet's ramp; image sizes grow by its formula."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import create_scheduler_v2
from torch import nn

from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.recipes import RECIPES, with_size_defaults
from fastofa.training.schedule import cautions, image_size, learning_rate


def config(**overrides: Any) -> TrainConfig:
    return TrainConfig(
        **{"data": "digits", "student": "test_resnet", "out": Path("run"), "recipe": "digits", **overrides}
    )


def rates(c: TrainConfig, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step of a run."""
    return [learning_rate(c, step, steps_per_epoch) for step in range(c.epochs * steps_per_epoch)]


def published_rates(c: TrainConfig, steps_per_epoch: int) -> list[float]:
    """What timm's scheduler sets for each step if it is updated after every epoch, as the published code does."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=c.lr)
    names = ("min_lr", "warmup_epochs", "warmup_lr", "decay_epochs", "decay_rate")
    scheduler, epochs = create_scheduler_v2(
        optimizer, c.schedule, num_epochs=c.epochs, **{name: getattr(c, name) for name in names}
    )
    assert epochs == c.epochs
    rates = []
    for epoch in range(c.epochs):
        rates += [optimizer.param_groups[0]["lr"]] * steps_per_epoch
        scheduler.step(epoch + 1)
    return rates


def timm_rates(c: TrainConfig, steps_per_epoch: int) -> list[float]:
    """What timm's scheduler, updated after every step as its train script does, sets for each step of the run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=c.lr)
    names = ("min_lr", "warmup_epochs", "warmup_lr", "decay_epochs", "decay_rate")
    scheduler, _ = create_scheduler_v2(
        optimizer, c.schedule, num_epochs=c.epochs, step_on_epochs=False, updates_per_epoch=steps_per_epoch,
        **{name: getattr(c, name) for name in names},
    )  # fmt: skip
    rates = []
    for step in range(c.epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step + 1)
    return rates


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "imagenet_fast"])
def test_the_learning_rates_of_the_recipes_equal_timms(name):
    c = RECIPES[name](data="digits", student="test_resnet", out=Path("run"), lr_updates="step")
    c = with_size_defaults(c, 1000, 1000, 1)
    actual = rates(c, 7)
    assert actual == pytest.approx(timm_rates(c, 7), rel=1e-9, abs=1e-15)
    assert actual[0] == pytest.approx(c.warmup_lr if c.warmup_epochs else c.lr)
    assert max(actual) <= c.lr


@settings(max_examples=150, deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "step"]),
    epochs=st.integers(1, 30),
    steps_per_epoch=st.integers(1, 12),
    lr=st.floats(1e-6, 10),
    min_lr=st.floats(0, 1e-2),
    warmup_epochs=st.integers(0, 35) | st.floats(0, 5),
    warmup_lr=st.floats(0, 1),
    decay_epochs=st.integers(1, 40) | st.sampled_from([0.5, 2.4]),
    decay_rate=st.floats(0.01, 1),
)
def test_learning_rates_equal_timms(steps_per_epoch, **values):
    """Also if the warm-up exceeds the run, starts above lr or ends mid-epoch, and if decays are mid-epoch."""
    c = config(**values)
    assert rates(c, steps_per_epoch) == pytest.approx(timm_rates(c, steps_per_epoch), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_after_the_last_step_the_learning_rate_is_min_lr(schedule):
    c = config(epochs=3, lr=0.1, min_lr=0.01, schedule=schedule)
    assert [learning_rate(c, step, 5) for step in (15, 16, 100)] == pytest.approx([0.01] * 3)


PUBLISHED = [name for name in RECIPES if name.startswith(("imagenet", "cifar")) and name != "imagenet_fast"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_updates_between_epochs_equal_the_published_codes(name):
    """Of timm's schedulers, updated once per epoch. Resuming within an epoch does not change its rate."""
    c = RECIPES[name](data="d", student="s", out=Path("o"), lr_updates="epoch")
    assert rates(c, 7) == pytest.approx(published_rates(c, 7), rel=1e-9)
    assert len(set(rates(c, 7)[7:14])) == 1


def test_updates_at_every_step_warm_cnns_up_with_half_as_much_again():
    """The sum of the learning rates of the three epochs of warm-up: 1.5 times the published one, but for warmup_lr."""
    step, epoch = (
        sum(rates(RECIPES["imagenet_cnn"](data="d", student="s", out=Path("o"), lr_updates=updates), 2502)[: 3 * 2502])
        for updates in ("step", "epoch")
    )
    assert step / epoch == pytest.approx(1.5, abs=0.01)


# --- linear -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    epochs=st.integers(1, 30),
    steps_per_epoch=st.integers(1, 12),
    lr=st.floats(1e-6, 10),
    min_lr=st.floats(0, 1e-2),
    warmup_epochs=st.integers(0, 35) | st.floats(0, 5),
    warmup_lr=st.floats(0, 1),
)
def test_linear_is_two_straight_lines(steps_per_epoch, **values):
    """Through (0, warmup_lr), (end of warm-up, lr), (end, min_lr); only the first line if the warm-up is longer."""
    c = config(schedule="linear", **values)
    last = c.epochs * steps_per_epoch
    knots = [0, c.warmup_epochs * steps_per_epoch, last], [c.warmup_lr, c.lr, c.min_lr]
    if not c.warmup_epochs:
        knots = knots[0][1:], knots[1][1:]
    elif c.warmup_epochs >= c.epochs:
        knots = knots[0][:2], knots[1][:2]
    assert rates(c, steps_per_epoch) == pytest.approx(np.interp(np.arange(last), *knots), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("epochs", [16, 32, 88])
def test_imagenet_fast_has_ffcvs_learning_rate(epochs):
    """It rises for two epochs from a ten-thousandth of 0.5 to 0.5, then falls to 0."""
    c = recipes.imagenet_fast(epochs, data="d", student="s", out=Path("o"))
    expected = np.interp(np.arange(epochs * 5) / 5, [0, 2, epochs], [0.5e-4, 0.5, 0])
    assert rates(c, 5) == pytest.approx(expected, rel=1e-9)


def test_the_learning_rate_has_no_jumps_and_reaches_its_maximum():
    actual = rates(config(schedule="linear", epochs=10, lr=0.5, warmup_epochs=2, warmup_lr=0.0), 100)
    assert max(abs(a - b) for a, b in pairwise(actual)) <= 0.5 / 200 + 1e-12
    assert (actual[0], max(actual)) == (0, 0.5)


# --- Growing images ---------------------------------------------------------------------------------------------------


def sizes(c: TrainConfig, full: int) -> list[int]:
    return [image_size(c, epoch, full) for epoch in range(c.epochs)]


def test_without_start_size_images_do_not_grow():
    assert sizes(config(epochs=5, growth=(0.0, 1.0)), 224) == [224] * 5


def test_image_sizes_grow_as_in_ffcv_imagenet():
    """rn18_88_epochs: 160 px up to epoch 65, 192 px from epoch 76 on, between them linear, rounded to 32 px."""

    def ffcv(epoch: int, low: int, high: int) -> int:
        size = np.interp(epoch, [65, 76], [low, high])
        return int(np.round(size / 32)) * 32

    for low, high in ((160, 192), (128, 224), (96, 288)):
        c = config(epochs=88, start_size=low, growth=(65 / 88, 76 / 88))
        assert sizes(c, high) == [ffcv(epoch, low, high) for epoch in range(88)]
        assert sizes(c, high)[65:77:11] == [low, high]


def test_a_ramp_by_hand():
    """Ten epochs, 96 to 192 px between epochs 2 and 6: 96 + 24 per epoch, to the nearest multiple of 32."""
    c = config(epochs=10, start_size=96, growth=(0.2, 0.6))
    assert sizes(c, 192) == [96, 96, 96, 128, 128, 160, 192, 192, 192, 192]  # 120 -> 128, 144 -> 128 (even), 168 -> 160


def test_imagenet_fast_grows_before_its_end():
    c = recipes.imagenet_fast(data="d", student="s", out=Path("o"))
    actual = sizes(c, c.image_size)
    assert (actual[0], actual[-1], set(actual)) == (160, 192, {160, 192})
    assert actual.index(192) in (12, 13)


@settings(max_examples=300, deadline=None)
@given(
    epochs=st.integers(1, 100),
    start=st.integers(1, 400),
    full=st.integers(1, 400),
    growth=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple),
)
def test_image_sizes_never_shrink(epochs, start, full, growth):
    """They grow from the first size to the full one, whatever these are; between them they are multiples of 32."""
    start, full = sorted((start, full))
    c = config(epochs=epochs, start_size=start, growth=growth)
    actual = sizes(c, full)
    assert actual == sorted(actual)
    assert start <= actual[0] <= actual[-1] <= full
    assert {size % 32 for size in actual if size not in (start, full)} <= {0}
    assert all(size == full for epoch, size in enumerate(actual) if epoch >= growth[1] * epochs)
    assert image_size(c, epochs, full) == full


# --- Settings that suit longer runs -----------------------------------------------------------------------------------


def test_settings_for_longer_runs_are_reported():
    """Warm-up, decay or moving average of a long recipe in a short run; the suggested value is not reported."""

    def reported(name: str, **overrides: Any) -> list[str]:
        return cautions(RECIPES[name](data="d", student="s", out=Path("o"), **overrides), steps_per_epoch=18)

    (warmup, average) = reported("imagenet_vit_mlp", epochs=4)
    assert warmup == (
        "warmup-epochs 20: the run has 4 epochs, so the learning rate never reaches --lr 0.0005; try --warmup-epochs "
        "0.2"
    )
    assert average.startswith("ema 0.99996: the average is over 25,000 steps, but the run has 72, ")
    assert "; try --ema 0.861 (" in average
    assert reported("imagenet_vit_mlp", epochs=4, warmup_epochs=0.2, ema=0.861) == []
    (decay,) = reported("imagenet_cnn", epochs=20)
    assert decay.startswith(
        "decay-epochs 30: the run has 20 epochs, so the learning rate never falls; try --decay-epochs 6"
    )
    assert reported("imagenet_cnn", epochs=20, decay_epochs=6.0) == []
    assert [reported(name) for name in ("digits", "imagenet_fast", "imagenet_cnn", "cifar_cnn", "cifar_vit_mlp")] == [
        []
    ] * 5
    steps = 1000  # 2 / (1 - 0.998)
    at_the_edge = RECIPES["digits"](data="d", student="s", out=Path("o"), epochs=10, ema=0.998)
    assert cautions(at_the_edge, steps // 10) == []
    assert len(cautions(at_the_edge, steps // 10 - 1)) == 1
