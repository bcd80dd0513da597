"""Which files of a folder are images, and of which class. All others are counted and reported."""

import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastofa.data.content
import fastofa.data.folder
import fastofa.data.folder_index
import fastofa.data.folder_listing
from fastofa.data.open import open_dataset
from folders import SPECIAL, add, assert_same, refusal, save_random, special


def test_images_are_ordered_by_class_then_name(tmp_path: Path) -> None:
    """Whatever the file system's order. Subfolders are searched, other files skipped; suffixes are case-insensitive."""
    for name in ("b/2.jpg", "b/10.png", "b/1.webp", "b/sub/deep/0.JPG", "b/a sub/9.jpeg", "a/z.PNG", "B/x.jpg"):
        save_random(tmp_path / "train" / name, 9, 7)
    for name in ("a/notes.txt", "a/no_suffix", "a/jpg", ".hidden/x.jpg", "outside.jpg"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_text("not an image")
    data = open_dataset(str(tmp_path))
    assert data.classes == ("B", "a", "b")
    assert data.names == ["B/x.jpg", "a/z.PNG", "b/1.webp", "b/10.png", "b/2.jpg", "b/a sub/9.jpeg", "b/sub/deep/0.JPG"]
    assert data.labels.tolist() == [0, 1, 2, 2, 2, 2, 2]


def test_links_to_folders_and_files_are_followed(folder: Path, tmp_path: Path) -> None:
    """Datasets are often assembled from links."""
    linked = tmp_path / "linked" / "train"
    linked.mkdir(parents=True)
    (linked / "china").symlink_to(folder / "train" / "china")
    (linked / "flower").mkdir()
    for path in (folder / "train" / "flower").iterdir():
        (linked / "flower" / path.name).symlink_to(path)
    assert_same(open_dataset(str(tmp_path / "linked")), open_dataset(str(folder)))


def test_val_has_the_labels_of_train(tmp_path: Path) -> None:
    """Even if it lacks a class in the middle."""
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/1.png"):
        save_random(tmp_path / name, 8, 8)
    val = open_dataset(str(tmp_path), "val")
    assert val.classes == ("a", "b", "c")
    assert val.labels.tolist() == [0, 2]


def test_folder_without_train_or_val(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "val")
    text = refusal(folder, "val")
    assert str(folder / "val") in text
    shutil.rmtree(folder / "train")
    assert str(folder / "train") in refusal(folder)
    (tmp_path / "file").write_text("")
    assert "unknown dataset" in refusal(tmp_path / "file")


def test_folder_without_classes_or_images(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert "found no image" in refusal(tmp_path)
    save_random(tmp_path / "train" / "loose.jpg", 8, 8)
    assert "folder per class" in refusal(tmp_path)


def test_a_class_without_images_is_refused(folder: Path) -> None:
    """Its archive was not unpacked, or its images are of an unsupported kind."""
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


@pytest.mark.parametrize("kind", ["nowhere", "circle"])
def test_a_class_that_is_a_broken_link_is_refused(folder: Path, kind: str) -> None:
    """Without it, the labels of all later classes would change."""
    special(folder / "train" / "dog", kind)
    assert refusal(folder) == (f"{folder}/train/dog: expected a class folder, got {SPECIAL[kind]}; repair or remove it")


@pytest.mark.parametrize("name", ["flower/\udce9.jpg", "caf\udce9/1.jpg"])
def test_a_name_that_is_not_utf8_is_refused(folder: Path, name: str) -> None:
    """Such names come from old archives; neither torch nor the fingerprint can handle them."""
    path = folder / "train" / name
    path.parent.mkdir(exist_ok=True)
    try:
        shutil.copy(folder / "train" / "flower" / "004.jpg", path)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert ascii(name) in refusal(folder)


def test_skipped_files_are_counted_by_kind_and_reported_once(folder: Path, capsys) -> None:
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
            "(flower/x.jpg~), 1 outside the class folders (loose.jpg), 1 without suffix (flower/plain); images end in "
            ".jpg, .jpeg, .jpe, .jfif, .png, .webp; 7 of those files are images by content (china/1.gif, flower/a.tif, "
            "...): rename such files to end in one of these suffixes\n"
        )
    open_dataset(str(folder), "val")
    assert capsys.readouterr().err == ""


def frames(count: int) -> bytes:
    """A GIF with this number of frames."""
    file = io.BytesIO()
    images = [Image.new("RGB", (40, 30), (90 * i, 0, 0)) for i in range(count)]
    images[0].save(file, "GIF", save_all=count > 1, append_images=images[1:])
    return file.getvalue()


def test_images_with_other_suffixes_are_recognised(folder: Path, capsys) -> None:
    """By their first bytes; once they are renamed as the notice says, they are read."""
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


def test_of_many_files_with_other_suffixes_a_sample_is_opened(folder: Path, capsys, monkeypatch) -> None:
    read, opened = fastofa.data.folder_listing.read_file, []
    monkeypatch.setattr(
        "fastofa.data.folder_listing.read_file", lambda path, most: opened.append(path) or read(path, most)
    )
    add(folder, *(f"flower/{i}.x" for i in range(700)))
    open_dataset(str(folder))
    assert len(opened) <= 300
    assert f"; {len(opened)} of {len(opened)} of those files that were opened are images" in capsys.readouterr().err


def test_a_class_of_images_without_suffixes_is_refused_with_the_remedy(folder: Path) -> None:
    for path in (folder / "train" / "flower").iterdir():
        path.rename(path.with_suffix(""))
    assert refusal(folder).endswith(
        "found none but 12 without suffix (flower/000, flower/001, ...); 12 of those files are images by content "
        "(flower/000, flower/001, ...): rename such files to end in one of these suffixes"
    )


def test_names_may_contain_any_utf8(folder: Path, capsys) -> None:
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


def test_every_suffix_of_jpeg_is_accepted(folder: Path, capsys) -> None:
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
def test_leftovers_are_neither_classes_nor_samples(folder: Path, capsys, name: str) -> None:
    """Beside the classes or inside one; nothing in them is opened."""
    before = open_dataset(str(folder))
    add(folder, f"{name}/a.jpg", f"flower/{name}/b.jpg")
    assert_same(open_dataset(str(folder)), before)
    assert f"skipped 2 files and folders: 2 {'hidden' if name[0] == '.' else 'of the system or an editor'}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["._004.jpg", ".004.jpg", "#004.jpg#", "~$004.jpg"])
def test_leftover_files_are_not_samples(folder: Path, name: str) -> None:
    before = open_dataset(str(folder))
    add(folder, f"flower/{name}")
    assert_same(open_dataset(str(folder)), before)


def test_images_in_subfolders_of_a_class_are_included_and_reported(folder: Path, capsys) -> None:
    add(folder, "flower/b/1.jpg", "flower/a/deep/1.jpg")
    data = open_dataset(str(folder))
    assert data.names[12:14] == ["flower/000.jpg", "flower/001.jpg"]
    assert data.names[-2:] == ["flower/a/deep/1.jpg", "flower/b/1.jpg"]
    assert capsys.readouterr().err == (
        f"{folder}/train: found 2 images in subfolders of the class folders, such as flower/a/deep/1.jpg, which gets "
        "the class flower\n"
    )


LOOPS = {  # link: where it leads, in DIR/train
    "train": ".", "china/up": "..", "china/top": "../..", "flower/self": ".", "china/slash": "/", "china/flower":
    "../flower", "china/val": "../../val", "val": "../val",
}  # fmt: skip


@pytest.mark.parametrize("link", LOOPS)
@pytest.mark.parametrize("split_is_link", [False, True])
def test_a_link_back_includes_no_image_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str, split_is_link: bool
) -> None:
    """`ln -s` run twice leaves train/train; a link to a folder above or to another class would mix the labels."""
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


def test_folders_linked_to_each_other_are_entered_once(folder: Path, tmp_path: Path) -> None:
    """Ten, each with links to all: following every path would never end."""
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


def test_a_class_folder_without_access_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
