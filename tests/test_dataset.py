"""Datasets: one order everywhere, sizes as the pictures are read, an index that is kept and mended, clear refusals."""

import contextlib
import errno
import io
import multiprocessing
import os
import pickle
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

import fastofa.data.content
import fastofa.data.folder
import fastofa.data.folder_index
import fastofa.data.folder_listing
from fastofa.data.dataset import Dataset, fingerprint_of, from_array
from fastofa.data.decode import read_image
from fastofa.data.headers import Limits
from fastofa.data.names import Names
from fastofa.data.open import open_dataset
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors

ORIENTATION = 0x0112


def refusal(spec: object, split: Any = "train", skip_corrupt: bool = False) -> str:
    """The message with which a dataset is refused: one line."""
    with pytest.raises(BadInput) as error:
        open_dataset(str(spec), split, skip_corrupt)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(a: Dataset, b: Dataset) -> None:
    assert a.names == b.names
    assert a.classes == b.classes
    assert (a.labels == b.labels).all()
    assert (a.sizes == b.sizes).all()
    assert a.fingerprint == b.fingerprint


# --- Any --------------------------------------------------------------------------------------------------------------


def test_unknown_specs_and_splits(tmp_path: Path) -> None:
    for spec in ("nonsense", "cifar100", "cifar100:", "cifar10:DIR", str(tmp_path / "none")):
        assert "digits" in refusal(spec)
    assert "train or val" in refusal("digits", "test")


def test_fingerprint_covers_names_bytes_labels_and_order() -> None:
    names, sizes, labels = ["a", "b", "c"], np.array([1, 2, 3]), np.array([0, 0, 1])
    content = np.arange(6, dtype=np.uint8).reshape(3, 2)
    prints = {
        fingerprint_of(names, sizes, labels, content),
        fingerprint_of(["a", "b", "d"], sizes, labels, content),
        fingerprint_of(["b", "a", "c"], sizes, labels, content),
        fingerprint_of(names, np.array([1, 2, 4]), labels, content),
        fingerprint_of(names, sizes, np.array([0, 1, 1]), content),
        fingerprint_of(names, sizes, labels, content[::-1]),
        fingerprint_of(names[:2], sizes[:2], labels[:2], content[:2]),
    }
    assert len(prints) == 7
    # Whatever holds the names and numbers.
    assert fingerprint_of(Names.of(names), sizes.astype(np.int32), labels.astype(">i8"), content) in prints


def test_fingerprint_of_an_array_covers_its_pixels(digits: Dataset) -> None:
    assert digits.pixels is not None
    prints = set()
    for change in (0, 1):
        pixels = digits.pixels.copy()
        pixels[50, 3, 3, 0] ^= change
        prints.add(from_array("digits", "train", digits.classes, list(digits.names), digits.labels, pixels).fingerprint)
    assert len(prints) == 2
    assert digits.fingerprint in prints


@pytest.mark.parametrize("spec", ["digits", "digits:100", "cifar100:data"])
def test_a_folder_named_like_a_built_in_data_set_is_refused_with_both_spellings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    """Neither user gets the other one's data; what the message says works."""
    monkeypatch.chdir(tmp_path)
    save_random(tmp_path / spec / "train" / "a" / "1.png", 8, 8)
    text = refusal(spec)
    assert str(tmp_path / spec) in text
    assert f"give ./{spec} for the folder" in text
    for given in (f"./{spec}", str(tmp_path / spec), *([f"{spec}/"] if "digits" in spec else [])):
        assert open_dataset(given).names == ["a/1.png"]
    if spec == "digits":
        assert "digits: for the built-in one" in text
        assert len(open_dataset("digits:")) == 1198
    elif spec == "digits:100":
        (tmp_path / spec).rename(tmp_path / "other")
        assert len(open_dataset(spec)) == 100


def test_a_path_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """A name that is too long, a link to itself, a NUL."""
    (tmp_path / "loop").symlink_to("loop")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    assert "unknown dataset" in refusal(tmp_path / "loop")
    assert "unknown dataset" in refusal("a\0b")


# --- Names ------------------------------------------------------------------------------------------------------------


def test_names_are_a_list_of_strings() -> None:
    """With whatever a file name may hold."""
    names = ["a/1.jpg", "b c/ü 2.jpg", "", "b/[bold]\n\x1b.jpg", "a/1.jpg"]
    found = Names.of(names)
    assert (len(found), list(found), found[1], found[-1], found[1:3]) == (5, names, names[1], names[-1], names[1:3])
    assert found == names
    assert names == found
    assert found == Names.of(names)
    assert found != names[:4]
    assert found.index(names[3]) == 3
    assert names[3] in found
    assert "c" not in found
    assert found[np.int64(1)] == names[1]
    assert found.without(np.array([0, 3])) == [names[1], names[2], names[4]]
    assert list(Names.of([])) == []
    for i in (5, -6):
        with pytest.raises(IndexError):
            found[i]
    with pytest.raises(ValueError, match="NUL"):
        Names(b"a\0b")


def test_names_are_found_in_others() -> None:
    """Also more of them than are decoded at once, and none in none."""
    numbers = np.random.default_rng(0).permutation(70_000)
    names, others = [f"{i}" for i in numbers], [f"{i}" for i in range(0, 140_000, 2)]
    places = Names.of(names).places_in(Names.of(others))
    assert places.tolist() == [i // 2 if i % 2 == 0 else -1 for i in numbers]
    assert Names.of(names).places_in(Names.of(names)).tolist() == list(range(70_000))
    assert Names.of(["a"]).places_in(Names.of([])).tolist() == [-1]
    assert Names.of([]).places_in(Names.of(["a"])).tolist() == []


# --- Digits -----------------------------------------------------------------------------------------------------------


def test_digits_splits() -> None:
    """1,198 and 599, nothing in both, nothing lost."""
    train, val = open_dataset("digits"), open_dataset("digits", "val")
    assert (len(train), len(val)) == (1198, 599)
    assert len({*train.names, *val.names}) == 1797
    assert train.classes == val.classes == tuple("0123456789")
    assert train.fingerprint != val.fingerprint


@pytest.mark.parametrize("split", ["train", "val"])
def test_digits_pixels_and_labels_are_sklearns(split: Any) -> None:
    """Names are sklearn's positions; levels 0 to 16 become 0 to 255."""
    source, digits = load_digits(), open_dataset("digits", split)
    rows = [int(name) for name in digits.names]
    assert (digits.labels == source.target[rows]).all()
    assert digits.labels.dtype == np.int64
    assert digits.pixels is not None
    assert digits.pixels.dtype == np.uint8
    assert digits.pixels.shape == (len(digits), 8, 8, 3)
    assert np.abs(digits.pixels - source.images[rows][..., None] * 255 / 16).max() <= 0.5
    assert digits.pixels.max() == 255
    assert (digits.sizes == 8).all()
    assert digits.sizes.shape == (len(digits), 2)


@pytest.mark.parametrize("spec", ["digits", "digits:100"])
def test_digits_are_ordered_by_class_then_name(spec: str) -> None:
    digits = open_dataset(spec)
    keys = list(zip(digits.labels.tolist(), digits.names, strict=True))
    assert keys == sorted(keys)


@pytest.mark.parametrize("count", [10, 100, 1120])
def test_few_digits_are_balanced_and_part_of_all(count: int) -> None:
    few, train = open_dataset(f"digits:{count}"), open_dataset("digits")
    assert np.bincount(few.labels).tolist() == [count // 10] * 10
    assert set(few.names) <= set(train.names)
    assert few.pixels is not None
    assert train.pixels is not None
    rows = [train.names.index(name) for name in few.names]
    assert (few.pixels == train.pixels[rows]).all()
    assert_same(open_dataset(f"digits:{count}", "val"), open_dataset("digits", "val"))


@pytest.mark.parametrize("count", ["0", "5", "15", "-10", "1.5", "ten", "1130", "10000", "²0"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_number_of_digits(count: str, split: Any) -> None:
    text = refusal(f"digits:{count}", split)
    assert "multiple of 10" in text
    assert count in text


# --- A folder of pictures ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos that the test may change."""
    return shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns(".fastofa"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the pictures whose header is read, as it happens."""
    names: list[str] = []
    original = fastofa.data.folder.header_size

    def count(path: Path, limits: Limits) -> tuple[int, int] | str:
        names.append(path.name)
        return original(path, limits)

    monkeypatch.setattr(fastofa.data.folder, "header_size", count)
    return names


def index_of(folder: Path, split: str = "train") -> Path:
    return folder / ".fastofa" / f"{split}.safetensors"


def save_random(path: Path, height: int, width: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def damage_in_place(path: Path) -> None:
    """Overwrite the picture with nonsense of the same length."""
    path.write_bytes(b"nonsense" * (path.stat().st_size // 8) + b"x" * (path.stat().st_size % 8))


def cut(path: Path) -> None:
    """Leave the header and half of the pixels."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_folder_names_labels_and_sizes(photos: Path) -> None:
    for split, count in (("train", 24), ("val", 12)):
        data = open_dataset(str(photos), split)  # type: ignore[arg-type]
        assert len(data) == count
        assert data.classes == ("china", "flower")
        assert data.names == sorted(p.relative_to(photos / split).as_posix() for p in (photos / split).rglob("*.jpg"))
        assert data.labels.tolist() == [0] * (count // 2) + [1] * (count // 2)
        assert data.labels.dtype == np.int64
        for i in range(len(data)):
            assert data.path(i) == photos / split / data.names[i]
            with Image.open(data.path(i)) as image:
                assert tuple(data.sizes[i]) == (image.height, image.width)


def test_folder_is_ordered_by_class_then_name_with_folders_below(tmp_path: Path) -> None:
    """Not as the file system lists it; other files are passed over; suffixes count in any case."""
    for name in ("b/2.jpg", "b/10.png", "b/1.webp", "b/sub/deep/0.JPG", "b/a sub/9.jpeg", "a/z.PNG", "B/x.jpg"):
        save_random(tmp_path / "train" / name, 9, 7)
    for name in ("a/notes.txt", "a/no_suffix", "a/jpg", ".hidden/x.jpg", "outside.jpg"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_text("not a picture")
    data = open_dataset(str(tmp_path))
    assert data.classes == ("B", "a", "b")
    assert data.names == ["B/x.jpg", "a/z.PNG", "b/1.webp", "b/10.png", "b/2.jpg", "b/a sub/9.jpeg", "b/sub/deep/0.JPG"]
    assert data.labels.tolist() == [0, 1, 2, 2, 2, 2, 2]


def test_folder_through_links(folder: Path, tmp_path: Path) -> None:
    """A class that is a link to a folder and a picture that is a link to a file, as people assemble datasets."""
    linked = tmp_path / "linked" / "train"
    linked.mkdir(parents=True)
    (linked / "china").symlink_to(folder / "train" / "china")
    (linked / "flower").mkdir()
    for path in (folder / "train" / "flower").iterdir():
        (linked / "flower" / path.name).symlink_to(path)
    assert_same(open_dataset(str(tmp_path / "linked")), open_dataset(str(folder)))


def test_val_has_the_labels_of_train(tmp_path: Path) -> None:
    """Although it lacks a class in the middle."""
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/1.png"):
        save_random(tmp_path / name, 8, 8)
    val = open_dataset(str(tmp_path), "val")
    assert val.classes == ("a", "b", "c")
    assert val.labels.tolist() == [0, 2]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_picture(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    save_random(tmp_path / "train" / "a" / f"0.{suffix}", 20, 30, exif=exif)
    data = open_dataset(str(tmp_path))
    with Image.open(data.path(0)) as image:
        upright = ImageOps.exif_transpose(image)
    assert data.sizes.tolist() == [[upright.height, upright.width]]
    assert data.sizes.tolist() == [list(read_image(data.path(0)).shape[1:])]


def xmp(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/>'
        b"</rdf:RDF></x:xmpmeta>" % orientation
    )


def move_exif_to_the_end(path: Path) -> None:
    """Of a PNG; allowed, but torchvision reads only what comes before the pixels."""
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    chunk = data[start:end]
    assert zlib.crc32(chunk[4:-4]) == struct.unpack(">I", chunk[-4:])[0]
    path.write_bytes(data[:start] + data[end:-12] + chunk + data[-12:])


@pytest.mark.parametrize("kind", ["webp", "mpo", "xmp_jpg", "xmp_png", "late_png", "orientation_0", "orientation_9"])
def test_sizes_are_those_that_the_reader_gives(tmp_path: Path, kind: str) -> None:
    """Where Pillow and torchvision find the orientation in different places, the reader's word counts."""
    exif = Image.Exif()
    exif[ORIENTATION] = {"orientation_0": 0, "orientation_9": 9}.get(kind, 6)
    suffix = {"webp": "webp", "xmp_png": "png", "late_png": "png"}.get(kind, "jpg")
    options: dict[str, Any] = {"xmp": xmp(6)} if kind == "xmp_jpg" else {"exif": exif}
    if kind == "xmp_png":
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp(6).decode())
    if kind == "mpo":  # what telephones write: a JPEG with a second picture behind it
        options |= {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (30, 20))]}
    path = tmp_path / "train" / "a" / f"0.{suffix}"
    save_random(path, 20, 30, **options)
    if kind == "late_png":
        move_exif_to_the_end(path)
    assert open_dataset(str(tmp_path)).sizes.tolist() == [list(read_image(path).shape[1:])]


# --- The index of a folder --------------------------------------------------------------------------------------------


def test_index_is_written_and_used_again(folder: Path, opened: list[str]) -> None:
    """The second time no picture is opened."""
    first = open_dataset(str(folder))
    assert len(opened) == 24
    assert first.index == index_of(folder)
    assert first.index.exists()
    opened.clear()
    again = open_dataset(str(folder))
    assert opened == []
    assert again.index == first.index
    assert_same(again, first)


def exchange(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def test_files_of_one_length_that_were_exchanged_are_noticed(folder: Path, opened: list[str]) -> None:
    """By their content: the fingerprint changes, and the index does not give one the size of the other."""
    pair = folder / "train" / "china" / "003.png", folder / "train" / "flower" / "009.png"
    for path, (height, width) in zip(pair, ((20, 30), (30, 20)), strict=True):
        save_random(path, height, width)
        path.write_bytes(path.read_bytes().ljust(3000, b"\0"))
    first = open_dataset(str(folder))
    opened.clear()
    exchange(*pair)
    second = open_dataset(str(folder))
    assert sorted(opened) == ["003.png", "009.png"]
    assert second.names == first.names
    rows = [first.names.index(path.relative_to(folder / "train").as_posix()) for path in pair]
    assert second.sizes[rows].tolist() == first.sizes[rows[::-1]].tolist() == [[30, 20], [20, 30]]
    assert second.fingerprint != first.fingerprint
    exchange(*pair)
    assert_same(open_dataset(str(folder)), first)


@pytest.mark.parametrize("at", ["first", "middle", "last", "between"])
def test_what_the_fingerprint_sees_of_a_large_file(folder: Path, at: str) -> None:
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
    """Spread over all; the index knows the others by name and length only."""
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
def test_damaged_index_is_told_and_made_anew(
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
def test_whatever_lies_in_the_place_of_the_index(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Is reported, and the folder is read anew; the checksum of a made-up index may well be right."""
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
    """Neither in the place of the index nor of its folder: what it leads to stays as it is."""
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
def test_without_a_place_for_the_index_all_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, opened: list[str], kind: str
) -> None:
    """A container: data that cannot be written, a user who has no home; said once."""
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


def test_six_that_start_together(folder: Path) -> None:
    """Without an index at first: all open the same data."""
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


def test_who_comes_second_waits_and_takes_the_index_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one still works: it holds the lock. What it leaves serves the second, which opens no image."""
    first = open_dataset(str(folder))
    whole = index_of(folder).read_bytes()
    index_of(folder).unlink()
    opened.clear()
    flock, asked = fastofa.data.folder_index.fcntl.flock, []

    def held(file: int, how: int) -> None:
        asked.append(how)
        if len(asked) == 1:
            raise BlockingIOError
        index_of(folder).write_bytes(whole)  # it is done
        flock(file, how)

    monkeypatch.setattr(fastofa.data.folder_index.fcntl, "flock", held)
    assert_same(open_dataset(str(folder)), first)
    assert len(asked) == 2
    assert opened == []
    assert "another process is indexing these images" in capsys.readouterr().err


def test_an_index_of_a_few_hundred_thousand_files(tmp_path: Path) -> None:
    """Their names do not fit into a safetensors header, where they once were (3 million did not)."""
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


def make_read_only(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """As far as os.access tells: tests may run as root, to whom nothing is read-only."""
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
    """It is used; what it lacks is kept in the user's cache from then on."""
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


# --- The fingerprint of a folder --------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_wherever_the_folder_lies(folder: Path, tmp_path: Path) -> None:
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


# --- Folders that do not fit ------------------------------------------------------------------------------------------


def test_folder_without_train_or_val(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "val")
    text = refusal(folder, "val")
    assert str(folder / "val") in text
    shutil.rmtree(folder / "train")
    assert str(folder / "train") in refusal(folder)
    (tmp_path / "file").write_text("")
    assert "unknown dataset" in refusal(tmp_path / "file")


def test_folder_without_classes_or_pictures(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert "found no image" in refusal(tmp_path)
    save_random(tmp_path / "train" / "loose.jpg", 8, 8)
    assert "folder per class" in refusal(tmp_path)


def test_class_without_pictures(folder: Path) -> None:
    """An archive that was not unpacked, or pictures of a kind that is not read, must not vanish in silence."""
    for i, path in enumerate(sorted((folder / "train" / "flower").iterdir())):
        path.rename(path.with_name(f"{i}.bmp"))
    text = refusal(folder)
    assert str(folder / "train" / "flower") in text
    assert ".jpeg" in text


def test_val_with_unknown_classes(folder: Path) -> None:
    (folder / "val" / "flower").rename(folder / "val" / "rose")
    text = refusal(folder, "val")
    assert "rose" in text
    assert "flower" not in text.replace(str(folder), "")


@pytest.mark.parametrize("content", [b"", b"text\n", b"\xff\xd8\xff\xe0 no jpeg"])
def test_unreadable_picture_is_named(folder: Path, content: bytes) -> None:
    path = folder / "train" / "flower" / "004.jpg"
    path.write_bytes(content)
    text = refusal(folder)
    assert text.startswith("1 unreadable image")
    assert str(path) in text
    assert "--skip-corrupt" in text
    assert ("empty file" in text) == (content == b"")


def test_after_a_refusal_only_the_mended_picture_is_read(folder: Path, opened: list[str]) -> None:
    """What was found about the others is kept: to decode a million of them again takes an hour."""
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


def special(path: Path, kind: str) -> None:
    """Something that is no file, the opening of which may wait for ever."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    else:
        path.symlink_to({"nowhere": "none.jpg", "circle": path.name, "device": "/dev/zero"}[kind])


SPECIAL = {
    "fifo": "a FIFO, not a file", "socket": "a socket, not a file", "device": "a device, not a file",
    "nowhere": "a broken link", "circle": "a circular link",
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_named_and_never_opened(folder: Path, kind: str) -> None:
    path = folder / "train" / "flower" / "lost.jpg"
    special(path, kind)
    text = refusal(folder)
    assert f"1 unreadable image: {path} ({SPECIAL[kind]})" in text
    for _ in range(2):
        data = open_dataset(str(folder), skip_corrupt=True)
        assert data.skipped == (f"flower/lost.jpg: {SPECIAL[kind]}",)
        assert len(data) == 24


@pytest.mark.parametrize("kind", ["nowhere", "circle"])
def test_a_class_that_is_a_broken_link_is_refused(folder: Path, kind: str) -> None:
    """It must not vanish: the labels of all classes behind it would be others."""
    special(folder / "train" / "dog", kind)
    assert refusal(folder) == (f"{folder}/train/dog: expected a class folder, got {SPECIAL[kind]}; repair or remove it")


@pytest.mark.parametrize("name", ["flower/\udce9.jpg", "caf\udce9/1.jpg"])
def test_name_that_is_not_utf8_is_shown(folder: Path, name: str) -> None:
    """As old archives hold them; neither torch nor a fingerprint can take it."""
    path = folder / "train" / name
    path.parent.mkdir(exist_ok=True)
    try:
        shutil.copy(folder / "train" / "flower" / "004.jpg", path)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert ascii(name) in refusal(folder)


def test_many_unreadable_pictures_are_counted_and_some_named(folder: Path) -> None:
    paths = sorted((folder / "train" / "china").iterdir())[:8]
    for path in paths:
        path.write_bytes(b"")
    text = refusal(folder)
    assert "8 unreadable images" in text
    assert [str(path) in text for path in paths] == [True] * 5 + [False] * 3
    assert "and 3 more" in text


def test_where_one_is_unreadable_all_are_decoded_to_name_every_one(folder: Path, capsys) -> None:
    """Also those of which only the pixels are damaged, and which an index knew before."""
    open_dataset(str(folder))
    bad = folder / "train" / "china" / "000.jpg", folder / "train" / "flower" / "001.jpg"
    data = bad[0].read_bytes()
    bad[0].write_bytes(data[:600] + bytes(len(data) - 800) + data[-200:])  # as many bytes as before
    open_dataset(str(folder))
    bad[1].write_bytes(b"")
    text = refusal(folder)
    assert text.startswith("2 unreadable images")
    assert text.index(str(bad[0])) < text.index(str(bad[1]))


def add(folder: Path, *names: str) -> None:
    """Copies of a real image under other names in the training split."""
    for name in names:
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "train" / "flower" / "004.jpg", path)


def test_what_is_not_taken_is_counted_by_kind_and_reported_once(folder: Path, capsys) -> None:
    open_dataset(str(folder))
    assert capsys.readouterr().err == ""
    add(folder, "flower/b.GIF", "flower/d/c.gif", "flower/a.tif", "flower/notes.txt", "flower/.c.bmp", "flower/plain",
        "flower/e.jpg_large", "china/1.gif", "loose.jpg", "flower/x.jpg~")  # fmt: skip
    (folder / "train" / "flower" / "broken").symlink_to("none")
    for _ in range(2):
        assert len(open_dataset(str(folder))) == 24
        assert capsys.readouterr().err == (
            f"{folder}/train: skipped 11 files and folders: 3 .gif (china/1.gif, flower/b.GIF, ...), "
            "1 .jpg_large (flower/e.jpg_large), 1 .tif (flower/a.tif), 1 .txt (flower/notes.txt), 1 hidden "
            "(flower/.c.bmp), 1 linked to a missing target (flower/broken), 1 of the system or an editor "
            "(flower/x.jpg~), 1 outside the class folders (loose.jpg), 1 without suffix (flower/plain); images end in .jpg, .jpeg, "
            ".jpe, .jfif, .png, .webp; 7 of those files are images by content (china/1.gif, flower/a.tif, ...): rename "
            "such files to end in one of these suffixes\n"
        )
    open_dataset(str(folder), "val")
    assert capsys.readouterr().err == ""


def frames(count: int) -> bytes:
    """A GIF."""
    file = io.BytesIO()
    pictures = [Image.new("RGB", (40, 30), (90 * i, 0, 0)) for i in range(count)]
    pictures[0].save(file, "GIF", save_all=count > 1, append_images=pictures[1:])
    return file.getvalue()


def test_images_under_other_names_are_told_from_other_files(folder: Path, capsys) -> None:
    """By their first bytes; and once they are renamed as the line says, they are read."""
    flower = folder / "train" / "flower"
    image = Image.new("RGB", (40, 30), "red")
    for name, kind in (("IMG_0001", "JPEG"), ("x.download", "PNG"), ("y.JPG_large", "WebP"), ("tiff.x", "TIFF")):
        image.save(flower / name, kind)
    (flower / "z.gif").write_bytes(frames(1))
    (flower / "moving.gif").write_bytes(frames(3))
    for name, data in (("notes.txt", b"GIF, JPEG and PNG"), ("empty", b""), ("riff.wav", b"RIFF\0\0\0\0WAVE")):
        (flower / name).write_bytes(data)
    os.mkfifo(flower / "fifo")  # if it were opened, that would not end
    (flower / "device").symlink_to("/dev/zero")
    (flower / "closed").write_bytes(frames(1))
    (flower / "closed").chmod(0)
    open_dataset(str(folder))
    said, count = capsys.readouterr().err, 4 + (os.access(flower / "closed", os.R_OK))
    begin = f"; {count} of those files are images by content ("
    assert begin in said
    assert said.endswith("): rename such files to end in one of these suffixes\n")
    assert "moving" not in said.partition(begin)[2]
    for name in ("IMG_0001", "x.download", "y.JPG_large", "z.gif"):
        (flower / name).rename(flower / f"{name}.jpg")
    data = open_dataset(str(folder))
    assert len(data) == 24 + 4
    assert data.read(list(data.names).index("flower/IMG_0001.jpg")).shape == (3, 30, 40)


def test_of_many_files_under_other_names_some_are_opened(folder: Path, capsys, monkeypatch) -> None:
    read, opened = fastofa.data.folder_listing.read_file, []
    monkeypatch.setattr(
        "fastofa.data.folder_listing.read_file", lambda path, most: opened.append(path) or read(path, most)
    )
    add(folder, *(f"flower/{i}.x" for i in range(700)))
    open_dataset(str(folder))
    assert len(opened) <= 300
    assert f"; {len(opened)} of {len(opened)} of those files that were opened are images" in capsys.readouterr().err


def test_a_class_of_images_under_other_names_is_refused_with_the_remedy(folder: Path) -> None:
    for path in (folder / "train" / "flower").iterdir():
        path.rename(path.with_suffix(""))
    assert refusal(folder).endswith(
        "found none but 12 without suffix (flower/000, flower/001, ...); 12 of those files are images by content "
        "(flower/000, flower/001, ...): rename such files to end in one of these suffixes"
    )


def test_names_may_hold_anything_that_is_utf8(folder: Path, capsys) -> None:
    names = [
        "flower/[bold] x.jpg",
        "flower/a\nb.jpg",
        "flower/\x1b[31m.jpg",
        "flower/\u202egpj.jpg",
        "flower/ü (1).jpg",
    ]
    add(folder, *names, "flower/[/red].bmp")
    for _ in range(2):
        data = open_dataset(str(folder))
        assert set(names) <= set(data.names)
        assert data.read(list(data.names).index(names[0])).ndim == 3
        assert "[/red].bmp" in capsys.readouterr().err


def test_every_suffix_of_jpeg_is_taken(folder: Path, capsys) -> None:
    add(folder, "flower/a.jfif", "flower/b.JPE", "flower/c.JPEG")
    data = open_dataset(str(folder))
    assert {"flower/a.jfif", "flower/b.JPE", "flower/c.JPEG"} <= set(data.names)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name",
    [
        ".hidden", ".ipynb_checkpoints", ".Trash-1000", "__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN",
        "System Volume Information", "#recycle", "flower~", "flower.bak", "__pycache__", "Thumbs.db", "desktop.ini",
    ],
)  # fmt: skip
def test_leftovers_are_no_class_and_no_sample(folder: Path, capsys, name: str) -> None:
    """Whether they lie beside the classes or in one; nothing in them is looked at."""
    before = open_dataset(str(folder))
    add(folder, f"{name}/a.jpg", f"flower/{name}/b.jpg")
    assert_same(open_dataset(str(folder)), before)
    assert f"skipped 2 files and folders: 2 {'hidden' if name[0] == '.' else 'of the system or an editor'}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["._004.jpg", ".004.jpg", "#004.jpg#", "~$004.jpg"])
def test_leftover_files_are_no_samples(folder: Path, name: str) -> None:
    before = open_dataset(str(folder))
    add(folder, f"flower/{name}")
    assert_same(open_dataset(str(folder)), before)


def test_images_in_folders_below_a_class_are_taken_and_reported(folder: Path, capsys) -> None:
    add(folder, "flower/b/1.jpg", "flower/a/deep/1.jpg")
    data = open_dataset(str(folder))
    assert data.names[12:14] == ["flower/000.jpg", "flower/001.jpg"]
    assert data.names[-2:] == ["flower/a/deep/1.jpg", "flower/b/1.jpg"]
    assert capsys.readouterr().err == (
        f"{folder}/train: found 2 images in subfolders of the class folders, such as flower/a/deep/1.jpg, which gets "
        "the class flower\n"
    )


# --- Links that lead in circles ---------------------------------------------------------------------------------------

LOOPS = {  # link: where it leads, in DIR/train
    "train": ".", "china/up": "..", "china/top": "../..", "flower/self": ".", "china/slash": "/", "china/flower":
    "../flower", "china/val": "../../val", "val": "../val",
}  # fmt: skip


@pytest.mark.parametrize("link", LOOPS)
@pytest.mark.parametrize("split_is_link", [False, True])
def test_a_link_back_takes_no_image_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str, split_is_link: bool
) -> None:
    """`ln -s` typed twice leaves train/train; a link to a folder above or to another class would mix the labels."""
    if split_is_link:
        (tmp_path / "links").mkdir()
        for split in ("train", "val"):
            (tmp_path / "links" / split).symlink_to(folder / split)
    top = tmp_path / "links" if split_is_link else folder
    before = open_dataset(str(top))
    (folder / "train" / link).symlink_to(LOOPS[link])
    assert_same(open_dataset(str(top)), before)
    assert f"skipped 1 file or folder: 1 linked to a folder that contains it or is already listed ({link})" in (
        capsys.readouterr().err
    )


def test_folders_that_lead_to_each_other_are_entered_once(folder: Path, tmp_path: Path) -> None:
    """Ten that each lead to all: every way through them would take for ever."""
    for i in range(10):
        shared = tmp_path / "shared" / str(i)
        shared.mkdir(parents=True)
        shutil.copy(folder / "train" / "flower" / "004.jpg", shared / f"{i}.jpg")
        for j in range(10):
            (shared / f"to{j}").symlink_to(f"../{j}")
    (folder / "train" / "flower" / "more").symlink_to(tmp_path / "shared" / "0")
    data = open_dataset(str(folder))
    assert sorted(Path(name).name for name in data.names[24:]) == [f"{i}.jpg" for i in range(10)]


def test_two_classes_that_are_one_folder_are_reported(folder: Path, capsys) -> None:
    (folder / "train" / "rose").symlink_to("flower")
    data = open_dataset(str(folder))
    assert np.bincount(data.labels).tolist() == [12, 12, 12]
    assert "rose is the same folder as flower; its images are in both classes" in capsys.readouterr().err


# --- What may not be opened -------------------------------------------------------------------------------------------


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Tests may run as root, to whom nothing is closed."""
    system_open = os.open

    def refuse(place: Any, *arguments: Any, **options: Any) -> int:
        if Path(place) == path:
            raise OSError(number, os.strerror(number), str(place))
        return system_open(place, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("skip_corrupt", [False, True])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_file_that_may_not_be_opened_is_not_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, skip_corrupt: bool
) -> None:
    """It would be left out for good although nothing is wrong with it."""
    path = folder / "train" / "flower" / "004.jpg"
    with monkeypatch.context() as patch:
        refuse_to_open(patch, path, number)
        text = refusal(folder, skip_corrupt=skip_corrupt)
    assert text.startswith(f"could not open 1 image: {path} ({os.strerror(number)}); ")
    assert ("chmod" in text, "ulimit -n" in text) == (number == errno.EACCES, number == errno.EMFILE)
    assert len(open_dataset(str(folder))) == 24


def test_a_class_folder_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path) == str(folder / "train" / "flower"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(folder) == (
        f"could not list {folder}/train/flower: Permission denied; make it readable for this user (`chmod a+rX`) or "
        "remove it"
    )


# --- --skip-corrupt ---------------------------------------------------------------------------------------------------


def test_skip_corrupt_finds_lists_and_leaves_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what only decoding shows: a picture cut off in the middle."""
    whole = open_dataset(str(folder))
    cut(folder / "train" / "china" / "002.jpg")
    (folder / "train" / "flower" / "007.jpg").write_bytes(b"")
    bad = ["china/002.jpg", "flower/007.jpg"]
    data = open_dataset(str(folder), skip_corrupt=True)
    assert data.names == [name for name in whole.names if name not in bad]
    keep = [whole.names.index(name) for name in data.names]
    assert (data.labels == whole.labels[keep]).all()
    assert (data.sizes == whole.sizes[keep]).all()
    assert [entry.partition(": ")[0] for entry in data.skipped] == bad
    assert "truncated" in data.skipped[0]
    assert data.skipped[1] == "flower/007.jpg: empty file"
    notice = capsys.readouterr().err
    assert "skipped 2" in notice
    assert all(name in notice for name in bad)


def test_skip_corrupt_names_every_file_each_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = sorted((folder / "train" / "china").iterdir())[:8]
    for path in bad:
        path.write_bytes(b"")
    for flag in (True, False):
        open_dataset(str(folder), skip_corrupt=flag)
        said = capsys.readouterr().err.splitlines()
        assert said[:-1] == [f"skipped: {path}: empty file" for path in bad]
        assert said[-1] == f"{folder}/train: skipped 8 unreadable images"


def test_a_class_whose_images_are_all_unreadable(folder: Path) -> None:
    """Would be a class that is never seen."""
    for path in (folder / "train" / "flower").iterdir():
        cut(path)
    for _ in range(2):
        text = refusal(folder, skip_corrupt=True)
        assert "all images of 1 class are unreadable (flower)" in text
    shutil.rmtree(folder / "train" / "flower")
    assert open_dataset(str(folder), skip_corrupt=True).classes == ("china",)


def test_skipped_pictures_are_as_if_they_were_not_there(folder: Path, tmp_path: Path) -> None:
    """The fingerprint is that of the folder without them."""
    cut(folder / "train" / "china" / "002.jpg")
    without = shutil.copytree(folder, tmp_path / "without")
    (without / "train" / "china" / "002.jpg").unlink()
    assert_same(open_dataset(str(folder), skip_corrupt=True), open_dataset(str(without)))


def test_skip_corrupt_decodes_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the index already knew the sizes; later openings, with or without the flag, go by its list."""
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


def test_mended_picture_comes_back(folder: Path) -> None:
    path = folder / "train" / "china" / "002.jpg"
    whole = path.read_bytes()
    before = open_dataset(str(folder))
    cut(path)
    assert len(open_dataset(str(folder), skip_corrupt=True)) == 23
    path.write_bytes(whole)
    after = open_dataset(str(folder), skip_corrupt=True)
    assert_same(after, before)
    assert after.skipped == ()


def test_nothing_left_after_skipping(folder: Path) -> None:
    for path in (folder / "train").rglob("*.jpg"):
        cut(path)
    assert "24 files of which none is readable" in refusal(folder, skip_corrupt=True)


# --- CIFAR-100 --------------------------------------------------------------------------------------------------------

FINE = [f"class{i:02d}" for i in range(100)]
COUNT = {"train": 120, "test": 30}


class AsPython2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes text and bytes as Python 2 did: the published files hold 8-bit strings, arrays' contents among them."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def as_python2(value: Any) -> bytes:
    buffer = io.BytesIO()
    AsPython2(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def cifar_member(member: str) -> dict[str, Any]:
    """Of a small CIFAR-100 in the published layout: rows in no order, red, green and blue plane one after the other."""
    if member == "meta":
        return {"fine_label_names": FINE, "coarse_label_names": [f"group{i}" for i in range(20)]}
    rng = np.random.default_rng(COUNT[member])
    labels = rng.permutation(np.arange(COUNT[member]) % 100).tolist()
    return {
        "filenames": [f"thing_s_{rng.integers(10**6):06d}.png" for _ in labels],
        "batch_label": f"{member}ing batch 1 of 1",
        "fine_labels": labels,
        "coarse_labels": [label // 5 for label in labels],
        "data": rng.integers(0, 256, (COUNT[member], 3072), dtype=np.uint8),
    }


def write_cifar(top: Path, encode: Callable[[Any], bytes] = as_python2, **replaced: bytes) -> Path:
    """The unpacked folder below `top`; `replaced` gives members another content."""
    folder = top / "cifar-100-python"
    folder.mkdir(parents=True)
    for member in ("meta", "train", "test"):
        (folder / member).write_bytes(replaced.get(member, encode(cifar_member(member))))
    return folder


def pack(folder: Path) -> None:
    """Turn the folder into the archive beside it."""
    with tarfile.open(folder.parent / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)


def test_python2_strings_are_what_is_published() -> None:
    """The helper above writes what Python 3 reads as bytes or, on request, as latin-1."""
    data = as_python2({"data": np.arange(3, dtype=np.uint8)})
    assert pickle.loads(data, encoding="bytes")[b"data"].tolist() == [0, 1, 2]
    assert pickle.loads(data, encoding="latin1")["data"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", ["archive", "folder", "inside", "both"])
@pytest.mark.parametrize("encode", [as_python2, pickle.dumps], ids=["python2", "python3"])
@pytest.mark.parametrize(("split", "member"), [("train", "train"), ("val", "test")])
def test_cifar100(tmp_path: Path, layout: str, encode: Callable[[Any], bytes], split: Any, member: str) -> None:
    """From the archive, the folder beside it, or the folder itself: pixels, labels, names, in the one order."""
    top = tmp_path / "cifar"
    folder = write_cifar(top, encode)
    if layout == "archive":
        pack(folder)
    if layout == "both":
        (top / "cifar-100-python.tar.gz").write_bytes(b"a download that broke off")
    data = open_dataset(f"cifar100:{folder if layout == 'inside' else top}", split)
    source = cifar_member(member)
    order = sorted(range(len(data)), key=lambda i: (source["fine_labels"][i], source["filenames"][i]))
    assert len(data) == COUNT[member]
    assert data.classes == tuple(FINE)
    assert data.names == [source["filenames"][i] for i in order]
    assert data.labels.tolist() == [source["fine_labels"][i] for i in order]
    assert data.labels.dtype == np.int64
    assert data.pixels is not None
    assert data.pixels.dtype == np.uint8
    assert data.sizes.tolist() == [[32, 32]] * len(data)
    for row, i in enumerate(order):
        planes = source["data"][i].reshape(3, 32, 32)
        assert (data.pixels[row, 5, 9] == planes[:, 5, 9]).all()
        assert (data.pixels[row] == np.stack(planes, axis=-1)).all()


def test_cifar100_fingerprint_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    write_cifar(tmp_path / "a")
    pack(write_cifar(tmp_path / "b"))
    a, b = (open_dataset(f"cifar100:{tmp_path / name}") for name in "ab")
    assert a.fingerprint == b.fingerprint != open_dataset(f"cifar100:{tmp_path / 'a'}", "val").fingerprint


class Command:
    """Runs a command when it is unpickled, in one of several ways."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("member", ["train", "meta"])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "inside", "protocol0", "getattr", "numpy"])
def test_malicious_cifar100_is_refused_and_not_run(tmp_path: Path, kind: str, member: str) -> None:
    witness = tmp_path / "ran"
    system = Command(os.system, f"touch '{witness}'")
    code = f"open({str(witness)!r}, 'w').close()"
    content = {
        "system": lambda: pickle.dumps(system),
        "eval": lambda: pickle.dumps(Command(eval, code)),
        "exec": lambda: pickle.dumps(Command(exec, code)),
        "inside": lambda: pickle.dumps({**cifar_member(member), "batch_label": system}),
        "protocol0": lambda: b"cposix\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR.",
        "getattr": lambda: pickle.dumps(Command(getattr, "text", "upper")),
        "numpy": lambda: pickle.dumps(Command(np.fromfile, str(witness))),
    }[kind]()
    top = tmp_path / "cifar"
    write_cifar(top, **{member: content})
    text = refusal(f"cifar100:{top}")
    assert member in text
    assert "refers to" in text
    assert not witness.exists()


def test_object_arrays_cannot_smuggle_code(tmp_path: Path) -> None:
    """An array of objects is rebuilt by numpy, through the same guarded reader."""
    witness = tmp_path / "ran"
    array = np.array([Command(os.system, f"touch '{witness}'")], dtype=object)
    write_cifar(tmp_path / "cifar", train=pickle.dumps({**cifar_member("train"), "data": array}))
    refusal(f"cifar100:{tmp_path / 'cifar'}")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"text\n", b"\x80\x02}", as_python2(cifar_member("train"))[:-1000]])
def test_damaged_cifar100_member(tmp_path: Path, content: bytes) -> None:
    write_cifar(tmp_path, train=content)
    assert "expected train as published" in refusal(f"cifar100:{tmp_path}")


@pytest.mark.parametrize(
    "change",
    [
        {"fine_labels": None},
        {"fine_labels": [0] * 119},
        {"fine_labels": [100] * 120},
        {"fine_labels": [-1] * 120},
        {"filenames": ["one.png"]},
        {"data": np.zeros((119, 3072), np.uint8)},
        {"data": np.zeros((120, 3071), np.uint8)},
        {"data": np.zeros((0, 3072), np.uint8), "fine_labels": [], "filenames": []},
    ],
)
def test_inconsistent_cifar100(tmp_path: Path, change: dict[str, Any]) -> None:
    member = {name: value for name, value in {**cifar_member("train"), **change}.items() if value is not None}
    write_cifar(tmp_path, train=as_python2(member))
    assert str(tmp_path) in refusal(f"cifar100:{tmp_path}")


def test_changed_byte_in_the_cifar100_archive(tmp_path: Path) -> None:
    """Wherever it is, although most of the archive's bytes are pixels that any value would do for.

    But one may fall on the bits that fill up the last byte of what is compressed, which mean nothing.
    """
    pack(write_cifar(tmp_path))
    first = open_dataset(f"cifar100:{tmp_path}")
    archive = tmp_path / "cifar-100-python.tar.gz"
    whole, same = archive.read_bytes(), 0
    for position in np.random.default_rng(0).integers(64, len(whole), 60):
        archive.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with contextlib.suppress(BadInput):
            assert_same(open_dataset(f"cifar100:{tmp_path}"), first)
            same += 1
    assert same <= 1


def test_cifar10_is_not_cifar100(tmp_path: Path) -> None:
    member = cifar_member("train")
    member["labels"] = member.pop("fine_labels")
    write_cifar(tmp_path, train=as_python2(member))
    assert "fine_labels" in refusal(f"cifar100:{tmp_path}")


def test_missing_cifar100(tmp_path: Path) -> None:
    """No folder, an empty one, a member missing from the folder or from the archive, an archive that is none."""
    assert "cifar-100-python.tar.gz" in refusal(f"cifar100:{tmp_path / 'none'}")
    assert "cifar-100-python.tar.gz" in refusal(f"cifar100:{tmp_path}")
    folder = write_cifar(tmp_path / "a")
    (folder / "test").unlink()
    assert "test" in refusal(f"cifar100:{tmp_path / 'a'}", "val")
    assert len(open_dataset(f"cifar100:{tmp_path / 'a'}")) == COUNT["train"]
    pack(folder)
    assert "test" in refusal(f"cifar100:{tmp_path / 'a'}", "val")
    archive = tmp_path / "a" / "cifar-100-python.tar.gz"
    whole = archive.read_bytes()
    header = whole[: whole.index(b"\0", 10) + 1]
    for content in (b"not an archive", whole[:-2000], whole[:2000], header + b"\xff" * 500, b""):
        archive.write_bytes(content)
        assert "cifar-100-python.tar.gz" in refusal(f"cifar100:{tmp_path / 'a'}")
