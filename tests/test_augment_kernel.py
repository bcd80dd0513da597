"""The augmentation's Triton kernels against their twins, bit for bit: on a GPU if there is one, else interpreted."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images
from torch import Tensor

from fastofa.kernels import triton_augment
from fastofa.kernels.augment_batch import NAMES, Erasing, Mixing, apply_operations, mix_and_erase
from fastofa.pipelines.augment import augment, checked, with_partners
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy
from fastofa.views.rand_augment import amounts, limits

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILL = (124, 116, 104)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMATS = (torch.channels_last, torch.contiguous_format)


@pytest.fixture(autouse=True)
def _poisoned():
    """What a kernel forgets to write is 255."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """uint8 [B, 3, S, S] channels-last: parts of photographs, noise of several contrasts, one level, two levels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    photos = load_sample_images().images
    for i in range(0, count, 2):
        top, left = rng.integers(0, 427 - size, 2)
        images[i] = photos[i // 2 % 2][top : top + size, left : left + size]
    for i in range(1, count, 8):
        low, high = np.sort(rng.integers(0, 256, 2))
        images[i] = images[i] // 255 * (high - low) + low
    for i in range(3, count, 8):
        images[i] = images[i] // 3 + rng.integers(0, 170)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def both(images: Tensor, ops: np.ndarray, amount: np.ndarray, fill=FILL) -> tuple[Tensor, Tensor]:
    """The results of the kernels and of the twins."""
    table = torch.from_numpy(ops.astype(np.uint8)), torch.from_numpy(amount.astype(np.float32))
    got = apply_operations(images.to(DEVICE), *table, fill, impl="triton")
    assert got.dtype == torch.uint8
    return got.cpu(), apply_operations(images.clone(), *table, fill, impl="torch")


def draw(rng: np.random.Generator, count: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Operations and amounts [count, columns]."""
    ops = rng.integers(0, len(NAMES), (count, columns))
    return ops, amounts(ops, rng.uniform(0, 10, ops.shape), rng.choice([-1, 1], ops.shape), bool(rng.integers(2)))


@pytest.mark.parametrize(
    ("size", "memory_format", "each"),
    [(1, FORMATS[0], 5), (2, FORMATS[1], 5), (16, FORMATS[0], 5), (37, FORMATS[1], 3)],
)
def test_every_operation_equals_the_twin(size, memory_format, each):
    """At the smallest, the largest and other amounts; a block of pixels and several."""
    ops = np.repeat(np.arange(len(NAMES)), each)
    for increasing in (False, True):
        amount = amounts(ops, np.linspace(0.5, 9.5, len(ops)), np.where(np.arange(len(ops)) % 2, 1, -1), increasing)
        amount[0::each], amount[1::each] = limits()
        images = pictures(len(ops), size).contiguous(memory_format=memory_format)
        got, expected = both(images, ops[:, None], amount[:, None])
        wrong = (got != expected).flatten(1).any(dim=1)
        assert not wrong.any(), [(NAMES[op], value) for op, value in zip(ops[wrong], amount[wrong], strict=True)]
        assert got.is_contiguous(memory_format=memory_format)


@settings(max_examples=20)
@given(
    size=st.integers(1, 45),
    count=st.integers(1, 7),
    columns=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    memory_format=st.sampled_from(FORMATS),
)
def test_any_batch_equals_the_twin(size, count, columns, seed, memory_format):
    """Whatever operations stand side by side and follow one another."""
    rng = np.random.default_rng(seed)
    fill = tuple(rng.integers(0, 256, 3).tolist())
    images = pictures(count, size, seed).contiguous(memory_format=memory_format)
    got, expected = both(images, *draw(rng, count, columns), fill)
    assert torch.equal(got, expected)


@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 255), min_size=25, max_size=25), levels=st.integers(1, 255))
@example(counts=[0] * 25, levels=1)
@example(counts=[0] * 24 + [255], levels=255)
def test_tables_of_any_histogram(counts, levels):
    """Of ranges of any width, which fp64 rounds in different ways, and of lopsided histograms."""
    image = torch.tensor(counts, dtype=torch.uint8).view(1, 1, 5, 5).expand(2, 3, 5, 5)
    scaled = (image.int() * levels // 255).to(torch.uint8).repeat(1, 1, 5, 5)
    got, expected = both(
        scaled, np.array([[NAMES.index("auto_contrast")], [NAMES.index("equalize")]]), np.zeros((2, 1))
    )
    assert torch.equal(got, expected)


def test_ranges_are_stretched_as_by_the_twin():
    """All pairs of a lowest and a highest level on a GPU."""
    low, high = (
        v.flatten().to(torch.uint8) for v in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    )
    low, high = low[low <= high], high[low <= high]
    if DEVICE == "cpu":  # the interpreter takes some of them
        low, high = low[::613], high[::613]
    between = low[:, None] + (high - low)[:, None].int() * torch.arange(9) // 8
    images = between.to(torch.uint8).view(-1, 1, 3, 3).repeat(1, 3, 1, 1)
    ops = np.full((len(images), 1), NAMES.index("auto_contrast"))
    got, expected = both(images, ops, np.zeros(ops.shape))
    assert torch.equal(got, expected)


def test_memory_of_another_format():
    """A slice whose rows are not adjacent, and no images."""
    images, rng = pictures(6, 24)[:, :, 3:20, 5:22], np.random.default_rng(0)
    got, expected = both(images, *draw(rng, 6, 2))
    assert torch.equal(got, expected)
    got, expected = both(images[:0], *draw(rng, 0, 2))
    assert got.shape == expected.shape == (0, 3, 17, 17)


# --- Mixing and erasing -----------------------------------------------------------------------------------------------


def some_boxes(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """int64 [B, 4]; every third is empty, one is the whole image."""
    corners = np.sort(rng.integers(0, size + 1, (count, 2, 2)), axis=1).reshape(count, 4)
    corners[::3] = 0
    corners[1:2] = 0, 0, size, size
    return torch.from_numpy(corners)


@settings(max_examples=15)
@given(
    size=st.integers(1, 45),
    count=st.integers(0, 7),
    more=st.integers(0, 3),
    mixes=st.booleans(),
    erases=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    memory_format=st.sampled_from(FORMATS),
)
@example(9, 7, 2, True, True, 1, FORMATS[0])
def test_mixing_and_erasing_equal_the_twin(size, count, more, mixes, erases, seed, memory_format):
    rng = np.random.default_rng(seed)
    images = pictures(count + more, size, seed).contiguous(memory_format=memory_format)
    mixing = erasing = None
    if mixes:
        boxes, shares = some_boxes(rng, count, size), torch.from_numpy(rng.random(count, dtype=np.float32))
        shares[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])] = 1
        partners = torch.from_numpy(rng.integers(0, max(1, count + more), count))
        mixing = Mixing(partners, shares, boxes)
    if erases:
        keys = torch.from_numpy(rng.integers(-(2**31), 2**31, count, dtype=np.int32))
        erasing = Erasing(some_boxes(rng, count, size), keys, MEAN, STD)
    got = mix_and_erase(images.to(DEVICE), count, mixing, erasing, impl="triton")
    expected = mix_and_erase(images.clone(), count, mixing, erasing, impl="torch")
    assert got.dtype == torch.uint8
    assert torch.equal(got.cpu(), expected)


def test_halves_of_a_mixture_are_rounded_to_even():
    levels = torch.arange(0, 255, dtype=torch.uint8)[:, None, None, None].expand(255, 3, 1, 1)
    images = torch.cat([levels, levels + 1]).to(DEVICE)
    mixing = Mixing(torch.arange(255, 510), torch.full((255,), 0.5), torch.zeros(255, 4, dtype=torch.int64))
    got = mix_and_erase(images, 255, mixing, None, impl="triton")
    assert got[:, 0, 0, 0].tolist() == [round(level + 0.5) for level in range(255)]


# --- A whole batch ----------------------------------------------------------------------------------------------------

FULL = ViewPolicy(auto_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, erase=0.25)


@pytest.mark.parametrize("count", [13, 24])
def test_a_drawn_batch_equals_the_twin(count):
    """Half of the pairs are torn apart, so that partners follow the batch's own images."""
    views = draw_views(FULL, np.full((24, 2), 64), seed=3, view=1)
    rows = with_partners(views, np.arange(count))
    images = pictures(len(rows), 29)
    got = augment(images.to(DEVICE), views, rows, count, impl="triton")
    assert torch.equal(got.cpu(), augment(images.clone(), views, rows, count, impl="torch"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [96, 224, 225])
def test_a_gpu_computes_the_bits_of_the_cpu_and_never_waits(size, memory_format):
    """Every operation at many amounts; the first time, the kernels are compiled and constants are copied."""
    count = 480
    views = draw_views(FULL, np.full((count, 2), 256), seed=3, view=1)
    views.ops[:, 0] = np.arange(count) % len(NAMES)
    signs = np.random.default_rng(0).choice([-1, 1], count)
    views.amounts[:, 0] = amounts(views.ops[:, 0], np.linspace(0, 9.99, count), signs, increasing=True)
    rows, images = np.arange(count), pictures(count, size).contiguous(memory_format=memory_format)
    expected = augment(images.clone(), views, rows, count, impl="torch")
    for mode in ("default", "error"):
        uploaded = images.cuda()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            got = augment(uploaded, views, rows, count, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wrong = (got.cpu() != expected).flatten(1).any(dim=1)
        assert not wrong.any(), [[NAMES[op] for op in ops] for ops in views.ops[wrong.numpy()]]


# --- Bad arguments ----------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    images, ops, amount = pictures(4, 8), torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(4, 2)
    for arguments, message in (
        ((images.float(), ops, amount), r"images: expected uint8 \[B, 3, S, S\], got torch.float32"),
        ((images[:, :, :7], ops, amount), r"images: expected .* got torch.uint8 \(4, 3, 7, 8\)"),
        ((images, ops[:3], amount), r"ops: expected uint8 \[4, n\] in 0..15, got torch.uint8 \(3, 2\)"),
        ((images, ops + 16, amount), r"ops: expected .* with 16"),
        ((images, ops.long(), amount), r"ops: expected .* got torch.int64"),
        ((images, ops, amount[:, :1]), r"amounts: expected float32 \(4, 2\), got torch.float32 \(4, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_operations(*arguments, FILL)
    boxes, good = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0, 3])
    for mixing, message in (
        (Mixing(good + 1, torch.ones(2), boxes), r"partners: expected positions in 0..3, got 4"),
        (Mixing(good - 1, torch.ones(2), boxes), r"partners: expected positions in 0..3, got -1"),
        (Mixing(good, torch.ones(3), boxes), r"shares: expected torch.float32 \(2,\), got torch.float32 \(3,\)"),
        (Mixing(good, torch.ones(2), boxes[:1]), r"boxes: expected torch.int64 \(2, 4\), got torch.int64 \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_and_erase(images, 2, mixing, None)
    with pytest.raises(ValueError, match=r"keys: expected torch.int32 \(2,\), got torch.int64"):
        mix_and_erase(images, 2, None, Erasing(boxes, good, MEAN, STD))


@pytest.mark.kernel
def test_the_check_before_the_first_batch(monkeypatch, capsys):
    """The kernels pass it; a kernel that is wrong or fails is not used, and a notice says why."""
    assert checked(DEVICE) == "triton"
    assert capsys.readouterr().err == ""
    right = triton_augment.apply_operations
    monkeypatch.setattr(triton_augment, "apply_operations", lambda *given: right(*given) ^ 1)
    assert checked(DEVICE) == "torch"
    assert "results differ" in capsys.readouterr().err
    monkeypatch.setattr(triton_augment, "apply_operations", lambda *given: 1 / 0)
    assert checked(DEVICE) == "torch"
    assert "ZeroDivisionError" in capsys.readouterr().err
