"""A folder's fingerprint and its index, which is reused, extended after changes and rebuilt after damage."""

import multiprocessing
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fastofa.data.content
import fastofa.data.folder
import fastofa.data.folder_index
import fastofa.data.folder_listing
from fastofa.data.decode import read_image
from fastofa.data.headers import Limits
from fastofa.data.names import Names
from fastofa.data.open import open_dataset
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from folders import assert_same, cut, damage_in_place, index_of, refusal, save_random


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the images whose header is read, in order."""
    names: list[str] = []
    original = fastofa.data.folder.header_size

    def count(path: Path, limits: Limits) -> tuple[int, int] | str:
        names.append(path.name)
        return original(path, limits)

    monkeypatch.setattr(fastofa.data.folder, "header_size", count)
    return names


def test_index_is_written_and_used_again(folder: Path, opened: list[str]) -> None:
    """The second time, no image is opened."""
    first = open_dataset(str(folder))
    assert len(opened) == 24
    assert first.index == index_of(folder)
    assert first.index.exists()
    opened.clear()
    again = open_dataset(str(folder))
    assert opened == []
    assert again.index == first.index
    assert_same(again, first)


def swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def test_two_files_of_equal_length_that_were_swapped_are_detected(folder: Path, opened: list[str]) -> None:
    """By their content: the fingerprint changes, and neither gets the size of the other from the index."""
    pair = folder / "train" / "china" / "003.png", folder / "train" / "flower" / "009.png"
    for path, (height, width) in zip(pair, ((20, 30), (30, 20)), strict=True):
        save_random(path, height, width)
        path.write_bytes(path.read_bytes().ljust(3000, b"\0"))
    first = open_dataset(str(folder))
    opened.clear()
    swap(*pair)
    second = open_dataset(str(folder))
    assert sorted(opened) == ["003.png", "009.png"]
    assert second.names == first.names
    rows = [first.names.index(path.relative_to(folder / "train").as_posix()) for path in pair]
    assert second.sizes[rows].tolist() == first.sizes[rows[::-1]].tolist() == [[30, 20], [20, 30]]
    assert second.fingerprint != first.fingerprint
    swap(*pair)
    assert_same(open_dataset(str(folder)), first)


@pytest.mark.parametrize("at", ["first", "middle", "last", "between"])
def test_the_fingerprint_covers_parts_of_a_large_file(folder: Path, at: str) -> None:
    """The first, middle and last 4 kB, and nothing between them."""
    path = folder / "train" / "china" / "000.jpg"
    path.write_bytes(path.read_bytes().ljust(40_000, b"\0"))
    before = open_dataset(str(folder))
    data = bytearray(path.read_bytes())
    data[{"first": 4095, "middle": 20_000, "last": 36_000, "between": 12_000}[at]] ^= 1
    path.write_bytes(data)
    try:
        after = open_dataset(str(folder)).fingerprint
    except BadInput:  # the change made it unreadable
        after = ""
    assert (after == before.fingerprint) == (at == "between")


def test_of_many_files_a_sample_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are evenly spaced; the others are recognised by name and size only."""
    monkeypatch.setattr(fastofa.data.content, "FILES", 6)
    assert fastofa.data.content.sample(24).tolist() == [0, 4, 8, 12, 16, 20]
    assert fastofa.data.content.sample(6).tolist() == [0, 1, 2, 3, 4, 5]
    first = open_dataset(str(folder))
    paths = [first.path(i) for i in range(24)]
    damage_in_place(paths[5])
    assert_same(open_dataset(str(folder)), first)
    damage_in_place(paths[8])
    assert str(paths[8]) in refusal(folder)


def test_splits_have_their_own_index(folder: Path) -> None:
    open_dataset(str(folder)), open_dataset(str(folder), "val")
    assert {path.name for path in (folder / ".fastofa").glob("[!.]*")} == {"train.safetensors", "val.safetensors"}
    assert len(open_dataset(str(folder))) == 24
    assert len(open_dataset(str(folder), "val")) == 12


def test_only_changed_and_new_files_are_read_again(folder: Path, opened: list[str]) -> None:
    before = open_dataset(str(folder))
    opened.clear()
    save_random(folder / "train" / "china" / "003.jpg", 33, 44)
    save_random(folder / "train" / "flower" / "new.png", 55, 66)
    (folder / "train" / "china" / "005.jpg").unlink()
    after = open_dataset(str(folder))
    assert sorted(opened) == ["003.jpg", "new.png"]
    sizes = dict(zip(after.names, after.sizes.tolist(), strict=True))
    expected = dict(zip(before.names, before.sizes.tolist(), strict=True))
    del expected["china/005.jpg"]
    assert sizes == {**expected, "china/003.jpg": [33, 44], "flower/new.png": [55, 66]}
    opened.clear()
    assert_same(open_dataset(str(folder)), after)
    assert opened == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "text", "pickle"])
def test_a_damaged_index_is_reported_and_rebuilt(
    folder: Path, opened: list[str], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    first = open_dataset(str(folder))
    whole = index_of(folder).read_bytes()
    content = {
        "flip": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "truncate": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"an index",
        "pickle": pickle.dumps({"sizes": 3}),
    }[damage]
    index_of(folder).write_bytes(content)
    opened.clear()
    capsys.readouterr()
    again = open_dataset(str(folder))
    notice = capsys.readouterr().err
    assert str(index_of(folder)) in notice
    assert "indexing the folder again" in notice
    assert len(opened) == 24
    assert_same(again, first)
    assert index_of(folder).read_bytes() == whole


IN_ITS_PLACE: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "another": lambda path: safetensors.torch.save_file({"weight": torch.zeros(3)}, path),
    "fastofa's": lambda path: save_tensors(path, {"classes": torch.zeros(3)}, {"view": 0}),
    "deep": lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "deep_info": lambda path: safetensors.torch.save_file(
        {"a": torch.zeros(1)}, path, {"fastofa": "[" * 100_000 + "]" * 100_000}
    ),
}


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "dtype": lambda tensors: tensors.update(sizes=tensors["sizes"].float()),
    "bf16": lambda tensors: tensors.update(sizes=tensors["sizes"].bfloat16()),
    "shape": lambda tensors: tensors.update(sizes=tensors["sizes"].T.contiguous()),
    "rows": lambda tensors: tensors.update(byte_sizes=tensors["byte_sizes"][:-1].clone()),
    "missing": lambda tensors: tensors.pop("content"),
    "more": lambda tensors: tensors.update(weight=torch.zeros(1)),
    "negative": lambda tensors: tensors["sizes"].neg_(),
    "names": lambda tensors: tensors["names"].fill_(1),
    "scalar": lambda tensors: tensors.update(names=torch.tensor(0, dtype=torch.uint8)),
    "place": lambda tensors: tensors.update(
        skipped=torch.tensor([24]), reasons=torch.tensor([65, 0], dtype=torch.uint8)
    ),
    "reason": lambda tensors: tensors.update(
        skipped=torch.tensor([2]), reasons=torch.tensor([255, 0], dtype=torch.uint8)
    ),
}


@pytest.mark.parametrize("kind", [*IN_ITS_PLACE, *CHANGES])
def test_another_file_in_place_of_the_index(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """It is reported, and the folder is indexed again, even if the checksum of the forged index is correct."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = open_dataset(str(folder))
    tensors = load_tensors(index_of(folder))[0]
    index_of(folder).unlink()
    if kind in CHANGES:
        CHANGES[kind](tensors)
        save_tensors(index_of(folder), tensors, {})
    else:
        IN_ITS_PLACE[kind](index_of(folder))
    capsys.readouterr()
    assert_same(open_dataset(str(folder)), first)
    said = capsys.readouterr().err
    assert said.count(str(index_of(folder))) == said.count("indexing the folder again") == 1
    assert_same(open_dataset(str(folder)), first)


def test_a_planted_link_is_not_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as the index nor as its folder: the link's target is unchanged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.safetensors").write_text("precious")
    (folder / ".fastofa").symlink_to(mine)
    assert open_dataset(str(folder)).index is not None
    (folder / ".fastofa").unlink()
    (folder / ".fastofa").mkdir()
    index_of(folder).symlink_to(mine / "train.safetensors")
    (folder / ".fastofa" / ".lock").symlink_to(mine / "lock")
    assert_same(open_dataset(str(folder)), open_dataset(str(folder)))
    assert files_below(mine) == {str(mine / "train.safetensors"): b"precious"}


@pytest.mark.parametrize("kind", ["no home", "home is a file", "disk is full"])
def test_a_folder_opens_without_an_index(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, opened: list[str], kind: str
) -> None:
    """In a container: the data are read-only and the user has no home folder; reported once."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (folder / ".fastofa").write_text("a file where the folder would be")
    if kind == "no home":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is without HOME and a passwd entry
    elif kind == "home is a file":
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("HOME", str(tmp_path))

        def full(path: Path, *_: Any) -> None:
            raise BadInput(f"could not write {path}: No space left on device")

        monkeypatch.setattr(fastofa.data.folder_index, "save_tensors", full)
    for _ in range(2):
        opened.clear()
        data = open_dataset(str(folder))
        said = capsys.readouterr().err
        assert said.count("could not write the index") == 1
        assert data.index is None
        assert len(opened) == len(data) == 24
    damaged = data.path(3)
    save_random(damaged, 5, 5)
    with pytest.raises(BadInput, match=r"003\.jpg: expected .* pixels, .*, got 5 x 5; run"):
        data.read(3)


def _open(folder: str, start: Any, results: Any) -> None:
    start.wait()
    try:
        data = open_dataset(folder)
        results.put((data.fingerprint, data.sizes.tolist()))
    except BaseException as error:
        results.put(repr(error))


def test_six_processes_index_at_the_same_time(folder: Path) -> None:
    """At first there is no index: all open the same data."""
    context = multiprocessing.get_context("fork")
    first = open_dataset(str(folder))
    for _ in range(2):
        shutil.rmtree(folder / ".fastofa")
        start, results = context.Event(), context.Queue()
        processes = [context.Process(target=_open, args=(str(folder), start, results)) for _ in range(6)]
        for process in processes:
            process.start()
        start.set()
        found = [results.get(timeout=300) for _ in processes]
        for process in processes:
            process.join()
        assert found == [(first.fingerprint, first.sizes.tolist())] * 6


def test_a_second_process_waits_for_the_index_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """While the first one holds the lock; then the second opens no image."""
    first = open_dataset(str(folder))
    whole = index_of(folder).read_bytes()
    index_of(folder).unlink()
    opened.clear()
    flock, calls = fastofa.data.folder_index.fcntl.flock, []

    def held(file: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            raise BlockingIOError
        index_of(folder).write_bytes(whole)  # it is done
        flock(file, how)

    monkeypatch.setattr(fastofa.data.folder_index.fcntl, "flock", held)
    assert_same(open_dataset(str(folder)), first)
    assert len(calls) == 2
    assert opened == []
    assert "another process is indexing these images" in capsys.readouterr().err


def test_an_index_of_a_few_hundred_thousand_files(tmp_path: Path) -> None:
    """Their names are not stored in the safetensors header, which could not hold those of 3 million files."""
    count = 200_000
    names = [f"n{i % 500:08d}/n{i % 500:08d}_{i:08d}_{'x' * 20}.JPEG" for i in range(count)]
    rng = np.random.default_rng(0)
    content = np.zeros((fastofa.data.content.FILES, fastofa.data.content.DIGEST), dtype=np.uint8)
    files = fastofa.data.folder_index.Files(Names.of(names), rng.integers(1, 10**6, count), content)
    known = fastofa.data.folder_index.Known(rng.integers(1, 5000, (count, 2)), rng.random(count) < 0.5, {})
    known.skipped[7], known.sizes[7] = "empty file", 0
    path = fastofa.data.folder_index.write_index([tmp_path / "train.safetensors"], files, known)
    assert path is not None
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] < 2000
    found, _ = fastofa.data.folder_index.read_index([path], files)
    assert (found.sizes == known.sizes).all()
    assert (found.decoded == known.decoded).all()
    assert found.skipped == known.skipped
    fewer = files._replace(names=files.names.without(np.array([3])), byte_sizes=np.delete(files.byte_sizes, 3))
    found, _ = fastofa.data.folder_index.read_index([path], fewer)
    assert (found.sizes == np.delete(known.sizes, 3, axis=0)).all()
    assert found.skipped == {6: "empty file"}


# --- Read-only folders ------------------------------------------------------------------------------------------------


def make_read_only(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """According to os.access only, since tests may run as root, who can write everywhere."""
    access = os.access

    def refuse(path: Any, mode: int, **options: Any) -> bool:
        inside = Path(path) == top or top in Path(path).parents
        return not (inside and mode & os.W_OK) and access(path, mode, **options)

    monkeypatch.setattr(os, "access", refuse)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("by_environment", [True, False])
def test_read_only_folder_has_its_index_in_the_users_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], by_environment: bool
) -> None:
    """Below XDG_CACHE_HOME, or ~/.cache without it; nothing is written into the folder."""
    make_read_only(monkeypatch, folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if by_environment:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = files_below(folder)
    first = open_dataset(str(folder))
    assert first.index is not None
    assert first.index.is_relative_to(tmp_path / "cache" if by_environment else tmp_path / "home" / ".cache")
    assert first.index.exists()
    assert files_below(folder) == before
    opened.clear()
    assert_same(open_dataset(str(folder)), first)
    assert opened == []


def test_read_only_folders_do_not_share_an_index(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    make_read_only(monkeypatch, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_dataset(str(folder)).index != open_dataset(str(other)).index


def test_read_only_folder_that_has_an_index(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    """It is used; additions are written to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_dataset(str(folder))
    opened.clear()
    save_random(folder / "train" / "china" / "003.jpg", 33, 44)
    make_read_only(monkeypatch, folder)
    before = files_below(folder)
    for expected in (["003.jpg"], []):
        data = open_dataset(str(folder))
        assert data.sizes[3].tolist() == [33, 44]
        assert opened == expected
        assert files_below(folder) == before
        opened.clear()
    data = open_dataset(str(folder), skip_corrupt=True)
    assert data.index is not None
    assert data.index.is_relative_to(tmp_path / "cache")


# --- The fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_does_not_depend_on_the_folders_path(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "deep", ignore=shutil.ignore_patterns(".fastofa"))
    for split in ("train", "val"):
        assert_same(open_dataset(str(folder), split), open_dataset(str(other), split))  # type: ignore[arg-type]


def rename(folder: Path) -> None:
    (folder / "train/china/000.jpg").rename(folder / "train/china/000a.jpg")


def move_to_another_class(folder: Path) -> None:
    (folder / "train/china/000.jpg").rename(folder / "train/flower/000a.jpg")


def grow_by_a_byte(folder: Path) -> None:
    with open(folder / "train/china/000.jpg", "ab") as file:
        file.write(b"\0")


def remove(folder: Path) -> None:
    (folder / "train/china/000.jpg").unlink()


@pytest.mark.parametrize("change", [rename, move_to_another_class, grow_by_a_byte, remove])
@pytest.mark.parametrize("with_index", [True, False])
def test_fingerprint_changes_with_the_folder(folder: Path, change: Callable[[Path], None], with_index: bool) -> None:
    before = open_dataset(str(folder))
    change(folder)
    if not with_index:
        shutil.rmtree(folder / ".fastofa")
    after = open_dataset(str(folder))
    assert after.fingerprint != before.fingerprint
    assert open_dataset(str(folder), "val").fingerprint not in (before.fingerprint, after.fingerprint)


# --- Unreadable images ------------------------------------------------------------------------------------------------


def test_after_a_refusal_only_the_repaired_image_is_read(folder: Path, opened: list[str]) -> None:
    """The results for the others are kept: decoding a million of them again takes an hour."""
    path = folder / "train" / "flower" / "004.jpg"
    whole = path.read_bytes()
    cut(path)
    path.write_bytes(b"nonsense")
    for expected in (24, 1):
        opened.clear()
        assert refusal(folder).startswith("1 unreadable image")
        assert len(opened) == expected
    path.write_bytes(whole)
    opened.clear()
    data = open_dataset(str(folder))
    assert opened == ["004.jpg"]
    shutil.rmtree(folder / ".fastofa")
    assert_same(open_dataset(str(folder)), data)


def test_skip_corrupt_decodes_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the index knew the sizes; later openings, with or without the flag, use its list."""
    open_dataset(str(folder))
    cut(folder / "train" / "china" / "002.jpg")
    decoded = []
    monkeypatch.setattr(
        "fastofa.data.check_images.read_image", lambda path, *_, **__: (decoded.append(path), read_image(path))[1]
    )
    first = open_dataset(str(folder), skip_corrupt=True)
    assert len(decoded) == 24
    for flag in (True, False):
        again = open_dataset(str(folder), skip_corrupt=flag)
        assert_same(again, first)
        assert again.skipped == first.skipped
    assert len(decoded) == 24


def test_a_repaired_image_is_included_again(folder: Path) -> None:
    path = folder / "train" / "china" / "002.jpg"
    whole = path.read_bytes()
    before = open_dataset(str(folder))
    cut(path)
    assert len(open_dataset(str(folder), skip_corrupt=True)) == 23
    path.write_bytes(whole)
    after = open_dataset(str(folder), skip_corrupt=True)
    assert_same(after, before)
    assert after.skipped == ()
