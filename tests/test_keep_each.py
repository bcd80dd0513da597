"""A cache keeps several teachers apart, and each run weighs them: the mean is exact, in the loss as in the cache."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from fastofa.commands import cache as cache_command
from fastofa.commands.arguments import CacheConfig
from fastofa.data.open import open_dataset
from fastofa.kernels import ofa_loss
from fastofa.kernels.reference import ofa_loss_dense
from fastofa.methods.targets import Targets, TopK
from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.run import CONFIG
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.system.interrupt import Stopped
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.compare_caches import compare
from fastofa.teacher.compiled_teacher import TopKProgram
from fastofa.teacher.device_targets import DeviceTargets, MixedTargets
from fastofa.teacher.fidelity import Sample, measure, read_fidelity
from fastofa.teacher.merge import merge
from fastofa.teacher.packed_rows import packed
from fastofa.teacher.parts import PARTS
from fastofa.teacher.plan import plan
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.push_pull import pull, push
from fastofa.teacher.staged_cache import open_cache
from fastofa.teacher.table_checks import best_classes_fault
from fastofa.training.evaluate import evaluate
from fastofa.training.loop import train

CPU = torch.device("cpu")
WEIGHTS = (0.3, 0.7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two teachers of other architectures and normalisations, with large random weights."""
    made = []
    for mean, name in ((0.5, "test_efficientnet"), (0.2, "test_resnet")):
        torch.manual_seed(len(name))
        model = timm.create_model(name, num_classes=10)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
        folder = tmp_path_factory.mktemp(name)
        config = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (mean,) * 3, "std": (0.3,) * 3}
        save_for_hf(model, str(folder), safe_serialization=True, data_config=config, model_args={"num_classes": 10})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "label_names": list("0123456789")}))
        made.append(str(folder))
    return made[0], made[1]


@pytest.fixture(scope="module")
def make(folders, tmp_path_factory: pytest.TempPathFactory):
    """make(out, ...) -> a cache of 40 digits that keeps both teachers' top 3."""

    def cache(out: Path | None = None, **given) -> TeacherCache:
        values = {"teacher": folders, "keep_each": True, "views": 1, "topk": 3, **given}
        return precompute(PrecomputeConfig("digits:40", out=out or tmp_path_factory.mktemp("cache"), **values))

    return cache


@pytest.fixture(scope="module")
def kept(make) -> TeacherCache:
    """Two views; tests must not change it."""
    return make(views=2)


@pytest.fixture
def run(kept, tmp_path, no_report):
    def config(name: str = "run", **given) -> TrainConfig:
        values = {
            "data": "digits:40", "cache": str(kept.path), "student": "test_resnet", "out": tmp_path / name,
            "epochs": 2, "batch_size": 20, "warmup_epochs": 0, "eval_every": 2, **given,
        }  # fmt: skip
        return recipes.digits(**values)

    return config


def by_hand(each: list[TopK], weights: tuple[float, ...], num_classes: int) -> Tensor:
    """The mean of the teachers' probabilities with their even tails, float64 [N, C], class by class."""
    total = np.zeros((len(each[0].classes), num_classes))
    for (classes, log_probs), weight in zip(each, weights, strict=True):
        for n, (row, values) in enumerate(zip(classes.tolist(), log_probs.double().exp().tolist(), strict=True)):
            spread = max(0.0, 1 - sum(values)) / max(1, num_classes - len(row))
            probs = dict(zip(row, values, strict=True))
            total[n] += [weight * probs.get(c, spread) for c in range(num_classes)]
    return torch.from_numpy(total)


# --- The mean ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teachers", "topk", "num_classes", "scale"), [(2, 3, 12, 2.0), (3, 4, 10, 2.0), (2, 10, 10, 2.0), (2, 4, 40, 0.02)]
)
@pytest.mark.parametrize("rows", [None, np.array([5, 2, 7])])
def test_the_mean_and_its_loss_are_exact(teachers, topk, num_classes, scale, rows):
    """Against float64, and the loss and its gradient against those of all classes; also where 3 x 4 exceeds 10 classes,
    all are kept, or the teachers are so flat that rounding reorders them."""
    weights = (0.2, 0.5, 0.3) if teachers == 3 else WEIGHTS
    torch.manual_seed(topk)
    stored = [
        packed(topk_targets((scale * torch.randn(8, num_classes)).log_softmax(dim=1), topk), num_classes)
        for _ in range(teachers)
    ]
    each = [own if isinstance(own, TopK) else own.unpacked() for own in stored]
    if topk == num_classes:
        each = [TopK(own.classes, own.log_probs.double().log_softmax(dim=1)) for own in each]
    expected = by_hand(each, weights, num_classes)
    table = MixedTargets([DeviceTargets(own, CPU, rows=rows) for own in stored], weights, num_classes, True)
    picked = torch.arange(8) if rows is None else torch.from_numpy(rows)
    assert len(table) == len(picked)
    targets, expected = table.lookup(picked), expected[picked]
    assert targets.all_log_probs is not None
    torch.testing.assert_close(targets.all_log_probs.double().exp(), expected, rtol=1e-5, atol=1e-7)

    wide = min(teachers * topk, num_classes)
    assert targets.classes.shape == targets.log_probs.shape == (len(picked), wide)
    assert all(len(set(row)) == wide for row in targets.classes.tolist())
    assert torch.equal(expected.gather(1, targets.classes[:, :1].long())[:, 0], expected.amax(dim=1))
    sparse = Targets(targets.classes, targets.log_probs)
    for temperature in (1.0, 4.0):
        probs = expected ** (1 / temperature)
        probs /= probs.sum(dim=1, keepdim=True)
        torch.testing.assert_close(sparse.probs(num_classes, temperature).double(), probs, rtol=1e-4, atol=1e-6)

    labels, eps = torch.randint(num_classes, (len(picked),)), torch.tensor([1.5])
    a, b = (torch.randn(1, len(picked), num_classes, dtype=torch.float64).requires_grad_() for _ in range(2))
    b.data.copy_(a.data)
    (got,) = ofa_loss(a.float(), labels, targets.classes, targets.log_probs, eps=1.5)
    (exact,) = ofa_loss_dense(b, labels, expected, eps)
    got.backward(), exact.backward()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_methods_get_all_classes_only_if_they_need_them():
    stored = packed(topk_targets(torch.randn(4, 9).log_softmax(dim=1), 2), 9)
    table = MixedTargets([DeviceTargets(stored, CPU)] * 2, WEIGHTS, 9, False)
    assert table.lookup(torch.arange(4)).all_log_probs is None


# --- The cache --------------------------------------------------------------------------------------------------------


def test_each_column_is_what_the_teacher_stores_alone(make, kept, folders):
    """Byte for byte, in a view and for the validation images; with all classes kept, too."""
    alone = [make(teacher=folder, keep_each=False) for folder in folders]
    for file in (view_file(0), VAL):
        columns = load_tensors(kept.path / file)[0]
        for number, cache in enumerate(alone, 1):
            own = load_tensors(cache.path / file)[0]["predictions"]
            assert torch.equal(columns[f"predictions_{number}"], own)
    assert set(load_tensors(kept.path / VAL)[0]) == {"predictions_1", "predictions_2"}
    dense, first = make(topk=10), make(teacher=folders[0], keep_each=False, topk=10)
    columns, own = (load_tensors(cache.path / view_file(0))[0] for cache in (dense, first))
    assert torch.equal(columns["log_probs_1"], own["log_probs"])
    assert columns["classes_2"].shape == (40, 10)
    dense.verify()


def test_the_cache_predicts_the_mean(kept, make, folders):
    """The best classes of the mean with the weights given, by default those of the cache."""
    each = [make(teacher=folder, keep_each=False).val_targets() for folder in folders]
    for given in (None, WEIGHTS):
        expected = by_hand(each, given or (0.5, 0.5), 10)
        got = kept.val_targets(given)
        torch.testing.assert_close(
            got.log_probs.double().exp(), expected.gather(1, got.classes.long()), rtol=1e-5, atol=1e-7
        )
        assert torch.equal(expected.gather(1, got.classes[:, :1].long())[:, 0], expected.amax(dim=1))


def test_a_stopped_precompute_continues_to_the_same_bytes(make, tmp_path, monkeypatch):
    straight = make(tmp_path / "straight", batch_size=16)
    original, calls = TopKProgram.__call__, [0]

    def call(self: TopKProgram, images: Tensor) -> dict[str, Tensor]:
        calls[0] += 1
        if calls[0] == 2 * (-(-599 // 16) + 1):
            signal.raise_signal(signal.SIGTERM)
        return original(self, images)

    monkeypatch.setattr(TopKProgram, "__call__", call)
    with pytest.raises(Stopped):
        make(tmp_path / "cache", batch_size=16)
    (part,) = (tmp_path / "cache").glob(PARTS)
    assert len(load_tensors(part)[0]["classes_2"]) == 16
    again = make(tmp_path / "cache", batch_size=16)
    for file in straight.path.glob("*.safetensors"):
        assert (again.path / file.name).read_bytes() == file.read_bytes()


def test_merge_diff_verify_and_info(kept, make, tmp_path, capsys):
    parts = make(), make(views=2, first_view=1)
    joined = merge([part.path for part in parts], tmp_path / "joined")
    joined.verify()
    for view in range(2):
        assert (joined.path / view_file(view)).read_bytes() == (kept.path / view_file(view)).read_bytes()
    result = compare(kept, make(topk=10))
    assert {each.field for each in result.identity} == {"topk"}
    assert result.validation is not None
    assert 0 <= result.validation.kl < 0.5
    capsys.readouterr()
    cache_command.main(CacheConfig("info", (str(kept.path),)))
    said = " ".join(capsys.readouterr().out.split())
    assert "top 3 of 10, of each teacher" in said
    assert "0.5 of test_efficientnet" in said


def test_a_cache_at_a_url_is_the_same(kept, tmp_path):
    """Pushed, pulled, and read view by view where it lies."""
    url = f"file://{tmp_path}/pushed"
    push(kept.path, url)
    pulled, staged = pull(url, tmp_path / "pulled"), open_cache(url)
    pulled.verify()
    assert staged.weights() == (0.5, 0.5)
    for own, expected in zip(staged.table(1).of_each(), kept.table(1).of_each(), strict=True):
        assert torch.equal(own.rows, expected.rows)


def test_a_damaged_column_names_the_teacher(make, tmp_path):
    cache = make(tmp_path / "cache")
    columns = load_tensors(cache.path / VAL)[0]
    damaged = {**columns, "predictions_2": columns["predictions_2"][:, 1:].contiguous()}
    assert "teacher 2" in best_classes_fault(damaged, cache.header, 599)
    assert best_classes_fault(columns, cache.header, 599) == ""
    del damaged["predictions_2"]
    assert "missing" in best_classes_fault(damaged, cache.header, 599)


def test_the_fidelity_is_that_of_the_mean(kept):
    """All classes kept are exact; fewer are less so, and the kept probability is the weighted mean."""
    torch.manual_seed(0)
    each = tuple((2 * torch.randn(30, 10)).log_softmax(dim=1) for _ in range(2))
    mean = (0.3 * each[0].double().exp() + 0.7 * each[1].double().exp()).log().float()
    sample = Sample(mean, torch.randint(10, (30,)), each, WEIGHTS)
    some, every = (measure(sample, k, (1.0,)) for k in (3, 10))
    assert every.cosine > 0.9999 > some.cosine
    best = [own.double().exp().sort(dim=1, descending=True).values[:, :3].sum(dim=1) for own in each]
    assert some.kept == pytest.approx((0.3 * best[0] + 0.7 * best[1]).mean().item())
    assert read_fidelity(kept.path, kept.header) is not None


def test_topk_auto_and_the_plan(make, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("fastofa.teacher.plan.SECONDS", 0.05)
    assert 1 <= make(topk="auto").topk <= 10
    values = {"teacher": folders, "views": 1, "topk": 3, "plan": True, "out": tmp_path / "no"}
    each, mean = (plan(PrecomputeConfig("digits:40", keep_each=keep, **values)) for keep in (True, False))
    assert each is not None
    assert mean is not None
    assert each.row_bytes - mean.row_bytes == 6  # 3 classes of 4 bits, 15 and 2 x 7: 41 bits


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ofa", "dkd"])
def test_a_run_learns_from_the_weighted_mean(run, kept, method, monkeypatch):
    """The targets of its batches are the mean of what the cache holds for these images, with the weights given."""
    seen: list[Targets] = []
    original = MixedTargets.of

    def of(self, batch):
        found = original(self, batch)
        seen.append(found._replace(sample_ids=batch.rows))
        return found

    monkeypatch.setattr(MixedTargets, "of", of)
    train(run(method=method, teacher_weights=WEIGHTS, epochs=1, eval_every=1))
    each = [own.unpacked() for own in kept.table(0).of_each()]
    expected = by_hand(each, WEIGHTS, 10)
    for targets in seen:
        assert (targets.all_log_probs is None) == (method == "ofa")
        torch.testing.assert_close(targets.probs(10).double(), expected[targets.sample_ids], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_ends_with_the_same_bits_and_its_weights_are_fixed(run):
    """A run continues from its second checkpoint of four; other weights, and the cache's own, are refused."""
    config = run(teacher_weights=WEIGHTS, checkpoint_every=1, keep=4)
    train(config)
    assert json.loads((config.out / CONFIG).read_text())["config"]["teacher_weights"] == [0.3, 0.7]
    steps = sorted((config.out / "checkpoints").glob("step-*"))
    straight = load_tensors(steps[-1])[0]
    for step in steps[2:]:
        step.unlink()
    for other in (None, (0.6, 0.4)):
        with pytest.raises(BadInput, match="teacher_weights: "):
            train(dataclasses.replace(config, resume=True, teacher_weights=other))
    train(dataclasses.replace(config, resume=True))
    again = load_tensors(steps[-1])[0]
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_the_default_weights_are_those_of_the_cache(run):
    """They are recorded, and other weights change the result."""
    default, other = run("default", epochs=1), run("other", epochs=1, teacher_weights=(0.9, 0.1))
    results = []
    for config in (default, other):
        train(config)
        (newest,) = (config.out / "checkpoints").glob("step-*")
        results.append(load_tensors(newest)[0])
    assert json.loads((default.out / CONFIG).read_text())["config"]["teacher_weights"] == [0.5, 0.5]
    assert not all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_evaluate_compares_with_the_mean_of_the_run(run, kept):
    config = run(teacher_weights=(0.9, 0.1), epochs=1)
    train(config)
    best, others = (kept.val_targets(weights).classes[:, 0].long().numpy() for weights in ((0.9, 0.1), (0.5, 0.5)))
    student = load_tensors(config.out / "val_predictions.safetensors")[0]["best"][:, 0].numpy()
    result = evaluate(config.out)
    assert result.teacher_top1 == (best == open_dataset("digits:40", "val").labels).mean()
    assert result.agreement == (best == student).mean()
    assert (best != others).any()


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.0,), r"teacher-weights: expected 2, one per teacher of .*, got 1 \(1\)"),
        ((0.5, 0.3), "teacher-weights: expected numbers above 0 with a sum of 1, got 0.5 0.3"),
        ((1.0, 0.0), "teacher-weights: expected numbers above 0"),
    ],
)
def test_impossible_weights_are_refused(run, weights, said):
    with pytest.raises(BadInput, match=said):
        train(run(teacher_weights=weights))
    assert not run().out.exists()


def test_other_caches_take_no_weights(run, make, folders):
    mean = make(keep_each=False)
    with pytest.raises(BadInput, match="teacher-weights: expected a cache made with `fastofa precompute --keep-each`"):
        train(run(cache=str(mean.path), teacher_weights=WEIGHTS))
    with pytest.raises(BadInput, match="teacher-weights: expected --cache"):
        run(cache=None, method="scratch", teacher_weights=WEIGHTS)
    assert "keep_each" not in (mean.path / HEADER).read_text()


def test_precompute_refuses(make, kept, folders, tmp_path):
    with pytest.raises(BadInput, match="keep-each: expected several --teacher"):
        make(teacher=folders[0])
    with pytest.raises(BadInput, match="features: expected none with several teachers"):
        make(features="pooled")
    shutil.copytree(kept.path, tmp_path / "cache")
    with pytest.raises(BadInput, match=r"keep-each \(cached: True, given: False\)"):
        make(tmp_path / "cache", keep_each=False)


@pytest.mark.parametrize("value", [False, 1, "yes"])
def test_an_edited_header_is_refused(kept, tmp_path, value):
    header = json.loads((kept.path / HEADER).read_text())
    (tmp_path / HEADER).write_text(json.dumps({**header, "keep_each": value}))
    with pytest.raises(BadInput, match="for keep_each"):
        TeacherCache.open(tmp_path)
