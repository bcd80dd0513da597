"""Packed predictions: what a row decodes to, on every path; how far it is from the teacher; what it takes on disk."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.bench_cache import begin, view_columns
from fastofa.kernels.reference import dense_probs
from fastofa.methods.targets import TopK
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.cache_files import read_table, view_file, write_table
from fastofa.teacher.cache_header import read_header
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.packed_rows import Decoder, RowFormat, joined, packed
from fastofa.teacher.table_checks import packed_fault

CPU = torch.device("cpu")


def teacher(rows: int, num_classes: int, deviation: float, seed: int = 0) -> Tensor:
    """Log-probabilities fp32 [N, C] of random logits."""
    draw = torch.Generator().manual_seed(seed)
    return (deviation * torch.randn(rows, num_classes, generator=draw)).log_softmax(dim=1)


def as_defined(row: bytes, topk: int, num_classes: int) -> tuple[list[int], list[float]]:
    """The classes and log-probabilities of a row, read bit by bit as the format is described."""
    value = int.from_bytes(row, "little")

    def take(bits: int) -> int:
        nonlocal value
        field, value = value % 2**bits, value // 2**bits
        return field

    classes = [take(max(1, math.ceil(math.log2(num_classes)))) for _ in range(topk)]
    odds, codes = math.exp((take(15) - 16_384) / 1024), [take(7) for _ in range(topk - 1)]
    assert value == 0, "the padding is not zero"
    falls = itertools.accumulate([0, *(round(1024 * -3 * math.log(1 - code / 128)) / 1024 for code in codes)])
    shares = [math.exp(-fall) for fall in falls]
    return classes, [math.log(share / sum(shares) / (1 + odds)) for share in shares]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 10, 94, 128, 1000, 1024, 21_841, 65_536, 65_537, 200_000]), st.integers(1, 40),
       st.floats(0, 30), st.data())  # fmt: skip
def test_rows_hold_what_the_format_says(num_classes, topk, deviation, data):
    """Classes exactly, the last ones included; log-probabilities as defined; the same in bulk and on the device."""
    topk = min(topk, num_classes - 1)
    log_probs = teacher(5, num_classes, deviation, data.draw(st.integers(0, 5)))
    log_probs[:, [0, -1]] = log_probs.amax(dim=1, keepdim=True)  # ties, of the first and the last class
    targets = topk_targets(log_probs, topk)
    found = RowFormat(topk, num_classes)
    rows = found.pack(targets)
    assert rows.shape == (5, math.ceil((topk * max(1, math.ceil(math.log2(num_classes))) + 15 + 7 * (topk - 1)) / 8))
    bulk, looked_up = found.unpack(rows), Decoder(found, CPU)(rows)
    assert torch.equal(bulk.classes.long(), targets.classes.long())
    assert (bulk.classes.dtype, looked_up.classes.dtype) == (targets.classes.dtype, torch.int32)
    for i, row in enumerate(rows):
        classes, values = as_defined(row.numpy().tobytes(), topk, num_classes)
        for got in (bulk, looked_up):
            assert got.classes[i].tolist() == classes
            assert got.log_probs[i].tolist() == pytest.approx(values, rel=1e-6, abs=1e-7)
    assert torch.equal(bulk.log_probs, looked_up.log_probs)


@pytest.mark.parametrize("rows", [0, 1, 8192, 20_000])
def test_any_number_of_rows(rows):
    """Rows are packed and unpacked in blocks."""
    targets = topk_targets(teacher(max(rows, 1), 50, 3.0)[:rows], 5)
    found = RowFormat(5, 50)
    back = found.unpack(found.pack(targets))
    assert torch.equal(back.classes.long(), targets.classes.long())
    assert ((back.log_probs - targets.log_probs.float()).abs() < 0.05 + 0.1 * targets.log_probs.float().abs()).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("deviation", [1.5, 3, 6])
def test_packing_changes_the_targets_far_less_than_the_even_tail(deviation, temperature):
    """K = 16 of 1,000 in 35 bytes: the divergence from the exact K and even tail, and the cosine of the gradients.

    At T = 4 a small rest counts, which a sum of rounded probabilities would lose.
    """
    log_probs = teacher(512, 1000, deviation)
    values, classes = log_probs.double().log_softmax(dim=1).topk(16)
    assert RowFormat(16, 1000).num_bytes == 35
    stored = packed(topk_targets(log_probs, 16), 1000).unpacked()
    assert torch.equal(stored.classes.long(), classes)
    even, rounded = (dense_probs(classes, v.double(), 1000, temperature) for v in (values, stored.log_probs))
    assert torch.xlogy(even, even / rounded).sum(dim=1).mean() < 3e-5
    student = log_probs.double() + torch.randn(512, 1000, generator=torch.Generator().manual_seed(1))
    student = (student / temperature).softmax(dim=1)
    assert F.cosine_similarity(student - even, student - rounded).mean() > 0.9995


@pytest.mark.parametrize("kept", [1e-4, 0.01, 0.5, 0.999, 1 - 1e-5])
def test_the_rest_is_exact_whatever_its_size(kept):
    """To one part in a thousand of itself, as is the kept probability."""
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64) * kept
    got = packed(TopK(torch.arange(4)[None], probs.log()), 1000).unpacked().log_probs.double().exp().sum().item()
    assert got == pytest.approx(kept, rel=1e-3)
    assert 1 - got == pytest.approx(1 - kept, rel=2e-3, abs=1e-7)


def test_a_fall_that_no_step_reaches_is_cut():
    """A nearly certain teacher: all that it excludes keeps a probability of at most e^-14 of the class before."""
    log_probs = torch.tensor([[-1e-4, -50.0, -60_000.0]])
    got = packed(TopK(torch.tensor([[7, 0, 9]]), log_probs), 10).unpacked().log_probs
    assert got[0].tolist() == pytest.approx([-1e-4, -14.56, -29.11], abs=0.01)


def test_a_value_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="expected numbers, got NaN"):
        packed(TopK(torch.tensor([[1, 2]]), torch.tensor([[-1.0, torch.nan]])), 10)


@pytest.mark.parametrize("rows", [None, [4, 0, 3]])
def test_a_lookup_decodes_the_rows_of_its_batch(rows):
    """Of the whole table, or of a rank's share; in any order, repeated, or none."""
    targets = topk_targets(teacher(6, 300, 3.0), 4)
    stored = packed(targets, 300)
    expected = stored.unpacked()
    kept = None if rows is None else torch.tensor(rows).numpy()
    table = DeviceTargets(stored, CPU, rows=kept)
    assert len(table) == len(rows or range(6))
    for ids in ([4, 0, 3], [3, 3], []):
        got = table.lookup(torch.tensor(ids, dtype=torch.int64))
        assert torch.equal(got.classes, expected.classes[ids].int() if ids else torch.empty(0, 4, dtype=torch.int32))
        assert torch.equal(got.log_probs, expected.log_probs[ids])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_decodes_the_same_bits():
    stored = packed(topk_targets(teacher(100, 1000, 3.0), 16), 1000)
    rows, cuda = torch.arange(100), torch.device("cuda")
    here, there = DeviceTargets(stored, CPU).lookup(rows), DeviceTargets(stored, cuda).lookup(rows.to(cuda))
    assert torch.equal(here.classes, there.classes.cpu())
    assert torch.equal(here.log_probs, there.log_probs.cpu())


def test_repeated_views_are_joined():
    """Also packed and plain ones, of a cache that an older version began."""
    parts = [topk_targets(teacher(3, 20, 2.0, seed), 4) for seed in (0, 1)]
    both = [packed(part, 20) for part in parts]
    expected = torch.cat([part.unpacked().log_probs for part in both])
    assert torch.equal(joined(both).unpacked().log_probs, expected)
    mixed = joined([both[0], parts[1]])
    assert torch.equal(mixed.classes.long(), torch.cat([part.classes.long() for part in parts]))
    assert torch.equal(mixed.log_probs[3:], parts[1].log_probs.float())


def test_all_classes_are_not_packed():
    """The predictions of all classes are renormalised from float16, which is exact to 1e-5."""
    targets = topk_targets(teacher(3, 10, 2.0), 10)
    assert packed(targets, 10) is targets


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([1, 2, 1000], "classes from 0 to 999, got [1, 2, 1000] for sample 3"),
        ([1, 4, 1], "each class once, got [1, 4, 1] for sample 3"),
    ],
)
def test_impossible_classes_are_found(classes, message):
    targets = topk_targets(teacher(9, 1000, 3.0), 3)
    found = RowFormat(3, 1000)
    assert packed_fault(found.pack(targets), 9, found) == ""
    targets.classes[3] = torch.tensor(classes).to(torch.uint16)
    assert message in packed_fault(found.pack(targets), 9, found)
    assert re.search(r"uint8 \[9, 8\], got uint8 \[8, 8\]", packed_fault(found.pack(targets)[1:], 9, found))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[TeacherCache, TopK]:
    """One view of 20,000 rows, K = 16 of 1,000 classes, with crop and flip; and its predictions."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    begin(path, 20_000, 1000)
    targets = topk_targets(teacher(20_000, 1000, 3.0), 16)
    columns = {**view_columns(20_000), **targets._asdict()}
    write_table(path / view_file(0), columns, read_header(path), 0)
    return TeacherCache.open(path), targets


def test_a_view_takes_44_bytes_per_image(cache: tuple[TeacherCache, TopK]) -> None:
    """Everything included: crop, flip, predictions and the file's header."""
    opened, _ = cache
    assert (opened.path / view_file(0)).stat().st_size <= 44 * 20_000


def test_a_written_view_is_read_back(cache: tuple[TeacherCache, TopK]) -> None:
    """Crops, flips and classes bit for bit; written again from its columns, the file has the same bytes."""
    opened, targets = cache
    table, drawn = opened.table(0), view_columns(20_000)
    assert torch.equal(torch.from_numpy(table.views.crop), drawn["crop"])
    assert torch.equal(torch.from_numpy(table.views.flip), drawn["flip"])
    assert torch.equal(table.targets.classes.long(), targets.classes.long())
    opened.verify()
    again: Path = opened.path / "again.safetensors"
    write_table(again, read_table(opened.path / view_file(0), opened.header, 0), opened.header, 0)
    assert again.read_bytes() == (opened.path / view_file(0)).read_bytes()
    again.unlink()
