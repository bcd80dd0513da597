"""The pixels of (view, sample) do not depend on workers, batch size, order or start."""

import dataclasses
import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from timm.data import auto_augment as timm
from torch import Tensor

from fastofa import pipelines
from fastofa.data.dataset import Dataset, from_array
from fastofa.data.open import open_dataset
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.pipelines import Batch, open_pipeline
from fastofa.pipelines.augment import augment, shares, with_partners
from fastofa.pipelines.crops import crop_on_device
from fastofa.pipelines.packed import Cropped, Gathered
from fastofa.pipelines.request import Request
from fastofa.pipelines.resident import check_memory
from fastofa.system.errors import BadInput, Failed
from fastofa.system.interrupt import Interrupt, Stopped
from fastofa.training.loop import train
from fastofa.views.draw import draw_views
from fastofa.views.order import batches, epoch_order
from fastofa.views.policy import ViewPolicy
from fastofa.views.rand_augment import OPS
from fastofa.views.table import Views, center_views, join_views, pixel_boxes
from runs import children

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DALI = pytest.param("dali", marks=pytest.mark.dali)
FOLDER_DALI = pytest.param("mixed", "dali", marks=pytest.mark.dali)


@pytest.fixture(scope="module")
def mixed(photos: Path) -> Dataset:
    """24 JPEGs of many sizes."""
    return open_dataset(str(photos))


@pytest.fixture(scope="module")
def uniform(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same photographs as 24 JPEGs of 90 x 80 pixels."""
    root = tmp_path_factory.mktemp("uniform")
    for path in sorted(photos.glob("train/*/*.jpg")):
        (root / "train" / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).crop((0, 0, 80, 90)).save(root / path.relative_to(photos), quality=92)
    return open_dataset(str(root))


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same photographs in a pack, 128 x 128 pixels each."""
    path = tmp_path_factory.mktemp("packed") / "photos.pack"
    write(WriteConfig(str(photos), path, size=128))
    return open_dataset(str(path))


@pytest.fixture(scope="module")
def raw(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same photographs in a .beton, as pixels."""
    path = tmp_path_factory.mktemp("raw") / "photos.beton"
    write(WriteConfig(str(photos), path, raw=True))
    return open_dataset(str(path))


@pytest.fixture(scope="module")
def beton(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same photographs in a .beton, at most 100 pixels a side."""
    path = tmp_path_factory.mktemp("beton") / "photos.beton"
    write(WriteConfig(str(photos), path, max_size=100))
    return open_dataset(str(path))


FILTERS = {False: tv.InterpolationMode.BILINEAR, True: tv.InterpolationMode.BICUBIC}


def draw(dataset: Dataset, view: int = 0, bicubic: float = 0.0) -> Views:
    return draw_views(ViewPolicy(bicubic=bicubic), dataset.sizes, seed=1, view=view)


def source_of(name: str, request: pytest.FixtureRequest) -> Dataset:
    """The photographs in a form that the pipeline serves."""
    return request.getfixturevalue({"ffcv": "beton", "dali": "mixed"}.get(name, "packed"))


def by_row(batches: list[Batch]) -> dict[int, Tensor]:
    rows = torch.cat([batch.rows for batch in batches])
    return dict(zip(rows.tolist(), torch.cat([batch.images for batch in batches]), strict=True))


def run(
    name: str, dataset: Dataset, views: Views, size=32, batch_size=7, order=None, start=0, **options
) -> list[Batch]:
    order = np.arange(len(dataset)) if order is None else order
    return list(open_pipeline(name, dataset, size, batch_size, **options).epoch(views, order, start))


def by_hand(dataset: Dataset, views: Views, size: int) -> Tensor:
    """Pillow and torchvision's transforms, one sample after the other."""
    images = []
    boxes = views.boxes(dataset.stored_sizes).tolist()
    for i, (box, flip, bicubic) in enumerate(zip(boxes, views.flip, views.is_bicubic, strict=True)):
        if dataset.root is not None:
            image = tv.pil_to_tensor(Image.open(dataset.path(i)).convert("RGB"))
        else:
            image = dataset.read(i)
        image = tv.resized_crop(image, *box, [size, size], FILTERS[bool(bicubic)], antialias=True)
        images.append(tv.horizontal_flip(image) if flip else image)
    return torch.stack(images)


def difference(a: Tensor, b: Tensor) -> float:
    """Mean over the pixels of the image that differs most, in levels of 255."""
    return (a.float() - b.float()).abs().mean(dim=(1, 2, 3)).max().item()


def images_of(batches: list[Batch]) -> Tensor:
    return torch.cat([batch.images for batch in batches])


def same(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return all(torch.equal(image, a[i]) for i, image in b.items())


# --- Replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("batch_size", [7, 64])
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("mixed", "torchvision"),
        ("packed", "torchvision"),
        ("beton", "torchvision"),
        ("packed", "packed"),
        ("beton", "ffcv"),
        ("raw", "ffcv"),
        FOLDER_DALI,
    ],
)
def test_pixels_depend_on_view_and_sample_only(request, source, name, workers, batch_size):
    """Bit for bit: sequential in this process against shuffled in workers, and from the middle of the epoch."""
    dataset = request.getfixturevalue(source)
    views = draw(dataset)
    truth = by_row(run(name, dataset, views, batch_size=5))
    order = epoch_order(len(dataset), seed=9, epoch=2)
    options = {"workers": workers, "batch_size": batch_size, "order": order}
    whole = by_row(run(name, dataset, views, **options))
    assert list(whole) == order.tolist()
    assert same(truth, whole)
    later = by_row(run(name, dataset, views, start=11, **options))
    assert list(later) == order[11:].tolist()
    assert same(truth, later)
    assert not same(truth, by_row(run(name, dataset, draw(dataset, view=1))))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("source", "name"), [("packed", "packed"), ("beton", "ffcv"), ("raw", "ffcv")])
def test_pixels_do_not_depend_on_how_the_file_is_read(request, monkeypatch, source, name, cached):
    """By pages or not, with read-ahead or not, mixed or not."""
    monkeypatch.setattr("fastofa.pipelines.read_ahead._in_memory", lambda *_: cached)
    dataset = request.getfixturevalue(source)
    pages = np.arange(len(dataset)) // 3  # 8 pages, as a larger file has them
    for views in (draw(dataset), draw_full(dataset)):
        truth = by_row(run(name, dataset, views, batch_size=24))
        order = epoch_order(24, 9, 2, partner=views.partner, page_ids=pages)
        found = by_row(run(name, dataset, views, order=order, batch_size=8, start=8, workers=2))
        assert list(found) == order[8:].tolist()
        assert same(truth, found)


@pytest.mark.parametrize("batch_size", [7, 64])
@pytest.mark.parametrize("source", ["digits", "uniform", "packed"])
def test_resident_pixels_depend_on_view_and_sample_only(request, source, batch_size):
    dataset = request.getfixturevalue(source)
    views = draw(dataset)
    truth = by_row(run("resident", dataset, views, batch_size=5))
    order = epoch_order(len(dataset), seed=9, epoch=2)
    whole = by_row(run("resident", dataset, views, batch_size=batch_size, order=order))
    assert list(whole) == order.tolist()
    assert same(truth, whole)
    later = by_row(run("resident", dataset, views, batch_size=batch_size, order=order, start=11))
    assert list(later) == order[11:].tolist()
    assert same(truth, later)
    assert not same(truth, by_row(run("resident", dataset, draw(dataset, view=1))))


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 6), (3, 4)])
@pytest.mark.parametrize("name", ["packed", "resident", "torchvision", "ffcv", DALI])
def test_ranks_together_see_the_batches_of_one(request, name, ranks, batch_size):
    """The samples in batch b of all ranks are those in batch b of a single rank, with the same pixels."""
    dataset = source_of(name, request)
    views = draw(dataset)
    alone = run(name, dataset, views, batch_size=ranks * batch_size, order=epoch_order(24, 9, 2))
    shares = [
        run(name, dataset, views, batch_size=batch_size, order=epoch_order(24, 9, 2, rank, ranks), workers=1)
        for rank in range(ranks)
    ]
    assert len(alone) == len(shares[0])
    for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert by_row([whole]).keys() == by_row(list(parts)).keys()
        assert same(by_row([whole]), by_row(list(parts)))


def ramp(size: tuple[int, int]) -> np.ndarray:
    """uint8 [1, H, W, 3]: red is the position from top to bottom, green from left to right, 0 to 255 at the edges."""
    down, across = (255 * (np.arange(side) + 0.5) / side for side in size)
    red, green = np.meshgrid(down, across, indexing="ij")
    return np.rint(np.stack([red, green, 0 * red], axis=-1)).astype(np.uint8)[None]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *[(form, name) for form in ("array", "x.pack") for name in ("torchvision", "resident", "packed")],
        *[("x.beton", name) for name in ("torchvision", "resident", "ffcv")],
        pytest.param("data", "dali", marks=pytest.mark.dali),
    ],
)
def test_a_view_is_the_same_region_in_every_form_and_at_every_size(tmp_path, form, name):
    """On an image of its coordinates, each output pixel is its position in the box.

    Up to the rounding of pixels (half a level, also of stored ones), and of the box to pixels of the stored image.
    """
    names = [f"{i:02d}" for i in range(12)]
    pixels = ramp((240, 400)).repeat(12, axis=0)
    dataset = from_array("ramp", "train", ("ramp",), names, np.zeros(12, dtype=np.int64), pixels)
    views = draw(dataset)
    assert 0 < views.flip.sum() < 12
    if form != "array":
        (tmp_path / "data/train/ramp").mkdir(parents=True)
        for i in names:
            Image.fromarray(pixels[0]).save(tmp_path / f"data/train/ramp/{i}.png")
        if form != "data":
            write(
                WriteConfig(str(tmp_path / "data"), tmp_path / form, **{"max_size": 200} if form == "x.beton" else {})
            )
        dataset = open_dataset(str(tmp_path / form))
    slack = 255 / dataset.stored_sizes[0]
    for size in (8, 20, 64):
        images = images_of(run(name, dataset, views, size, workers=1)).float()
        place = (np.arange(size) + 0.5) / size
        for image, (top, left, height, width), flip in zip(images, views.crop / 65535, views.flip, strict=True):
            middle = slice(size // 8, size - size // 8)  # filters are cut at the box's edges
            down = 255 * (top + place * height)
            across = 255 * (left + (place[::-1] if flip else place) * width)
            compressed = 1.5 if form == "x.beton" else 0
            for found, expected, most in ((image[0].mean(1), down, slack[0]), (image[1].mean(0), across, slack[1])):
                assert np.abs(found.numpy() - expected)[middle].max() < 1 + most + compressed


# --- The rest of the augmentation -------------------------------------------------------------------------------------

FULL = ViewPolicy(bicubic=0.5, auto_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, erase=0.25)


def draw_full(dataset: Dataset, view: int = 0, policy: ViewPolicy = FULL) -> Views:
    return draw_views(policy, dataset.sizes, seed=1, view=view)


def augmented_by_hand(cropped: Tensor, views: Views) -> Tensor:
    """Crops of all samples with timm's operations on Pillow images, mixed in numpy; an erased box is left black."""
    size = cropped.shape[-1]
    images = []
    for crop, ops, amounts in zip(cropped, views.ops, views.amounts.tolist(), strict=True):
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        for op, amount in zip(ops, amounts, strict=True):
            if op:
                name = timm._RAND_TRANSFORMS[op - 1]
                args = [] if timm.LEVEL_TO_ARG[name] is None else [int(amount) if "ize" in name else amount]
                if OPS[op] == "solarize_add":
                    args = [int(amount)]
                options = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BILINEAR}
                image = timm.NAME_TO_OP[name](image, *args, **options)
        images.append(np.asarray(image))
    whole = np.stack(images)
    out = whole.copy()
    for i, (partner, share, cut) in enumerate(zip(views.partner, views.mix, views.mix_box, strict=True)):
        if cut[2]:
            top, left, bottom, right = pixel_boxes(cut[None], size)[0]
            out[i, top:bottom, left:right] = whole[partner, top:bottom, left:right]
        else:
            out[i] = np.rint(whole[i] * share + whole[partner] * (1 - share))
    for image, (top, left, bottom, right) in zip(out, pixel_boxes(views.erase, size), strict=True):
        image[top:bottom, left:right] = 0
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "resident"),
        ("uniform", "resident"),
        ("mixed", "torchvision"),
        ("packed", "packed"),
        ("beton", "ffcv"),
        FOLDER_DALI,
    ],
)
def test_the_augmentation_equals_timms_image_by_image(request, source, name):
    """Crop, operations, mixing and erasing in the published order; only rotations differ, by 1 at few pixels."""
    dataset = request.getfixturevalue(source)
    for view in range(3):
        views = draw_full(dataset, view)
        plain = Views(views.crop, views.flip, views.bicubic)
        got = images_of(run(name, dataset, views, 48, batch_size=16))
        expected = augmented_by_hand(images_of(run(name, dataset, plain, 48)), views)
        for image, (top, left, bottom, right) in zip(got, pixel_boxes(views.erase, 48), strict=True):
            if bottom > top:
                assert image[:, top:bottom, left:right].float().std() > 20
            image[:, top:bottom, left:right] = 0
        error = (got.int() - expected.int()).abs()
        assert error.max() <= 2
        assert (error > 0).float().mean() < 1e-4


@pytest.mark.parametrize(
    ("source", "name", "workers"),
    [
        ("mixed", "torchvision", 0),
        ("mixed", "torchvision", 1),
        ("mixed", "torchvision", 4),
        ("digits", "resident", 0),
        ("packed", "packed", 1),
        ("packed", "packed", 4),
        ("beton", "ffcv", 4),
        pytest.param("mixed", "dali", 4, marks=pytest.mark.dali),
    ],
)
def test_augmented_pixels_depend_on_view_and_sample_only(request, source, name, workers):
    """Bit for bit, in batches of whole pairs and in any others, for which partners are read as well."""
    dataset = request.getfixturevalue(source)
    views = draw_full(dataset)
    truth = by_row(run(name, dataset, views, batch_size=len(dataset)))
    pairs = epoch_order(len(dataset), seed=9, epoch=2, partner=views.partner)
    torn = epoch_order(len(dataset), seed=9, epoch=2)
    for order, batch_size, start in ((pairs, 64, 0), (pairs, 8, 0), (torn, 7, 0), (pairs, 6, 11), (torn, 1, 20)):
        options = {"workers": workers, "batch_size": batch_size, "order": order, "start": start}
        found = by_row(run(name, dataset, views, **options))
        assert list(found) == order[start:].tolist()
        assert same(truth, found)
    assert not same(truth, by_row(run(name, dataset, draw_full(dataset, view=1))))


def test_all_pipelines_give_the_same_augmentation(digits, uniform, packed):
    for dataset in (digits, uniform, packed):
        views = draw_full(dataset)
        names = ["resident", "torchvision"] + ["packed"] * (dataset.pixels is not None)
        first, *others = (by_row(run(name, dataset, views, 45)) for name in names)
        assert all(same(first, other) for other in others)


@pytest.mark.parametrize(("name", "workers"), [("torchvision", 0), ("torchvision", 2), ("resident", 0), ("packed", 2)])
def test_a_mixed_batch_contains_partner_labels_and_shares(digits, name, workers):
    """The share of cutmix is that of the visible pixels."""
    views, size = draw_full(digits), 20
    batches = run(name, digits, views, size, batch_size=30, workers=workers)
    labels = torch.from_numpy(digits.labels)
    for batch in batches:
        partner = torch.from_numpy(views.partner)[batch.rows].long()
        assert (batch.partner_labels.dtype, batch.mix.dtype) == (torch.int64, torch.float32)
        assert torch.equal(batch.partner_labels, labels[partner])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    mix = torch.cat([batch.mix for batch in batches]).numpy()
    assert np.array_equal(mix, shares(views, np.arange(100), size))
    cut = views.mix_box[:, 2] > 0
    assert np.array_equal(mix[~cut], views.mix[~cut])
    assert np.abs(mix[cut] - views.mix[cut]).max() < 2 / size
    assert np.allclose(mix[cut] * size**2, np.rint(mix[cut] * size**2), atol=1e-3)
    for batch in run(name, digits, draw(digits), size):
        assert (batch.partner_labels, batch.mix) == (None, None)


@pytest.mark.parametrize("name", ["torchvision", "resident", "packed"])
def test_joined_views_are_the_views_one_after_the_other(digits, name):
    """Repeated augmentation: row r * N + i is sample i in the r-th view, with its label and its partner's."""
    policy = dataclasses.replace(FULL, repeats=3)
    tables = [draw_full(digits, view, policy) for view in range(3)]
    apart = [by_row(run(name, digits, table)) for table in tables]
    views = join_views(tables)
    order = epoch_order(100, 0, 1, partner=views.partner, repeats=3)
    batches = run(name, digits, views, batch_size=12, order=order)
    found = by_row(batches)
    assert list(found) == order.tolist()
    assert all(torch.equal(image, apart[row // 100][row % 100]) for row, image in found.items())
    labels = torch.from_numpy(digits.labels)
    for batch in batches:
        assert torch.equal(batch.sample_ids, batch.rows % 100)
        assert torch.equal(batch.labels, labels[batch.sample_ids])
        partner = torch.from_numpy(views.partner)[batch.rows].long()
        assert torch.equal(batch.partner_labels, labels[partner % 100])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_augments_to_the_same_bits_and_never_waits(digits):
    """The operations consist of single roundings, which are the same on every device."""
    views, rows = draw_full(digits), np.arange(100)
    crops = images_of(run("resident", digits, Views(views.crop, views.flip, views.bicubic), 64))
    expected = augment(crops.clone(memory_format=torch.channels_last), views, rows, 100)
    for mode in ("default", "error"):  # the first time constants are copied
        images = crops.cuda().contiguous(memory_format=torch.channels_last)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            got = augment(images, views, rows, 100)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got.cpu(), expected)


def test_fill_and_noise_have_the_policys_mean(digits):
    """The colour where an operation moved the image away, and the mean of the noise."""
    policy = ViewPolicy(auto_augment="rand-m10-p1-n1", erase=1.0, mean=(0.2, 0.4, 0.6), std=(0.01, 0.01, 0.01))
    views = draw_full(digits, policy=policy)
    slid = np.flatnonzero(views.ops[:, 0] == OPS.index("translate_x"))
    images = images_of(run("resident", digits, views, 40))
    for i in slid:
        side = images[i, :, :, 0 if views.amounts[i, 0] < 0 else -1].float()
        assert (side.median(dim=1).values - torch.tensor([51.0, 102.0, 153.0])).abs().max() <= 3
    for image, (top, left, bottom, right) in zip(images, pixel_boxes(views.erase, 40), strict=True):
        noise = image[:, top:bottom, left:right].float().mean(dim=(1, 2))
        assert (noise - torch.tensor([51.0, 102.0, 153.0])).abs().max() < 3
    assert len(slid) > 2


# --- Pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [(s, n) for s in ("digits", "uniform", "packed") for n in ("torchvision", "resident")]
    + [("mixed", "torchvision"), ("beton", "torchvision"), ("digits", "packed"), ("packed", "packed")]
    + [("beton", "ffcv"), ("raw", "ffcv"), FOLDER_DALI],
)
@pytest.mark.parametrize("bicubic", [0.0, 0.5])
def test_equals_a_plain_torchvision_loop(request, source, name, bicubic):
    """Per sample: open, resized_crop(antialias=True) with the view's filter, horizontal_flip; digits to 1 of 255 at
    every pixel.
    """
    dataset = request.getfixturevalue(source)
    views = draw(dataset, bicubic=bicubic)
    for size in (32 if name == "dali" else 8, 45):  # whose resizing differs at the outermost pixels
        got, expected = images_of(run(name, dataset, views, size)), by_hand(dataset, views, size)
        assert got.dtype == torch.uint8
        if source == "digits":
            assert (got.int() - expected.int()).abs().max() <= 1
        assert difference(got, expected) <= 1


@pytest.mark.parametrize("bicubic", [0.0, 0.5])
@pytest.mark.parametrize("source", ["digits", "uniform"])
def test_resident_and_the_gpus_kernel_agree_with_torchvision(request, source, bicubic):
    """To a mean of 1/255: the resident pipeline, and the crops that it makes on a GPU, of the same pixels."""
    dataset = request.getfixturevalue(source)
    views = draw(dataset, bicubic=bicubic)
    center = center_views(dataset.sizes, bicubic=bicubic > 0)
    pixels = dataset.pixels
    if pixels is None:
        pixels = np.stack([np.asarray(Image.open(dataset.path(i))) for i in range(len(dataset))])
    for table in (views, center):
        expected = images_of(run("torchvision", dataset, table))
        assert difference(images_of(run("resident", dataset, table)), expected) <= 1
        boxes, flip = torch.from_numpy(table.boxes(dataset.sizes)), torch.from_numpy(table.flip)
        on_device = crop_on_device(torch.from_numpy(pixels), boxes, flip, 32, None, table.bicubic, None)
        assert on_device.is_contiguous(memory_format=torch.channels_last)
        assert difference(on_device, expected) <= 1


@pytest.mark.parametrize("source", ["beton", "raw"])
def test_ffcv_has_exactly_the_pixels_of_torchvision(request, source):
    dataset = request.getfixturevalue(source)
    views = draw_full(dataset)
    assert same(by_row(run("ffcv", dataset, views, 48)), by_row(run("torchvision", dataset, views, 48)))


@pytest.mark.parametrize(("name", "workers"), [("torchvision", 0), ("torchvision", 2), ("resident", 0), ("packed", 2)])
def test_the_layout_of_batches(digits, name, workers):
    """Channels-last, labels and ids of the order's samples, a smaller last batch; normalised as torchvision does."""
    views, order = draw(digits), epoch_order(len(digits), 0, 0)
    batches = run(name, digits, views, 16, batch_size=24, order=order, workers=workers)
    assert [len(batch.images) for batch in batches] == [24, 24, 24, 24, 4]
    for batch in batches:
        assert batch.images.shape[1:] == (3, 16, 16)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.sample_ids.dtype == batch.rows.dtype == torch.int64
        assert torch.equal(batch.labels, torch.from_numpy(digits.labels)[batch.sample_ids])
    assert torch.cat([batch.rows for batch in batches]).tolist() == order.tolist()

    plain = images_of(batches)
    options = {"order": order, "workers": workers, "normalize": (MEAN, STD)}
    normal = run(name, digits, views, 16, batch_size=24, **options)
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in normal)
    expected = tv.normalize(tv.to_dtype(plain, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(images_of(normal), expected, rtol=0, atol=1e-5)


def test_an_epoch_may_be_empty_or_repeat_samples(digits):
    views = draw(digits)
    for name in ("torchvision", "resident", "packed"):
        assert run(name, digits, views, order=np.arange(10), start=10, workers=2) == []
        twice = run(name, digits, views, order=np.array([3, 3, 5]))[0].images
        assert torch.equal(twice[0], twice[1])
        with pytest.raises(ValueError, match=r"order: expected rows 0..99, got 0..100"):
            run(name, digits, views, order=np.arange(101))


@pytest.mark.parametrize("name", ["torchvision", "resident", "packed", "ffcv", DALI])
def test_the_size_may_change_between_epochs(request, name):
    """The images are those of a pipeline opened with that size."""
    dataset = source_of(name, request)
    views = draw(dataset)
    pipeline = open_pipeline(name, dataset, 16, batch_size=10)
    for size in (16, 45, 16):
        assert torch.equal(
            images_of(list(pipeline.epoch(views, np.arange(24), image_size=size))),
            images_of(run(name, dataset, views, size)),
        )


# --- What is refused, and interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-900]), "unreadable image .*{name}"),
        (lambda path: path.write_text("not an image"), "unreadable image .*{name}"),
        (lambda path: path.unlink(), "unreadable image .*{name}"),
        (lambda path: Image.open(path).crop((0, 0, 50, 40)).save(path), "image .*{name}: expected .* got 40 x 50"),
    ],
)
def test_a_file_damaged_after_opening_is_named(
    photos: Path, tmp_path: Path, workers: int, damage: Callable[[Path], object], message: str
):
    """Truncated, text, missing, or of another size than indexed: BadInput with its name, also from a worker."""
    shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns(".fastofa"))
    dataset = open_dataset(str(tmp_path / "data"))
    damage(dataset.path(17))
    pipeline = open_pipeline("torchvision", dataset, 32, batch_size=6, workers=workers)
    before = children()
    epoch = pipeline.epoch(draw(dataset), np.arange(len(dataset)))
    assert [len(next(epoch).images), len(next(epoch).images)] == [6, 6]  # samples 0..11 are whole
    with pytest.raises(BadInput, match=message.format(name=dataset.names[17])) as error:
        next(epoch)
    assert "\n" not in str(error.value)  # no worker's traceback
    assert children() <= before


def test_a_damaged_image_of_a_beton_is_named(photos: Path, tmp_path: Path):
    """Its end or its beginning is missing; also if the file became shorter."""
    write(WriteConfig(str(photos), tmp_path / "x.beton"))
    dataset = open_dataset(str(tmp_path / "x.beton"))
    views, (begin, count) = draw(dataset), dataset.spans[17].tolist()
    whole = (tmp_path / "x.beton").read_bytes()
    for damage in (slice(begin + count - 700, begin + count), slice(begin, begin + 9)):
        damaged = bytearray(whole)
        damaged[damage] = bytes(damage.stop - damage.start)
        (tmp_path / "x.beton").write_bytes(damaged)
        threads = threading.active_count()
        with pytest.raises(BadInput, match=f"unreadable image {dataset.names[17]} in .*x.beton"):
            run("ffcv", dataset, views, workers=2)
        assert threading.active_count() <= threads
    (tmp_path / "x.beton").write_bytes(whole[: begin + 9])
    with pytest.raises(BadInput, match=rf"image {dataset.names[17]} in .*x.beton: expected [\d,]+ bytes, got 9"):
        run("ffcv", dataset, views, order=np.arange(17, 18))


@pytest.mark.dali
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-900]), "unreadable image .*{name}"),
        (lambda path: path.write_text("not an image"), "unreadable image .*{name}"),
        (lambda path: path.write_bytes(b""), "unreadable image .*{name}"),
        (lambda path: path.unlink(), "unreadable image .*{name}"),
        (lambda path: Image.open(path).crop((0, 0, 50, 40)).save(path), "image .*{name}: expected .* got 40 x 50"),
        (lambda path: Image.open(path).resize((500, 400)).save(path), "image .*{name}: expected .* got 400 x 500"),
    ],
)
def test_dali_names_a_file_damaged_after_opening(
    photos: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
):
    """When its batch is read, not before."""
    shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns(".fastofa"))
    dataset = open_dataset(str(tmp_path / "data"))
    damage(dataset.path(17))
    epoch = open_pipeline("dali", dataset, 32, batch_size=6, workers=2).epoch(draw(dataset), np.arange(24))
    assert [len(next(epoch).images), len(next(epoch).images)] == [6, 6]
    with pytest.raises(BadInput, match=message.format(name=dataset.names[17])) as error:
        next(epoch)
    assert "\n" not in str(error.value)


@pytest.mark.dali
def test_dali_continues_after_damaged_files(photos: Path, tmp_path: Path, capsys):
    """With skip_corrupt they are named and skipped; the other images are unchanged."""
    shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns(".fastofa"))
    folder = tmp_path / "data/train/china"
    (folder / "003.jpg").write_text("not an image")
    (folder / "005.jpg").write_bytes((folder / "005.jpg").read_bytes()[:-900])
    (folder / "006.jpg").write_bytes(b"")
    dataset = open_dataset(str(tmp_path / "data"), skip_corrupt=True)
    said = capsys.readouterr().err
    assert all(f"a/{name}.jpg" in said for name in ("003", "005", "006"))
    assert len(dataset) == 21
    views = draw(dataset)
    assert difference(images_of(run("dali", dataset, views)), by_hand(dataset, views, 32)) <= 1


@pytest.mark.dali
def test_dali_reads_every_kind_of_file(photos: Path, tmp_path: Path):
    """CMYK, grey, 16 bits, transparency, EXIF orientation, another kind than the name says, very wide."""
    folder = tmp_path / "data/train/a"
    folder.mkdir(parents=True)
    photo = Image.open(photos / "train/china/000.jpg")
    exif = Image.Exif()
    for i in range(8):
        exif[0x0112] = i + 1
        photo.save(folder / f"turned-{i}.jpg", exif=exif, quality=95)
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("L").save(folder / "grey.jpg")
    photo.save(folder / "a-png.jpg", "PNG")
    photo.save(folder / "photo.webp")
    photo.resize((20000, 40)).save(folder / "wide.jpg")
    photo.convert("P").save(folder / "palette.png")
    photo.convert("RGBA").save(folder / "clear.png")
    Image.fromarray((np.arange(4800).reshape(60, 80) * 13).astype(np.uint16)).save(folder / "16-bit.png")
    dataset = open_dataset(str(tmp_path / "data"))
    views = draw(dataset)
    found, expected = (images_of(run(name, dataset, views)) for name in ("dali", "torchvision"))
    worst = {n: round(difference(a[None], b[None]), 2) for n, a, b in zip(dataset.names, found, expected, strict=True)}
    assert max(worst.values()) <= 1, worst


@pytest.mark.slow
@pytest.mark.dali
def test_a_cache_made_through_torchvision_trains_through_dali(on_photos):
    assert train(on_photos(pipeline="dali", workers=1)).images_per_second > 0


def test_without_dali_one_line_names_the_remedy(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "fastofa.pipelines.dali_loader", raising=False)
    with pytest.raises(BadInput, match=r"pipeline dali: needs DALI \(.*\); `fastofa doctor` says how to install it"):
        open_pipeline("dali", mixed, 32, 8)


def test_workers_leave_signals_to_the_main_process(mixed):
    """Both signals reach all processes of a group; a worker killed by one would hide how the main process ends."""
    order = np.arange(len(mixed))
    before = children()
    epoch = open_pipeline("torchvision", mixed, 32, batch_size=2, workers=2).epoch(draw(mixed), order)
    batches = [next(epoch)]
    workers = children() - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    batches += list(epoch)
    assert list(by_row(batches)) == order.tolist()
    assert children() <= before


def test_a_worker_that_is_killed_is_one_line(mixed):
    """As by the kernel when memory runs out."""
    before = children()
    epoch = open_pipeline("torchvision", mixed, 32, batch_size=2, workers=2).epoch(draw(mixed), np.arange(24))
    next(epoch)
    os.kill((children() - before).pop(), signal.SIGKILL)
    with pytest.raises(Failed, match=r"^a decoder process ended .killed by signal 9.* --workers \(0: none\)[^\n]+$"):
        list(epoch)
    assert children() <= before


def test_batches_do_not_use_dev_shm(mixed):
    """A container has only 64 MB of it."""
    before = children()
    epoch = open_pipeline("torchvision", mixed, 160, batch_size=8, workers=2).epoch(draw(mixed), np.arange(24))
    next(epoch)
    (worker, *_) = children() - before
    lines = Path(f"/proc/{worker}/maps").read_text().splitlines()
    maps = [line.split(maxsplit=5)[5] for line in lines if "rw-s" in line]
    epoch.close()
    assert "/dev/zero (deleted)" in [name.strip() for name in maps]  # how Linux calls shared memory without a file
    assert not [name for name in maps if "/dev/shm" in name and "/sem." not in name]  # locks of other tests


@pytest.mark.parametrize(("name", "source"), [("torchvision", "mixed"), ("ffcv", "beton")])
def test_a_signal_ends_the_wait_for_an_image_that_never_arrives(request, monkeypatch, name, source):
    """As when a disk does not respond."""
    dataset, stuck = request.getfixturevalue(source), threading.Event()

    def never(_: Dataset, sample_id: int, *__: object) -> None:
        stuck.wait(20)
        raise BadInput(f"sample {sample_id}")

    monkeypatch.setattr(Dataset, "unpack" if name == "ffcv" else "read", never)
    for module in ("system.interrupt", "pipelines.threaded"):
        monkeypatch.setattr(f"fastofa.{module}.PATIENCE_S", 0.1)
    before = children()
    epoch = open_pipeline(name, dataset, 32, batch_size=2, workers=2).epoch(draw(dataset), np.arange(8))
    with Interrupt():
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with pytest.raises(Stopped, match=r"waiting .* for images") as stopped:
            next(epoch)
    stuck.set()
    assert stopped.value.signum == signal.SIGTERM
    assert children() <= before


def test_auto_chooses_by_the_data_and_reports_why(digits, mixed, packed, beton, capsys):
    """Arrays are resident, image files go through torchvision, a .beton and a pack have their own pipelines."""
    for dataset, name in ((digits, "resident"), (mixed, "torchvision"), (beton, "ffcv"), (packed, "packed")):
        pipelines._say.cache_clear()
        for _ in range(2):  # the training and the validation split, say
            assert type(open_pipeline("auto", dataset, 32, 8)) is type(open_pipeline(name, dataset, 32, 8))
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"pipeline {name}: ")


def test_a_small_pack_is_resident_if_it_fits(packed, monkeypatch, capsys):
    """The notice for a GPU with this much memory."""
    need, gpu = packed.pixels.nbytes, torch.device("cuda", 0)
    for free, name in ((4 * need, "resident"), (4 * need - 1, "packed")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2**33))
        assert pipelines.choose(packed, gpu)[0] == name
    check_memory(need, gpu, "x.pack")
    assert "pipeline resident: x.pack takes 0.0 GiB of cuda:0's 8 GiB" in capsys.readouterr().err
    with pytest.raises(BadInput, match="use --pipeline packed"):
        check_memory(4 * need, gpu, "x.pack")


@pytest.mark.parametrize("name", ["packed", "torchvision", "resident", "ffcv", DALI])
def test_early_exits_leave_no_thread_and_no_memory(request, name):
    """After fifteen epochs abandoned after a batch, and sixty complete ones."""
    before = children()
    dataset = source_of(name, request)
    views, order = draw(dataset), np.arange(24)
    pipeline = open_pipeline(name, dataset, 64, batch_size=4, workers=2)

    def resident() -> float:
        gc.collect()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) / 1024

    def leave() -> None:
        next(iter(pipeline.epoch(views, order)))

    def count_threads() -> int:
        return len(os.listdir("/proc/self/task"))  # those of libraries, too

    for _ in range(3):
        leave()
        list(pipeline.epoch(views, order))
    threads = count_threads()
    for _ in range(15):
        leave()
    limit = time.monotonic() + 900
    while count_threads() > threads and time.monotonic() < limit:
        time.sleep(0.01)  # those of DALI end a moment later
    assert count_threads() <= threads
    assert children() <= before
    grown = []
    for _ in range(0 if name == "torchvision" else 3):
        at_first = resident()
        for _ in range(20):
            assert sum(len(batch.labels) for batch in pipeline.epoch(views, order)) == 24
        grown.append(resident() - at_first)
    assert min(grown, default=0) < 2  # MB; a leak grows every time, threads' own memory does not


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_gathered_for_a_gpu(packed, monkeypatch, workers):
    """The rows of the batch in order, then partners; cropped, they equal the images that a CPU crops."""
    views, order, here = draw_full(packed), epoch_order(24, seed=9, epoch=2), torch.device("cpu")
    gathered, cropped = (cls(Request(packed, 32, 7, here, workers, None)) for cls in (Gathered, Cropped))
    monkeypatch.setattr(gathered, "_copy", lambda *tensors: tensors)
    pairs = zip(gathered.host_batches(views, order), cropped.host_batches(views, order), strict=True)
    for (whole, crops), rows in zip(pairs, batches(views, order, 0, 7), strict=True):
        assert np.array_equal(whole.rows, rows)
        assert np.array_equal(whole.images, packed.pixels[with_partners(views, rows)])
        arrived = gathered._to_gpu(whole.images, views, whole.all_rows, 32).permute(0, 2, 3, 1)
        assert (arrived.int() - crops.images.int()).abs().max() <= 1


def test_a_threads_error_is_raised_by_the_epoch(packed, monkeypatch):
    """Nothing waits."""
    monkeypatch.setattr("fastofa.pipelines.threaded.crop_resize_one", lambda *_: 1 / 0)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(open_pipeline("packed", packed, 32, 4, workers=2).epoch(draw(packed), np.arange(24)))
    assert threading.active_count() <= threads


@pytest.mark.parametrize("name", ["packed", "resident", "torchvision", "ffcv", DALI])
def test_batches_made_in_inference_mode(request, name):
    """As in evaluation."""
    dataset = source_of(name, request)
    with torch.inference_mode():
        inside = images_of(run(name, dataset, draw(dataset), workers=2))
    assert torch.equal(inside, images_of(run(name, dataset, draw(dataset))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["packed", "resident"])
def test_a_gpu_crops_to_the_pixels_of_the_cpu(packed, name):
    """Gathered, copied on a stream and cropped there; in whatever order batches are consumed."""
    views = draw_full(packed)
    order = epoch_order(24, seed=9, epoch=2, partner=views.partner)
    plain = Views(views.crop, views.flip, views.bicubic)
    expected = by_row(run("torchvision", packed, plain, 64))
    for workers in (1, 4):
        batches = run(name, packed, plain, 64, batch_size=4, order=order, device="cuda", workers=workers)
        found = {i: image.cpu() for i, image in by_row(batches).items()}
        assert list(found) == order.tolist()
        assert max(difference(found[i][None], expected[i][None]) for i in found) <= 1
    assert torch.equal(
        images_of(run(name, packed, views, 64, batch_size=5, device="cuda")),
        images_of(run(name, packed, views, 64, batch_size=24, device="cuda")),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ffcv", DALI])
def test_a_gpu_gets_the_pixels_of_the_cpu(request, name):
    """Whole batches are kept until the end, so that memory reused too early would be noticed."""
    dataset = source_of(name, request)
    views, order = draw(dataset), np.tile(np.arange(24), 4)
    expected = images_of(run("torchvision", dataset, views, 64))
    found = images_of(run(name, dataset, views, 64, batch_size=4, order=order, device="cuda", workers=4)).cpu()
    assert difference(found, expected.repeat(4, 1, 1, 1)) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "resident"},
            "pipeline resident: expected images of one size, got heights .*--pipeline auto",
        ),
        ({"name": "packed"}, r"pipeline packed: expected a \.pack, got .*; `fastofa write` writes one"),
        (
            {"name": "ffcv", "source": "packed"},
            r"pipeline ffcv: expected a \.beton, got .*photos.pack; `fastofa write`",
        ),
        ({"name": "ffcv"}, r"pipeline ffcv: expected a \.beton, got .*; `fastofa write` writes one"),
        pytest.param(
            {"name": "dali", "source": "packed"},
            "pipeline dali: expected a folder of images, got ",
            marks=pytest.mark.dali,
        ),
        ({"name": "pillow"}, "unknown pipeline 'pillow': expected auto or one of .*resident.*torchvision"),
        ({"image_size": 0}, "at least 1 .*got 0, 8 and 0"),
        ({"batch_size": 0}, "at least 1 .*got 32, 0 and 0"),
        ({"workers": -1}, "at least 0, got 32, 8 and -1"),
    ],
)
def test_unsupported_datasets_are_refused(request, change, message):
    options = {"name": "torchvision", "source": "mixed", "image_size": 32, "batch_size": 8, "workers": 0, **change}
    dataset = request.getfixturevalue(options.pop("source"))
    with pytest.raises(BadInput, match=message):
        open_pipeline(dataset=dataset, **options)


def test_one_image_of_another_size_is_refused(uniform):
    sizes = uniform.sizes.copy()
    sizes[5, 1] += 1
    with pytest.raises(BadInput, match=r"heights 90\.\.90 and widths 80\.\.81"):
        open_pipeline("resident", dataclasses.replace(uniform, sizes=sizes), 32, 8)
