"""Parts of a teacher cache that were computed separately, joined; and two caches compared."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from fastofa.cli import main
from fastofa.methods.targets import TopK
from fastofa.system.errors import BadInput
from fastofa.system.files import filling, load_tensors, save_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.cache_header import HEADER
from fastofa.teacher.compare_caches import agreement, compare
from fastofa.teacher.merge import gaps, merge
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.reference_images import SEEN
from runs import make_cache

Part = Callable[..., Path]


@pytest.fixture(scope="module")
def part(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Part:
    """part(views, first_view, ...) -> folder of a cache of the photographs with these views; one of two classes kept.
    Tests must not change it."""
    folder = tmp_path_factory.mktemp("parts")
    make_cache(str(photos), 2, folder, topk=1)
    made: dict[Any, Path] = {(2, 0): folder / "cache"}

    def compute(views: int, first_view: int = 0, **given: Any) -> Path:
        key = (views, first_view, *given.items())
        if key not in made:
            values = {"topk": 1, "workers": 0, "teacher": str(folder / "teacher"), **given}
            values |= {"out": folder / str(len(made)), "views": views, "first_view": first_view}
            made[key] = precompute(PrecomputeConfig(str(photos), **values)).path
        return made[key]

    return compute


@pytest.fixture
def copied(part: Part, tmp_path: Path) -> Part:
    """The same, but a copy that the test may change."""

    def copy(*args: Any, **given: Any) -> Path:
        return Path(shutil.copytree(part(*args, **given), tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"))

    return copy


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def rewrite(file: Path, **changed: torch.Tensor) -> None:
    """Replace tensors, with a correct checksum."""
    tensors, info = load_tensors(file)
    save_tensors(file, {**tensors, **changed}, info)


# --- Joining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_joined_parts_equal_a_cache_computed_at_once(part, tmp_path, order):
    """Byte for byte, in any order; the parts stay as they are."""
    parts = [part(2), part(3, 2), part(4, 3)]
    before = [files(path) for path in parts]
    joined = merge([parts[i] for i in order], tmp_path / "joined")
    assert (joined.first, joined.views, gaps(joined)) == (0, 4, "")
    joined.verify()
    assert files(joined.path) == files(part(4))
    assert [files(path) for path in parts] == before


def test_a_joined_cache_grows_like_any_other(part, tmp_path):
    """The next views are added, and files that exist are untouched."""
    joined = merge([part(2), part(3, 2)], tmp_path / "joined").path
    before = files(joined)
    config = json.loads((joined / HEADER).read_text())["config"]
    precompute(PrecomputeConfig(config["data"], config["teacher"], joined, 4, 1, workers=0))
    after = files(joined)
    assert after == files(part(4))
    assert {name: after[name] for name in before if name != HEADER} == {
        name: data for name, data in before.items() if name != HEADER
    }


def test_a_part_is_verified_but_not_learned_from(copied):
    path = copied(4, 2)
    cache = TeacherCache.open(path, part=True)
    assert (cache.first, cache.views, cache.finished) == (2, 2, "2")
    assert cache.finished_views == "2 views from view 2 on"
    cache.verify()
    assert cache.table(3).targets.classes.shape == (24, 1)
    with pytest.raises(BadInput, match="expected a view from 2 to 3, got 1"):
        cache.table(1)
    with pytest.raises(
        BadInput, match=r"is missing; run `fastofa cache merge` to join this part, which begins with view 2"
    ):
        TeacherCache.open(path)
    (path / view_file(2)).unlink()
    with pytest.raises(BadInput, match=f"{view_file(2)} is missing; run `fastofa precompute` again"):
        TeacherCache.open(path, part=True)


def test_extending_adds_to_the_first_cache(copied, part, capsys):
    """`fastofa cache extend`; repeating it changes nothing. Equal views in both are accepted."""
    path = copied(2)
    for _ in range(2):
        main(["cache", "extend", str(path), str(part(4)), str(part(3, 2))])
        assert capsys.readouterr().out == f"{path}: 4 views of 24 images\n"
        assert files(path) == files(part(4))


def test_an_interrupted_merge_continues(part, tmp_path):
    """From every state in which some files are missing."""
    parts, out = [part(2), part(4, 2)], tmp_path / "joined"
    for missing in ([view_file(3)], [view_file(1), view_file(2), VAL], [SEEN]):
        whole = files(merge(parts, out).path)
        for name in missing:
            (out / name).unlink()
        assert files(merge(parts, out).path) == whole


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_files_are_copied_where_links_are_impossible(part, tmp_path, monkeypatch, code):
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    assert files(merge([part(2), part(4, 2)], tmp_path / "joined").path) == files(part(4))


def test_missing_views_are_reported(part, tmp_path, capsys):
    """Views 0 and 1, then 3: students replay two."""
    main(["cache", "merge", str(part(2)), str(part(4, 3)), "--out", str(tmp_path / "joined")])
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'joined'}: 2 of 4 views of 24 images\n"
    assert "1 view missing, the first is view 2; students replay the views before it" in output.err
    with pytest.raises(BadInput, match=f"{view_file(2)} is missing although later views exist"):
        TeacherCache.open(tmp_path / "joined").verify()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"seed": 7}, r"seed \(there: 0, here: 7\)"),
        ({"flip": 0.0}, r"policy.flip \(there: 0.5, here: 0.0\)"),
        ({"topk": 2}, r"topk \(there: 1, here: 2\)"),
        ({"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}, r"teachers.0.mean.0 \(there: .*, here: 0.1\)"),
    ],
)
def test_parts_of_other_caches_are_refused(part, tmp_path, given, named):
    """The message names the fields and both values; nothing is written."""
    with pytest.raises(BadInput, match=f"expected views of the same cache as .*, but they differ in .*{named}"):
        merge([part(2), part(2, **given)], tmp_path / "joined")
    assert list(tmp_path.iterdir()) == []


def test_another_cache_in_the_place_of_the_output_is_refused(part, copied, tmp_path):
    out = copied(2, seed=7)
    before = files(out)
    with pytest.raises(BadInput, match="they differ in seed"):
        merge([part(2), part(4, 2)], out)
    assert files(out) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    with pytest.raises(BadInput, match="a folder with other files"):
        merge([part(2), part(4, 2)], tmp_path / "notes")
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_other_predictions_for_the_same_view_are_refused(part, copied, tmp_path):
    """Before anything is written: which of them is right is not known."""
    other = copied(3, 1)
    predictions = load_tensors(other / view_file(1))[0]["predictions"]
    predictions[:, 1] ^= 1  # the probability of the class
    rewrite(other / view_file(1), predictions=predictions)
    with pytest.raises(
        BadInput, match=f"{view_file(1)}: expected the predictions of .*, got others .*delete one of the"
    ):
        merge([part(2), other], tmp_path / "joined")
    assert not (tmp_path / "joined" / HEADER).exists()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "swapped"])
def test_a_damaged_part_is_refused(part, copied, tmp_path, kind):
    """A truncated view, one with a flipped bit, and one that is another view; the rest can be joined later."""
    other, out = copied(4, 2), tmp_path / "joined"
    whole = (other / view_file(3)).read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    swapped = (other / view_file(2)).read_bytes()
    (other / view_file(3)).write_bytes({"truncated": whole[:-9], "flipped": flipped, "swapped": swapped}[kind])
    with pytest.raises(BadInput, match=f"{view_file(3)}: .*(truncated|checksum does not match|expected view 3)"):
        merge([part(2), other], out)
    assert not (out / view_file(3)).exists()
    (other / view_file(3)).write_bytes(whole)
    assert files(merge([part(2), other], out).path) == files(part(4))


def test_two_writers_are_refused(part, tmp_path):
    with filling(tmp_path / "joined"), pytest.raises(BadInput, match=r"another fastofa .* is writing there"):
        merge([part(2), part(4, 2)], tmp_path / "joined")


def test_other_validation_predictions_are_reported(part, copied, tmp_path, capsys):
    """Those of the first part are kept, because another machine may round differently."""
    other = copied(4, 2)
    predictions = load_tensors(other / VAL)[0]["predictions"]
    predictions[:3, 0] ^= 1  # the class, in the lowest bit
    rewrite(other / VAL, predictions=predictions)
    joined = merge([part(2), other], tmp_path / "joined")
    assert (joined.path / VAL).read_bytes() == (part(2) / VAL).read_bytes()
    assert f"{other / VAL}: differs from {joined.path / VAL}" in capsys.readouterr().err.replace("\n", "")


# --- Comparing --------------------------------------------------------------------------------------------------------


def dense(targets: TopK, num_classes: int) -> np.ndarray:
    """float64 [N, C]: the distribution of each row, one class after the other."""
    rows = np.zeros((len(targets.classes), num_classes))
    for row, classes, log_probs in zip(rows, targets.classes.tolist(), targets.log_probs.double().numpy(), strict=True):
        kept = dict(zip(classes, np.exp(log_probs), strict=True))
        left = num_classes - len(kept)
        for c in range(num_classes):
            row[c] = kept[c] if c in kept else (1 - sum(kept.values())) / left
    return rows / rows.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("C", "one", "two"), [(10, 3, 3), (10, 3, 5), (10, 10, 2), (3, 3, 3), (300, 1, 7)])
def test_agreement_is_that_of_the_whole_distributions(C, one, two):
    """With the probability outside the kept classes spread evenly, for any two numbers of kept classes."""
    generator = torch.Generator().manual_seed(C)
    a, b = (topk_targets(torch.randn(50, C, generator=generator).log_softmax(1), K) for K in (one, two))
    p, q = dense(a, C), dense(b, C)
    divergence = (p * np.log(p / q)).sum(axis=1)
    got = agreement(a, b, C)
    assert got.kl == pytest.approx(divergence.mean(), rel=1e-9)
    assert got.worst_kl == pytest.approx(divergence.max(), rel=1e-9)
    assert got.top1 == pytest.approx((a.classes[:, 0].long() == b.classes[:, 0].long()).double().mean().item())
    assert agreement(a, a, C) == (1, pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_a_sure_teacher_gives_a_finite_divergence():
    """float16 rounds the best class's probability to 1, which leaves nothing for the others."""
    sure = TopK(torch.tensor([[2]], dtype=torch.uint16), torch.zeros(1, 1, dtype=torch.float16))
    other = TopK(torch.tensor([[1]], dtype=torch.uint16), torch.zeros(1, 1, dtype=torch.float16))
    got = agreement(sure, other, 5)
    assert got.top1 == 0
    assert 10 < got.kl < 25


def test_a_cache_agrees_with_itself(part):
    """And with its parts, on the views that both have."""
    whole = TeacherCache.open(part(4))
    for other, common in ((part(2), {0, 1}), (part(4, 3), {3})):
        result = compare(whole, TeacherCache.open(other, part=True))
        assert result.identity == []
        assert result.views.keys() == common
        assert all(each.top1 == 1 and each.kl < 1e-12 for each in (*result.views.values(), result.validation))


def test_other_views_of_the_same_images(part):
    """Validation predictions are comparable, views are not."""
    result = compare(TeacherCache.open(part(2)), TeacherCache.open(part(2, seed=7)))
    assert [(each.field, each.a, each.b) for each in result.identity] == [("seed", "0", "7")]
    assert result.views == {}
    assert result.validation is not None
    assert result.validation.top1 == 1


def test_another_teacher_on_the_same_views(part, teacher_of_two, tmp_path, capsys):
    """`fastofa cache diff` names the weights, and writes what it prints."""
    a, b = part(2), part(2, teacher=teacher_of_two)
    main(["cache", "diff", str(a), str(b), "--json", str(tmp_path / "diff.json")])
    output = capsys.readouterr().out
    written = json.loads((tmp_path / "diff.json").read_text())
    assert "teachers.0.sha256" in {each["field"] for each in written["identity"]}
    assert set(written["views"]) == {"0", "1"}
    one, two = (TeacherCache.open(path).targets(1)[1][:, 0].long() for path in (a, b))
    assert written["views"]["1"]["top1"] == pytest.approx((one == two).double().mean().item())
    assert written["views"]["1"]["kl"] > 0
    for text in ("teachers.0.sha256", "view 1", f"{written['views']['1']['top1']:.2%}", "validation images"):
        assert text in output


@pytest.fixture(scope="module")
def teacher_of_two(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher with other weights than the one of the parts."""
    torch.manual_seed(5)
    model = timm.create_model("test_efficientnet", num_classes=2)
    torch.nn.init.normal_(model.get_classifier().weight)
    folder = tmp_path_factory.mktemp("models") / "other"
    save_for_hf(model, str(folder), safe_serialization=True, data_config={"input_size": (3, 32, 32)})
    return str(folder)


def test_caches_of_other_classes_have_nothing_to_compare(part, tmp_path, capsys):
    cache = make_cache("digits:100", 10, tmp_path, topk=2)
    main(["cache", "diff", str(part(2)), str(cache.path)])
    output = capsys.readouterr().out
    assert "no predictions to compare" in output
    assert "topk" in output
