"""The teacher's log-probabilities equal plain timm's, with its own normalisation and size, for all
formats of weights.
"""

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import timm.models._hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from fastofa.runs.checkpoint import save_checkpoint
from fastofa.runs.config import TrainConfig
from fastofa.runs.run import Run
from fastofa.system.errors import BadInput
from fastofa.teacher.model import Teacher, check_finite, open_teacher, report_accuracy
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.export import export

NAME, CLASSES, SIZE = "test_efficientnet", 7, 40
NAMES = tuple("abcdefg")  # of the data's classes
TEN = tuple("0123456789")
MEAN, STD = (0.1, 0.4, 0.7), (0.15, 0.25, 0.35)  # nobody else's


def lively(model: nn.Module) -> nn.Module:
    """Random weights large enough that every pixel affects the prediction."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lively(timm.create_model(NAME, num_classes=CLASSES))


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As timm's save_for_hf writes it, with the normalisation and size above."""
    path = tmp_path_factory.mktemp("teacher")
    data_config = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD, "crop_pct": 0.9}
    save_for_hf(model, str(path), safe_serialization=True, data_config=data_config)
    return path


def make_images(size: int) -> Tensor:
    return torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)


def by_hand(model: nn.Module, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Plain timm and torchvision, in inference mode."""
    with torch.inference_mode():
        return torch.log_softmax(model(normalize(images / 255, list(mean), list(std))), dim=-1)


def assert_predicts(teacher: Teacher, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """log_probs at the teacher's size equal plain timm's, are normalised, and depend on this normalisation."""
    images = make_images(teacher.image_size)
    got, expected = teacher.log_probs(images), by_hand(model, images, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.exp().sum(1), torch.ones(len(images)))
    assert (got - by_hand(model, images, (0.5,) * 3, (1.0,) * 3)).abs().max() > 0.01


# --- Predictions ------------------------------------------------------------------------------------------------------


def test_a_folder_written_by_timm_predicts_as_timm(folder, model):
    """Normalisation and size from its config.json; in eval mode, whatever mode it was saved in."""
    teacher = open_teacher(str(folder), NAMES)
    assert (teacher.name, teacher.image_size, teacher.crop, teacher.bf16) == (NAME, SIZE, 0.9, False)
    assert_predicts(teacher, model, MEAN, STD)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_predicts(teacher, plain, plain.pretrained_cfg["mean"], plain.pretrained_cfg["std"])
    assert not teacher.model.training


def test_a_transformer_of_fixed_size_is_built_for_the_size_it_was_saved_with(tmp_path):
    """Its position embeddings fit no other size; the model's own 224 px are not used."""
    vit = lively(timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, img_size=48, depth=2))
    save_for_hf(vit, str(tmp_path), safe_serialization=True, data_config={"input_size": (3, 48, 48), "mean": MEAN})
    teacher = open_teacher(str(tmp_path), NAMES)
    assert teacher.image_size == 48
    assert_predicts(teacher, vit, MEAN, vit.pretrained_cfg["std"])
    with pytest.raises(BadInput, match=r"does not run at 64 px .*give another --image-size"):
        open_teacher(str(tmp_path), NAMES, image_size=64)


def test_an_exported_run_is_a_teacher(tmp_path):
    """The export of a run with its own size, crop and normalisation."""
    config = TrainConfig(
        data="d",
        student="test_vit",
        out=tmp_path / "run",
        recipe="digits",
        image_size=32,
        eval_crop=0.8,
        mean=MEAN,
        std=STD,
    )
    run = Run(config.out, config, tuple("abcdefg"), teacher_dim=0, fingerprint="")
    student = run.build_student()
    lively(student)
    run.save()
    save_checkpoint(config.out, 0, student, torch.optim.SGD(student.parameters(), lr=0.1), None, {}, keep=1)
    export(config.out, tmp_path / "out")
    teacher = open_teacher(str(tmp_path / "out"), NAMES)
    assert (teacher.image_size, teacher.crop) == (32, 0.8)
    assert_predicts(teacher, student.backbone, MEAN, STD)


def test_overrides(folder, model):
    """Given size, mean and std override the teacher's own; the description states the values used."""
    mean, std = (0.2, 0.2, 0.2), (0.5, 0.4, 0.3)
    teacher = open_teacher(str(folder), NAMES, image_size=56, mean=mean, std=std)
    assert_predicts(teacher, model, mean, std)
    described = teacher.describe()
    assert {k: described[k] for k in ("image_size", "mean", "std")} == {
        "image_size": 56,
        "mean": list(mean),
        "std": list(std),
    }


def test_bf16_log_probs_are_fp32_and_close(folder):
    """Of the same weights; for a cache it is another teacher."""
    exact, rough = open_teacher(str(folder), NAMES), open_teacher(str(folder), NAMES, bf16=True)
    images = make_images(SIZE)
    a, b = exact.log_probs(images), rough.log_probs(images)
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.3
    torch.testing.assert_close(b.exp().sum(1), torch.ones(5))  # the softmax is not in bf16
    described = exact.describe(), rough.describe()
    assert described[0]["sha256"] == described[1]["sha256"]
    assert described[0]["precision"] != described[1]["precision"]


def test_bf16_is_autocasts_but_for_what_autocast_leaves_in_fp32(folder, model):
    """A CNN predicts as under autocast, since its batch norms keep their statistics in fp32."""
    images, rough = make_images(SIZE), open_teacher(str(folder), NAMES, bf16=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model(normalize(images / 255, list(MEAN), list(STD)).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(rough.log_probs(images), logits.float().log_softmax(1), rtol=1e-2, atol=1e-2)
    norms = [module for module in rough.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for module in norms:
        assert {tensor.dtype for tensor in (*module.parameters(), module.running_mean, module.running_var)} == {
            torch.float32
        }
    assert rough.model.classifier.weight.dtype == torch.bfloat16


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def write(form: str, model: nn.Module, path: Path) -> Path:
    """Write weights in one of their common formats."""
    weights = model.state_dict()
    if form == "safetensors":
        save_file(weights, path / "model.safetensors")
        return path / "model.safetensors"
    contents = {
        "plain": weights,
        "timm's trainer": {"state_dict": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "timm's trainer with EMA": {
            "state_dict": {k: torch.zeros_like(v) for k, v in weights.items()},
            "state_dict_ema": weights,
        },
        "DeiT": {"model": weights, "epoch": 3},
        "DataParallel": {f"module.{name}": value for name, value in weights.items()},
    }
    torch.save(contents[form], path / "model.pth")
    return path / "model.pth"


FORMS = ["safetensors", "plain", "timm's trainer", "timm's trainer with EMA", "DeiT", "DataParallel"]


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_in_any_format(form, tmp_path, model):
    """The same weights, hence the same predictions and sha256; normalisation and crop are timm's for the model."""
    teacher = open_teacher(NAME, NAMES, write(form, model, tmp_path), image_size=SIZE)
    own = model.pretrained_cfg
    assert_predicts(teacher, model, own["mean"], own["std"])
    assert teacher.crop == own["crop_pct"]
    assert teacher.describe()["sha256"] == sha256_of(model, tmp_path)


def sha256_of(model: nn.Module, folder: Path) -> str:
    save_for_hf(model, str(folder / "reference"), safe_serialization=True)
    return open_teacher(str(folder / "reference"), NAMES, image_size=SIZE).describe()["sha256"]


def test_sha256_is_of_the_weights(folder, model, tmp_path):
    """It changes with one value in a weight or buffer; the description is JSON."""
    described = open_teacher(str(folder), NAMES).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["sha256"] == sha256_of(model, tmp_path)
    assert described["num_features"] == model.num_features
    for name in ("classifier.bias", "bn1.running_mean"):
        changed = timm.create_model(NAME, num_classes=CLASSES)
        changed.load_state_dict(model.state_dict())
        changed.state_dict()[name][0] += 1e-3
        assert sha256_of(changed, tmp_path / name) != described["sha256"]


def test_config_json_beside_a_checkpoint_is_used_for_the_same_architecture(folder, model, tmp_path):
    """With that of another architecture, or another file, the model's own normalisation and size."""
    weights = Path(shutil.copy(folder / "model.safetensors", tmp_path))
    own = model.pretrained_cfg

    def settings() -> tuple:
        teacher = open_teacher(NAME, NAMES, weights)
        return teacher.image_size, teacher.mean, teacher.std, teacher.crop

    timms = (own["input_size"][-1], tuple(own["mean"]), tuple(own["std"]), own["crop_pct"])
    assert settings() == timms
    config = json.loads((folder / "config.json").read_text())
    for content, expected in (
        (config, (SIZE, MEAN, STD, 0.9)),
        ({**config, "architecture": "test_resnet"}, timms),
        ({"lr": 0.1}, timms),
        ([1, 2], timms),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert settings() == expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_teacher(NAME, NAMES, weights, image_size=56).image_size == 56


def test_a_fixed_size_checkpoint_is_built_for_the_size_in_its_config_json(tmp_path):
    vit = lively(timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, img_size=48))
    save_for_hf(vit, str(tmp_path), safe_serialization=True, data_config={"input_size": (3, 48, 48)})
    teacher = open_teacher("deit_tiny_patch16_224.fb_in1k", NAMES, tmp_path / "model.safetensors")
    assert teacher.image_size == 48
    assert_predicts(teacher, vit, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])


# --- What does not fit ------------------------------------------------------------------------------------------------


def test_another_number_of_classes_is_refused(folder):
    expected = f".*10 classes, got {CLASSES}, without names; .*--method scratch"
    with pytest.raises(BadInput, match=f"teacher {folder}: {expected}"):
        open_teacher(str(folder), TEN)
    with pytest.raises(BadInput, match=f"teacher {NAME}: {expected}"):
        open_teacher(NAME, TEN, folder / "model.safetensors")


def test_weights_of_another_architecture_are_refused(folder):
    with pytest.raises(BadInput, match=r"model.safetensors: does not match the model: missing .*unexpected .* more"):
        open_teacher("test_resnet", NAMES, folder / "model.safetensors")


def test_a_missing_or_damaged_file_is_refused(folder, tmp_path):
    with pytest.raises(BadInput, match=r"none.pth: expected a file with weights, but it does not exist"):
        open_teacher(NAME, NAMES, tmp_path / "none.pth")
    for name, message in (
        ("a.safetensors", "expected safetensors, got a file that is damaged"),
        ("a.pth", "it is damaged"),
    ):
        (tmp_path / name).write_bytes((folder / "model.safetensors").read_bytes()[:1000])
        with pytest.raises(BadInput, match=message):
            open_teacher(NAME, NAMES, tmp_path / name)


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(BadInput, match=r"weights-only reader refused the file: it contains .*save a plain state_dict"):
        open_teacher(NAME, NAMES, tmp_path / "evil.pth")
    (tmp_path / "evil.pth").rename(tmp_path / "evil.safetensors")
    with pytest.raises(BadInput, match="expected safetensors, got a file that is a pickle"):
        open_teacher(NAME, NAMES, tmp_path / "evil.safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(BadInput, match=r"could not read .*config.json"):
        open_teacher(str(tmp_path), NAMES)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"config.json: expected timm's model configuration, but .* is missing"):
        open_teacher(str(tmp_path), NAMES)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(BadInput, match=r"model.safetensors: expected a file with weights, but it does not exist"):
        open_teacher(str(tmp_path), NAMES)


@pytest.mark.parametrize("error", [OSError("no route to host"), LocalEntryNotFoundError("cannot reach the Hub")])
def test_timms_weights_without_a_network_are_refused(monkeypatch, error):
    """The hub is contacted once or twice, and its error becomes one line with the remedy."""
    calls = []

    def no_network(*_, **__):
        calls.append(1)
        raise error

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", no_network)
    with pytest.raises(
        BadInput, match=rf"could not get the weights of test_resnet.r160_in1k \({error}\); .*a local file"
    ):
        open_teacher("test_resnet.r160_in1k", TEN)
    assert 1 <= len(calls) <= 2


def test_local_weights_need_no_network(monkeypatch, folder, tmp_path, model):
    def no_network(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", no_network)
    open_teacher(str(folder), NAMES)
    open_teacher(f"{NAME}.r160_in1k", NAMES, write("plain", model, tmp_path))


# --- Its classes and the data's ---------------------------------------------------------------------------------------


def named(model: nn.Module, folder: Path, names: list[str]) -> str:
    config = {"label_names": names}
    save_for_hf(model, str(folder), config, safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})
    return str(folder)


def test_outputs_are_in_the_order_of_the_datas_classes(model, tmp_path, capsys):
    """They are matched by name. The order affects the cache's identity, although the weights are the same."""
    images, own = make_images(SIZE), model.pretrained_cfg
    expected = by_hand(model, images, own["mean"], own["std"])
    plain = open_teacher(named(model, tmp_path, list("abcdefg")), NAMES)
    mixed = open_teacher(named(model, tmp_path, list("gfcdeba")), NAMES)
    order = [6, 5, 2, 3, 4, 1, 0]
    torch.testing.assert_close(plain.log_probs(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed.log_probs(images), expected[:, order], rtol=1e-4, atol=1e-4)
    assert mixed.describe() == {**plain.describe(), "columns": order}
    assert "in another order (g, f, c and 4 more) than the data's (a, b, c and 4 more)" in capsys.readouterr().err


def test_of_more_classes_those_of_the_data_are_kept(model, tmp_path):
    """The probabilities are conditional on these classes, the only ones that the student knows."""
    images, own = make_images(SIZE), model.pretrained_cfg
    teacher = open_teacher(named(model, tmp_path, list("abcdefg")), ("f", "b"))
    probs = by_hand(model, images, own["mean"], own["std"]).exp()[:, [5, 1]]
    torch.testing.assert_close(
        teacher.log_probs(images).exp(), probs / probs.sum(1, keepdim=True), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(
        BadInput, match=f"teacher {tmp_path}: expected the dataset.s 3 classes, got 7, .*: it has no x, y; "
    ):
        open_teacher(str(tmp_path), ("f", "x", "y"))


def test_a_checkpoint_of_imagenet_for_two_of_its_classes(tmp_path, capsys):
    """It has as many classes as the file, of which the data's synsets are kept."""
    thousand = lively(timm.create_model(NAME, num_classes=1000))
    teacher = open_teacher(
        f"timm/{NAME}", ("n01440764", "n02085620"), write("plain", thousand, tmp_path), image_size=SIZE
    )
    assert teacher.columns == (0, 151)
    assert "kept 2 of the 1,000 classes of imagenet-1k" in capsys.readouterr().err


def test_names_beside_a_checkpoint_are_used(model, tmp_path):
    named(model, tmp_path, list("gfcdeba"))
    assert open_teacher(NAME, NAMES, tmp_path / "model.safetensors").columns == (6, 5, 2, 3, 4, 1, 0)


@pytest.mark.parametrize(
    ("top1", "classes", "near"),
    [(0.1, 10, True), (0.19, 10, True), (0.21, 10, False), (0.5, 2, True), (0.7, 2, False), (0.0015, 1000, True)],
)
def test_accuracy_near_chance_is_reported(capsys, top1, classes, near):
    report_accuracy("t", top1, classes, 599)
    said = capsys.readouterr().err
    assert said.startswith(f"teacher t: {top1:.2%} top-1 on 599 validation images")
    assert ("near chance" in said) is near


# --- A run as a teacher, or as the beginning of another ---------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a CNN with exits, not exported."""
    config = TrainConfig(
        data="d", student=NAME, out=tmp_path_factory.mktemp("run"), recipe="digits", image_size=32, eval_crop=0.8,
        mean=MEAN, std=STD,
    )  # fmt: skip
    run = Run(config.out, config, NAMES, teacher_dim=0, fingerprint="")
    student = run.build_student()
    lively(student)
    run.save()
    save_checkpoint(config.out, 0, student, torch.optim.SGD(student.parameters(), lr=0.1), None, {}, keep=1)
    return run


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_a_run_predicts_as_its_export(run, tmp_path, form):
    teacher = open_teacher(form.format(run.path), NAMES[::-1])
    export(run.path, tmp_path / "out")
    assert teacher.describe() == open_teacher(str(tmp_path / "out"), NAMES[::-1]).describe()
    assert (teacher.image_size, teacher.crop, teacher.columns) == (32, 0.8, (6, 5, 4, 3, 2, 1, 0))


def test_a_checkpoint_of_a_run_is_a_teacher(run, capsys):
    """Exits and optimiser are ignored."""
    (path,) = (run.path / "checkpoints").iterdir()
    teacher = open_teacher(NAME, NAMES, path, image_size=32, mean=MEAN, std=STD)
    assert_predicts(teacher, run.trained_student().backbone, MEAN, STD)
    assert f"{path}: uses the weights called student.backbone\n" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_a_run_initialises_another_student(run, tmp_path, form):
    """With other classes, except the classifier; another architecture is refused."""
    trained = run.trained_student().backbone.state_dict()
    same = run.build_student(init=form.format(run.path)).backbone.state_dict()
    assert all(torch.equal(same[name], value) for name, value in trained.items())
    fewer = dataclasses.replace(run, classes=NAMES[:3]).build_student(init=form.format(run.path)).backbone.state_dict()
    changed = {name for name, value in trained.items() if not torch.equal(fewer[name], value)}
    assert changed == {"classifier.weight", "classifier.bias"}
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, student="test_resnet"))
    with pytest.raises(BadInput, match=f"{run.path}: does not match the model: missing"):
        other.build_student(init=str(run.path))


def test_a_folder_is_not_a_checkpoint(run):
    with pytest.raises(BadInput, match=f"expected a file, got the folder {run.path}; give it as --teacher"):
        open_teacher(NAME, NAMES, run.path)


def test_which_of_several_weights(model, tmp_path, capsys):
    """An average by default; the notice names the flag."""
    path = write("timm's trainer with EMA", model, tmp_path)
    open_teacher(NAME, NAMES, path)
    assert "uses the weights called state_dict_ema, not state_dict; --teacher-checkpoint-key chooses others" in (
        capsys.readouterr().err
    )
    zeros = open_teacher(NAME, NAMES, path, checkpoint_key="state_dict")
    assert not any(parameter.any() for parameter in zeros.model.parameters())
    with pytest.raises(BadInput, match="expected weights called ema, got state_dict, state_dict_ema"):
        open_teacher(NAME, NAMES, path, checkpoint_key="ema")


# --- Invalid logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "NaN for 00"), (1e6, "minus infinity for .*lower --topk")],
)
def test_a_teacher_with_invalid_logits_is_refused_at_the_first_batch(tmp_path, value, message):
    """Damaged weights, and probabilities that float16 cannot store: with teacher, view and image."""
    model = lively(timm.create_model(NAME, num_classes=10))
    with torch.no_grad():
        model.classifier.weight.mul_(value)
    folder = named(model, tmp_path / "teacher", list(TEN))
    config = PrecomputeConfig("digits:100", folder, tmp_path / "cache", views=1, topk=10)
    with pytest.raises(BadInput, match=rf"teacher {NAME}: .*in .* view.* it predicts {message}"):
        precompute(config)
    assert not (tmp_path / "cache" / "val.safetensors").exists()


def test_the_view_with_invalid_logits_is_named(capsys):
    log_probs = torch.zeros(3, 2)
    check_finite("t", log_probs, "view 7", ["a", "b", "c"])
    log_probs[1, 0] = math.inf
    with pytest.raises(BadInput, match=r"teacher t: .* in view 7 it predicts minus infinity for b \(1 of 3 images\)"):
        check_finite("t", -log_probs, "view 7", ["a", "b", "c"])


def test_teachers_for_grey_images_are_refused(tmp_path):
    grey = timm.create_model(NAME, num_classes=7, in_chans=1)
    save_for_hf(grey, str(tmp_path), safe_serialization=True)
    with pytest.raises(BadInput, match="one for 1 channel"):
        open_teacher(str(tmp_path), NAMES)
    with pytest.raises(BadInput, match="one for 1 channel"):
        open_teacher(NAME, NAMES, tmp_path / "model.safetensors")


def test_a_model_without_pooling_is_refused(tmp_path):
    """In timm, a config.json can disable the pooling."""
    unpooled = timm.create_model(NAME, num_classes=7, global_pool="")
    with pytest.raises(BadInput, match=r"does not run at 40 px|expected logits"):
        open_teacher(named(unpooled, tmp_path, list(NAMES)), NAMES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"std": (0.2, 0.0, 0.2), "mean": (0.5, 0.5, 0.5)}, "std: expected three numbers above 0"),
        ({"std": (0.2, math.nan, 0.2), "mean": (0.5, 0.5, 0.5)}, "std: expected three numbers above 0"),
        ({"std": (0.2, 0.2, 0.2), "mean": (0.5, math.inf, 0.5)}, "mean: expected three numbers"),
        ({"image_size": 0}, "image-size: expected at least 1 pixel"),
        ({"teacher_checkpoint_key": "ema"}, "teacher-checkpoint-key: expected --teacher-checkpoint"),
    ],
)
def test_impossible_arguments(given, message):
    with pytest.raises(BadInput, match=message):
        PrecomputeConfig("digits", "teacher", Path("cache"), 1, 1, **given)


def test_crops_are_limited_to_the_image(folder, tmp_path):
    """VOLO publishes a crop of 1.15 of the shorter side."""
    shutil.copytree(folder, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 1.15
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    assert open_teacher(str(tmp_path / "wide"), NAMES).crop == 1.0


def test_unknown_teachers_are_refused():
    with pytest.raises(BadInput, match=r"unknown model 'test_resnetx': .*similar names: test_resnet"):
        open_teacher("test_resnetx", NAMES)
    with pytest.raises(BadInput, match=r"unknown model 'runs/none': .*; there is no folder runs/none either"):
        open_teacher("runs/none", NAMES)
    with pytest.raises(BadInput, match=r"unknown model 'test_resnet.no_such_tag'"):
        open_teacher("test_resnet.no_such_tag", NAMES)
