"""Fidelity: what a cache reports about its predictions is what students would see, and --topk auto acts on it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.commands import cache as cache_command
from fastofa.commands import precompute as precompute_command
from fastofa.commands.arguments import CacheConfig
from fastofa.kernels import ofa_loss
from fastofa.methods.targets import TopK
from fastofa.pipelines import open_pipeline
from fastofa.reports.page import write_report
from fastofa.system.errors import BadInput
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.ensemble import Ensemble
from fastofa.teacher.fidelity import (
    FIDELITY,
    STUDENTS,
    Fidelity,
    Sample,
    compare,
    held_back,
    less_exact,
    measure,
    read_fidelity,
    smallest_topk,
    students_logits,
    top_k,
)
from fastofa.teacher.model import open_teacher
from fastofa.teacher.packed_rows import PackedRows, packed
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.loop import train
from fastofa.views.policy import ViewPolicy

DIGITS = tuple("0123456789")


def made_up(images: int = 70, classes: int = 40, deviation: float = 3.0) -> Sample:
    logits = torch.randn(images, classes) * deviation
    return Sample(logits.log_softmax(dim=1), torch.randint(classes, (images,)))


def alone(folder: str) -> Ensemble:
    return Ensemble((open_teacher(folder, DIGITS, image_size=32),), (1.0,), (folder,))


def gradient(sample: Sample, student: str, eps: float, topk: int) -> tuple[float, Tensor]:
    """Loss and gradient [N, C] of the loss that training uses, from the K best classes as stored; in float64."""
    logits = students_logits(sample.log_probs)[student][None].requires_grad_()
    log_probs, classes = sample.log_probs.topk(topk)
    if topk < sample.log_probs.shape[1]:
        rows = packed(TopK(classes, log_probs), sample.log_probs.shape[1])
        assert isinstance(rows, PackedRows)
        log_probs = rows.unpacked().log_probs
    loss = ofa_loss(logits, sample.labels, classes, log_probs.double(), eps, impl="torch")[0]
    loss.backward()
    return loss.item(), logits.grad[0]


# --- Figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [1, 5, 39])
def test_the_figures_are_those_of_the_loss_that_training_uses(topk):
    """From the top K against from all classes, for both students and two eps; also the probability that is kept."""
    sample = made_up()
    found = measure(sample, topk, (1.0, 1.5))
    assert [(loss.eps, loss.student) for loss in found.losses] == [(e, s) for e in (1.0, 1.5) for s in STUDENTS]
    for figures in found.losses:
        loss, g = gradient(sample, figures.student, figures.eps, 40)
        stored_loss, h = gradient(sample, figures.student, figures.eps, topk)
        assert figures.loss_error == pytest.approx(abs(stored_loss - loss) / loss, rel=1e-3, abs=1e-7)
        assert figures.gradient_error == pytest.approx(((h - g).norm() / g.norm()).item(), rel=1e-3)
        assert figures.cosine == pytest.approx(F.cosine_similarity(g.flatten(), h.flatten(), dim=0).item(), abs=1e-6)
    kept = np.sort(sample.log_probs.double().exp().numpy(), axis=1)[:, ::-1][:, :topk].sum(axis=1)
    assert (found.images, found.kept) == (70, pytest.approx(kept.mean(), abs=1e-6))
    assert found.kept_p1 == pytest.approx(np.quantile(kept, 0.01), abs=1e-6)


def test_probability_that_lies_with_other_classes():
    """One image, by hand: of .5 .3 .15 .05, the top 2 spread .2 evenly, so that .05 moves."""
    sample = Sample(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([0]))
    assert measure(sample, 2, (1.0,)).moved == pytest.approx(0.05, abs=5e-3)
    assert measure(sample, 4, (1.0,)).moved == pytest.approx(0, abs=1e-3)


def test_exact_predictions_change_nothing():
    sample = made_up()
    for loss in compare(sample, sample.log_probs.double().exp(), (0.8, 2.0)):
        assert (loss.loss_error, loss.gradient_error) == (0, 0)
        assert loss.cosine == pytest.approx(1)


def test_a_method_sees_a_distribution():
    """The K best as they are, the others all equal; renormalised if all classes are stored."""
    sample = made_up(5, 6)
    seen = top_k(2)(sample.log_probs)
    exact = sample.log_probs.exp()
    torch.testing.assert_close(seen.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(seen.topk(2).values, exact.topk(2).values, rtol=0.05, atol=1e-6)
    rest = seen.sort(dim=1).values[:, :4]
    torch.testing.assert_close(rest, rest[:, :1].expand(-1, 4))
    torch.testing.assert_close(top_k(6)(sample.log_probs), exact, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("deviation", [0.01, 1.0, 3.0, 9.0])
def test_the_smallest_k_is_the_first_that_suffices(deviation):
    """By trying all of them; the even tail of a flat distribution is exact from the first."""
    sample = made_up(deviation=deviation)
    enough = (k for k in range(1, 41) if measure(sample, k, (1.0, 1.5)).cosine >= 0.999)
    assert smallest_topk(sample, (1.0, 1.5)) == next(enough)


def test_a_data_set_of_one_class_has_no_errors():
    sample = Sample(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
    assert {(x.loss_error, x.cosine, x.gradient_error) for x in measure(sample, 1, (1.0,)).losses} == {(0, 1, 0)}
    assert smallest_topk(sample, (1.0,)) == 1


# --- The images held back ---------------------------------------------------------------------------------------------


def test_the_label_of_a_mixed_image_is_that_of_its_larger_share(teacher, digits):
    """As in training: from the table of the same view, by hand."""
    pipeline = open_pipeline("resident", digits, 32, 16)
    opened = alone(teacher)
    plain, mixed = (
        held_back(opened, digits, pipeline, policy, seed=0)
        for policy in (ViewPolicy(flip=0.0), ViewPolicy(flip=0.0, mixup=1.0))
    )
    assert plain.log_probs.shape == mixed.log_probs.shape == (100, 10)
    torch.testing.assert_close(plain.log_probs.exp().sum(dim=1), torch.ones(100))
    assert plain.labels.tolist() == digits.labels.tolist()
    changed = (mixed.labels != plain.labels).float().mean().item()
    assert 0.25 < changed < 0.6  # half of the images are the smaller share; a tenth of the partners have the same label


# --- The cache --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make(teacher: str, tmp_path_factory: pytest.TempPathFactory):
    """make(topk, ...) -> a cache of 50 digits in a new folder, or in `out`."""

    def cache(topk: object, out: Path | None = None, **given) -> TeacherCache:
        out = out or tmp_path_factory.mktemp("cache")
        return precompute(
            PrecomputeConfig("digits:50", teacher, out, **{"views": 1, "topk": topk, "image_size": 32, **given})
        )

    return cache


@pytest.fixture(scope="module")
def small(make) -> TeacherCache:
    """K = 2. Tests must not change it."""
    return make(2)


def fidelity(cache: TeacherCache) -> Fidelity:
    found = read_fidelity(cache.path, cache.header)
    assert found is not None
    return found


def test_a_cache_reports_the_probability_that_its_views_keep(small):
    """The held-back view is another draw of the same images: its mean differs little from a stored view's."""
    _, _, log_probs = small.targets(0)
    found = fidelity(small)
    assert found.images == 50
    assert found.kept == pytest.approx(log_probs.double().exp().sum(dim=1).mean().item(), abs=0.05)
    assert found.kept_p1 <= found.kept
    assert {loss.eps for loss in found.losses} == {1.0, 1.5}


def test_a_recipes_eps_is_the_one_measured(make):
    assert {loss.eps for loss in fidelity(make(2, recipe="digits")).losses} == {1.0}


def test_too_few_classes_are_reported_before_the_views(make, capsys):
    """One line with the remedy; none if all classes are stored."""
    make(1)
    lines = capsys.readouterr().err.splitlines()
    (warned,) = (i for i, line in enumerate(lines) if "--topk auto" in line)
    assert "expected at least 0.999" in lines[warned]
    assert warned < next(i for i, line in enumerate(lines) if "validation images" in line)
    make(10)
    assert "--topk auto" not in capsys.readouterr().err


def test_the_command_ends_with_the_figures_and_info_shows_them(teacher, tmp_path, capsys):
    precompute_command.main(PrecomputeConfig("digits:50", teacher, tmp_path / "cache", views=1, topk=4, image_size=32))
    figures = fidelity(TeacherCache.open(tmp_path / "cache"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"{figures.kept:.2%}" in said
    assert "(eps 1)" in said
    assert "(eps 1.5)" in said
    cache_command.main(CacheConfig("info", (str(tmp_path / "cache"),)))
    told = " ".join(capsys.readouterr().out.split())
    for loss in less_exact(figures.losses):
        assert f"OFA loss, eps {loss.eps:g}" in told
        assert f"{loss.gradient_error:.2%}" in told


def test_auto_stores_the_smallest_k_and_keeps_it(make, tmp_path, monkeypatch):
    """Also when views are added, without measuring again; --topk with that number continues it, too."""
    cache = make("auto", tmp_path / "cache")
    assert cache.header["topk_chosen"] == "auto"
    assert fidelity(cache).cosine >= 0.999
    assert cache.topk == 1 or fidelity(make(cache.topk - 1)).cosine < 0.999
    same = make(cache.topk)
    assert same.targets(0)[1].tolist() == cache.targets(0)[1].tolist()

    monkeypatch.setattr("fastofa.teacher.precompute.smallest_topk", lambda *_: pytest.fail("chosen again"))
    for topk in ("auto", cache.topk):
        grown = make(topk, tmp_path / "cache", views=2)
        assert (grown.topk, grown.header["topk_chosen"]) == (cache.topk, "auto")
    with pytest.raises(BadInput, match=r"topk \(cached: \d+, given: auto\)"):
        make("auto", same.path)
    with pytest.raises(BadInput, match=r"topk \(cached: \d+, given: 10\)"):
        make(10, tmp_path / "cache")


def test_fidelity_is_measured_once(make, tmp_path, monkeypatch):
    """And again if the file is missing or describes another cache."""
    cache = make(3, tmp_path / "cache")
    before = (cache.path / FIDELITY).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("fastofa.teacher.cache_job.held_back", lambda *_: pytest.fail("measured again"))
        make(3, cache.path, views=2)
    assert (cache.path / FIDELITY).read_bytes() == before
    (cache.path / FIDELITY).unlink()
    assert read_fidelity(cache.path, cache.header) is None
    make(3, cache.path, views=2)
    assert (cache.path / FIDELITY).read_bytes() == before
    shutil.copy(make(4).path / FIDELITY, cache.path / FIDELITY)
    assert read_fidelity(cache.path, cache.header) is None
    make(3, cache.path, views=2)
    assert (cache.path / FIDELITY).read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda values: {**values, "losses": []},
        lambda values: {**values, "losses": 3},
        lambda values: {**values, "kept": "all"},
        lambda values: {**values, "losses": [{**values["losses"][0], "student": ["x"]}]},
        lambda values: {**values, "more": 1},
        lambda values: [],
    ],
)
def test_an_edited_file_is_refused_in_one_line(small, tmp_path, change):
    values = json.loads((small.path / FIDELITY).read_text())
    (tmp_path / FIDELITY).write_text(json.dumps(change(values)))
    with pytest.raises(BadInput, match=rf"{FIDELITY}: expected figures .* delete it") as error:
        read_fidelity(tmp_path, small.header)
    assert "\n" not in str(error.value)


def test_an_edited_header_with_another_choice_of_k(small, tmp_path):
    shutil.copytree(small.path, tmp_path / "cache")
    header = json.loads((tmp_path / "cache" / HEADER).read_text())
    (tmp_path / "cache" / HEADER).write_text(json.dumps({**header, "topk_chosen": 3}))
    with pytest.raises(BadInput, match="for topk_chosen"):
        TeacherCache.open(tmp_path / "cache")


@pytest.mark.parametrize("topk", ["all", 0])
def test_other_values_of_topk_are_refused(topk):
    with pytest.raises(BadInput, match="topk: expected"):
        PrecomputeConfig("digits", "teacher", Path("cache"), 1, topk)


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_report_shows_the_figures_of_the_runs_cache(on_photos, photo_cache):
    """Only while the cache is there."""
    config = on_photos(epochs=1)
    train(config)
    page = write_report(config.out).read_text()
    (figures,) = {loss.gradient_error for loss in fidelity(photo_cache).losses[:1]}
    assert "Teacher cache</h2>" in page
    assert f"{figures:.2%}" in page
    values = json.loads((config.out / "config.json").read_text())
    values["config"]["cache"] = "gone"
    (config.out / "config.json").write_text(json.dumps(values))
    assert "Teacher cache</h2>" not in write_report(config.out).read_text()


def test_the_report_shows_the_figures_of_a_cache_at_a_url(on_photos, photo_cache, tmp_path):
    """The same as of the folder, also when the URL can no longer be reached; another cache's figures are not shown."""
    there = Path(shutil.copytree(photo_cache.path, tmp_path / "there"))
    local, remote, other = (on_photos(name, epochs=1) for name in ("local", "remote", "other"))
    train(local)
    train(dataclasses.replace(remote, cache=f"file://{there}"))
    values = json.loads((there / FIDELITY).read_text())
    (there / FIDELITY).write_text(json.dumps({**values, "cache": {**values["cache"], "seed": 7}}))
    train(dataclasses.replace(other, cache=f"file://{there}"))
    shutil.rmtree(there)
    section = r"Teacher cache</h2>.*?</section>"
    expected, shown = (re.search(section, write_report(c.out).read_text(), re.DOTALL) for c in (local, remote))
    assert expected is not None
    assert shown is not None
    assert shown[0] == expected[0]
    assert "Teacher cache</h2>" not in write_report(other.out).read_text()


def test_a_damaged_fidelity_at_a_url_does_not_stop_a_run(on_photos, photo_cache, tmp_path, capsys):
    there = Path(shutil.copytree(photo_cache.path, tmp_path / "there"))
    (there / FIDELITY).write_text("[]")
    config = on_photos(epochs=1, cache=f"file://{there}")
    train(config)
    assert f"file://{there}/{FIDELITY}: expected figures written by" in " ".join(capsys.readouterr().err.split())
    assert "Teacher cache</h2>" not in write_report(config.out).read_text()


def test_a_report_of_a_run_without_a_cache(on_photos):
    config = dataclasses.replace(on_photos(epochs=1), cache=None, method="scratch")
    train(config)
    assert "Teacher cache</h2>" not in write_report(config.out).read_text()
