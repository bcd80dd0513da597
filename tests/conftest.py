"""Shared fixtures: images in a temporary folder, a short run on them, and a fixed seed for every test."""

import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported. One thread a process: tests run side by side, threads that wait for each other are slow,
# and a sum over two threads has other last bits than over one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # torch.compile writes the same code for every processor, and less of it
os.environ.setdefault("TERM", "dumb")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels then run on the CPU; read when timm imports triton

import timm
from timm.models import save_for_hf
from torchvision.transforms.v2.functional import _geometry

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.teacher.cache import TeacherCache
from runs import float64, make_cache

# The same examples everywhere, and on a machine that is slow or busy, too.
settings.register_profile(
    "anywhere", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("anywhere")
# On a processor without AVX2 torchvision resizes in floats, which rounds otherwise than torch's kernel for uint8, whose
# bits are the same on every processor. What tests compare with fastofa's pixels is always that kernel's.
_geometry._do_native_uint8_resize_on_cpu = lambda _: True


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seeds timm's generators, too: comparisons of distributions are reproducible and cannot fail by chance."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    """Skip tests that need a library that is not installed."""
    for marker, module in (("ffcv", "ffcv"), ("dali", "nvidia.dali")):
        if request.node.get_closest_marker(marker):
            how = f"needs {module}; `fastofa doctor` says how to get it, or: make test EXTRAS=test,ffcv,dali"
            pytest.importorskip(module, reason=how, exc_type=ImportError)


@pytest.fixture
def in_float64() -> Iterator[None]:
    with float64():
        yield


@pytest.fixture(scope="session")
def agrees() -> Iterator[Callable[..., None]]:
    """A function that checks a method's loss against its formula, `agrees(method, loss, expected, rel)`; at the end,
    the largest relative difference of each method is printed."""
    differences: dict[str, float] = defaultdict(float)

    def check(method: Any, loss: torch.Tensor, expected: float, rel: float, absolute: float = 0.0) -> None:
        name = type(method).__name__.lower()
        differences[name] = max(differences[name], abs(loss.item() - expected) / abs(expected))
        assert loss.item() == pytest.approx(expected, rel=rel, abs=absolute)

    yield check
    print("\nlargest relative difference to the formula, in float64:")
    for name, value in differences.items():
        print(f"  {name:8}{value:.0e}")


@pytest.fixture
def digits() -> Dataset:
    """100 training images of scikit-learn's digits, ten of each class."""
    return open_dataset("digits:100")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several sizes, cut from two photographs: two classes, 12 training and 6 validation images each."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(90, 160, 2)
                top, left = rng.integers(0, 200, 2)
                Image.fromarray(photo[top : top + height, left : left + width]).save(
                    root / split / name / f"{i:03d}.jpg", quality=92
                )
    return root


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos that the test may change."""
    return shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns(".fastofa"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained teacher of ten classes in timm's format, whose predictions are far from uniform."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "teacher"
    model = timm.create_model("test_efficientnet", num_classes=10)
    torch.nn.init.normal_(model.get_classifier().weight)
    save_for_hf(model, str(folder), safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="session")
def photo_cache(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return make_cache(str(photos), 2, tmp_path_factory.mktemp("photo-cache"), topk=2)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the report, which takes half the time of a short run."""
    monkeypatch.setattr("fastofa.training.live_report.LiveReport.write", lambda *_: None)


@pytest.fixture
def on_photos(photos: Path, photo_cache: TeacherCache, tmp_path: Path, no_report: None) -> Callable[..., TrainConfig]:
    """on_photos(name, ...) -> configuration of a run on 24 photographs: 2 epochs of 3 steps of 8, no report."""

    def config(name: str = "run", **given: Any) -> TrainConfig:
        values = {
            "data": str(photos), "cache": photo_cache.path, "student": "test_efficientnet", "out": tmp_path / name,
            "epochs": 2, "batch_size": 8, "warmup_epochs": 0, "workers": 0, "log_every": 1, "eval_every": 1,
        }  # fmt: skip
        return recipes.digits(**{**values, **given})

    return config
