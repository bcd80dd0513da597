"""Training with vectors: methods get those of their images, learn, resume to the same weights and leave no trace."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fastofa.commands.parse import parse
from fastofa.data.open import open_dataset
from fastofa.methods.dkd import DKD
from fastofa.methods.method import Outputs, Sizes
from fastofa.methods.objective import Objective
from fastofa.methods.options import RSDOptions
from fastofa.methods.rsd import RSD
from fastofa.methods.targets import Targets
from fastofa.runs import recipes
from fastofa.runs.checkpoint import checkpoints
from fastofa.runs.config import TrainConfig
from fastofa.runs.log import read_metrics
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.system.interrupt import Stopped
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.vectors import stored
from fastofa.training.evaluate import evaluate
from fastofa.training.export import export
from fastofa.training.loop import train
from fastofa.training.plan import plan
from fastofa.training.step import Program
from runs import make_cache, newest, same_run, stop_at

VECTORS = ["cc", "rkd", "crd", "rsd"]
SMALL = {"crd": {"negatives": 64}, "cc": {"width": 16}}
pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherCache]:
    """Two views of a hundred digits: top 4 of 10, without vectors and with both kinds."""
    return {
        features: make_cache("digits:100", 10, tmp_path_factory.mktemp(features), topk=4, features=features)
        for features in ("none", "pooled", "pooled-int8")
    }


@pytest.fixture
def config(caches: dict[str, TeacherCache], tmp_path: Path) -> Callable[..., TrainConfig]:
    """config(method, features, ...) -> two epochs of four steps on a hundred digits."""

    def make(method: str, features: str = "pooled", **given: Any) -> TrainConfig:
        values = {
            "data": "digits:100", "student": "test_resnet", "cache": caches[features].path, "method": method,
            "out": tmp_path / "run", "epochs": 2, "batch_size": 25, "warmup_epochs": 0, "log_every": 1,
        }  # fmt: skip
        made = recipes.digits(**{**values, **given})
        options = {name: dataclasses.replace(getattr(made, name), **own) for name, own in SMALL.items()}
        return dataclasses.replace(made, **options)

    return make


# --- What methods get -------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Outputs, Tensor, Targets]]:
    """Outputs, labels and targets of every step."""
    found: list[tuple[Outputs, Tensor, Targets]] = []
    original = Objective.forward

    def forward(self: Objective, outputs: Outputs, labels: Tensor, targets: Targets, *mixed: Any) -> Tensor:
        found.append((outputs, labels, targets))
        return original(self, outputs, labels, targets, *mixed)

    monkeypatch.setattr(Objective, "forward", forward)
    return found


@pytest.mark.parametrize("features", ["pooled", "pooled-int8"])
def test_vectors_and_numbers_are_those_of_the_images(config, caches, seen, features):
    """Of the epoch's view, row by row; the student's vector is the input of its classifier."""
    c = config("rsd+dkd", features)
    train(c)
    labels, classifier = open_dataset(c.data).labels, caches[features].classifier()
    for number, (outputs, own, targets) in enumerate(seen):
        table = caches[features].table(number // 4)
        assert own.tolist() == labels[targets.sample_ids].tolist()
        expected = table.vectors.restored()[targets.sample_ids]
        assert torch.equal(targets.pooled, expected)
        assert torch.equal(targets.classes, table.targets.classes.int()[targets.sample_ids])
        exact = (expected.double() @ classifier.weight.double().T + classifier.bias.double()).log_softmax(1)
        torch.testing.assert_close(targets.all_log_probs.double(), exact, rtol=1e-4, atol=1e-4)
        assert outputs.heads.shape == (1, 25, 10)
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("method", "features", "pooled", "all_classes"),
    [("ofa", "pooled", False, False), ("kd", "pooled", False, False), ("dkd", "none", False, False),
     ("dkd", "pooled", True, True), ("rsd", "pooled", True, False)],
)  # fmt: skip
def test_only_what_a_method_needs_is_restored(config, seen, method, features, pooled, all_classes):
    train(config(method, features, epochs=1))
    for outputs, _, targets in seen:
        assert (targets.pooled is not None, targets.all_log_probs is not None) == (pooled, all_classes)
        assert (outputs.pooled is not None) == (method == "rsd")


def test_a_cache_of_all_classes_needs_no_vectors_for_them(caches, config, seen, tmp_path):
    cache = make_cache("digits:100", 10, tmp_path, topk=10, features="pooled")
    train(config("dkd", cache=cache.path, epochs=1))
    assert all(targets.all_log_probs is None and targets.classes.shape == (25, 10) for _, _, targets in seen)


def test_ofa_does_not_depend_on_the_vectors(config, tmp_path):
    """The same run, log and weights from a cache with them and from one without."""
    for features in ("none", "pooled"):
        train(config("ofa", features, out=tmp_path / features))
    (a, _), (b, _) = (load_tensors(newest(tmp_path / features)) for features in ("none", "pooled"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ofa_and_rsd_add_up(config, seen):
    """With five heads, the student's vector beside them, and each loss in the log."""
    c = config("ofa+rsd", epochs=1, kd_weight=0.5, rsd=RSDOptions(weight=0.3))
    train(c)
    outputs, _, targets = seen[0]
    row = next(row for row in read_metrics(c.out) if row["kind"] == "step")
    weights = {"gt": c.gt_weight, "kd": 0.5, "ofa": c.ofa_weight, "rsd": 0.3}
    total = sum(weight * row[name] for name, weight in weights.items())
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert outputs.heads.shape[0] == 5
    assert outputs.pooled.shape == (25, 96)
    assert targets.pooled.shape == (25, 256)


# --- A whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*VECTORS, "ofa+rsd", "dkd"])
def test_a_run_resumes_to_the_same_bits_and_is_evaluated_and_exported(config, method, tmp_path, monkeypatch):
    """Interrupted in the second epoch, with a moving average; what is exported has timm's own weights and no others."""
    straight, stopped = config(method, ema=0.9), config(method, ema=0.9, out=tmp_path / "stopped")
    train(straight)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            train(stopped)
    train(parse("train", ["--resume", str(stopped.out)]))
    same_run(stopped.out, straight.out)

    rows = [row for row in read_metrics(straight.out) if row["kind"] == "step"]
    assert all(row[name] > 0 for row in rows for name in method.split("+"))
    saved = load_tensors(newest(straight.out))[0]
    assert any(name.startswith("student.methods.") for name in saved) == (method not in ("rkd", "dkd"))
    found = evaluate(straight.out)
    assert 0 <= found.top1 <= 1
    assert found.teacher_top1 is not None
    export(straight.out, tmp_path / "exported")
    model = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
    assert model.state_dict().keys() == timm.create_model("test_resnet", num_classes=10).state_dict().keys()


@pytest.mark.parametrize("method", ["rsd", "cc", "crd"])
def test_the_methods_own_modules_learn(config, method):
    """Every weight of a projector or an embedding differs between the first step and the last."""
    c = config(method, checkpoint_every=1, keep=9)
    train(c)
    files = checkpoints(c.out)
    last, first = (load_tensors(file)[0] for file in (files[0], files[-1]))
    own = [name for name in first if name.startswith("student.methods.") and name.endswith("weight")]
    assert len(own) == (3 if method == "rsd" else 2)
    assert not any(torch.equal(first[name], last[name]) for name in own)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*VECTORS, "ofa+rsd+dkd"])
def test_the_step_is_one_graph(caches, config, method):
    """As it is compiled on a GPU: without a break, with the losses and gradients of the eager program."""
    c, table = config(method), caches["pooled"].table(0)
    targets = (
        DeviceTargets(
            table.targets, torch.device("cpu"), vectors=table.vectors, classifier=caches["pooled"].classifier()
        )
        .lookup(torch.arange(20))
        ._replace(sample_ids=torch.arange(20))
    )
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.from_numpy(open_dataset(c.data).labels[:20])
    student = Student(c.student, 10, 32, stages=c.exits)
    sizes = Sizes(10, student.pooled_dim(), 256, images_per_class=(10,) * 10)
    eager = Program(student.train(), Objective(c.objective, sizes), c, torch.device("cpu"))
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for program in (eager, compiled):
        torch.manual_seed(0)  # crd draws
        losses = program(images, labels, targets)
        losses[0].backward()
        gradients = [p.grad.flatten() for p in program.parameters() if p.grad is not None]
        found.append((losses.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    for a, b in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_plan_counts_the_whole_cache(config, caches):
    estimate, _ = plan(config("rsd", plan=True))
    assert estimate.cache_bytes == sum(file.stat().st_size for file in caches["pooled"].path.iterdir())
    assert estimate.cache_bytes > sum(file.stat().st_size for file in caches["none"].path.iterdir()) + 2 * 100 * 512


def test_the_options_are_flags_and_are_kept_in_the_runs_configuration(config):
    c = config("rsd")
    argv = ["--data", c.data, "--cache", str(c.cache), "--student", c.student, "--out", str(c.out)]
    parsed = parse("train", [*argv, "--method", "rsd", "--rsd.weight", "0.3", "--rsd.kappa", "0.02", "--epochs", "1"])
    assert (parsed.rsd.weight, parsed.rsd.kappa) == (0.3, 0.02)
    train(dataclasses.replace(parsed, batch_size=50, warmup_epochs=0))
    assert json.loads((c.out / "config.json").read_text())["config"]["rsd"] == {
        "weight": 0.3,
        "kappa": 0.02,
        "expansion": 2,
    }
    for flag, value, said in (
        ("rsd.kappa", "-1", "at least 0"),
        ("crd.momentum", "1", "below 1"),
        ("cc.width", "0", "above 0"),
    ):
        with pytest.raises(BadInput, match=f"{flag}: expected a number .*{said}"):
            parse("train", [*argv, f"--{flag}", value])


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*VECTORS, "ofa+rsd"])
def test_a_method_whose_need_the_cache_does_not_meet_is_refused(config, method):
    """In one line, before anything is written: what it needs, what the cache has, and what to do."""
    with pytest.raises(BadInput) as error:
        train(config(method, "none"))
    said = str(error.value)
    assert "\n" not in said
    assert "pooled vectors" in said
    assert "top 4 of 10 classes" in said
    assert "precompute --features pooled" in said
    assert not (config(method).out / "config.json").exists()


def test_a_student_without_a_linear_head_is_refused_for_these_methods_only(config):
    c = config("rsd", student="deit_tiny_distilled_patch16_224", image_size=32)
    with pytest.raises(BadInput, match=r"student deit_tiny_distilled_patch16_224: .* it has 2 classifiers") as error:
        train(c)
    assert "\n" not in str(error.value)
    assert not (c.out / "config.json").exists()


def test_a_part_of_one_image_is_refused(config):
    with pytest.raises(BadInput, match="expected at least two images in each part of a step, because cc"):
        train(config("cc", student="test_vit", batch_size=25, accumulate=25))


# --- The notice -------------------------------------------------------------------------------------------------------


def test_methods_of_all_classes_say_what_a_sparse_cache_holds(config, caches, capsys):
    """The mean of the kept probability over view 0; nothing where vectors or all classes are there, or for ofa."""
    train(config("dkd", "none", epochs=1))
    kept = caches["none"].targets(0)[2].double().exp().sum(dim=1).mean().item()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "needs all classes" in line]
    assert "4 of 10" in line
    assert f"{kept:.3%}" in line
    assert f"{1 - kept:.3%}" in line
    for method, features in (("dkd", "pooled"), ("ofa", "none"), ("rsd", "pooled")):
        train(config(method, features, epochs=1, out=config(method).out / method))
        assert "needs all classes" not in capsys.readouterr().err


def test_the_even_tails_error_is_at_most_the_rest(caches):
    """Total variation between the teacher's distribution and the spread one, image by image."""
    cache = caches["pooled"]
    table = cache.table(0)
    exact = cache.classifier().log_probs(table.vectors.restored()).exp()
    targets = Targets(table.targets.classes.int(), table.targets.log_probs)
    away = (targets.probs(10) - exact).abs().sum(dim=1) / 2
    rest = 1 - table.targets.log_probs.float().exp().sum(dim=1)
    assert (away <= rest + 0.005).all()
    assert away.mean() > 0.01


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "least"), [("pooled", 0.99999), ("pooled-int8", 0.995)])
@pytest.mark.parametrize("method", [DKD, RSD])
def test_the_gradient_is_that_of_exact_vectors(caches, method, features, least):
    """Cosine of the gradients from stored vectors and from the fp32 vectors that were stored."""
    torch.manual_seed(3)
    classifier = caches["pooled"].classifier()
    exact = caches["pooled"].table(0).vectors.restored() * (1 + 0.001 * torch.rand(100, 256))
    sizes = Sizes(10, 256, 256)
    instance = method(method.Options(), sizes)
    gradients = []
    for vectors in (exact, stored(exact, features).restored()):
        logits = torch.randn(1, 100, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
        pooled = torch.randn(100, 256, generator=torch.Generator().manual_seed(2)).requires_grad_()
        log_probs = classifier.log_probs(vectors)
        targets = Targets(log_probs.topk(4).indices, log_probs.topk(4).values, vectors, all_log_probs=log_probs)
        instance.loss(Outputs(logits, pooled), targets, log_probs.argmax(1)).backward()
        gradients.append((logits if method is DKD else pooled).grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > least
