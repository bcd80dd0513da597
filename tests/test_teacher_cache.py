"""The teacher cache: it stores the teacher's predictions for each view, and accepts nothing else in their place."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn

from fastofa.commands.cache import info
from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.methods.targets import Targets, TopK, agreement
from fastofa.pipelines import open_pipeline
from fastofa.runs.recipes import default_policy
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.cache_files import VAL, view_file
from fastofa.teacher.cache_header import HEADER, policy_from_json, policy_to_json
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.fidelity import FIDELITY
from fastofa.teacher.model import Teacher, open_teacher
from fastofa.teacher.packed_rows import RowFormat
from fastofa.teacher.parts import PARTS, part_file
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.reference_images import SEEN
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views, center_views

CPU = torch.device("cpu")
SIZE = 32


def make_teacher(folder: Path, classes: int) -> Path:
    """A small CNN whose random weights are large enough for predictions that differ."""
    torch.manual_seed(1)
    model = timm.create_model("test_efficientnet", num_classes=classes)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    save_for_hf(
        model, str(folder), safe_serialization=True, data_config={"input_size": (3, SIZE, SIZE), "crop_pct": 0.9}
    )
    return folder


@pytest.fixture(scope="module")
def teacher_of_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher2"), 2)


@pytest.fixture(scope="module")
def teacher_of_10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher10"), 10)


@pytest.fixture(scope="module")
def make(photos: Path, teacher_of_2: Path, tmp_path_factory: pytest.TempPathFactory):
    """make(views=..., ...) -> a cache of the photographs in a new folder."""

    def cache(out: Path | None = None, **given) -> TeacherCache:
        out = out or tmp_path_factory.mktemp("cache")
        values = {"data": str(photos), "teacher": str(teacher_of_2), "views": 3, "topk": 2, "workers": 0, **given}
        return precompute(PrecomputeConfig(out=out, **values))

    return cache


@pytest.fixture(scope="module")
def photo_cache(make) -> TeacherCache:
    """Three views of 24 photographs, both classes kept. Tests must not change it."""
    return make()


@pytest.fixture(scope="module")
def digit_cache(teacher_of_10: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """Two views of 100 digits, 4 of 10 classes kept. Tests must not change it."""
    out = tmp_path_factory.mktemp("digits")
    return precompute(PrecomputeConfig("digits:100", str(teacher_of_10), out, views=2, topk=4))


@pytest.fixture
def changed(photo_cache: TeacherCache, tmp_path: Path) -> Path:
    """A copy of the photographs' cache, which the test may damage."""
    return Path(shutil.copytree(photo_cache.path, tmp_path / "cache"))


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def edit_header(path: Path, **values) -> None:
    header = json.loads((path / HEADER).read_text())
    (path / HEADER).write_text(json.dumps({**header, **values}))


# --- Predictions ------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.data())
def test_the_best_classes_are_stored(B, C, data):
    """As by torch.topk, best first, as uint16; with their log-probabilities, fp16 if all classes are kept."""
    K = data.draw(st.integers(1, C))
    log_probs = torch.randn(B, C, generator=torch.Generator().manual_seed(C)).log_softmax(-1)
    got = topk_targets(log_probs, K)
    values, classes = log_probs.topk(K)
    assert got.classes.dtype == torch.uint16
    assert torch.equal(got.classes.long(), classes)
    assert torch.equal(got.log_probs, values.half() if K == C else values)


@pytest.mark.parametrize(("C", "dtype"), [(65_535, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)])
def test_class_numbers_use_the_narrowest_type(C, dtype):
    """The last class and those around 2^15 are the same after the copy to the device."""
    log_probs = torch.full((3, C), -20.0)
    best = [[C - 1, 32_768, 0], [32_767, 40_000, C - 2], [65_534, 1, 32_769]]
    for row, numbers in zip(log_probs, best, strict=True):
        row[numbers] = torch.tensor([-0.1, -2.0, -3.0])
    got = topk_targets(log_probs, 3)
    assert got.classes.dtype == dtype
    assert got.classes.tolist() == best
    looked_up = DeviceTargets(got, CPU).lookup(torch.tensor([2, 0, 1, 2]))
    assert looked_up.classes.dtype == torch.int32
    assert looked_up.classes.tolist() == [best[2], best[0], best[1], best[2]]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32])
def test_lookup_is_a_gather_of_rows(dtype):
    """In any order, repeated, or none; log-probabilities are unchanged."""
    classes = torch.arange(20).view(5, 4).to(dtype)
    log_probs = torch.randn(5, 4).half()
    table = DeviceTargets(TopK(classes, log_probs), CPU)
    for ids in ([4, 0, 0, 3], [], [2]):
        got = table.lookup(torch.tensor(ids, dtype=torch.int64))
        assert got.classes.tolist() == classes.to(torch.int32)[ids].tolist()
        assert torch.equal(got.log_probs, log_probs[ids])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32])
def test_a_ranks_share_gives_the_same_targets_as_the_whole_table(dtype, dense):
    """For its own samples, in any order; others are not kept."""
    classes = torch.arange(40).view(10, 4).to(dtype)
    log_probs = torch.randn(10, 4).log_softmax(1).half()
    whole = DeviceTargets(TopK(classes, log_probs), CPU, dense)
    share = DeviceTargets(TopK(classes, log_probs), CPU, dense, rows=np.array([7, 2, 9]))
    assert len(share) == 3
    for ids in ([7, 2, 9], [9, 9, 7], [2], []):
        found, expected = (table.lookup(torch.tensor(ids).long()) for table in (share, whole))
        for a, b in ((found.classes, expected.classes), (found.log_probs, expected.log_probs)):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_agreement_is_the_share_of_equal_best_classes():
    """Also for class numbers above 2^15; only the first of the K classes counts."""
    targets = Targets(torch.tensor([[40_000, 1], [2, 3], [5, 40_000], [7, 8]], dtype=torch.uint16), torch.zeros(4, 2))
    assert agreement(np.array([40_000, 2, 40_000, 8]), targets) == 0.5
    assert agreement(np.array([40_000, 2, 5, 7]), targets) == 1.0


# --- What is stored ---------------------------------------------------------------------------------------------------


def test_the_files_of_a_cache(photo_cache, photos):
    """Names, header, and shapes and dtypes of the tables; no temporary files."""
    assert sorted(file.name for file in photo_cache.path.iterdir()) == sorted(
        [FIDELITY, HEADER, SEEN, VAL, *map(view_file, range(3))]
    )
    header = json.loads((photo_cache.path / HEADER).read_text())
    train, val = open_dataset(str(photos)), open_dataset(str(photos), "val")
    expected = {
        "schema": 4, "num_samples": 24, "num_val_samples": 12, "num_classes": 2, "topk": 2, "views": 3, "seed": 0,
        "classes": ["china", "flower"],
        "dataset": {
            "spec": str(photos), "train": train.fingerprint, "val": val.fingerprint,
            "train_samples": train.samples_fingerprint,
        },
        "policy": {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "flip": 0.5},
    }  # fmt: skip
    assert {key: header[key] for key in expected} == expected
    (teacher,) = header["teachers"]
    assert (teacher["name"], teacher["image_size"], teacher["precision"]) == ("test_efficientnet", SIZE, "fp32")
    assert len(teacher["sha256"]) == 64
    assert set(header["versions"]) == {"torch", "torchvision", "timm"}

    tensors, _ = load_tensors(photo_cache.path / view_file(1))
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert kinds == {
        "crop": (torch.uint16, (24, 4)), "flip": (torch.uint8, (3,)),
        "classes": (torch.uint16, (24, 2)), "log_probs": (torch.float16, (24, 2)),
    }  # fmt: skip
    val_tensors, _ = load_tensors(photo_cache.path / VAL)
    assert {name: tuple(tensor.shape) for name, tensor in val_tensors.items()} == {
        "classes": (12, 2),
        "log_probs": (12, 2),
    }


def test_opening_reads_what_was_written(photo_cache, teacher_of_2):
    cache = TeacherCache.open(photo_cache.path)
    assert (cache.views, cache.num_samples, cache.num_classes, cache.topk) == (3, 24, 2, 2)
    assert cache.policy == ViewPolicy()
    assert cache.teacher_dim == open_teacher(str(teacher_of_2), ("china", "flower")).model.num_features
    cache.verify()
    for view in (-1, 3):
        with pytest.raises(BadInput, match=f"expected a view from 0 to 2, got {view}"):
            cache.targets(view)


def test_the_summary_of_a_cache(photo_cache):
    said = info(photo_cache)
    sha256 = photo_cache.header["teachers"][0]["sha256"]
    assert said["teacher"] == f"test_efficientnet at 32 px, fp32, weights {sha256[:12]}"
    assert said["data"].endswith(", 24 images, 2 classes")
    assert said["classes"] == "china, flower"
    assert (said["predictions"], said["views"], said["flip"]) == ("top 2 of 2", "3, seed 0", "0.5")


@pytest.mark.parametrize("kind", ["digits", "photos"])
def test_the_stored_views_are_the_drawn_ones(kind, digit_cache, photo_cache, photos):
    """Byte for byte those of (policy, seed, view), different for each view."""
    cache, spec = (digit_cache, "digits:100") if kind == "digits" else (photo_cache, str(photos))
    stored = [cache.targets(view)[0] for view in range(cache.views)]
    for view, views in enumerate(stored):
        drawn = draw_views(default_policy(spec), open_dataset(spec).sizes, seed=0, view=view)
        assert (views.crop.dtype, views.flip.dtype) == (np.uint16, np.bool_)
        np.testing.assert_array_equal(views.crop, drawn.crop)
        np.testing.assert_array_equal(views.flip, drawn.flip)
    assert (stored[0].crop != stored[1].crop).any()


def pixels(dataset: Dataset, views: Views) -> Tensor:
    """uint8 images of a view by Pillow and torchvision's transforms, one after the other."""
    images = []
    for i, (box, flip) in enumerate(zip(views.boxes(dataset.sizes).tolist(), views.flip, strict=True)):
        if dataset.pixels is None:
            image = tv.pil_to_tensor(Image.open(dataset.path(i)))
        else:
            image = torch.from_numpy(dataset.pixels[i]).permute(2, 0, 1)
        image = tv.resized_crop(image, *box, [SIZE, SIZE], antialias=True)
        images.append(tv.horizontal_flip(image) if flip else image)
    return torch.stack(images)


def assert_same_predictions(got: Targets, expected: Tensor) -> None:
    """Within fp16, or half a packed step, of `expected` [N, C], and no omitted class is better."""
    got_at, allowed = expected.gather(1, got.classes.long()), 2e-3 if got.log_probs.dtype == torch.float16 else 0.02
    torch.testing.assert_close(got.log_probs.float(), got_at, rtol=allowed, atol=allowed)
    torch.testing.assert_close(got_at, expected.topk(got.classes.shape[1]).values, rtol=2e-3, atol=2e-3)
    assert (got.classes[:, 0].long() == expected.argmax(1)).float().mean() > 0.9


def test_the_predictions_are_the_teachers_for_those_images(
    photo_cache, digit_cache, photos, teacher_of_2, teacher_of_10
):
    """Every view of both datasets, recomputed with Pillow, torchvision's transforms and the teacher alone."""
    for cache, spec, folder in ((photo_cache, str(photos), teacher_of_2), (digit_cache, "digits:100", teacher_of_10)):
        dataset, teacher = open_dataset(spec), open_teacher(str(folder), open_dataset(spec).classes)
        tables = []
        for view in range(cache.views):
            views, classes, log_probs = cache.targets(view)
            expected = teacher.log_probs(pixels(dataset, views))
            assert_same_predictions(Targets(classes, log_probs), expected)
            tables.append(log_probs)
        assert not torch.equal(tables[0], tables[1])


def test_validation_predictions_are_of_the_teachers_own_centre_crops(photo_cache, photos, teacher_of_2):
    """Row by row; hence its accuracy is the share of correct best classes."""
    val, teacher = open_dataset(str(photos), "val"), open_teacher(str(teacher_of_2), ("china", "flower"))
    expected = teacher.log_probs(pixels(val, center_views(val.sizes, 0.9)))
    got = photo_cache.val_targets()
    assert_same_predictions(got, expected)
    by_hand = (expected.argmax(1) == torch.from_numpy(val.labels)).float().mean().item()
    assert agreement(val.labels, got) == pytest.approx(by_hand, abs=1 / len(val))


# --- Augmented views --------------------------------------------------------------------------------------------------

FULL = {"bicubic": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "erase": 0.25}


@pytest.fixture(scope="module")
def full_cache(make) -> TeacherCache:
    """Two views of the photographs with all columns. Tests must not change it."""
    return make(views=2, recipe="imagenet_vit_mlp")


def test_every_column_is_stored_and_read(full_cache, photos):
    """The given policy, and the drawn columns, byte for byte."""
    header = json.loads((full_cache.path / HEADER).read_text())
    assert header["policy"] == {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "flip": 0.5, **FULL}
    cache = TeacherCache.open(full_cache.path)
    cache.verify()
    assert cache.policy == ViewPolicy(**FULL)
    for view in range(2):
        stored = cache.targets(view)[0]
        drawn = draw_views(ViewPolicy(**FULL), open_dataset(str(photos)).sizes, seed=0, view=view)
        assert stored.columns().keys() == drawn.columns().keys()
        for name, column in drawn.columns().items():
            assert stored.columns()[name].dtype == column.dtype
            np.testing.assert_array_equal(stored.columns()[name], column)
    said = info(full_cache)
    assert (said["auto-augment"], said["mixup"], said["erase"]) == ("rand-m9-mstd0.5-inc1", "0.8", "0.25")
    assert said["bicubic"] == "0.5"
    assert "repeats" not in said


def test_predictions_for_mixed_images_are_the_teachers(full_cache, photos, teacher_of_2):
    """Each row has the prediction for its own mixture, although they are computed pair by pair."""
    dataset, teacher = open_dataset(str(photos)), open_teacher(str(teacher_of_2), ("china", "flower"))
    for view in range(2):
        views, classes, log_probs = full_cache.targets(view)
        (batch,) = open_pipeline("torchvision", dataset, SIZE, len(dataset)).epoch(views, np.arange(len(dataset)))
        assert_same_predictions(Targets(classes, log_probs), teacher.log_probs(batch.images))


def test_pair_order_and_batches_do_not_affect_the_views(full_cache, make):
    other = make(views=2, recipe="imagenet_vit_mlp", batch_size=5, workers=1)
    for view in range(2):
        (a, classes_a, log_probs_a), (b, classes_b, log_probs_b) = full_cache.targets(view), other.targets(view)
        for name, column in a.columns().items():
            np.testing.assert_array_equal(column, b.columns()[name])
        both = ((classes_a, log_probs_a), (classes_b, log_probs_b))
        by_class = [torch.zeros(24, 2).scatter(1, classes.long(), given.float()) for classes, given in both]
        torch.testing.assert_close(*by_class, rtol=2e-3, atol=2e-3)


def test_the_teachers_input_is_normalised_by_its_own_configuration_or_as_published(make, capsys):
    """A cifar recipe uses CIFAR's numbers for every teacher, and so do the predictions. The numbers are reported."""
    own, published, given = make(views=1), make(views=1, recipe="cifar_cnn"), {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    by_hand = make(views=1, recipe="cifar_cnn", **given)
    seen = [(c.header["teachers"][0]["mean"], c.header["teachers"][0]["std"]) for c in (own, published, by_hand)]
    assert seen[0] == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # of the teacher's config.json
    assert seen[1] == ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762])
    assert seen[2] == ([0.5] * 3, [0.2] * 3)
    assert not torch.equal(own.val_targets().log_probs, published.val_targets().log_probs)
    said = " ".join(capsys.readouterr().err.split())
    assert "normalised with mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in said
    assert "normalised with mean 0.5071 0.4865 0.4409, std 0.2673 0.2564 0.2762" in said


def test_flags_change_the_recipes_views(make):
    cache = make(views=2, recipe="imagenet_vit_mlp", mixup=0.0, cutmix=0.0, erase=0.5, auto_augment="")
    assert cache.policy == ViewPolicy(bicubic=0.5, erase=0.5)
    assert set(cache.targets(0)[0].columns()) == {"crop", "flip", "bicubic", "erase", "noise"}
    assert make(recipe="imagenet_cnn", bicubic=0.0).policy == ViewPolicy()
    cache = make(views=2, auto_augment="rand-m5-n1", repeats=2)
    assert cache.policy == ViewPolicy(auto_augment="rand-m5-n1", repeats=2)
    with pytest.raises(BadInput, match="views: expected a multiple of 3, the repeats of the augmentation, got 4"):
        make(views=4, recipe="imagenet_stronger")
    with pytest.raises(BadInput, match="recipe: expected --recipe with one of"):
        make(recipe="imagenet")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_json_round_trip_of_a_policy(data):
    share = st.floats(0, 1)
    policy = ViewPolicy(
        flip=data.draw(share), bicubic=data.draw(share), erase=data.draw(share), mixup=data.draw(st.floats(0, 3)),
        repeats=data.draw(st.integers(1, 4)), cutmix=data.draw(st.floats(0, 3)),
        auto_augment=data.draw(st.sampled_from(["", "rand-m9", "rand-m7-n3-p0.1"])),
        mean=data.draw(st.tuples(share, share, share)),
    )  # fmt: skip
    assert policy_from_json(json.loads(json.dumps(policy_to_json(policy)))) == policy


# --- What a cache is for ----------------------------------------------------------------------------------------------


def test_check_accepts_its_own_data_and_policy(photo_cache, photos):
    photo_cache.check(open_dataset(str(photos)), ViewPolicy())


def test_check_accepts_other_pixels_only_if_told(photo_cache, folder):
    """Photographs compressed again are other data unless the caller accepts that; a renamed one is, even then."""
    for file in folder.glob("train/*/*.jpg"):
        Image.open(file).save(file, quality=60)
    changed = open_dataset(str(folder))
    found = rf"24 samples, sha256 {photo_cache.header['dataset']['train']:.12}"
    expected = rf"24 samples, sha256 {changed.fingerprint:.12}"
    with pytest.raises(
        BadInput, match=rf"expected .* \({expected}\), got .* \({found}\) of the same names .*--allow-mismatch pixels"
    ):
        photo_cache.check(changed, ViewPolicy())
    photo_cache.check(changed, ViewPolicy(), other_pixels=True)
    with pytest.raises(BadInput, match="expected views drawn with"):
        photo_cache.check(changed, ViewPolicy(flip=0.1), other_pixels=True)
    (folder / "train" / "china" / "000.jpg").rename(folder / "train" / "china" / "zzz.jpg")
    with pytest.raises(BadInput, match=r"expected one made from .* got one made from .*\); run `fastofa precompute`"):
        photo_cache.check(open_dataset(str(folder)), ViewPolicy(), other_pixels=True)


def test_check_refuses_other_classes_data_and_policies(photo_cache, digit_cache, photos, tmp_path):
    digits = open_dataset("digits:100")
    with pytest.raises(BadInput, match=r"the 10 classes of digits:100, got 2, of .*; run `fastofa precompute`"):
        photo_cache.check(digits, ViewPolicy())
    with pytest.raises(BadInput, match=r"from digits:200 .*\(200 samples, .*\), got .* digits:100 \(100 samples"):
        digit_cache.check(open_dataset("digits:200"), digit_cache.policy)
    with pytest.raises(BadInput, match=r"expected views drawn with .*flip=0.5\), got .*flip=0.0\)"):
        digit_cache.check(digits, dataclasses.replace(digit_cache.policy, flip=0.5))
    with pytest.raises(BadInput, match=r"expected views drawn with \(bicubic=1.0\), got \(bicubic=0.0\)"):
        photo_cache.check(open_dataset(str(photos)), ViewPolicy(bicubic=1.0))
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "china" / "000.jpg").unlink()
    with pytest.raises(BadInput, match=r"23 samples.*24 samples"):
        photo_cache.check(open_dataset(str(tmp_path / "photos")), ViewPolicy())


@pytest.mark.parametrize("name", [view_file(0), VAL])
def test_a_cache_without_views_or_validation_predictions_is_refused(changed, name):
    (changed / name).unlink()
    with pytest.raises(
        BadInput, match=f"validation predictions and at least 1 of 3 views, but {name} is missing; run .* ag"
    ):
        TeacherCache.open(changed)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_cache_opens_with_its_finished_views(changed, missing):
    """From view 0 up to the first missing one; `info` shows the total. A gap is damage."""
    (changed / view_file(missing)).unlink()
    cache = TeacherCache.open(str(changed))
    assert cache.views == missing
    assert info(cache)["views"] == f"{missing} of 3 are finished, seed 0"
    with pytest.raises(BadInput, match=f"expected a view from 0 to {missing - 1}, got {missing}"):
        cache.targets(missing)
    with pytest.raises(BadInput, match=f"expected 3 views, finished: {missing} of 3; run `fastofa precompute` again"):
        cache.digests(3)
    if missing == 2:
        cache.verify()
    else:
        with pytest.raises(BadInput, match=f"{view_file(1)} is missing although later views exist"):
            cache.verify()


def test_views_of_one_epoch_are_finished_together(make, tmp_path):
    """With repeated augmentation, four of six views open as three."""
    cache = make(tmp_path / "cache", views=6, repeats=3, topk=1)
    for view in (5, 4):
        (cache.path / view_file(view)).unlink()
        assert TeacherCache.open(cache.path).views == 3
    (cache.path / view_file(2)).unlink()
    with pytest.raises(BadInput, match=f"3 of 6 views, but {view_file(2)} is missing"):
        TeacherCache.open(cache.path)


def test_digests_cover_a_views_whole_content(changed, make):
    """Equal for equal views, also in a cache that grew; different for another bit, seed or teacher."""
    first = TeacherCache.open(changed).digests(3)
    assert len(set(first)) == 3
    assert make(changed, views=4).digests(3) == first
    tensors, said = load_tensors(changed / view_file(1))
    tensors["log_probs"][5, 1] -= 0.01
    save_tensors(changed / view_file(1), tensors, said)
    other = TeacherCache.open(changed).digests(3)
    assert [a == b for a, b in zip(first, other, strict=True)] == [True, False, True]
    assert not set(make(views=3, seed=1).digests(3)) & set(first)
    (changed / view_file(2)).write_bytes((changed / view_file(2)).read_bytes()[:-10])
    with pytest.raises(BadInput, match=f"{view_file(2)}: .*truncated or damaged"):
        TeacherCache.open(changed).digests(3)
    shutil.copy(changed / view_file(0), changed / view_file(2))
    with pytest.raises(BadInput, match=f"{view_file(2)}: expected view 2 of this cache"):
        TeacherCache.open(changed).digests(3)


def test_a_missing_cache_and_invalid_headers(changed):
    expected = "expected a teacher cache made by `fastofa precompute`, but"
    with pytest.raises(BadInput, match=f"nowhere: {expected} there is no such folder"):
        TeacherCache.open(changed / "nowhere")
    (changed / "empty").mkdir()
    with pytest.raises(BadInput, match=rf"empty: {expected} it contains no cache\.json"):
        TeacherCache.open(changed / "empty")
    header = (changed / HEADER).read_text()
    for text, message in (
        (header[:50], "expected JSON"),
        ("[]", "expected schema 4, got list"),
        ("{}", "expected schema 4, got None"),
        (
            header.replace('"schema": 4', '"schema": 1'),
            "expected schema 4, got 1; remove the cache",
        ),
        (header.replace('"topk"', '"top"'), "expected the fields topk, but the file was edited"),
    ):
        (changed / HEADER).write_text(text)
        with pytest.raises(BadInput, match=message):
            TeacherCache.open(changed)


def test_a_view_in_the_place_of_another_is_refused(changed):
    """Each file is intact but records which view it is."""
    shutil.copy(changed / view_file(0), changed / view_file(1))
    cache = TeacherCache.open(changed)
    cache.targets(0)
    with pytest.raises(BadInput, match=f"{view_file(1)}: expected view 1 of this cache"):
        cache.targets(1)
    with pytest.raises(BadInput, match=f"{view_file(1)}: expected view 1 of this cache"):
        cache.verify()


@pytest.mark.parametrize(
    "given", [{"seed": 1}, {"topk": 1}, {"flip": 0.0}, {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}]
)
def test_a_file_of_another_cache_is_refused(changed, make, given):
    """The same images and (nearly) the same shapes, but with other views or another teacher."""
    other = make(views=1, **given)
    for name in (view_file(0), VAL):
        kept = (changed / name).read_bytes()
        shutil.copy(other.path / name, changed / name)
        with pytest.raises(BadInput, match=f"{name}: expected (view 0|{VAL}) of this cache"):
            TeacherCache.open(changed).verify()
        (changed / name).write_bytes(kept)
    TeacherCache.open(changed).verify()


def test_an_edited_header_does_not_match_the_tables(changed):
    """A seed or teacher other than that of the predictions."""
    edit_header(changed, seed=7)
    with pytest.raises(BadInput, match=f"{VAL}: expected {VAL} of this cache"):
        TeacherCache.open(changed).verify()


def rewrite(file: Path, **changed: Tensor) -> None:
    """Replace the tensors of the file and update its checksum, as a faulty program would."""
    tensors, said = load_tensors(file)
    save_tensors(file, {**tensors, **changed}, said)


def test_impossible_values_with_a_correct_checksum_are_detected(changed):
    """When a view is opened, or for the validation predictions when the cache is; with a remedy. The rest remains
    readable.
    """
    view, val = changed / view_file(1), changed / VAL
    kept = {file: file.read_bytes() for file in (view, val)}
    classes, log_probs = (load_tensors(view)[0][name] for name in ("classes", "log_probs"))
    crop = load_tensors(view)[0]["crop"]
    unknown, spoiled, outside = classes.clone(), log_probs.clone(), crop.clone()
    unknown[3, 1], spoiled[3, 0] = 2, torch.nan
    outside[3] = torch.tensor([60_000, 60_000, 9_000, 9_000])
    for tensors, message in (
        ({"classes": unknown}, r"expected classes from 0 to 1, got \[.*\] for sample 3"),
        ({"log_probs": spoiled}, r"expected finite log_probs, got \[nan, .*\] for sample 3"),
        ({"log_probs": log_probs.float()}, "expected log_probs float16"),
        (
            {"crop": outside},
            r"expected crop to be a box inside .*, got \[60000, 60000, 9000, 9000\] for sample 3",
        ),
        ({"ops": classes}, "expected the columns crop, flip, got crop, flip, ops"),
    ):
        rewrite(view, **tensors)
        cache = TeacherCache.open(changed)
        cache.targets(0)
        for read in (lambda cache=cache: cache.targets(1), cache.verify):
            with pytest.raises(
                BadInput, match=rf"{view_file(1)}: {message}.*; delete it,? and run `fastofa precompute`"
            ):
                read()
        view.write_bytes(kept[view])
    for tensors, message in (
        ({"log_probs": spoiled[:12]}, "expected finite log_probs"),
        ({"classes": unknown[:12]}, "expected classes from 0 to 1"),
        ({"classes": classes, "log_probs": log_probs}, r"expected classes uint16 \[12, 2\], got uint16 \[24, 2\]"),
    ):
        rewrite(val, **tensors)
        with pytest.raises(BadInput, match=rf"{VAL}: {message}"):
            TeacherCache.open(changed)
        val.write_bytes(kept[val])
    TeacherCache.open(changed).verify()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teachers", lambda h: h["teachers"] * 10_000),
        ("teachers", lambda h: [{**h["teachers"][0], "num_features": 10**15}]),
        ("teachers", lambda h: h["teachers"][0]),
        ("teachers", lambda h: [{**h["teachers"][0], "mean": ["a", 1, 2]}]),
        ("teachers", lambda h: [{**h["teachers"][0], "std": [0.5]}]),
        ("views", lambda _: 10**12),
        ("views", lambda _: -3),
        ("views", lambda _: True),
        ("num_samples", lambda _: 2**40),
        ("num_val_samples", lambda _: 0),
        ("topk", lambda _: 3),
        ("classes", lambda _: ["china"]),
        ("classes", lambda _: ["china", 1]),
        ("seed", lambda _: 2**70),
        ("policy", lambda h: {**h["policy"], "scale": [0.1, 0.5, 1.0]}),
        ("policy", lambda h: {**h["policy"], "flip": "often"}),
        ("policy", lambda h: {**h["policy"], "flip": float("nan")}),
        ("policy", lambda h: {**h["policy"], "repeats": 2.5}),
        ("policy", lambda h: {**h["policy"], "repeats": 2}),
        ("policy", lambda h: {**h["policy"], "mean": [0.5, 0.4]}),
        ("policy", lambda h: {**h["policy"], "auto_augment": ["rand-m9"]}),
        ("policy", lambda h: {**h["policy"], "hue": 0.5}),
        ("policy", lambda _: [1, 2]),
        ("dataset", lambda _: "photos"),
        ("versions", lambda _: {"torch": 2}),
        ("versions", lambda _: {str(i): "1" for i in range(1000)}),
        ("pipeline", lambda _: None),
    ],
)
def test_headers_of_another_shape_or_size(changed, field, value):
    """Each gives one line that names the field."""
    header = json.loads((changed / HEADER).read_text())
    edit_header(changed, **{field: value(header)})
    named = "views" if "'repeats': 2}" in str(value(header)) else field  # three views are no whole groups then
    message = (
        f"expected values that `fastofa precompute` writes for {named}.*, but the file was edited; remove the cache"
    )
    with pytest.raises(BadInput, match=message) as error:
        TeacherCache.open(changed)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", [view_file(2), VAL])
def test_verify_finds_the_damaged_file(changed, name):
    """A flipped bit, or the last bytes missing."""
    data = (changed / name).read_bytes()
    for damage in (data[:-1] + bytes([data[-1] ^ 1]), data[:-10]):
        (changed / name).write_bytes(damage)
        with pytest.raises(BadInput, match=f"{name}.*(checksum does not match|truncated or damaged)"):
            TeacherCache.open(changed).verify()
    (changed / name).write_bytes(data)
    TeacherCache.open(changed).verify()


def test_a_cache_of_schema_3_is_read_and_continued_in_its_form(digit_cache, teacher_of_10, tmp_path):
    """What an earlier version wrote: nothing packed. Its views replay as before, and a view can be added."""
    old = Path(shutil.copytree(digit_cache.path, tmp_path / "cache"))
    edit_header(old, schema=3)
    for name in (view_file(0), view_file(1), VAL):
        tensors, said = load_tensors(old / name)
        packed = tensors.pop("predictions")
        targets = RowFormat(4, 10).unpack(packed)
        if "flip" in tensors:
            tensors["flip"] = torch.from_numpy(digit_cache.targets(0 if name == view_file(0) else 1)[0].flip)
        columns = {**tensors, "classes": targets.classes, "log_probs": targets.log_probs.half()}
        save_tensors(old / name, columns, said)
    cache = TeacherCache.open(old)
    cache.verify()
    for view in range(2):
        (a, classes_a, log_probs_a), (b, classes_b, log_probs_b) = cache.targets(view), digit_cache.targets(view)
        np.testing.assert_array_equal(a.flip, b.flip)
        assert torch.equal(classes_a, classes_b)
        assert torch.equal(log_probs_a, log_probs_b.half())
    assert torch.equal(cache.val_targets().classes, digit_cache.val_targets().classes)
    grown = precompute(PrecomputeConfig("digits:100", str(teacher_of_10), old, views=3, topk=4))
    assert set(load_tensors(old / view_file(2))[0]) == {"crop", "flip", "classes", "log_probs"}
    grown.verify()
    assert json.loads((old / HEADER).read_text())["schema"] == 3


# --- Making one -------------------------------------------------------------------------------------------------------


def test_more_views_keep_the_old_files_and_equal_a_larger_cache(changed, make):
    """Extended from 3 to 5: old files except the header are untouched, and all files equal those made at once."""
    before = files(changed)
    times = {file.name: file.stat().st_mtime_ns for file in changed.iterdir()}
    extended = make(changed, views=5)
    assert extended.views == 5
    after = files(changed)
    assert {name for name in before if after[name] != before[name]} == {HEADER}
    assert all((changed / name).stat().st_mtime_ns == times[name] for name in before if name != HEADER)
    assert after == files(make(views=5).path)


def test_fewer_or_as_many_views_change_nothing(changed, make, capsys):
    before = files(changed)
    for views, said in ((3, False), (1, True)):
        assert make(changed, views=views).views == 3
        assert ("was started with --views 3; --views 1" in capsys.readouterr().err) is said
    assert files(changed) == before


def test_fewer_views_end_an_unfinished_cache_sooner(changed, make):
    """Only the requested views are made; the planned number is unchanged."""
    for view in (1, 2):
        (changed / view_file(view)).unlink()
    cache = make(changed, views=2)
    assert (cache.views, cache.header["views"], cache.finished) == (2, 3, "2 of 3")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 3}, r"seed \(cached: 0, given: 3\)"),
        ({"topk": 1}, r"topk \(cached: 2, given: 1\)"),
        ({"scale": (0.5, 1.0)}, r"scale \(cached: .*, given: 0\.5 1\)"),
        ({"image_size": 48}, "teachers "),
        ({"data": "digits:100"}, ""),
        ({"data": "digits:100", "topk": 1}, r"data \(cached: .*, given: digits:100\); topk \("),
    ],
)
def test_other_arguments_do_not_extend_a_cache(changed, make, teacher_of_10, given, said):
    before = files(changed)
    if "data" in given:
        given = {**given, "teacher": str(teacher_of_10)}
    with pytest.raises(
        BadInput, match=f"contains a cache made with other arguments: .*{said}.*choose another --out or remove it"
    ):
        make(changed, **given)
    assert files(changed) == before


def test_workers_do_not_affect_the_predictions(photo_cache, make):
    """Every file byte for byte, with two decoding processes and with none."""
    assert files(make(workers=2).path) == files(photo_cache.path)


def test_the_pipeline_does_not_affect_the_predictions(digit_cache, teacher_of_10, tmp_path):
    """Resident and torchvision: every table byte for byte; the header records which it was."""
    config = PrecomputeConfig(
        "digits:100", str(teacher_of_10), tmp_path, views=1, topk=4, pipeline="torchvision", workers=0
    )
    other = precompute(config)
    for name in (view_file(0), VAL):
        assert (other.path / name).read_bytes() == (digit_cache.path / name).read_bytes()
    assert (digit_cache.header["pipeline"], other.header["pipeline"]) == ("resident", "torchvision")


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_affects_only_the_last_bits(photo_cache, make, batch_size):
    """The same views to the byte, the same predictions within fp16; if a class differs, both are equally probable."""
    other = make(batch_size=batch_size)
    for view in range(3):
        (a, classes_a, log_probs_a), (b, classes_b, log_probs_b) = photo_cache.targets(view), other.targets(view)
        np.testing.assert_array_equal(a.crop, b.crop)
        np.testing.assert_array_equal(a.flip, b.flip)
        torch.testing.assert_close(log_probs_a, log_probs_b, rtol=2e-3, atol=2e-3)
        clear = (log_probs_a[:, 0] - log_probs_a[:, 1]).abs() > 0.01
        assert clear.any()
        assert torch.equal(classes_a[clear].long(), classes_b[clear].long())


def test_unreadable_images_are_skipped_for_good(photos, make, teacher_of_2, tmp_path):
    """Refused without --skip-corrupt; with it, the cache is that of a folder without them."""
    shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".fastofa"))
    data = tmp_path / "photos"
    broken = data / "train" / "flower" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (data / "val" / "china" / "000.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match=r"unreadable images?: .*--skip-corrupt"):
        make(tmp_path / "cache", data=str(data))
    assert not (tmp_path / "cache").exists()

    cache = make(tmp_path / "cache", data=str(data), skip_corrupt=True, views=1)
    assert (cache.num_samples, cache.header["num_val_samples"]) == (23, 11)
    cache.check(open_dataset(str(data)), ViewPolicy())
    broken.unlink()
    (data / "val" / "china" / "000.jpg").unlink()
    clean = make(tmp_path / "clean", data=str(data), views=1)
    assert files(clean.path) == files(cache.path)


def test_a_temporarily_unreadable_image_loses_no_predictions(make, tmp_path, monkeypatch):
    """The line names table and image; earlier predictions are kept, and none is computed twice."""
    original, calls = Teacher.log_probs, []

    def log_probs(self: Teacher, images: Tensor) -> Tensor:
        calls.append(len(images))
        return original(self, images)

    def read(self: Dataset, sample_id: int) -> Tensor:
        if sample_id == 7 and fails[self.split] and fails[self.split].pop(0):
            raise BadInput(f"unreadable image {self.names[sample_id]} (the disk is away)")
        return reads(self, sample_id)

    reads, given, fails = Dataset.read, {"views": 2, "batch_size": 5}, {"val": [True], "train": [False, False, True]}
    monkeypatch.setattr(Dataset, "read", read)
    monkeypatch.setattr(Teacher, "log_probs", log_probs)
    for message in (
        rf"{VAL}: unreadable image flower/001.jpg .*: 0 views and 5 predictions .*; repeat the command to continue",
        rf"{view_file(1)}: unreadable image china/007.jpg .*1 view and 5 .* --skip-corrupt, it requires another --out",
    ):
        with pytest.raises(BadInput, match=message):
            make(tmp_path, **given)
        assert any(tmp_path.glob(PARTS))
    make(tmp_path, **given)
    # 24 images held back; open_teacher tries two; of the validation images two are the last
    assert sum(calls) - 2 * calls.count(2) == 24 + 12 + 2 * 24 - 2
    monkeypatch.undo()
    assert files(tmp_path) == files(make(**given).path)


def test_any_other_error_keeps_the_predictions_too(make, tmp_path, monkeypatch):
    """For example, a lack of memory, which the library reports."""
    original, calls = Teacher.log_probs, iter(range(100))

    def log_probs(self: Teacher, images: Tensor) -> Tensor:
        if next(calls) == 11:  # one trial, 5 batches held back, 3 of validation images, 2 of the view
            raise RuntimeError("out of memory")
        return original(self, images)

    monkeypatch.setattr(Teacher, "log_probs", log_probs)
    with pytest.raises(RuntimeError, match="out of memory"):
        make(tmp_path, views=1, batch_size=5)
    assert len(load_tensors(tmp_path / part_file(0, 0))[0]["classes"]) == 10
    monkeypatch.undo()
    assert files(make(tmp_path, views=1, batch_size=5).path) == files(make(views=1, batch_size=5).path)


def test_skip_corrupt_starts_over_if_no_view_is_finished(photos, make, tmp_path, monkeypatch, capsys):
    """An image is damaged while the job runs; the remedies in the message work in the same folder."""
    data = Path(shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".fastofa")))
    broken, out, original = data / "train" / "flower" / "003.jpg", tmp_path / "cache", Dataset.read
    whole = broken.read_bytes()

    def read(self: Dataset, sample_id: int) -> Tensor:
        if self.split == "train" and (out / FIDELITY).exists():
            broken.write_bytes(whole[: len(whole) // 2])
        return original(self, sample_id)

    monkeypatch.setattr(Dataset, "read", read)
    with pytest.raises(BadInput, match=rf"{broken}.*with --skip-corrupt, it starts over"):
        make(out, data=str(data), views=2, batch_size=5)
    monkeypatch.undo()
    capsys.readouterr()
    cache = make(out, data=str(data), views=1, batch_size=5, skip_corrupt=True)
    assert cache.num_samples == 23
    assert "starts over, because dataset changed and no view was finished" in capsys.readouterr().err
    broken.unlink()
    assert files(out) == files(make(data=str(data), views=1, batch_size=5).path)
    broken.write_bytes(whole)  # mended after all; a view is finished now
    before = files(out)
    with pytest.raises(BadInput, match=r"dataset \(.*--out"):
        make(out, data=str(data))
    assert files(out) == before
    shutil.rmtree(out)
    assert make(out, data=str(data)).num_samples == 24


def test_a_teacher_can_be_replaced_only_before_a_view_is_finished(make, tmp_path, changed):
    """Before that, no run can use the cache."""
    for name in (view_file(0), view_file(1), view_file(2)):
        (changed / name).unlink()
    with pytest.raises(BadInput, match=r"teachers .*--out"):
        make(changed, image_size=48)
    (changed / VAL).unlink()
    assert make(changed, image_size=48).header["teachers"][0]["image_size"] == 48


def test_a_truncated_file_is_written_again(changed, make, capsys):
    """Without deleting it first, as the message says; files of other caches are untouched."""
    whole = files(changed)
    for name in (VAL, view_file(1)):
        (changed / name).write_bytes(whole[name][:-10])
        with pytest.raises(BadInput, match=f"{name}.*truncated or damaged"):
            TeacherCache.open(changed).verify()
        make(changed)
        assert f"{name}: expected a safetensors file, got one that is truncated or damaged" in capsys.readouterr().err
        assert files(changed) == whole
    shutil.copy(changed / view_file(0), changed / view_file(1))
    with pytest.raises(BadInput, match=f"{view_file(1)}: expected view 1 of this cache.*; delete it, and run"):
        make(changed)
    (changed / view_file(1)).unlink()
    make(changed)
    assert files(changed) == whole


def test_topk_is_at_most_the_number_of_classes(make, tmp_path):
    with pytest.raises(BadInput, match=r"topk: expected at most the 2 classes of .*, got 3"):
        make(tmp_path / "cache", topk=3)
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_other_files_is_refused(make, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        BadInput, match="expected a new or empty folder or a cache, got a folder with other files; choose another"
    ):
        make(tmp_path)
    with pytest.raises(BadInput, match=r"out: expected a folder, could not read .*thesis.txt \(Not a directory\)"):
        make(tmp_path / "thesis.txt")
    assert files(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_table_written_again_with_its_own_info_is_accepted(changed):
    """So the tests above fail for the stated reason, not because a file was rewritten."""
    tensors, said = load_tensors(changed / view_file(1))
    save_tensors(changed / view_file(1), tensors, said)
    TeacherCache.open(changed).verify()
