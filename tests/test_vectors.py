"""The teacher's vectors in the cache: what is stored restores all logits, and what cannot be stored is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from torch import Tensor, nn

from fastofa.commands.cache import info
from fastofa.data.open import open_dataset
from fastofa.methods.dist import DIST
from fastofa.methods.dkd import DKD
from fastofa.methods.lskd import LSKD
from fastofa.methods.method import Outputs, Sizes
from fastofa.methods.targets import Targets, TopK
from fastofa.models.linear_head import check_linear_head
from fastofa.pipelines import open_pipeline
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import CLASSIFIER, view_file
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.model import open_teacher
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.vectors import Classifier, Vectors, stored

CPU, SIZE, C, D = torch.device("cpu"), 32, 10, 256
BOTH = ["pooled", "pooled-int8"]


# --- Rounding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.sampled_from([1e-3, 1.0, 1e4, 1e6]))
def test_int8_is_within_half_a_step_of_each_row(count, width, size):
    """A step is 1/127 of the row's largest value; rows differ in size, and one is all zeros."""
    vectors = torch.randn(count, width) * size * torch.logspace(-2, 0, count)[:, None]
    vectors[0] = 0
    kept = stored(vectors, "pooled-int8")
    assert (kept.pooled.dtype, kept.pooled_scale.dtype) == (torch.int8, torch.float32)
    step = vectors.abs().amax(dim=1, keepdim=True) / 127
    assert ((kept.restored() - vectors).abs() <= step * 0.501).all()
    assert torch.equal(kept.restored()[0], vectors[0])


def test_fp16_is_the_nearest_half():
    vectors = torch.randn(5, 7)
    kept = stored(vectors.bfloat16(), "pooled")
    assert kept.columns().keys() == {"pooled"}
    assert torch.equal(kept.restored(), vectors.bfloat16().float())  # bf16's values of this size are halves, too
    assert torch.equal(stored(vectors, "pooled").restored(), vectors.half().float())


# --- What is stored ---------------------------------------------------------------------------------------------------


LABELS = "9x876543y210"


def save_teacher(model: nn.Module, folder: Path) -> None:
    config = {"label_names": [*LABELS]}
    save_for_hf(model, str(folder), config, safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CNN of twelve classes, of which the digits are ten in another order; its logits are far from equal."""
    torch.manual_seed(1)
    model = timm.create_model("test_efficientnet", num_classes=12)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    nn.init.normal_(model.classifier.bias)
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(model, folder)
    return str(folder)


Make = Callable[..., TeacherCache]


@pytest.fixture(scope="module")
def make(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    def cache(features: str = "none", out: Path | None = None, **given: Any) -> TeacherCache:
        out = out or tmp_path_factory.mktemp("cache")
        values = {"teacher": teacher, "views": 2, "topk": 4, "batch_size": 32, **given}
        return precompute(PrecomputeConfig("digits:100", out=out, features=features, **values))

    return cache


@pytest.fixture(scope="module")
def caches(make: Make) -> dict[str, TeacherCache]:
    """Not to be changed."""
    return {features: make(features) for features in ("none", *BOTH)}


def exact(teacher: str, cache: TeacherCache, view: int) -> tuple[Tensor, Tensor]:
    """Logits of the ten digits and pooled vectors, by timm alone on the view's pixels."""
    model = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    dataset = open_dataset("digits:100")
    config = model.pretrained_cfg
    pipeline = open_pipeline("resident", dataset, SIZE, 100, normalize=(config["mean"], config["std"]))
    (batch,) = pipeline.epoch(cache.targets(view)[0], np.arange(100))
    with torch.no_grad():
        features = model.forward_features(batch.images)
        columns = [LABELS.index(digit) for digit in "0123456789"]
        return model.forward_head(features)[:, columns], model.forward_head(features, pre_logits=True)


@pytest.mark.parametrize("features", BOTH)
def test_every_view_holds_the_vectors_and_restores_all_log_probabilities(caches, teacher, features):
    """Against timm: vectors within their rounding, log-probabilities of all classes within what that makes of them."""
    cache = caches[features]
    cache.verify()
    classifier = cache.classifier()
    for view in range(2):
        logits, vectors = exact(teacher, cache, view)
        kept = cache.table(view).vectors.restored()
        step = vectors.abs().amax(dim=1, keepdim=True) / (2000 if features == "pooled" else 250)
        assert ((kept - vectors).abs() <= step).all()
        away = (classifier.log_probs(kept) - logits.log_softmax(1)).abs()
        assert (away <= 2 * step * classifier.weight.abs().sum(dim=1).max()).all()
        assert away.mean() < (0.001 if features == "pooled" else 0.05)


@pytest.mark.parametrize("features", BOTH)
def test_views_and_top_k_are_those_of_a_cache_without_vectors(caches, features):
    """And but for the vectors nothing else is in the files; a cache without vectors does not mention them."""
    plain, other = caches["none"], caches[features]
    assert "features" not in json.loads((plain.path / HEADER).read_text())
    assert not (plain.path / CLASSIFIER).exists()
    assert (plain.pooled_dim, plain.classifier(), plain.table(0).vectors) == (0, None, None)
    for view in range(2):
        (views, *targets), (expected_views, *expected) = other.targets(view), plain.targets(view)
        for a, b in zip(targets, expected, strict=True):
            assert torch.equal(a, b)
        np.testing.assert_array_equal(views.crop, expected_views.crop)
        tensors, more = (load_tensors(c.path / view_file(view))[0] for c in (plain, other))
        added = {name: (t.dtype, tuple(t.shape)) for name, t in more.items() if name not in tensors}
        expected_columns = {"pooled": (torch.float16, (100, D))}
        if features == "pooled-int8":
            expected_columns = {"pooled": (torch.int8, (100, D)), "pooled_scale": (torch.float32, (100,))}
        assert added == expected_columns
    assert [t.shape for t in other.val_targets()] == [(599, 4)] * 2
    assert "256 numbers" in info(other)["vectors"]
    assert "vectors" not in info(plain)


def test_a_cache_goes_on_only_with_the_same_vectors(caches, make, tmp_path):
    for kind, other in (("none", "pooled"), ("pooled", "none"), ("pooled", "pooled-int8")):
        out = Path(shutil.copytree(caches[kind].path, tmp_path / f"{kind}-{other}"))
        with pytest.raises(BadInput, match=rf"features \(cached: {kind}, given: {other}\)"):
            make(other, out)
    assert make("pooled", tmp_path / "pooled-none", views=3).views == 3


@pytest.mark.parametrize("changed", ["none", "pooled"])
def test_another_kind_starts_over_where_nothing_is_finished(make, tmp_path, changed):
    """Then the classifier is there if, and only if, there are vectors."""
    kept = "pooled" if changed == "none" else "none"
    cache = make(kept, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        if file.name != CLASSIFIER:
            file.unlink()
    cache = make(changed, tmp_path)
    cache.verify()
    assert cache.features == changed
    assert (tmp_path / CLASSIFIER).exists() == (changed == "pooled")


# --- What is refused --------------------------------------------------------------------------------------------------


def rewritten(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """With its own checksum and origin, as if `precompute` had written it."""
    tensors, own = load_tensors(file)
    change(tensors)
    save_tensors(file, tensors, own)


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("features", "file", "change", "said"),
    [
        ("pooled", view_file(1), spoil("pooled", torch.inf), "expected finite pooled, got .* for sample 99"),
        ("pooled", view_file(1), lambda t: t.pop("pooled"), "pooled is missing"),
        ("pooled", view_file(1), lambda t: t.update(pooled=t["pooled"].float()), "expected pooled float16"),
        ("pooled", view_file(1), lambda t: t.update(pooled=t["pooled"][:, 1:]), "expected pooled float16"),
        ("pooled", view_file(1), lambda t: t.update(other=t["pooled"].clone()), "expected the columns"),
        ("pooled-int8", view_file(1), spoil("pooled_scale", -1.0), "of at least 0, got .*-1.* for sample 99"),
        ("pooled-int8", view_file(1), spoil("pooled_scale", torch.nan), "finite pooled_scale"),
        ("pooled-int8", view_file(1), lambda t: t.pop("pooled_scale"), "pooled_scale is missing"),
        ("pooled", CLASSIFIER, spoil("weight", torch.nan), "NaN or infinity in weight"),
        ("pooled", CLASSIFIER, lambda t: t.update(bias=t["bias"][1:]), "expected bias float32"),
        ("none", view_file(1), lambda t: t.update(pooled=t["crop"].clone()), "expected the columns"),
    ],
)
def test_impossible_values_are_found_in_spite_of_a_right_checksum(caches, tmp_path, features, file, change, said):
    path = Path(shutil.copytree(caches[features].path, tmp_path / "cache"))
    rewritten(path / file, change)
    with pytest.raises(BadInput, match=said) as error:
        TeacherCache.open(path).verify()
    assert str(path / file) in str(error.value)


def test_a_damaged_file_and_a_missing_classifier_are_found(caches, make, tmp_path):
    path = Path(shutil.copytree(caches["pooled"].path, tmp_path / "cache"))
    content = (path / CLASSIFIER).read_bytes()
    (path / CLASSIFIER).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BadInput, match="checksum"):
        TeacherCache.open(path)
    (path / CLASSIFIER).unlink()
    with pytest.raises(BadInput, match=f"{CLASSIFIER} is missing; run"):
        TeacherCache.open(path)
    make("pooled", path)
    assert (path / CLASSIFIER).read_bytes() == content


@pytest.mark.parametrize(
    "value",
    ["pooled", {"kind": "pooled"}, {"kind": "float", "width": D}, {"kind": "pooled", "width": 0}, {}, None],
)
def test_a_header_with_impossible_vectors_is_refused(caches, tmp_path, value):
    path = Path(shutil.copytree(caches["pooled"].path, tmp_path / "cache"))
    header = json.loads((path / HEADER).read_text())
    (path / HEADER).write_text(json.dumps({**header, "features": value}))
    with pytest.raises(BadInput, match="features"):
        TeacherCache.open(path)


class Squashed(nn.Module):
    """Ends like a timm model, but its logits are not linear in the vector."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Convolved(Squashed):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 5, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x[..., None, None]).flatten(1)


class Unpooled(Squashed):
    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Squashed, "the linear layer's outputs differ from its logits by"),
        (Convolved, "it has Conv2d"),
        (Unpooled, "pre_logits"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1, img_size=SIZE), "it has 2 classifiers"),
    ],
)
def test_a_head_that_is_not_linear_is_refused_in_one_line(model, said):
    with pytest.raises(BadInput, match=said) as error:
        check_linear_head(model(), torch.randn(4, 3, SIZE, SIZE), "teacher t")
    assert str(error.value).startswith("teacher t: expected")
    assert "\n" not in str(error.value)


def test_nothing_is_written_for_such_a_teacher(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=SIZE)
    folder = tmp_path / "teacher"
    save_for_hf(model, str(folder), safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE)})
    with pytest.raises(BadInput, match="2 classifiers; leave --features out"):
        precompute(PrecomputeConfig("digits:100", str(folder), tmp_path / "cache", 1, 4, features="pooled"))
    assert not list((tmp_path / "cache").glob("*"))


def test_vectors_beyond_fp16_are_refused_with_the_remedy(tmp_path, teacher):
    """A teacher whose vectors are of the size 1e6 and whose classifier is that much smaller; int8 stores them."""
    model = timm.create_model(f"local-dir:{teacher}", pretrained=True)
    with torch.no_grad():
        model.bn2.weight *= 1e7
        model.bn2.bias *= 1e7
        model.classifier.weight /= 1e7
    folder = tmp_path / "large"
    save_teacher(model, folder)
    config = {"data": "digits:100", "teacher": str(folder), "views": 1, "topk": 4}
    with pytest.raises(BadInput, match=r"they exceed it for .*; use --features pooled-int8"):
        precompute(PrecomputeConfig(out=tmp_path / "cache", features="pooled", **config))
    kept = precompute(PrecomputeConfig(out=tmp_path / "int8", features="pooled-int8", **config))
    assert kept.table(0).vectors.restored().abs().max() > 65_504


# --- Lookup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", BOTH)
def test_lookup_restores_the_rows(features):
    """Of the whole table, and of a rank's share of it; all log-probabilities against float64."""
    vectors, weight, bias = torch.randn(10, 6), torch.randn(8, 6), torch.randn(8)
    kept = stored(vectors, features)
    best = TopK(torch.randint(8, (10, 2)).to(torch.uint16), torch.zeros(10, 2).half())
    classifier = Classifier(weight, bias)
    whole = DeviceTargets(best, CPU, vectors=kept, classifier=classifier)
    share = DeviceTargets(best, CPU, rows=np.array([7, 2, 9]), vectors=kept, classifier=classifier)
    exact = (kept.restored().double() @ weight.double().T + bias.double()).log_softmax(1)
    for ids in ([7, 2, 9], [9, 9, 7], [2], []):
        for table in (whole, share):
            found = table.lookup(torch.tensor(ids, dtype=torch.int64))
            assert torch.equal(found.pooled, kept.restored()[ids])
            torch.testing.assert_close(found.all_log_probs, exact[ids].float(), rtol=1e-5, atol=1e-5)
    alone = DeviceTargets(best, CPU, vectors=kept).lookup(torch.tensor([1]))
    assert (alone.pooled.shape, alone.all_log_probs) == ((1, 6), None)


@pytest.mark.parametrize("method", [DKD, DIST, LSKD])
def test_methods_of_all_classes_are_exact_with_all_log_probabilities(method):
    """The same loss as from a table of all classes, at any top K; without them, the even tail is another loss."""
    logits, labels = torch.randn(16, C) * 3, torch.randint(C, (16,))
    log_probs = (torch.randn(16, C) * 3).log_softmax(1)
    values, classes = log_probs.topk(3)
    everything, order = log_probs.topk(C)
    instance = method(method.Options(), Sizes(C))

    def loss(targets: Targets) -> Tensor:
        return instance.loss(Outputs(logits[None]), targets, labels)

    dense, sparse = loss(Targets(order, everything)), loss(Targets(classes, values))
    rebuilt = loss(Targets(classes, values, all_log_probs=log_probs))
    torch.testing.assert_close(rebuilt, dense, rtol=1e-5, atol=1e-6)
    assert abs(sparse - dense) > 1e-3 * dense


# --- The student's vector ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(), (1, 2, 3, 4)])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "mobilenetv3_small_050"])
def test_the_students_vector_is_the_input_of_its_classifier(name, stages):
    """All heads equal those without the vector, also while it learns; the last is timm's classifier of the vector."""
    if name.startswith("mobilenetv3") and stages:
        stages = (2, 3, 4)
    student = Student(name, C, SIZE if name != "test_vit" else None, stages=stages)
    side = student.image_size
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    for training in (False, True):
        student.train(training)
        with torch.no_grad():
            heads, pooled, _ = student.with_features(images, pooled=True)
            torch.testing.assert_close(heads, student(images))
            torch.testing.assert_close(student.backbone.get_classifier()(pooled), heads[-1])
    assert pooled.shape == (3, student.pooled_dim())
    assert student.training


def test_a_student_without_a_linear_head_is_refused():
    student = Student("deit_tiny_distilled_patch16_224", C, SIZE, stages=())
    with pytest.raises(BadInput, match=r"student deit_tiny_distilled_patch16_224: expected .* it has 2 classifiers"):
        student.pooled_dim()


def test_the_open_teachers_classifier_has_the_datas_columns(teacher):
    opened = open_teacher(teacher, tuple("0123456789"))
    images = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    log_probs, vectors = opened.with_pooled(images)
    torch.testing.assert_close(log_probs, opened.log_probs(images))
    torch.testing.assert_close(opened.classifier.log_probs(vectors), log_probs, rtol=1e-4, atol=1e-4)
    assert Vectors(vectors).restored().shape == (5, opened.check_linear_head(images))
