"""A folder of images: sizes as they are read; unreadable images are reported or skipped."""

import errno
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastofa.data.decode import read_image
from fastofa.data.open import open_dataset
from folders import SPECIAL, assert_same, cut, refusal, save_random, special

ORIENTATION = 0x0112


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


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, suffix: str, orientation: int) -> None:
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
    """Move a PNG's EXIF chunk behind the pixels. This is allowed, but torchvision reads only chunks before them."""
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    chunk = data[start:end]
    assert zlib.crc32(chunk[4:-4]) == struct.unpack(">I", chunk[-4:])[0]
    path.write_bytes(data[:start] + data[end:-12] + chunk + data[-12:])


@pytest.mark.parametrize("kind", ["webp", "mpo", "xmp_jpg", "xmp_png", "late_png", "orientation_0", "orientation_9"])
def test_sizes_are_those_of_the_decoded_image(tmp_path: Path, kind: str) -> None:
    """Also if Pillow and torchvision find the orientation in different places."""
    exif = Image.Exif()
    exif[ORIENTATION] = {"orientation_0": 0, "orientation_9": 9}.get(kind, 6)
    suffix = {"webp": "webp", "xmp_png": "png", "late_png": "png"}.get(kind, "jpg")
    options: dict[str, Any] = {"xmp": xmp(6)} if kind == "xmp_jpg" else {"exif": exif}
    if kind == "xmp_png":
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp(6).decode())
    if kind == "mpo":  # written by phones: a JPEG with a second image behind it
        options |= {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (30, 20))]}
    path = tmp_path / "train" / "a" / f"0.{suffix}"
    save_random(path, 20, 30, **options)
    if kind == "late_png":
        move_exif_to_the_end(path)
    assert open_dataset(str(tmp_path)).sizes.tolist() == [list(read_image(path).shape[1:])]


# --- Unreadable images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"text\n", b"\xff\xd8\xff\xe0 no jpeg"])
def test_an_unreadable_image_is_named(folder: Path, content: bytes) -> None:
    path = folder / "train" / "flower" / "004.jpg"
    path.write_bytes(content)
    text = refusal(folder)
    assert text.startswith("1 unreadable image")
    assert str(path) in text
    assert "--skip-corrupt" in text
    assert ("empty file" in text) == (content == b"")


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_named_and_never_opened(folder: Path, kind: str) -> None:
    path = folder / "train" / "flower" / "lost.jpg"
    special(path, kind)
    text = refusal(folder)
    assert f"1 unreadable image: {path} ({SPECIAL[kind]})" in text
    for _ in range(2):
        data = open_dataset(str(folder), skip_corrupt=True)
        assert data.skipped == (f"flower/lost.jpg: {SPECIAL[kind]}",)
        assert len(data) == 24


def test_many_unreadable_images_are_counted_and_some_named(folder: Path) -> None:
    paths = sorted((folder / "train" / "china").iterdir())[:8]
    for path in paths:
        path.write_bytes(b"")
    text = refusal(folder)
    assert "8 unreadable images" in text
    assert [str(path) in text for path in paths] == [True] * 5 + [False] * 3
    assert "and 3 more" in text


def test_after_one_unreadable_image_all_are_decoded(folder: Path, capsys) -> None:
    """Every unreadable image is named, also one with only its pixels damaged that the index knew before."""
    open_dataset(str(folder))
    bad = folder / "train" / "china" / "000.jpg", folder / "train" / "flower" / "001.jpg"
    data = bad[0].read_bytes()
    bad[0].write_bytes(data[:600] + bytes(len(data) - 800) + data[-200:])  # as many bytes as before
    open_dataset(str(folder))
    bad[1].write_bytes(b"")
    text = refusal(folder)
    assert text.startswith("2 unreadable images")
    assert text.index(str(bad[0])) < text.index(str(bad[1]))


# --- Files without access ---------------------------------------------------------------------------------------------


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Refuse access to a file. (Tests may run as root, who can open every file.)"""
    system_open = os.open

    def refuse(place: Any, *arguments: Any, **options: Any) -> int:
        if Path(place) == path:
            raise OSError(number, os.strerror(number), str(place))
        return system_open(place, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("skip_corrupt", [False, True])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_file_without_access_is_not_taken_for_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, skip_corrupt: bool
) -> None:
    """Otherwise --skip-corrupt would leave out an intact file for good."""
    path = folder / "train" / "flower" / "004.jpg"
    with monkeypatch.context() as patch:
        refuse_to_open(patch, path, number)
        text = refusal(folder, skip_corrupt=skip_corrupt)
    assert text.startswith(f"could not open 1 image: {path} ({os.strerror(number)}); ")
    assert ("chmod" in text, "ulimit -n" in text) == (number == errno.EACCES, number == errno.EMFILE)
    assert len(open_dataset(str(folder))) == 24


# --- --skip-corrupt ---------------------------------------------------------------------------------------------------


def test_skip_corrupt_lists_and_skips(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also an image that is cut off in the middle, which only decoding detects."""
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
    """It is refused, since the student would never see the class."""
    for path in (folder / "train" / "flower").iterdir():
        cut(path)
    for _ in range(2):
        text = refusal(folder, skip_corrupt=True)
        assert "all images of 1 class are unreadable (flower)" in text
    shutil.rmtree(folder / "train" / "flower")
    assert open_dataset(str(folder), skip_corrupt=True).classes == ("china",)


def test_skipped_images_do_not_affect_the_dataset(folder: Path, tmp_path: Path) -> None:
    """The fingerprint is that of the folder without them."""
    cut(folder / "train" / "china" / "002.jpg")
    without = shutil.copytree(folder, tmp_path / "without")
    (without / "train" / "china" / "002.jpg").unlink()
    assert_same(open_dataset(str(folder), skip_corrupt=True), open_dataset(str(without)))


def test_nothing_left_after_skipping(folder: Path) -> None:
    for path in (folder / "train").rglob("*.jpg"):
        cut(path)
    assert "24 files of which none is readable" in refusal(folder, skip_corrupt=True)
