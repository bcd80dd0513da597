"""Read-ahead requests each byte once, in time, in as few ranges as the order allows, and nothing that is in memory."""

import errno
import os
import time
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from fastofa.data.dataset import Dataset
from fastofa.data.open import open_dataset
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.pipelines import open_pipeline
from fastofa.pipelines import read_ahead as module
from fastofa.pipelines.read_ahead import BATCHES, CALL, plan, read_ahead
from fastofa.views.draw import draw_views
from fastofa.views.order import WINDOW, epoch_order
from fastofa.views.policy import ViewPolicy
from fastofa.views.table import Views, join_views

EACH = 200_000  # bytes of an image: 41 or 42 in a page, some of them across two
PAGE = 8 << 20


def shuffled(count: int, path: Path | None = None) -> Dataset:
    """Spans in random order, as in a .beton, without gaps between pages."""
    sizes, places = np.full((count, 2), 9), np.random.default_rng(0).permutation(count)
    spans = np.stack([128 + EACH * places, np.full(count, EACH)], axis=1)
    return Dataset("x.beton", "train", ("a",), [""] * count, 0 * places, sizes, "", file=path, spans=spans)


def views_of(dataset: Dataset, mixup: float = 0.0) -> Views:
    return draw_views(ViewPolicy(mixup=mixup), dataset.sizes, 0, 0)


def test_in_random_order_each_image_is_requested_at_its_position():
    dataset = shuffled(20_000)
    order = epoch_order(20_000, 0, 0)
    at, ranges, _ = plan(dataset, views_of(dataset), order)
    assert np.array_equal(at, np.arange(20_000))
    assert np.array_equal(ranges, np.cumsum(dataset.spans[order], axis=1))


@pytest.mark.parametrize("ranks", [1, 8])
def test_page_by_page_each_page_is_requested_whole_before_its_first_image(ranks):
    dataset = shuffled(20_000)
    order = epoch_order(20_000, 0, 0, ranks - 1, ranks, page_ids=dataset.page_ids)
    at, ranges, ahead = plan(dataset, views_of(dataset), order)
    assert len(ranges) == len(set(ranges[:, 0].tolist())) == len(np.unique(dataset.page_ids[order]))
    for place, (begin, end) in zip(at.tolist(), ranges.tolist(), strict=True):
        page = dataset.page_ids[order[place]]
        assert place == np.flatnonzero(dataset.page_ids[order] == page)[0]
        inside = dataset.spans[dataset.page_ids == page]
        assert (begin, end) == (inside[:, 0].min(), inside.sum(axis=1).max())
    assert (np.diff(at) > 0).all()
    assert ahead == pytest.approx(WINDOW * PAGE / EACH / ranks, rel=0.02)


def test_of_a_mixed_pair_the_first_image_is_covered_by_its_page():
    """The second one is requested by itself, before the same pair."""
    dataset = shuffled(20_000)
    views = views_of(dataset, mixup=1.0)
    order = epoch_order(20_000, 0, 0, partner=views.partner, page_ids=dataset.page_ids)
    at, ranges, _ = plan(dataset, views, order)
    alone = np.diff(ranges, axis=1)[:, 0] == EACH
    assert np.array_equal(at[alone], np.arange(1, 20_000, 2))
    assert np.array_equal(ranges[alone, 0], dataset.spans[order[1::2], 0])
    assert (~alone).sum() == len(np.unique(dataset.page_ids[order[::2]]))
    assert (np.diff(at) >= 0).all()


def test_repeated_images_are_requested_once():
    """In repeated augmentation the order contains rows of several tables."""
    dataset = shuffled(60_000)
    views = join_views([views_of(dataset)] * 3)
    order = epoch_order(60_000, 0, 0, repeats=3)
    at, ranges, _ = plan(dataset, views, order)
    assert np.array_equal(at, np.arange(0, len(order), 3))
    assert np.array_equal(ranges[:, 0], dataset.spans[order[::3] % 60_000, 0])
    order = epoch_order(60_000, 0, 0, repeats=3, page_ids=dataset.page_ids)
    at, ranges, ahead = plan(dataset, views, order)
    assert len(ranges) == len(np.unique(dataset.page_ids[order % 60_000]))
    assert ahead == pytest.approx(3 * WINDOW * PAGE / EACH, rel=0.1)


@pytest.fixture
def requested(monkeypatch) -> list[tuple[int, int]]:
    """Begin and end of each request to the system."""
    found: list[tuple[int, int]] = []

    def advise(file: int, begin: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        assert 0 < count <= CALL
        found.append((begin, begin + count))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


@pytest.mark.parametrize("by_pages", [True, False])
def test_every_byte_is_requested_once_and_batches_ahead(requested, tmp_path, monkeypatch, by_pages):
    (tmp_path / "x").touch()
    monkeypatch.setattr(module, "_in_memory", lambda *_: False)
    dataset = shuffled(20_000, tmp_path / "x")
    order = epoch_order(20_000, 0, 0, page_ids=dataset.page_ids if by_pages else None)
    asking = read_ahead(dataset, views_of(dataset), order, 500, Event())
    for first in range(0, 20_000, 500):
        next(asking, None)
        parts = np.array(sorted(requested))
        soon = dataset.spans[order[: first + 500 * (1 + BATCHES)]]
        found = parts[np.searchsorted(parts[:, 0], soon[:, 0], side="right") - 1]
        assert (found[:, 1] > soon[:, 0]).all()
        early = sum(end - start for start, end in requested) - (first + 500) * EACH
        assert early <= (2.1 * WINDOW * PAGE if by_pages else BATCHES * 500 * EACH)  # in memory too soon
    assert (parts[0, 0], parts[-1, 1]) == (128, 128 + 20_000 * EACH)
    assert np.array_equal(parts[:-1, 1], parts[1:, 0])


@pytest.mark.parametrize("missing", [True, False])
def test_data_in_memory_are_not_requested(requested, tmp_path, missing):
    """A file that has just been written is in memory; its evicted part is not."""
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.write(bytes(128 + 50 * EACH))
        file.flush()
        os.fsync(file.fileno())
    dataset = shuffled(50, path)
    if missing:
        os.truncate(path, 128)
    next(read_ahead(dataset, views_of(dataset), np.arange(50), 10, Event()), None)
    assert bool(requested) is missing


def test_without_a_file_of_images_nothing_is_requested(requested, digits):
    assert list(read_ahead(digits, views_of(digits), np.arange(100), 10, Event())) == []
    assert requested == []


def test_a_slow_disk_does_not_delay_the_end(tmp_path, monkeypatch):
    """A page order makes thousands of requests for its first batch; none is made after the pipeline is closed."""
    calls, called = [], Event()

    def advise(*_: int) -> None:
        calls.append(1)
        called.set()
        time.sleep(0.01)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(module, "_in_memory", lambda *_: False)
    write(WriteConfig("digits", tmp_path / "x.beton", raw=True))
    monkeypatch.setattr(module, "CALL", 16)
    dataset = open_dataset(str(tmp_path / "x.beton"))
    made = open_pipeline("ffcv", dataset, 8, 4).epoch(views_of(dataset), np.arange(len(dataset)))
    next(made)
    called.wait()
    made.close()
    left = len(calls)
    time.sleep(0.05)
    assert len(calls) == left < 14_376  # which would take more than two minutes


def test_a_failed_request_is_reported_and_the_images_are_read(tmp_path, monkeypatch, capsys):
    def advise(*_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(module, "_in_memory", lambda *_: False)
    write(WriteConfig("digits", tmp_path / "x.beton", raw=True))
    dataset = open_dataset(str(tmp_path / "x.beton"))
    batches = open_pipeline("ffcv", dataset, 8, 100).epoch(views_of(dataset), np.arange(len(dataset)))
    assert sum(len(batch.labels) for batch in batches) == len(dataset)
    assert capsys.readouterr().err.count("x.beton: no read-ahead in this epoch") == 1


@pytest.mark.parametrize("batch_size", [4, 1198])
def test_an_exception_of_the_reader_is_raised(tmp_path, monkeypatch, batch_size):
    """Even if it comes late."""
    monkeypatch.setattr(module, "_in_memory", lambda *_: time.sleep(0.1) or 1 / 0)
    write(WriteConfig("digits", tmp_path / "x.beton", raw=True))
    dataset = open_dataset(str(tmp_path / "x.beton"))
    with pytest.raises(ZeroDivisionError):
        list(open_pipeline("ffcv", dataset, 8, batch_size).epoch(views_of(dataset), np.arange(len(dataset))))
