"""Files as the official code and its timm 0.6.5 write them are loaded, evaluated, exported and distilled from."""

import argparse
import hashlib
import json
import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import Tensor, nn

from fastofa.cli import main
from fastofa.data.open import open_dataset
from fastofa.models.timm_models import VARIANTS, create_model
from fastofa.models.weights import SavedWeights
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.model import open_teacher
from fastofa.training.evaluate import evaluate
from fastofa.training.export import export_checkpoint

State = dict[str, Tensor]
CLASSES = tuple(f"c{i}" for i in range(7))

# The names and shapes of each state_dict for 100 classes: `digest` of the model that timm 0.6.5 builds, computed with
# the released wheel; Swin-Nano and -Pico with the arguments of the official custom_model/swin_transformer.py.
NAMES_065 = {
    "convnext_tiny": "391dc98e105b1b95",
    "deit_tiny_patch16_224": "e8ef652ed6c9e450",
    "mixer_b16_224": "02661cfee9b73190",
    "mixer_s16_224": "c38c285f03f1d8c4",
    "mobilenetv2_100": "5579e9098da4d0ac",
    "resmlp_12_224": "f8be5f664bd2c873",
    "resnet18": "f2ffe913242db8ac",
    "resnet50": "dd4633d2bff2f0ab",
    "swin_nano_patch4_window7_224": "38c72d14c436da01",
    "swin_pico_patch4_window7_224": "873c76a1f6ad7e12",
    "swin_tiny_patch4_window7_224": "2538a7469b94dda3",
    "vit_small_patch16_224": "7fd51dcac0d60a83",
}


def digest(state: State) -> str:
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def build(name: str, classes: int) -> Any:
    """The model in plain timm, with random weights."""
    timm_name, arguments = VARIANTS.get(name, (name, {}))
    return timm.create_model(timm_name, num_classes=classes, **arguments)


def trained(name: str, classes: int = len(CLASSES)) -> Any:
    """No tensor, nor a statistic of a batch norm, is left at the value that a new model has."""
    model = build(name, classes)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim > 1:
                nn.init.kaiming_normal_(tensor)
            elif tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    return model.eval()


def as_065(name: str, state: State) -> State:
    """The state_dict under the names of timm 0.6.5, with the buffers that it stored."""
    state = dict(state)
    if not name.startswith("swin"):
        return state
    old = {}
    for key, tensor in state.items():
        moved = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        old[moved.replace("head.fc.", "head.")] = tensor
    for key in [key for key in old if key.endswith("relative_position_bias_table")]:
        stage, block = map(int, re.findall(r"\d+", key)[:2])
        old[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
        if block % 2 and stage < 3:  # shifted windows: 64, 16 and 4 of them; the last stage is a single window
            old[f"layers.{stage}.blocks.{block}.attn_mask"] = torch.zeros(4 ** (3 - stage), 49, 49)
    return old


@pytest.mark.parametrize("name", NAMES_065)
def test_the_files_of_this_test_have_the_names_of_timm_065(name):
    with torch.device("meta"):
        state = build(name, 100).state_dict()
    assert digest(as_065(name, state)) == NAMES_065[name]


# --- Nine forms of a checkpoint ---------------------------------------------------------------------------------------


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(name: str, classes: int = len(CLASSES)) -> State:
    return as_065(name, trained(name, classes).state_dict())


def saver(folder: Path, model: nn.Module, average: nn.Module | None = None) -> Path:
    """The file of timm's trainer, written by timm."""
    args = argparse.Namespace(model="student", ofa_eps=[1.5] * 5, ofa_stage=[1, 2, 3, 4], lr=0.1, device="cuda:0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = None
    if average is not None:
        ema = ModelEmaV2(model)
        ema.module.load_state_dict(average.state_dict())
    writer = CheckpointSaver(
        model, optimizer, args, ema, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=1
    )
    writer.save_checkpoint(0, metric=70.5)
    return folder / "last.pth.tar"


def pth(folder: Path, contents: dict[str, Any]) -> Path:
    torch.save(contents, folder / "file.pth")
    return folder / "file.pth"


def safetensors(folder: Path, contents: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in contents.items()}, folder / "file.safetensors")
    return folder / "file.safetensors"


# name: (architecture, the file's writer, of the folder, the model and its state_dict in timm 0.6.5)
FORMS: dict[str, tuple[str, Callable[[Path, nn.Module, State], Path]]] = {
    "of timm's trainer": ("resnet18", lambda folder, model, _: saver(folder, model)),
    "average of timm's trainer": (
        "convnext_tiny",
        lambda folder, model, _: saver(folder, trained("convnext_tiny"), model),
    ),
    "of several GPUs": (
        "mobilenetv2_100",
        lambda folder, _, state: pth(folder, {"arch": "mobilenetv2_100", "state_dict": under("module.", state)}),
    ),
    "of DeiT's authors": ("deit_tiny_patch16_224", lambda folder, _, state: pth(folder, {"model": state})),
    "a teacher of CIFAR-100": ("swin_tiny_patch4_window7_224", lambda folder, _, state: pth(folder, state)),
    "student beside a larger teacher of its family": (
        "swin_nano_patch4_window7_224",
        lambda folder, _, state: pth(
            folder,
            {
                **under("student.", state),
                **under("teacher.", other("swin_tiny_patch4_window7_224")),
                **under("projector.1.0.op.0.", {"weight": torch.zeros(4)}),
            },
        ),
    ),
    "average of a distiller, of several GPUs": (
        "swin_pico_patch4_window7_224",
        lambda folder, _, state: pth(
            folder,
            {
                "state_dict": under("module.student.", other("swin_pico_patch4_window7_224")),
                "state_dict_ema": {
                    **under("module.student.", state),
                    **under("module.projector.4.3.", {"bias": torch.zeros(7)}),
                },
            },
        ),
    ),
    "teacher beside a student of another family": (
        "mixer_s16_224",
        lambda folder, _, state: safetensors(
            folder, {**under("module.teacher.", state), **under("module.student.", other("resnet18"))}
        ),
    ),
    "student that is its teacher's equal": (
        "resmlp_12_224",
        lambda folder, _, state: pth(
            folder,
            {
                **under("student.", state),
                **under("teacher.", other("resmlp_12_224")),
                **under("projector.2.3.", {"weight": torch.zeros(7, 384)}),
            },
        ),
    ),
    "teacher beside a smaller student of its family": (
        "resnet50",
        lambda folder, _, state: pth(
            folder, {**under("teacher.", state), **under("student.", other("resnet18")), "projector.x": torch.ones(1)}
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_its_logits_are_the_models(form, tmp_path):
    """As a model, as a student's initial weights, and as a teacher."""
    name, write = FORMS[form]
    model = trained(name)
    path = write(tmp_path, model, as_065(name, model.state_dict()))
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    expected = model(tv.normalize(pixels / 255, list(mean), list(std)))
    assert expected.std(dim=0).min() > 0

    loaded = create_model(name, None, init=str(path))
    assert loaded.num_classes == len(CLASSES)
    own = model.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, own[key], rtol=0, atol=0)
    student = Student(name, len(CLASSES), mean=mean, std=std, stages=(), init=str(path)).eval()
    torch.testing.assert_close(student.classify(pixels), expected, rtol=1e-4, atol=1e-4)
    teacher = open_teacher(name, CLASSES, path, mean=mean, std=std)
    torch.testing.assert_close(teacher.log_probs(pixels), expected.log_softmax(1), rtol=1e-4, atol=1e-4)


# --- What is refused --------------------------------------------------------------------------------------------------


def refusal(name: str, contents: dict[str, Any], classes: int | None = None) -> str:
    with pytest.raises(BadInput) as error:
        create_model(name, classes, init=SavedWeights("file", contents))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_architecture_is_named_if_the_file_names_it():
    state = build("resnet34", 7).state_dict()
    for contents, named in (({"arch": "resnet34", "state_dict": state}, True), ({"state_dict": state}, False)):
        said = refusal("resnet18", contents)
        assert "unexpected layer1.2" in said
        assert ("the file is of resnet34" in said) is named
    deeper = {"arch": "swin_tiny_patch4_window7_224", "state_dict": other("swin_tiny_patch4_window7_224")}
    assert "the file is of swin_tiny_patch4_window7_224" in refusal("swin_nano_patch4_window7_224", deeper)


def test_another_width_is_shown():
    said = refusal("swin_pico_patch4_window7_224", other("swin_nano_patch4_window7_224"))
    assert "expected head.fc.weight (7, 384), got (7, 512)" in said
    assert "check the architecture" in said


@pytest.mark.parametrize(
    ("family", "names", "tensor"),
    [
        ("CycleMLP", ("CycleMLP_B1", "cycle_mlp_b3"), "network.0.0.attn.sfc_h.weight"),
        ("HireMLP", ("hire_mlp_small",), "network.0.0.attn.mlp_h1.weight"),
        ("ViP", ("vip_s7",), "network.0.0.attn.mlp_h.weight"),
    ],
)
def test_families_that_timm_lacks_are_named(family, names, tensor):
    for name in names:
        with pytest.raises(BadInput, match=f"unknown model '{name}'.*timm has no {family}"):
            create_model(name, 7)
    rest = {"patch_embed.proj.weight": torch.zeros(64, 3, 7, 7), "norm.weight": torch.ones(9), tensor: torch.ones(9, 9)}
    for contents in (rest, {"state_dict": under("module.", rest)}):
        assert f"got {family}, which timm does not have" in refusal("swin_tiny_patch4_window7_224", contents)


def test_other_models_are_not_taken_for_these():
    assert "timm has no" not in refusal("vit_tinny", {})
    assert "timm does not have" not in refusal("resnet18", other("mixer_s16_224"))


# --- Evaluate and export ----------------------------------------------------------------------------------------------

MEAN, STD = (0.2, 0.4, 0.6), (0.3, 0.25, 0.2)


def judged(path: Path, model: nn.Module, crop: float) -> np.ndarray:
    """The class that plain timm and torchvision give each validation image, after the classifier's bias is set so that
    both classes are predicted."""
    val, shown = open_dataset(str(path), "val"), []
    for i in range(len(val)):
        image = tv.pil_to_tensor(Image.open(val.path(i)).convert("RGB"))
        height, width = image.shape[1:]
        side = round(min(height, width) * crop)
        box = [(height - side) // 2, (width - side) // 2, side, side]
        shown.append(tv.resized_crop(image, *box, [224, 224], antialias=True))
    images = tv.normalize(torch.stack(shown) / 255, list(MEAN), list(STD))
    with torch.inference_mode():
        difference = (logits := model(images))[:, 0] - logits[:, 1]
        ordered = difference.sort().values
        middle = int((ordered[1:] - ordered[:-1])[2:-2].argmax()) + 2  # the widest gap: no image is near the boundary
        shift = ordered[middle : middle + 2].mean()
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] -= shift
    return np.where(difference > shift, 0, 1)


def test_a_checkpoint_and_its_export_are_evaluated(photos, tmp_path, capsys):
    """The predictions are those of plain timm; the exported folder gives the same, with no flag."""
    model = trained("resnet18", 2)
    predicted = judged(photos, model, 0.75)
    labels = open_dataset(str(photos), "val").labels
    expected = [[int(((labels == row) & (predicted == column)).sum()) for column in (0, 1)] for row in (0, 1)]
    path = pth(tmp_path, {"arch": "resnet18", "state_dict": under("module.", model.state_dict())})
    settings = "--mean 0.2 0.4 0.6 --std 0.3 0.25 0.2 --eval-crop 0.75"
    out = tmp_path / "out"
    main(shlex.split(f"evaluate {path} --student resnet18 --data {photos} {settings} --json {tmp_path / 'a.json'}"))
    said = capsys.readouterr().err
    assert "resnet18: 2 outputs, 224 px, central crop 0.75, mean 0.2, 0.4, 0.6, std 0.3, 0.25, 0.2" in said
    assert "no class names" in said
    main(shlex.split(f"export {path} {out} --student resnet18 {settings}"))
    main(shlex.split(f"evaluate {out} --data {photos} --json {tmp_path / 'b.json'}"))
    for name, model_path in (("a", path), ("b", out)):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["confusion"] == expected
        assert found["model"] == str(model_path)
        assert (found["agreement"], found["images"]) == (None, len(labels))
    assert not list(tmp_path.rglob("evaluation.json"))
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin_pico_patch4_window7_224", "deit_tiny_patch16_224"])
def test_an_exported_checkpoint_is_a_teacher(name, tmp_path):
    """Under today's names, with the file's number of classes."""
    model = trained(name)
    path = pth(tmp_path, as_065(name, model.state_dict()))
    export_checkpoint(path, tmp_path / "out", name, MEAN, STD)
    teacher = open_teacher(str(tmp_path / "out"), CLASSES)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model(tv.normalize(pixels / 255, list(MEAN), list(STD))).log_softmax(1)
    torch.testing.assert_close(teacher.log_probs(pixels), expected, rtol=1e-4, atol=1e-4)


def test_outputs_are_matched_with_the_data_by_name(photos, tmp_path):
    """A folder with more classes, in another order, counts as the data name them."""
    model = trained("resnet18", 2)
    judged(photos, model, 0.875)
    for folder, names, rows in (("own", ("china", "flower"), (0, 1)), ("others", ("flower", "zebra", "china"), (2, 0))):
        saved = build("resnet18", len(names)).eval()
        state = dict(model.state_dict())
        for key in ("fc.weight", "fc.bias"):
            wider = torch.zeros(len(names), *state[key].shape[1:])
            wider[list(rows)] = state[key]
            state[key] = wider
        saved.load_state_dict(state)
        data = {"input_size": (3, 224, 224), "mean": MEAN, "std": STD, "crop_pct": 0.875}
        timm.models.save_for_hf(
            saved, str(tmp_path / folder), {"label_names": list(names)}, safe_serialization=True, data_config=data
        )
    own, others = (evaluate(tmp_path / folder, str(photos), workers=0) for folder in ("own", "others"))
    assert (own.confusion == others.confusion).all()
    assert (own.confusion.sum(axis=0) > 0).all()


def test_evaluate_and_export_refuse(photos, tmp_path):
    """No architecture, an architecture for a folder, no data, other classes."""
    path = pth(tmp_path, trained("resnet18").state_dict())
    out = tmp_path / "out"
    export_checkpoint(path, out, "resnet18")
    with pytest.raises(BadInput, match="expected --student with a file of weights, got none"):
        evaluate(path, str(photos))
    with pytest.raises(BadInput, match="student: expected only with a file of weights"):
        evaluate(out, str(photos), student="resnet18")
    with pytest.raises(BadInput, match="eval-crop: expected only with a file of weights"):
        evaluate(out, str(photos), eval_crop=0.9)
    with pytest.raises(BadInput, match="eval-crop: expected a fraction"):
        evaluate(path, str(photos), student="resnet18", eval_crop=1.5)
    with pytest.raises(BadInput, match="std: expected numbers above 0"):
        evaluate(path, str(photos), student="resnet18", std=(0, 1, 1))
    with pytest.raises(BadInput, match="data: expected --data"):
        evaluate(out)
    with pytest.raises(BadInput, match=r"expected outputs for the 2 classes of .*, got 7: without names"):
        evaluate(out, str(photos))
    wider = pth(tmp_path, trained("resnet18", 20).state_dict())
    with pytest.raises(BadInput, match=r"expected outputs for the 10 classes of digits:20, got 20: without names"):
        evaluate(wider, "digits:20", student="resnet18")  # whose classes are called 0 to 9, like outputs without names
    with pytest.raises(BadInput, match="only a run has best weights"):
        evaluate(out, str(photos), weights="best")
    with pytest.raises(BadInput, match="out: already exists"):
        export_checkpoint(path, out, "resnet18")
    checkpoint = f"{path} --student resnet18 --weights best"
    for argv in (
        f"export {path} new", f"evaluate {path} --data {photos}",
        f"evaluate {checkpoint} --data {photos}", f"export {checkpoint} new",
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(shlex.split(argv))
        assert end.value.code == 2


# --- The official README's two commands -------------------------------------------------------------------------------


def write_cifar100(top: Path) -> None:
    """A made-up archive, unpacked: 100 classes, 12 training and 6 test images."""
    (top / "cifar-100-python").mkdir(parents=True)
    rng = np.random.default_rng(0)
    members: dict[str, Any] = {"meta": {"fine_label_names": [f"class{i:02d}" for i in range(100)]}}
    for member, count in (("train", 12), ("test", 6)):
        members[member] = {
            "filenames": [f"{i}.png" for i in range(count)],
            "fine_labels": rng.integers(0, 100, count).tolist(),
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        }
    for member, contents in members.items():
        (top / "cifar-100-python" / member).write_bytes(pickle.dumps(contents))


CIFAR = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))  # mean and standard deviation in the official code


def documented(dataset: str) -> list[list[str]]:
    """The two commands of docs/recipes.md for this dataset, without torchrun."""
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    section = page.partition("## The official code's commands")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if f"--data {dataset}" in block]
    return [shlex.split(line.partition("fastofa ")[2]) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("dataset", ["/data/imagenet", "cifar100:/data"])
def test_the_official_readmes_commands_run(dataset, tmp_path, monkeypatch):
    """As documented, but on a small archive, with one view and one epoch at 32 px."""
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path / "data")
    precompute, train = ([word.replace(dataset, "cifar100:data") for word in argv] for argv in documented(dataset))
    name = precompute[precompute.index("--teacher") + 1]
    model = trained(name, 100)
    torch.save({"arch": name, "state_dict": as_065(name, model.state_dict())}, "teacher.pth")
    main([*precompute, "--views", "1", "--workers", "0"])
    small = ["--image-size", "32", "--epochs", "1", "--batch-size", "6", "--warmup-epochs", "0", "--workers", "0"]
    main([*train, *small])
    teacher = TeacherCache.open(Path("cache")).header["teachers"][0]
    assert (teacher["name"], teacher["image_size"]) == (name, 224)
    normalized = CIFAR if dataset.startswith("cifar") else (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert (tuple(teacher["mean"]), tuple(teacher["std"])) == normalized
    config = json.loads(Path("run/config.json").read_text())["config"]
    assert (config["student"], config["recipe"]) == ("resnet18", precompute[precompute.index("--recipe") + 1])
    assert evaluate("run", workers=0).images == 6
