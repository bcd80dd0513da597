"""Training from the cache equals training with the teacher online on the same views."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastofa.data.open import open_dataset
from fastofa.methods.method import Outputs, Sizes
from fastofa.methods.objective import Objective
from fastofa.methods.targets import Targets
from fastofa.pipelines import open_pipeline
from fastofa.runs import recipes
from fastofa.runs.recipes import default_policy
from fastofa.student.model import Student
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.model import open_teacher
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.export import export
from fastofa.training.loop import train
from fastofa.views.draw import draw_views
from fastofa.views.order import epoch_order

DATA, SIZE, BATCH = "digits:200", 32, 20
CPU = torch.device("cpu")


def trained(student: str, top: Path) -> Path:
    """A teacher that is trained: a few epochs on all digits."""
    config = recipes.digits(
        data="digits", student=student, method="scratch", out=top / "run", epochs=4, warmup_epochs=1
    )
    assert train(config).top1 > 0.3
    export(top / "run", top / "teacher")
    return top / "teacher"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("test_efficientnet", tmp_path_factory.mktemp("teacher"))


def losses(teacher_folder: Path, cache_path: Path, topk: int, lr: float, views_of: str = "") -> tuple[Tensor, ...]:
    """The losses of an epoch's steps: from the cache; online at the same weights; online in a separate training."""
    cache = precompute(PrecomputeConfig(DATA, str(teacher_folder), cache_path, views=1, topk=topk, recipe=views_of))
    stored = cache.table(0)
    views, table = stored.views, DeviceTargets(stored.predictions, CPU, dense=topk == cache.num_classes)
    dataset = open_dataset(DATA)
    teacher = open_teacher(str(teacher_folder), tuple("0123456789"))
    order = epoch_order(len(dataset), seed=0, epoch=0, partner=views.partner)
    config = recipes.digits(data=DATA, student="test_resnet", out=Path("unused"))
    objective: Any = Objective(config.objective, Sizes(10))

    def run(train_online: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        student = Student("test_resnet", 10, SIZE, teacher_dim=cache.teacher_dim)
        optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)
        batches = open_pipeline("resident", dataset, SIZE, BATCH).epoch(views, order)
        inputs = open_pipeline("resident", dataset, teacher.image_size, BATCH).epoch(views, order)
        found = []
        for batch, seen in zip(batches, inputs, strict=True):
            online = Targets(torch.arange(10).expand(BATCH, -1), teacher.log_probs(seen.images).clone())
            outputs = Outputs(student(batch.images))
            mixed = batch.partner_labels, batch.mix
            both = [objective(outputs, batch.labels, t, *mixed)[0] for t in (table.lookup(batch.rows), online)]
            optimizer.zero_grad()
            both[train_online].backward()
            optimizer.step()
            found.append(torch.stack(both).detach())
        cached, online = torch.stack(found).double().unbind(dim=1)
        return cached, online

    cached, online = run(train_online=False)
    return cached, online, run(train_online=True)[1]


def compare(teacher_folder: Path, tmp_path: Path, topk: int, views_of: str = "") -> tuple[float, float]:
    """The largest relative difference of a step's loss at the same weights, in a training with a high learning rate;
    and that of the mean loss of two trainings with a low one, since a high one amplifies the last bit of every
    number.
    """
    cached, online, _ = losses(teacher_folder, tmp_path / "cache", topk, 0.05, views_of)
    at_same_weights = (cached / online - 1).abs().max().item()
    cached, _, trained_online = losses(teacher_folder, tmp_path / "cache", topk, 1e-4, views_of)
    of_trainings = abs(cached.mean() / trained_online.mean() - 1).item()
    print(f"K = {topk}: relative difference at the same weights {at_same_weights:.1e}, of trainings {of_trainings:.1e}")
    return at_same_weights, of_trainings


@pytest.mark.slow
def test_dense_predictions_give_the_same_loss(teacher_folder: Path, tmp_path: Path) -> None:
    """K = C: float16 storage changes the loss of every step, and its mean over a whole training, by less than 1e-5."""
    at_same_weights, of_trainings = compare(teacher_folder, tmp_path, topk=10)
    assert at_same_weights < 1e-5
    assert of_trainings < 1e-5


@pytest.mark.slow
def test_dense_predictions_of_the_whole_augmentation_give_the_same_loss(teacher_folder: Path, tmp_path: Path) -> None:
    """RandAugment, mixup, cutmix and erasing: the online teacher gets the same mixed images as the cache."""
    at_same_weights, of_trainings = compare(teacher_folder, tmp_path, topk=10, views_of="imagenet_vit_mlp")
    assert at_same_weights < 2e-5
    assert of_trainings < 1e-5


@pytest.mark.slow
def test_top_five_predictions_give_nearly_the_same_loss(teacher_folder: Path, tmp_path: Path) -> None:
    """K = 5 of 10: the mass of the other five classes is spread evenly, which changes little."""
    at_same_weights, of_trainings = compare(teacher_folder, tmp_path, topk=5)
    assert 1e-6 < at_same_weights < 0.01
    assert of_trainings < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("student", ["test_efficientnet", "test_vit"])
def test_bf16_weights_cost_hardly_more_than_autocast(student: str, teacher_folder: Path, tmp_path: Path) -> None:
    """Both against fp32 on all digits: the divergence is no more than twice as large, the best class hardly changes."""
    folder = teacher_folder if student == "test_efficientnet" else trained(student, tmp_path)
    exact, rough = (open_teacher(str(folder), tuple("0123456789"), bf16=bf16) for bf16 in (False, True))
    dataset = open_dataset("digits")
    views = draw_views(default_policy("digits"), dataset.sizes, seed=0, view=0)
    found: dict[str, list[Tensor]] = {"fp32": [], "autocast": [], "bf16": []}
    for batch in open_pipeline("resident", dataset, exact.image_size, 128).epoch(views, np.arange(len(dataset))):
        found["fp32"].append(exact.log_probs(batch.images))
        with torch.autocast("cpu", torch.bfloat16):
            found["autocast"].append(exact.log_probs(batch.images))
        found["bf16"].append(rough.log_probs(batch.images))
    fp32, autocast, bf16 = (torch.cat(parts).double() for parts in found.values())

    def divergence(other: Tensor) -> float:
        return (fp32.exp() * (fp32 - other)).sum(dim=1).mean().item()

    agreement = (fp32.argmax(1) == bf16.argmax(1)).double().mean().item()
    print(f"{student}: KL {divergence(bf16):.2e}, autocast {divergence(autocast):.2e}, agreement {agreement:.2%}")
    assert 0 < divergence(bf16) < 2 * divergence(autocast) + 1e-6 < 1e-3
    assert agreement > 0.98
