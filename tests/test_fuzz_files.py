"""Damaged or edited files give one line that names them, or the same result as before.

Each case is a seed; a failure lists the seeds, and `damage_bytes(data, seed)` makes the same file again.
"""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.lib.damage import damage_bytes
from damage import complaint, damage_json, refused
from fastofa.data.open import open_dataset
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.data.written import verify
from fastofa.runs import recipes
from fastofa.runs.run import open_run
from fastofa.system.files import load_tensors, save_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.model import open_teacher
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.export import export
from fastofa.training.loop import train

DATA, CLASSES, SIZE = "digits:20", 10, 32


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, and of the same type."""
    if isinstance(a, Tensor | np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def regions(file: Path) -> list[slice]:
    """The parts of a file that describe its content: its beginning, and for a .beton also records and table."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        return [slice(0, 8 + int.from_bytes(data[:8], "little"))]
    if file.suffix == ".beton":
        return [slice(0, 60), slice(2106, 2106 + 24 * 12), slice(len(data) - 24 * 12, len(data))]
    return [slice(0, min(200, len(data)))]


def fuzz(file: Path, use: Callable[[], Any], anywhere: int, in_regions: int = 0) -> None:
    """Damage the file with each seed: `use()` raises an error that names it or its folder, or gives the undamaged
    result.
    """
    whole, expected = file.read_bytes(), use()
    cases = [(seed, slice(0, len(whole))) for seed in range(anywhere)]
    cases += [(seed, region) for region in regions(file) for seed in range(in_regions)]
    wrong, found = [], 0

    def case() -> str:
        nonlocal found
        named, result = refused(use, file.parent)
        found += named
        return "" if named or same(result, expected) else "silent, and the result is another"

    for seed, region in cases:
        kind, data = damage_bytes(whole[region], seed)
        file.write_bytes(whole[: region.start] + data + whole[region.stop :])
        if said := complaint(case):
            wrong.append(f"seed {seed} of bytes {region.start} to {region.stop} ({kind}): {said}")
    file.write_bytes(whole)
    assert same(use(), expected)
    assert wrong == [], f"{file.name}: {len(wrong)} of {len(cases)}\n" + "\n".join(wrong)
    assert found > len(cases) / 3  # else nothing was tried


def fuzz_text(file: Path, case: Callable[[], str], bytes_too: bool = False) -> None:
    """Damage JSON values, or the bytes, with 60 seeds; `case()` returns what is wrong."""
    text, wrong = file.read_text(), []
    for seed in range(60):
        kind, edited = damage_bytes(text.encode(), seed) if bytes_too else damage_json(text, seed)
        file.write_bytes(edited if isinstance(edited, bytes) else edited.encode())
        if said := complaint(case):
            wrong.append(f"seed {seed} ({kind}): {said}")
    assert wrong == [], "\n".join(wrong)


# --- Teacher cache ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a teacher, its export, a cache of its predictions, and photographs in both written forms."""
    folder = tmp_path_factory.mktemp("made")
    given: dict[str, Any] = {"epochs": 2, "batch_size": 10, "eval_every": 2, "checkpoint_every": 2, "ema": 0.9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastofa.training.live_report.LiveReport.write", lambda *_: None)
        train(recipes.digits(data=DATA, student="test_vit", method="scratch", out=folder / "run", **given))
    export(folder / "run", folder / "teacher")
    teacher = str(folder / "teacher")
    precompute(PrecomputeConfig(DATA, teacher, folder / "cache", views=2, topk=4, recipe="imagenet_vit_mlp"))
    write(WriteConfig(str(photos), folder / "x.pack", size=64))
    write(WriteConfig(str(photos), folder / "x.beton", max_size=64))
    write(WriteConfig(str(photos), folder / "raw.beton", raw=True, max_size=64))
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "cache", tmp_path / "cache"))


def all_of(path: Path) -> dict[str, Any]:
    """Everything that training reads from a cache."""
    opened = TeacherCache.open(path)
    opened.verify()
    numbers = {name: getattr(opened, name) for name in ("views", "num_samples", "num_classes", "topk", "teacher_dim")}
    tables = [opened.targets(view) for view in range(opened.views)]
    return {
        **numbers,
        "policy": dataclasses.asdict(opened.policy),
        "views_": [views.columns() for views, _, _ in tables],
        "views": [(classes, log_probs) for _, classes, log_probs in tables],
        "val": tuple(opened.val_targets()),
    }


@pytest.mark.parametrize("name", [view_file(0), VAL, HEADER])
def test_a_cache_with_damaged_bytes(cache, name):
    fuzz(cache / name, lambda: all_of(cache), anywhere=20, in_regions=20)


def test_a_cache_whose_header_was_edited(cache):
    """It is refused, or gives the same values for everything that training reads."""
    expected = all_of(cache)

    def case() -> str:
        named, result = refused(lambda: all_of(cache), cache)
        return "" if named or same(result, expected) else "silent, and the result is another"

    fuzz_text(cache / HEADER, case)


DTYPES = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bool]


def edit_tensors(tensors: dict[str, Tensor], seed: int) -> tuple[str, dict[str, Tensor]]:
    """Change the dtype, shape or a value of one tensor, remove one, or add one."""
    rng = random.Random(seed)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(["dtype", "shape", "value", "missing", "additional"])
    if kind == "dtype":
        changed = tensor.to(torch.float32).to(rng.choice([d for d in DTYPES if d != tensor.dtype]))
    elif kind == "shape":
        shapes = [tensor[:-1], tensor[:0], tensor.flatten(), tensor[None], torch.cat([tensor, tensor])]
        changed = rng.choice([t.clone() for t in shapes if t.shape != tensor.shape])
    elif kind == "value":
        changed = tensor.clone()
        flat = changed.view(-1).view(torch.uint8).numpy()  # the same memory
        flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
    if kind == "missing":
        return f"{name} missing", {k: v for k, v in tensors.items() if k != name}
    if kind == "additional":
        return "one too many", {**tensors, "x": tensor.clone()}
    return f"{kind} of {name}", {**tensors, name: changed}


def impossible(cache: dict[str, Any]) -> str:
    """Values that no teacher can have predicted and no policy can have drawn."""
    for columns in cache["views_"]:
        crop = columns["crop"].astype(int)
        if crop.shape != (cache["num_samples"], 4) or (crop[:, :2] + crop[:, 2:] > 65536).any():  # rounded twice
            return "crops outside of the image"
    for classes, log_probs in [*cache["views"], cache["val"]]:
        number, given = classes.to(torch.int64), log_probs.float()
        if len(number) != len(given) or number.shape[1:] != (cache["topk"],) != given.shape[1:]:
            return "predictions of another shape"
        if (number >= cache["num_classes"]).any() or any(len(set(row)) < len(row) for row in number.tolist()):
            return "class numbers that are not those of K different classes"
        if not (given.isfinite().all() and (given <= 0).all() and (given.exp().sum(1) < 1.01).all()):
            return "log-probabilities that are none"
    return ""


@pytest.mark.parametrize("name", [view_file(1), VAL])
def test_a_cache_with_edited_tables_and_correct_checksums(cache, name):
    """Anyone can recompute the checksum; then only possible predictions are accepted."""
    tensors, info = load_tensors(cache / name)
    wrong = []

    def case() -> str:
        named, result = refused(lambda: all_of(cache), cache)
        return "" if named else impossible(result)

    for seed in range(40):
        kind, edited = edit_tensors(tensors, seed)
        save_tensors(cache / name, edited, info)
        if said := complaint(case):
            wrong.append(f"seed {seed} ({kind}): {said}")
    assert wrong == [], "\n".join(wrong)


# --- Checkpoint and run -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def weights(run: Path) -> dict[str, Tensor]:
    return dict(open_run(run).trained_student().state_dict())


def test_a_damaged_checkpoint(run):
    newest = max((run / "checkpoints").glob("step-*.safetensors"))
    fuzz(newest, lambda: weights(run), anywhere=20, in_regions=20)


def test_a_checkpoint_with_edited_tensors_and_correct_checksums(run):
    """It gives a student with tensors of the right shapes, or one line."""
    newest = max((run / "checkpoints").glob("step-*.safetensors"))
    tensors, info = load_tensors(newest)
    shapes = {name: value.shape for name, value in weights(run).items()}
    wrong = []

    def case() -> str:
        named, result = refused(lambda: weights(run), newest.parent)
        return "" if named or {name: v.shape for name, v in result.items()} == shapes else "another student"

    for seed in range(15):
        kind, edited = edit_tensors(tensors, seed)
        save_tensors(newest, edited, info)
        if said := complaint(case):
            wrong.append(f"seed {seed} ({kind}): {said}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("bytes_too", [False, True])
def test_an_edited_configuration_of_a_run(run, bytes_too):
    """It describes a run whose student can be built, or it is refused."""
    file = run / "config.json"

    def build() -> int:
        opened = open_run(run)
        return opened.build_student().image_size

    def case() -> str:
        named, size = refused(build, run)
        return "" if named or (type(size) is int and size > 0) else f"an image size of {size!r}"

    fuzz_text(file, case, bytes_too)


# --- Teacher ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_too", [False, True])
def test_an_edited_configuration_of_a_teacher(made, tmp_path, bytes_too):
    """It describes a teacher that predicts log-probabilities, or it is refused."""
    folder = Path(shutil.copytree(made / "teacher", tmp_path / "teacher"))
    file = folder / "config.json"

    def predictions() -> Tensor:
        teacher = open_teacher(str(folder), tuple(map(str, range(CLASSES))))
        size = teacher.image_size
        images = torch.arange(2 * 3 * size * size).view(2, 3, size, size).to(torch.uint8)
        return teacher.log_probs(images)

    def case() -> str:
        named, found = refused(predictions, folder)
        if named:
            return ""
        fine = found.shape == (2, CLASSES) and found.isfinite().all() and found.exp().sum(1).sub(1).abs().max() < 1e-4
        return "" if fine else f"predictions {found}"

    fuzz_text(file, case, bytes_too)


# --- Written forms ----------------------------------------------------------------------------------------------------


def all_images(path: Path) -> list[Any]:
    """All images of both splits, after verification."""
    verify(path, workers=1)
    found = [open_dataset(str(path), split) for split in ("train", "val")]
    images = [[dataset.read(i) for i in range(len(dataset))] for dataset in found]
    return [*all_but_pixels(path), images]


def all_but_pixels(path: Path) -> list[Any]:
    """What is checked without verification: names, labels, sizes; of the images only that they can be decoded."""
    found = [open_dataset(str(path), split) for split in ("train", "val")]
    for dataset in found:
        image = dataset.read(3)
        assert image.dtype == torch.uint8
        assert list(image.shape) == [3, *dataset.stored_sizes[3]]
    return [(list(d.names), d.classes, d.labels, d.sizes, d.fingerprint) for d in found]


@pytest.mark.parametrize("form", ["x.pack", "x.beton", "raw.beton"])
def test_a_damaged_written_form(made, tmp_path, form):
    """Each file: `--verify` detects any damage; without it, names, labels and sizes are never wrong."""
    path = tmp_path / form
    if path.suffix == ".pack":
        shutil.copytree(made / form, path)
        files = sorted(path.iterdir())
    else:
        files = [Path(shutil.copy(file, tmp_path)) for file in sorted(made.glob(f"{path.stem}.*")) if file.is_file()]
    assert len(files) >= 3
    for file in files:
        fuzz(file, lambda: all_images(path), anywhere=10)
        fuzz(file, lambda: all_but_pixels(path), anywhere=0, in_regions=15)
