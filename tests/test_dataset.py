"""Data sets: one order everywhere, sizes as the pictures are read, an index that is kept and mended, clear refusals."""

import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

import fastofa.image_folder
from fastofa.dataset import Dataset, fingerprint_of, open_dataset
from fastofa.errors import BadInput
from fastofa.images import read_image

ORIENTATION = 0x0112


def refusal(spec: object, split: Any = "train", skip_corrupt: bool = False) -> str:
    """The message with which a data set is refused: one line."""
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
    prints = {
        fingerprint_of(names, sizes, labels),
        fingerprint_of(["a", "b", "d"], sizes, labels),
        fingerprint_of(["b", "a", "c"], sizes, labels),
        fingerprint_of(names, np.array([1, 2, 4]), labels),
        fingerprint_of(names, sizes, np.array([0, 1, 1])),
        fingerprint_of(names[:2], sizes[:2], labels[:2]),
    }
    assert len(prints) == 6
    assert fingerprint_of(names, sizes.astype(np.int32), labels.astype(">i8")) in prints  # whatever holds the numbers


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
    original = fastofa.image_folder._header_size

    def count(path: Path) -> tuple[int, int] | str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(fastofa.image_folder, "_header_size", count)
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
    """A class that is a link to a folder and a picture that is a link to a file, as people assemble data sets."""
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


def test_index_is_really_what_is_read(folder: Path) -> None:
    """Pictures damaged in place, as long as before, are not noticed: names and lengths are what it goes by."""
    first = open_dataset(str(folder))
    for path in (folder / "train").rglob("*.jpg"):
        damage_in_place(path)
    assert_same(open_dataset(str(folder)), first)


def test_splits_have_their_own_index(folder: Path) -> None:
    open_dataset(str(folder)), open_dataset(str(folder), "val")
    assert sorted(os.listdir(folder / ".fastofa")) == ["train.safetensors", "val.safetensors"]
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
    assert "reading the folder anew" in notice
    assert len(opened) == 24
    assert_same(again, first)
    assert index_of(folder).read_bytes() == whole


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
    assert "unknown data set" in refusal(tmp_path / "file")


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
    assert not index_of(folder).exists()


def test_link_that_leads_nowhere_is_named(folder: Path) -> None:
    path = folder / "train" / "flower" / "lost.jpg"
    path.symlink_to(folder / "none.jpg")
    assert str(path) in refusal(folder)


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


def test_pictures_of_other_kinds_are_told(folder: Path, capsys) -> None:
    """But not what is no picture, nor what is hidden."""
    open_dataset(str(folder))
    assert "left out" not in capsys.readouterr().err
    for name in ("b.GIF", "a.tif", "notes.txt", ".c.bmp"):
        (folder / "train" / "flower" / name).touch()
    dataset = open_dataset(str(folder))
    assert len(dataset) == 24
    expected = f"{folder}/train: left out 2 of other kinds than .jpg, .jpeg, .png, .webp: flower/a.tif, flower/b.GIF\n"
    assert capsys.readouterr().err == expected


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
    assert "left out 2" in notice
    assert all(name in notice for name in bad)


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
    monkeypatch.setattr(fastofa.image_folder, "read_image", lambda path: (decoded.append(path), read_image(path))[1])
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
    assert "all 24 files are unreadable" in refusal(folder, skip_corrupt=True)


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
    assert "asks for" in text
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
    assert "train is not the published file" in refusal(f"cifar100:{tmp_path}")


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
    """Wherever it is, although most of the archive's bytes are pixels that any value would do for."""
    pack(write_cifar(tmp_path))
    archive = tmp_path / "cifar-100-python.tar.gz"
    whole = archive.read_bytes()
    for position in np.random.default_rng(0).integers(64, len(whole), 60):
        archive.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        assert str(tmp_path) in refusal(f"cifar100:{tmp_path}")


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
