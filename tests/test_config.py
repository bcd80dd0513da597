"""Wrong values are refused, the configuration survives its JSON, and recipes hold the published values."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import ColorJitter

from fastofa.commands.parse import parse
from fastofa.methods.options import (
    BKDOptions,
    CCOptions,
    CRDOptions,
    DISTOptions,
    DKDOptions,
    FitNetOptions,
    LSKDOptions,
    RKDOptions,
    RSDOptions,
)
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.recipes import (
    CIFAR_MEAN,
    CIFAR_STD,
    RECIPES,
    augmentation_differences,
    default_policy,
    recipe,
    with_size_defaults,
)
from fastofa.system.errors import BadInput
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.views.policy import ViewPolicy

NAN = math.nan
NEEDED: dict[str, Any] = {"data": "digits", "student": "test_resnet", "out": Path("run"), "recipe": "digits"}


def config(**given) -> TrainConfig:
    return TrainConfig(**{**NEEDED, **given})


# --- Validation -------------------------------------------------------------------------------------------------------

WRONG = [
    *[(name, value, "expected at least 1") for name in ("epochs", "batch_size", "eval_every") for value in (0, -3)],
    *[(name, 0, "expected at least 1") for name in ("accumulate", "log_every", "checkpoint_every", "keep")],
    ("timeout_s", 0, "expected at least 1"),
    *[("max_pixels", value, "expected millions of pixels, above 0") for value in (0, -1.0, NAN)],
    *[
        (name, value, "expected a number of at least 0")
        for value in (-0.1, NAN)
        for name in (
            "gt_weight", "kd_weight", "ofa_weight", "lr", "min_lr", "warmup_lr", "weight_decay", "warmup_epochs",
        )
    ],
    *[(n, v, "expected a number from 0 to below 1") for n in ("smoothing", "drop_path") for v in (-0.1, 1.0, NAN)],
    *[(n, v, "expected a number above 0") for n in ("temperature", "decay_epochs", "decay_rate") for v in (0, -1, NAN)],
    *[("eval_crop", value, "expected a number above 0 and at most 1") for value in (0, 1.1, NAN)],
    *[("clip", value, "expected a number above 0") for value in (0, -1.0, NAN)],
    *[("ema", value, "expected a number between 0 and 1") for value in (0.0, 1.0, NAN)],
    *[(name, 0, "expected at least 1 pixel") for name in ("image_size", "start_size", "eval_size")],
    *[
        ("growth", value, "expected two rising numbers from 0 to 1")
        for value in ((0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (NAN, 0.5), (0.5, NAN))
    ],
    ("seed", -1, "expected a number from 0 to 2.63 - 1"),
    ("seed", 2**63, "expected a number from 0 to 2.63 - 1"),
    ("epochs", 10**9, "expected at most 1,000,000"),
    *[("stages", value, "expected some of 1 2 3 4") for value in ((0,), (1, 5), (2, 2))],
    ("stages", (), r"expected at least one stage \(or --method kd\)"),
    *[("eps", value, "expected 1 or 5 numbers above 0") for value in ((), (1.0, 1.0), (0.0,), (NAN,), (1.0,) * 6)],
    *[(name, "", "expected a name") for name in ("data", "student", "init", "wandb")],
    *[(name, math.inf, "expected finite numbers") for name in ("lr", "clip", "gt_weight", "temperature")],
    ("growth", (0.5, math.inf), "expected finite numbers"),
    ("method", "OFA", "expected some of ofa kd "),
    ("method", "ofa+scratch", "expected some of ofa kd "),
    ("method", "kd+kd", "expected each name once"),
    ("method", "mine.py", "expected some of "),
    ("variant", "mine", "expected one of official, paper"),
    ("gt_loss", "CE", "expected one of ce, bce"),
    ("optimizer", "adam", "expected one of sgd, adamw, lamb, apex_sgd, apex_adam, apex_lamb"),
    ("schedule", "poly", "expected one of cosine, step, linear"),
    ("lr_updates", "batch", "expected one of step, epoch"),
    ("eval_interpolation", "nearest", "expected one of bilinear, bicubic, student"),
    ("grad_compression", "fp16", "expected one of none, bf16"),
    ("allow_mismatch", "names", "expected one of none, pixels"),
    ("order", "sorted", "expected one of auto, random, pages"),
    ("precision", "fp16", "expected one of auto, bf16, fp32"),
    ("compile", "yes", "expected one of auto, on, off, max-autotune"),
    ("cuda_graphs", "yes", "expected one of auto, on, off"),
    ("kernels", ("crop",), "expected auto, off, or some of loss exits stem norms tokens layer_norms"),
    ("kernels", ("auto", "loss"), "expected auto, off, or some of loss exits stem norms tokens layer_norms"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_value_is_refused_with_the_flags_name(name, value, message):
    with pytest.raises(BadInput, match=f"^{name.replace('_', '-')}: {message}.*, got ") as error:
        config(**{name: value})
    assert str(value) in str(error.value)


def test_every_number_and_choice_is_checked():
    """No numeric or closed field of the configuration is missing from the list above (or from the tests below)."""
    numeric = {
        f.name for f in dataclasses.fields(TrainConfig) if any(t in str(f.type) for t in ("int", "float", "Lit"))
    }
    # workers: open_pipeline refuses them; teacher_weights: TeacherCache.weights
    elsewhere = {"scale", "ratio", "flip", "bicubic", "mean", "std", "workers", "teacher_weights"}
    assert {name for name, *_ in WRONG} | elsewhere == numeric | {"method", "data", "student", "init", "wandb"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "mean: expected both --mean and --std or neither"),
        ({"std": (0.5, 0.5, 0.5)}, "mean: expected both --mean and --std or neither"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "std: expected three numbers above 0"),
        ({"mean": (NAN, 0.5, 0.5), "std": (0.5,) * 3}, "mean: expected three numbers, got"),
        ({"scale": (0.0, 1.0)}, "view policy: expected scale with 0 < minimum <= maximum <= 1, got 0.0 1.0"),
        ({"scale": (0.5, 1.5)}, "view policy: expected scale"),
        ({"ratio": (2.0, 1.0)}, "view policy: expected ratio with 0 < minimum <= maximum, got 2.0 1.0"),
        ({"flip": 1.5}, "view policy: expected flip between 0 and 1, got 1.5"),
        ({"bicubic": -0.5}, "view policy: expected bicubic between 0 and 1, got -0.5"),
        ({"method": "kd", "eps": (1.0, 1.2)}, "eps: expected 1 number above 0"),
        ({"stages": (1, 4), "eps": (1.0, 1.2)}, "eps: expected 1 or 3 numbers above 0"),
        ({"cuda_graphs": "on", "compile": "off"}, "compile: expected on, auto or max-autotune with --cuda-graphs on"),
        ({"cuda_graphs": "on", "accumulate": 2}, "accumulate: expected 1 with --cuda-graphs on"),
        ({"start_size": 64, "image_size": 32}, "start-size: expected at most the full 32 pixels, got 64"),
    ],
)
def test_contradictory_values_are_refused(values, message):
    with pytest.raises(BadInput, match=message):
        config(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"stages": (), "method": "kd"},
        {"stages": (4, 1), "eps": (1.0, 1.2, 1.4)},
        {"lr": 0.0, "weight_decay": 0, "gt_weight": 0, "warmup_epochs": 0.5},
        {"drop_path": None, "eval_crop": None, "eval_interpolation": "student"},
        {"epochs": None, "batch_size": None, "lr": None, "warmup_epochs": None},
        {"smoothing": 0.0, "drop_path": 0.99, "eval_crop": 1.0, "ema": 0.5, "clip": 0.1},
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "flip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)},
        {"epochs": 1, "batch_size": 1, "image_size": 1, "seed": 0, "decay_rate": 1.0, "workers": 0},
        {"accumulate": 1, "keep": 1, "timeout_s": 1, "start_size": 1, "eval_size": 1, "growth": (0.0, 1.0)},
        {"growth": (0.5, 0.5), "start_size": 160, "image_size": 160},
    ],
)
def test_values_at_the_limits_are_accepted(values):
    c = config(**values)
    assert {name: getattr(c, name) for name in values} == values


def test_only_ofa_has_exits_and_they_are_in_stage_order():
    assert config(stages=(4, 2)).exits == (2, 4)
    assert config(method="kd").exits == config(method="scratch").exits == ()


def test_the_view_policy_is_the_default_with_the_given_changes():
    default = ViewPolicy(scale=(0.3, 0.9), ratio=(1.0, 2.0), flip=0.1)
    assert config().policy(default) == default
    assert config(flip=0.0).policy(default) == dataclasses.replace(default, flip=0.0)
    assert config(scale=(0.2, 0.5), ratio=(1, 1)).policy(default) == ViewPolicy((0.2, 0.5), (1, 1), 0.1)


# --- JSON -------------------------------------------------------------------------------------------------------------


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "cache": st.none() | st.just("a/cache"),
            "out": st.just(Path("/an/absolute/path")),
            "resume": st.booleans(),
            "method": st.sampled_from(["ofa", "kd", "scratch"]),
            "eps": st.tuples(st.floats(0.1, 3)),
            "lr": st.floats(0, 10),
            "mean": st.none(),
            "scale": st.none() | st.just((0.25, 0.75)),
            "ema": st.none() | st.just(0.9998),
            "image_size": st.none() | st.integers(1, 1000),
            "stages": st.just((1, 3)),
        },
    )
)
def test_json_round_trip(values):
    """Through text and back: an equal value, with its types."""
    c = config(**values)
    again = TrainConfig.from_json(json.loads(json.dumps(c.to_json())))
    assert again == c
    assert repr(again) == repr(c)
    assert c.differences(again) == []


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip_of_recipes(name):
    c = RECIPES[name](data="d", student="s", out=Path("o"), cache="c")
    assert TrainConfig.from_json(json.loads(json.dumps(c.to_json()))) == c


def test_json_of_an_earlier_version_means_what_that_version_did():
    """It lacks later fields: crops were bilinear, the learning rate changed at every step, embeddings were exempt."""
    c = config(drop_path=None, eval_crop=1.0, bicubic=0.0)
    later = ("bicubic", "eval_interpolation", "lr_updates", "decay_embeddings")
    earlier = {name: value for name, value in c.to_json().items() if name not in later}
    assert TrainConfig.from_json(earlier) == c
    assert tuple(getattr(c, name) for name in later) == (0, "bilinear", "step", False)


def test_json_of_another_version_or_edited_is_refused():
    values = config().to_json()
    with pytest.raises(BadInput, match=r"expected .* these differ: student; "):
        TrainConfig.from_json({k: v for k, v in values.items() if k != "student"})
    with pytest.raises(BadInput, match=r"expected .* these differ: momentum; "):
        TrainConfig.from_json({**values, "momentum": 0.9})
    with pytest.raises(BadInput, match="lr: expected a number of at least 0, got -1"):
        TrainConfig.from_json({**values, "lr": -1})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_json_of_another_type_is_refused(name):
    """In one line with the field's name; other values are accepted or refused for their content."""
    values = config().to_json()

    def said(value: Any) -> str:
        try:
            TrainConfig.from_json({**values, name: value})
        except BadInput as error:
            return str(error)
        return ""

    others = (None, True, 7, 1e400, "text", [], [None], ["1", "2"], [1, "x"], {}, {"a": 1}, [[1]])
    refusals = [text for value in others if (text := said(value))]
    assert len(refusals) >= 9
    for text in refusals:
        assert name.replace("_", "-") in text.replace("_", "-")
        assert "\n" not in text
    assert len(said({"a": "x" * 9999})) < 300
    for odd in (None, [], "text", 1):
        with pytest.raises(BadInput, match="expected an object as config, got"):
            TrainConfig.from_json(odd)  # type: ignore[arg-type]


def test_differences_that_make_it_another_run():
    """Fields that only affect where and how fast it runs may differ; all others are named with both values."""
    mine = config()
    free = {
        "out": Path("elsewhere"), "resume": True, "device": "cuda", "compile": "on", "pipeline": "torchvision",
        "workers": 3, "log_every": 7, "eval_every": 3, "checkpoint_every": 5, "data": "moved", "plan": True,
        "cuda_graphs": "on", "grad_compression": "bf16", "timeout_s": 9, "accumulate": 2, "keep": 1, "wandb": "mine",
        "online_teacher": "other", "allow_mismatch": "pixels",
        "cache": "c", "kernels": ("loss",), "skip_corrupt": True, "allow_warnings": True, "max_pixels": 300,
    }  # fmt: skip
    for name, value in free.items():
        assert mine.differences(dataclasses.replace(mine, **{name: value})) == []
    online = dataclasses.replace(mine, online_teacher="teacher")
    assert online.differences(dataclasses.replace(online, teacher_checkpoint=Path("c"))) == []
    changed: dict[str, Any] = {
        "student": "test_vit", "recipe": "cifar_cnn", "method": "kd", "stages": (1, 2),
        "eps": (1.5,), "temperature": 2.0, "variant": "paper", "gt_weight": 0.5, "kd_weight": 0.5, "ofa_weight": 0.5,
        "gt_loss": "bce",
        "smoothing": 0.2, "epochs": 107, "batch_size": 8, "image_size": 64, "eval_crop": 0.5, "seed": 5, "init": "file",
        "drop_path": 0.2, "scale": (0.5, 1.0), "ratio": (1.0, 1.0), "flip": 0.3, "optimizer": "lamb", "lr": 0.7,
        "min_lr": 0.01, "weight_decay": 0.3, "bicubic": 0.3, "eval_interpolation": "bicubic", "lr_updates": "epoch",
        "decay_embeddings": True, "schedule": "step", "decay_epochs": 9, "decay_rate": 0.5,
        "warmup_epochs": 2, "warmup_lr": 0.01, "clip": 1.0, "ema": 0.9, "precision": "bf16", "start_size": 32,
        "growth": (0.1, 0.2), "eval_size": 96, "eval_flip": True, "sync_bn": True,
        "order": "pages", "bkd": BKDOptions(2), "dkd": DKDOptions(2), "dist": DISTOptions(2), "lskd": LSKDOptions(2),
        "cc": CCOptions(2), "rkd": RKDOptions(2), "crd": CRDOptions(2), "rsd": RSDOptions(2),
        "fitnet": FitNetOptions(2),
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(changed) | set(free) | {"mean", "std", "teacher_checkpoint", "teacher_weights", "own_options"} == fields
    cached = dataclasses.replace(mine, cache="c")
    (said,) = cached.differences(dataclasses.replace(cached, teacher_weights=(0.3, 0.7)))
    assert said.startswith("teacher_weights: ")
    for name, value in changed.items():
        (said,) = mine.differences(dataclasses.replace(mine, **{name: value}))
        assert re.match(rf"{name}(\.weight)?: ", said)
    assert mine.differences(dataclasses.replace(mine, epochs=7)) == []  # a resumed run may get more
    both = mine.differences(dataclasses.replace(mine, mean=(0.5,) * 3, std=(0.5,) * 3))
    assert [text.partition(":")[0] for text in both] == ["mean", "std"]
    assert config(lr=0.1).differences(config(lr=0.2)) == ["lr: 0.1 here, 0.2 there"]
    assert config(eps=(1.0,)).differences(config(eps=(1.5,))) == ["eps: [1.0] here, [1.5] there"]


# --- Recipes ----------------------------------------------------------------------------------------------------------

# As published, batch sizes of 8 GPUs together: epochs, batch, optimiser, lr, least lr, weight decay, schedule, warm-up
# epochs, label smoothing, clip, EMA, label loss, drop-path, and the crop and filter of the evaluation. The published
# code takes crop and filter from the student's configuration in timm 0.6.5: 0.875 and bilinear for ResNet-18.
OWN = None, "student"
PUBLISHED = {
    "imagenet_cnn": (100, 8 * 64, "sgd", 0.1, 1e-6, 1e-4, "step", 3, 0.1, None, None, "ce", 0, 0.875, "bilinear"),
    "imagenet_vit_mlp": (300, 8 * 128, "adamw", 5e-4, 1e-6, 0.05, "cosine", 20, 0.1, 5, 0.99996, "ce", 0, *OWN),
    "imagenet_stronger": (
        300,
        8 * 256,
        "lamb",
        5e-3,
        1e-6,
        0.02,
        "cosine",
        5,
        0,
        None,
        0.9998,
        "bce",
        0.05,
        0.95,
        "student",
    ),
    "cifar_cnn": (300, 8 * 128, "sgd", 0.05, 1e-3, 2e-3, "cosine", 3, 0.1, None, None, "ce", 0, 0.875, "bilinear"),
    "cifar_vit_mlp": (300, 8 * 128, "adamw", 5e-4, 1e-5, 0.05, "cosine", 20, 0.1, 5, None, "ce", 0, *OWN),
    # What the authors ran (issues 14 and 19 of their repository).
    "cifar_cnn_authors": (
        300,
        8 * 128,
        "sgd",
        0.1,
        1e-3,
        2e-3,
        "cosine",
        3,
        0.1,
        None,
        None,
        "ce",
        0,
        0.875,
        "bilinear",
    ),
    "cifar_vit_mlp_authors": (300, 8 * 128, "adamw", 5e-4, 1e-6, 0.05, "cosine", 20, 0.1, 5, 0.99996, "ce", 0, *OWN),
}
COLUMNS = (
    "epochs", "batch_size", "optimizer", "lr", "min_lr", "weight_decay", "schedule", "warmup_epochs", "smoothing",
    "clip", "ema", "gt_loss", "drop_path", "eval_crop", "eval_interpolation",
)  # fmt: skip


def test_the_recipes_are_these():
    assert set(RECIPES) == {"photos", "digits", "imagenet_fast", *PUBLISHED}
    assert all(RECIPES[name] is getattr(recipes, name) for name in RECIPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(name):
    c = recipe(name)(data="d", student="s", out=Path("o"))
    assert tuple(getattr(c, column) for column in COLUMNS) == PUBLISHED[name]
    assert c.recipe == name
    assert (c.method, c.stages, c.eps, c.temperature, c.variant) == ("ofa", (1, 2, 3, 4), (1.0,), 1.0, "official")
    assert (c.gt_weight, c.kd_weight, c.ofa_weight) == (1, 1, 0.1 if name == "cifar_cnn_authors" else 1)
    assert c.precision == ("fp32" if name == "cifar_cnn_authors" else "auto")
    assert c.lr_updates == ("epoch" if name.endswith("authors") else "step")
    assert c.decay_embeddings is (name == "cifar_vit_mlp_authors")
    if name == "imagenet_cnn":
        assert (c.decay_epochs, c.decay_rate) == (30, 0.1)
    if "vit_mlp" in name:
        assert c.warmup_lr == 5e-7
    cifar = name.startswith("cifar")
    assert c.image_size == (224 if cifar else None)
    assert c.mean == ((0.5071, 0.4865, 0.4409) if cifar else None)
    assert c.std == ((0.2673, 0.2564, 0.2762) if cifar else None)


@pytest.mark.parametrize("epochs", [16, 32, 88])
def test_imagenet_fast_has_ffcvs_values(epochs):
    """Those of rn18_configs/rn18_*_epochs.yaml in ffcv-imagenet, whose learning rate rises for two epochs and falls to
    0.
    """
    c = recipes.imagenet_fast(data="d", student="s", out=Path("o"), **({} if epochs == 16 else {"epochs": epochs}))
    assert (c.epochs, c.batch_size, c.optimizer, c.weight_decay, c.smoothing) == (epochs, 1024, "sgd", 5e-5, 0.1)
    assert (c.start_size, c.image_size, c.eval_size, c.eval_flip) == (160, 192, 256, True)
    assert (c.schedule, c.lr, c.min_lr, c.warmup_epochs) == ("linear", 0.5, 0, 2)
    assert c.warmup_lr == pytest.approx(1e-4 * c.lr)
    assert c.recipe == "imagenet_fast"
    assert (c.clip, c.ema, c.gt_loss, c.drop_path) == (None, None, "ce", 0)


@pytest.mark.parametrize("name", RECIPES)
def test_given_values_override_the_recipe(name):
    c = recipe(name)(data="d", student="s", out=Path("o"), lr=0.123, epochs=3)
    assert (c.lr, c.epochs, c.data, c.recipe) == (0.123, 3, "d", name)
    assert c.differences(recipe(name)(data="d", student="s", out=Path("o"))) == [
        f"epochs: 3 here, {recipe(name)(data='d', student='s', out=Path('o')).epochs} there",
        f"lr: 0.123 here, {recipe(name)(data='d', student='s', out=Path('o')).lr} there",
    ]


def test_the_published_views():
    """The values of the paper's code except colour jitter (see the test below); CIFAR's images have their own mean."""
    vit_mlp = {"bicubic": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "erase": 0.25}
    expected = {
        "imagenet_vit_mlp": ViewPolicy(**vit_mlp),
        "cifar_vit_mlp": ViewPolicy(**vit_mlp, mean=CIFAR_MEAN, std=CIFAR_STD),
        "imagenet_stronger": ViewPolicy(bicubic=0.5, auto_augment="rand-m7-mstd0.5", mixup=0.1, cutmix=1.0, repeats=3),
        **dict.fromkeys(("imagenet_cnn", "cifar_cnn", "cifar_cnn_authors"), ViewPolicy(bicubic=0.5)),
    }
    expected["cifar_vit_mlp_authors"] = expected["cifar_vit_mlp"]
    for name in RECIPES:
        assert default_policy("photos", name) == expected.get(name, ViewPolicy())
        on_digits = default_policy("digits", name)
        assert (on_digits.scale, on_digits.flip) == ((0.6, 1.0), 0.0)
        assert dataclasses.replace(on_digits, scale=(0.08, 1.0), flip=0.5) == default_policy("photos", name)


def test_timm_draws_one_of_two_filters_unless_told_otherwise():
    """This is why the published views are bicubic with probability 0.5: the published code keeps this default."""
    crop = transforms_imagenet_train(interpolation="random").transforms[0]
    assert sorted(mode.value for mode in crop.interpolation) == ["bicubic", "bilinear"]


def test_a_teachers_input_is_normalised_as_published():
    """The published code overwrites mean and standard deviation for CIFAR-100, whatever the teacher."""

    def normalization(**given: Any) -> Any:
        config = PrecomputeConfig(data="cifar100:d", teacher="t", out=Path("o"), views=1, topk=1, **given)
        return config.normalization()

    for name in RECIPES:
        cifar = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)) if name.startswith("cifar") else (None, None)
        assert normalization(recipe=name) == cifar
    assert normalization() == (None, None)
    given = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    assert normalization(recipe="cifar_cnn", **given) == (given["mean"], given["std"])


@pytest.mark.parametrize(
    ("options", "jitter"), [({"auto_augment": "rand-m9-mstd0.5-inc1"}, False), ({"auto_augment": None}, True)]
)
def test_timm_leaves_out_colour_jitter_beside_randaugment(options, jitter):
    """This is why the recipes have none, although the published files name it."""
    transform = transforms_imagenet_train(color_jitter=0.4, **options)
    assert any(isinstance(step, ColorJitter) for step in transform.transforms) is jitter


def test_differences_from_the_recipes_views_are_named():
    for name in RECIPES:
        assert augmentation_differences(name, default_policy("digits", name)) == ""
    plain = ViewPolicy()
    assert augmentation_differences("cifar_vit_mlp", plain) == (
        "bicubic 0.5 (not 0.0), auto-augment rand-m9-mstd0.5-inc1 (not none), mixup 0.8 (not 0.0), "
        "cutmix 1.0 (not 0.0), erase 0.25 (not 0.0)"
    )
    assert augmentation_differences("imagenet_cnn", default_policy("photos", "imagenet_stronger")) == (
        "auto-augment none (not rand-m7-mstd0.5), mixup 0.0 (not 0.1), cutmix 0.0 (not 1.0), repeats 1 (not 3)"
    )


def test_unknown_recipe():
    for name, found in (("imagenet", "got 'imagenet'"), ("", "got none")):
        with pytest.raises(BadInput, match=rf"recipe: expected --recipe with one of {', '.join(RECIPES)}, {found}"):
            recipe(name)


def test_default_policy_is_the_published_one_and_does_not_mirror_digits():
    for data in ("photos", "cifar100:/data", "/data/imagenet", "my-digits"):
        assert default_policy(data) == ViewPolicy(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
    for data in ("digits", "digits:100"):
        assert default_policy(data) == ViewPolicy(scale=(0.6, 1.0), ratio=(3 / 4, 4 / 3), flip=0.0)


# --- Command line -----------------------------------------------------------------------------------------------------

ARGUMENTS = ["--data", "photos", "--student", "resnet18", "--out", "run"]


@pytest.mark.parametrize("form", [["--recipe", "imagenet_cnn"], ["--recipe=imagenet_cnn"]])
@pytest.mark.parametrize("first", [True, False])
def test_flags_change_the_recipe(form, first):
    """However and wherever the recipe is named; including `--flag-with-dashes` and several values."""
    flags = [*ARGUMENTS, "--lr", "0.3", "--batch-size", "64", "--cache", "c", "--eps", "1.5", "--stages", "1", "4"]
    c = parse("train", [*form, *flags] if first else [*flags, *form])
    given = {"lr": 0.3, "batch_size": 64, "cache": "c", "eps": (1.5,), "stages": (1, 4)}
    assert c == recipes.imagenet_cnn(data="photos", student="resnet18", out=Path("run"), **given)


@pytest.mark.parametrize(
    ("method", "flags", "users"),
    [
        ("kd", "--rsd.kappa 2", "rsd"), ("ofa+dkd", "--dist.beta=2", "dist"), ("kd", "--eps 1.5", "ofa"),
        ("kd+dkd", "--stages 1", "ofa"), ("rsd", "--ofa-weight 1", "ofa"), ("rsd", "--ofa_weight=1", "ofa"),
        ("kd", "--variant paper", "ofa"), ("dkd", "--temperature 2", "ofa or kd"),
        ("scratch", "--kd-weight 2", "ofa or kd"),
    ],
)  # fmt: skip
def test_a_flag_that_no_chosen_method_uses_is_refused(method, flags, users):
    """With the methods that use it; with one of them, it is accepted."""
    with pytest.raises(BadInput) as refused:
        parse("train", [*ARGUMENTS, "--method", method, *flags.split()])
    assert f"expected only with --method {users}, " in str(refused.value)
    assert f"got --method {method}; leave it out" in str(refused.value)
    for user in users.split(" or "):
        parse("train", [*ARGUMENTS, "--method", user, *flags.split()])


def test_values_of_a_recipe_that_the_method_does_not_use_are_accepted(tmp_path):
    """And those of a run's file."""
    found = parse("train", [*ARGUMENTS, "--recipe", "cifar_cnn_authors", "--method", "kd"])
    assert (found.ofa_weight, found.method) == (0.1, "kd")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(eps=(1.5,), rsd=RSDOptions(kappa=2)).to_json()))
    assert parse("train", ["--config", str(file), "--method", "kd"]).rsd.kappa == 2


@pytest.mark.parametrize("name", RECIPES)
def test_without_other_flags_it_is_the_recipe(name):
    expected = recipe(name)(data="photos", student="resnet18", out=Path("run"))
    assert parse("train", [*ARGUMENTS, "--recipe", name]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "imagenet"], "got 'imagenet'"),
        (["--recipe=imagenet"], "got 'imagenet'"),
        (["--recipe"], "got none"),
    ],
)
def test_an_unknown_recipe_is_bad_input(arguments, message):
    with pytest.raises(BadInput, match=message):
        parse("train", [*ARGUMENTS, *arguments])


@pytest.mark.parametrize(
    ("data", "name"),
    [("photos", "photos"), ("digits", "digits"), ("digits:50", "digits"), ("cifar100:dir", "cifar_cnn")],
)
def test_without_a_recipe_the_data_determine_it(data, name, capsys):
    """As the help states; other invalid values are still reported."""
    expected = recipe(name)(data=data, student="resnet18", out=Path("run"))
    assert parse("train", ["--data", data, "--student", "resnet18", "--out", "run"]) == expected
    assert parse("train", [f"--data={data}", "--student", "resnet18", "--out", "run"]) == expected
    with pytest.raises(SystemExit) as ended:
        parse("train", ["--data", data, "--help"])
    assert ended.value.code == 0
    assert f"(default: {name})" in " ".join(capsys.readouterr().out.split())


def test_the_help_shows_the_values_of_the_named_recipe(capsys):
    with pytest.raises(SystemExit):
        parse("train", ["--help", "--recipe", "imagenet_fast"])
    said = " ".join(capsys.readouterr().out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "(default: imagenet_fast)" in said
    assert "Side of the images in the first epochs, for students that accept any size" in said
    assert "--epochs {None}|INT" in said
    assert "(default: 16)" in said


# --- By the dataset's size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "fresh", "tuned"),
    [  # epochs, batch size, learning rate, warm-up epochs
        (200, (300, 16, 3.5e-4, 15), (100, 16, 3.5e-5, 5)),
        (1_198, (300, 128, 1e-3, 15), (100, 128, 1e-4, 5)),
        (20_000, (150, 128, 1e-3, 7.5), (30, 128, 1e-4, 1.5)),
        (1_281_167, (30, 128, 1e-3, 1.5), (30, 128, 1e-4, 1.5)),
    ],
)
def test_photos_values_by_dataset_size(images, fresh, tuned):
    for init, expected in ((None, fresh), ("pretrained", tuned)):
        c = with_size_defaults(recipes.photos(data="d", student="s", out=Path("o"), init=init), images, images, 1)
        assert (c.epochs, c.batch_size, c.lr, c.warmup_epochs) == expected
        assert (c.image_size, c.optimizer, c.recipe) == (224, "adamw", "photos")


@given(st.integers(1, 3000), st.sampled_from([1, 2, 3, 8, 24]), st.integers(1, 3))
def test_every_dataset_size_gives_valid_steps(images, multiple, repeats):
    """Wherever possible: at least one step per epoch and whole parts, for any number of images."""
    rows = images // repeats * repeats
    c = with_size_defaults(recipes.photos(data="d", student="s", out=Path("o")), images, rows, multiple)
    assert c.batch_size % multiple == 0
    if rows >= max(multiple, 1):
        assert 1 <= c.batch_size <= rows
    if rows >= 64 and multiple <= 8:
        assert rows // c.batch_size >= 8
    assert 30 <= c.epochs <= 300
    assert 0 < c.warmup_epochs < c.epochs
    assert 0 < c.lr <= 1e-3


def test_given_values_do_not_depend_on_the_size():
    given = {"epochs": 7, "batch_size": 50, "lr": 0.0, "warmup_epochs": 0}
    c = recipes.photos(data="d", student="s", out=Path("o"), **given)
    assert with_size_defaults(c, 10**6, 10**6, 8) == c
    half = with_size_defaults(recipes.photos(data="d", student="s", out=Path("o"), batch_size=32), 10**6, 10**6, 1)
    assert half.lr == 5e-4  # with the root of the batch size
