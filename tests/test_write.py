"""`fastofa write`: the same dataset in another form, whole or not at all; every unreadable image is reported."""

import io
import os
import random
import shutil
import signal
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastofa.data.write
from fastofa.cli import main
from fastofa.data.beton import FIELD, HEADER, MARK, RECORD, SPAN, StoredImage, write_beton
from fastofa.data.decode import read_image, resize
from fastofa.data.headers import Limits
from fastofa.data.open import open_dataset
from fastofa.data.write import write
from fastofa.data.write_config import WriteConfig
from fastofa.data.written import index_path, read_index, verify
from fastofa.system.errors import BadInput
from fastofa.system.files import save_tensors
from fastofa.training.loop import train
from fastofa.views.order import epoch_order
from runs import CONTEXT, make_cache

FORMS = {
    "pack": ("photos.pack", {"size": 128}),
    "jpeg": ("photos.beton", {}),
    "small jpeg": ("photos.beton", {"max_size": 64, "quality": 80}),
    "raw": ("photos.beton", {"raw": True}),
    "small raw": ("photos.beton", {"raw": True, "max_size": 64}),
}


def written(form: str, photos: Path, folder: Path) -> Path:
    name, options = FORMS[form]
    write(WriteConfig(str(photos), folder / name, **options))
    return folder / name


@pytest.fixture(scope="module")
def pack(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("pack", photos, tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def beton(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("jpeg", photos, tmp_path_factory.mktemp("beton"))


def files(path: Path) -> list[Path]:
    """All files of a written dataset."""
    if path.suffix == ".pack":
        return sorted(path.iterdir())
    return [path, path.with_suffix(".val.beton"), index_path(path)]


# --- The same dataset -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_positions_of_images_in_their_file(photos: Path, tmp_path: Path, form: str):
    """The bytes there are the image's, in order of sample ids except in a .beton's training split."""
    path = written(form, photos, tmp_path)
    for split in ("train", "val"):
        dataset = open_dataset(str(path), split)
        data = dataset.file.read_bytes()
        begins = dataset.spans[:, 0].tolist()
        if path.suffix == ".beton" and split == "train":
            assert begins != sorted(begins)
            assert dataset.page_ids.tolist() == [begin >> 23 for begin in begins]
            assert dataset.page_ids.dtype == np.int64
        else:
            assert begins == sorted(begins)
            assert dataset.page_ids is None
        for i, (begin, count) in enumerate(dataset.spans.tolist()):
            here = bytearray(data[begin : begin + count])
            if dataset.pixels is None:
                assert torch.equal(dataset.unpack(i, here), dataset.read(i))
            else:
                assert np.array_equal(np.frombuffer(here, np.uint8), dataset.pixels[i].reshape(-1))
    assert open_dataset(str(photos)).page_ids is None
    assert open_dataset("digits:100").page_ids is None


def test_batches_by_pages_contain_as_many_classes_as_random_ones(tmp_path: Path, monkeypatch):
    """Of ten classes, 32 random images have 10 (1 - 0.9^32) = 9.66 on average; the eight pages of a
    window, 40 images.
    """
    write(WriteConfig("digits", tmp_path / "x.beton", raw=True))
    monkeypatch.setattr("fastofa.data.dataset.PAGE", 1024)
    monkeypatch.setattr("fastofa.views.order.WINDOW", 8)
    dataset = open_dataset(str(tmp_path / "x.beton"))
    assert np.bincount(dataset.page_ids).max() == 6  # of 192 bytes
    order = epoch_order(len(dataset), 0, 0, page_ids=dataset.page_ids)
    classes = [len(set(dataset.labels[batch])) for batch in np.split(order[:1184], 37)]
    assert np.mean(classes) == pytest.approx(9.66, abs=0.3)
    in_a_page = [len(set(dataset.labels[dataset.page_ids == page])) for page in np.unique(dataset.page_ids)]
    assert np.mean(in_a_page) == pytest.approx(10 * (1 - 0.9 ** (1024 / 192)), abs=0.2)


@pytest.mark.parametrize("form", FORMS)
def test_the_written_dataset_is_the_same(photos: Path, tmp_path: Path, form: str):
    """Order, labels, classes, original sizes and the fingerprint, of both splits."""
    path = written(form, photos, tmp_path)
    verify(path, workers=2)
    for split in ("train", "val"):
        source, found = open_dataset(str(photos), split), open_dataset(str(path), split)
        assert (found.classes, found.names, found.fingerprint) == (source.classes, source.names, source.fingerprint)
        assert len(found) == len(source)
        for name in ("labels", "sizes"):
            assert np.array_equal(getattr(found, name), getattr(source, name))
            assert getattr(found, name).dtype == np.int64
        assert [list(found.read(i).shape[1:]) for i in range(len(found))] == found.stored_sizes.tolist()


def test_a_pack_contains_whole_images_of_one_size(photos: Path, pack: Path):
    """Both sides resized with antialias; two numpy files that any program can read, training split first."""
    images, labels = np.load(pack / "images.npy"), np.load(pack / "labels.npy")
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (36, 128, 128, 3), np.int64)
    sources = [open_dataset(str(photos), split) for split in ("train", "val")]
    assert labels.tolist() == [*sources[0].labels, *sources[1].labels]
    expected = [resize(read_image(s.path(i)), 128, 128).permute(1, 2, 0) for s in sources for i in range(len(s))]
    assert np.array_equal(images, torch.stack(expected))
    assert read_index(pack).classes == ("china", "flower")


@pytest.mark.parametrize("form", ["raw", "small raw", "jpeg", "small jpeg"])
def test_a_beton_contains_the_images(photos: Path, tmp_path: Path, form: str):
    """JPEGs with their own bytes, or compressed again, and smaller if requested; pixels exactly."""
    source, found = open_dataset(str(photos)), open_dataset(str(written(form, photos, tmp_path)))
    limit = 64 if "small" in form else 10**6
    for i in range(len(source)):
        original = read_image(source.path(i))
        _, height, width = original.shape
        scale = min(1, limit / max(height, width))
        expected = resize(original, round(height * scale), round(width * scale))
        difference = (found.read(i).int() - expected.int()).abs().float()
        assert difference.mean() < 12 if form == "small jpeg" else difference.max() == 0


def test_images_that_are_not_upright_jpegs_are_compressed(tmp_path: Path):
    """A PNG named .jpg, grey, CMYK and 16-bit images, one with an EXIF orientation: the .beton is right."""
    folder, rng = tmp_path / "data/train/a", np.random.default_rng(0)
    folder.mkdir(parents=True)
    image = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((80, 60))
    image.save(folder / "0.jpg", "PNG")
    image.convert("L").save(folder / "1.jpg")
    image.convert("CMYK").save(folder / "2.jpg")
    Image.fromarray((np.arange(4800).reshape(60, 80) * 13).astype(np.uint16)).save(folder / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "4.jpg", exif=exif)
    write(WriteConfig(str(tmp_path / "data"), tmp_path / "x.beton", quality=100))
    write(WriteConfig(str(tmp_path / "data"), tmp_path / "y.beton"))
    source = open_dataset(str(tmp_path / "data"))
    for name in ("x.beton", "y.beton"):
        found = open_dataset(str(tmp_path / name))
        for i in range(5):
            assert (found.read(i).int() - read_image(source.path(i)).int()).abs().float().mean() < 4
        data = (tmp_path / name).read_bytes()
        for at, count in found.spans.tolist():  # what a decoder that knows no tags and no CMYK makes of it
            with Image.open(io.BytesIO(data[at : at + count])) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert image.size == ((60, 80) if at == found.spans[4, 0] else (80, 60))


@pytest.mark.ffcv
@pytest.mark.parametrize("form", ["jpeg", "raw", "small raw"])
def test_ffcv_reads_it(photos: Path, tmp_path: Path, form: str):
    """FFCV's loader and decoders give the same images and labels."""
    import ffcv
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder

    path = written(form, photos, tmp_path)
    for file, split in ((path, "train"), (path.with_suffix(".val.beton"), "val")):
        dataset = open_dataset(str(path), split)
        reader = ffcv.reader.Reader(str(file))
        assert reader.field_names == ["image", "label"]
        by_sample = np.sort(reader.alloc_table, order="sample_id")
        assert np.array_equal(by_sample["ptr"], dataset.spans[:, 0])
        assert np.array_equal(by_sample["size"], dataset.spans[:, 1])
        loader = ffcv.Loader(
            str(file), 5, num_workers=1, os_cache=False, order=ffcv.loader.OrderOption.SEQUENTIAL, drop_last=False,
            pipelines={"image": [CenterCropRGBImageDecoder((48, 48), 1)], "label": [IntDecoder()]},
        )  # fmt: skip
        images, labels = (np.concatenate(x) for x in zip(*((a.copy(), b.copy()) for a, b in loader), strict=True))
        assert labels[:, 0].tolist() == dataset.labels.tolist()
        for i, image in enumerate(images):
            height, width = dataset.stored_sizes[i].tolist()
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            whole = resize(dataset.read(i)[:, top : top + side, left : left + side], 48, 48)
            assert np.abs(image.astype(int) - whole.permute(1, 2, 0).numpy().astype(int)).mean() < 5


def test_any_dataset_can_be_written_even_a_written_one(beton: Path, tmp_path: Path, capsys):
    main(["write", "digits:100", str(tmp_path / "digits.pack"), "--size", "128", "--verify"])
    assert "digits.pack: train 100, val 599 images of 10 classes" in capsys.readouterr().out
    assert open_dataset(str(tmp_path / "digits.pack")).fingerprint == open_dataset("digits:100").fingerprint
    main(["write", str(beton), str(tmp_path / "again.pack"), "--size", "128", "--verify"])
    again, first = open_dataset(str(tmp_path / "again.pack")), open_dataset(str(beton))
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.sizes, first.sizes)


def test_a_beton_of_a_beton_keeps_its_jpegs(beton: Path, tmp_path: Path):
    """As from a folder; pixels are compressed, and so are JPEGs if a smaller size is requested."""
    write(WriteConfig(str(beton), tmp_path / "again.beton"))
    again, first = open_dataset(str(tmp_path / "again.beton")), open_dataset(str(beton))
    assert [again.stored_bytes(i) for i in range(len(again))] == [first.stored_bytes(i) for i in range(len(first))]
    write(WriteConfig(str(beton), tmp_path / "pixels.beton", raw=True))
    write(WriteConfig(str(tmp_path / "pixels.beton"), tmp_path / "jpegs.beton"))
    jpegs = open_dataset(str(tmp_path / "jpegs.beton"))
    assert not jpegs.raw
    assert max(float((jpegs.read(i).int() - first.read(i).int()).abs().float().mean()) for i in range(len(first))) < 4


def test_a_folder_with_one_split_gives_one_split(photos: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    shutil.copytree(photos / "train", tmp_path / "data/train")
    for name in ("a.pack", "a.beton"):
        write(WriteConfig(str(tmp_path / "data"), tmp_path / name, verify=True))
        assert len(open_dataset(str(tmp_path / name))) == 24
        with pytest.raises(BadInput, match=rf"{name}: expected the split val, got only train"):
            open_dataset(str(tmp_path / name), "val")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pack", "raw"])
def test_a_folders_cache_trains_every_form(photo_cache: Any, on_photos: Any, photos: Path, tmp_path: Path, form: str):
    """And a form's cache trains the folder: the same command line with another --data."""
    path = written(form, photos, tmp_path)
    assert train(on_photos("one", data=str(path))).images_per_second > 0
    cache = make_cache(str(path), 2, tmp_path / "cache", topk=2)
    assert cache.header["dataset"]["train"] == photo_cache.header["dataset"]["train"]
    assert train(on_photos("two", cache=cache.path)).images_per_second > 0


# --- Unreadable images ------------------------------------------------------------------------------------------------


def wide_png(width: int) -> bytes:
    """A PNG that is one row high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, 1, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 + 3 * width)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def motley(photos: Path, tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """A folder of unusual images, the names of those that can be read, and of those that cannot."""
    root = tmp_path / "motley"
    shutil.copytree(photos, root, ignore=shutil.ignore_patterns(".fastofa"))
    folder = root / "train/china"
    photo = Image.open(folder / "000.jpg")
    photo.resize((20000, 40)).save(folder / "wide.jpg")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.save(folder / "a-png.jpg", "PNG")
    Image.fromarray((np.arange(4800).reshape(60, 80) * 13).astype(np.uint16)).save(folder / "16-bit.png")
    (folder / "truncated.jpg").write_bytes((folder / "001.jpg").read_bytes()[:-700])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    frames = [photo.rotate(90 * i).resize((64, 64)) for i in range(3)]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    good = ["wide.jpg", "cmyk.jpg", "a-png.jpg", "16-bit.png"]
    return root, good, ["truncated.jpg", "empty.jpg", "text.png", "animated.webp", "gone.jpg"]


@pytest.mark.parametrize("out", ["x.pack", "x.beton"])
@pytest.mark.parametrize("headers", ["damaged", "whole"])
def test_every_unreadable_image_is_named_and_nothing_is_written(motley, tmp_path: Path, capsys, out: str, headers: str):
    """In both splits; if only pixels are damaged, after all images of a split have been decoded."""
    root, good, bad = motley
    if headers == "whole":
        for name in set(bad) - {"truncated.jpg"}:
            (root / "train/china" / name).unlink()
        bad = ["truncated.jpg"]
    else:
        (root / "val/china/damaged.jpg").write_bytes((root / "train/china/002.jpg").read_bytes()[:-700])
        (root / "val/china/no.png").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main(["write", str(root), str(tmp_path / out)])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "fastofa: error: " in error.splitlines()[-1]
    assert all(f"china/{name}" in error for name in bad)
    assert not any(f"china/{name}" in error for name in good)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["motley"]
    for name in bad:
        (root / "train/china" / name).unlink()
    if headers == "damaged":
        for name in ("damaged.jpg", "no.png"):
            assert f"val/china/{name}" in error.splitlines()[-1]
            (root / "val/china" / name).unlink()
    main(["write", str(root), str(tmp_path / out), "--verify"])
    assert len(open_dataset(str(tmp_path / out))) == 28


@pytest.mark.parametrize("out", ["x.pack", "x.beton"])
def test_skip_corrupt_names_and_skips_them(motley, tmp_path: Path, capsys, out: str):
    """The fingerprint is that of the folder without them."""
    root, good, bad = motley
    main(["write", str(root), str(tmp_path / out), "--skip-corrupt", "--verify"])
    error = capsys.readouterr().err
    assert all(f"skipped: {root}/train/china/{name}: " in error for name in bad)
    found, source = open_dataset(str(tmp_path / out)), open_dataset(str(root))
    assert found.fingerprint == source.fingerprint
    assert {f"china/{name}" for name in good} < set(found.names)
    assert not {f"china/{name}" for name in bad} & set(found.names)
    wide = found.names.index("china/wide.jpg")
    assert found.sizes[wide].tolist() == [40, 20000]


def half_grey(path: Path) -> None:
    """Remove some bytes of a JPEG's pixels, about which libjpeg only warns."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 200 :])


@pytest.fixture
def warned(photos: Path, tmp_path: Path) -> Path:
    """The photos, one of which decodes with a warning."""
    root = shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns(".fastofa"))
    half_grey(root / "train/flower/003.jpg")
    return root


@pytest.mark.parametrize("out", ["x.pack", "x.beton"])
def test_an_image_with_signs_of_damage(warned: Path, tmp_path: Path, capfd, out: str):
    """It is refused, skipped or accepted, depending on the flags."""
    reason = r"train/flower/003\.jpg \(Corrupt JPEG data: .*; --allow-warnings accepts it"
    with pytest.raises(BadInput, match=r"nothing was written: 1 unreadable .*" + reason):
        write(WriteConfig(str(warned), tmp_path / out))
    write(WriteConfig(str(warned), tmp_path / out, allow_warnings=True))
    assert len(open_dataset(str(tmp_path / out))) == 24
    lines = capfd.readouterr().err.splitlines()
    assert all("train/flower/003.jpg" in line for line in lines if "Corrupt JPEG data" in line)
    write(WriteConfig(str(warned), tmp_path / f"less-{out}", skip_corrupt=True))
    assert len(open_dataset(str(tmp_path / f"less-{out}"))) == 23
    assert len(open_dataset(str(warned))) == 23
    assert "skipped: " in capfd.readouterr().err


def test_every_image_is_checked_once_and_the_index_remembers_it(warned: Path, monkeypatch):
    with pytest.raises(BadInput, match=r"1 unreadable image: .*train/flower/003\.jpg \(Corrupt JPEG data"):
        open_dataset(str(warned), check=True)
    assert len(open_dataset(str(warned))) == 24  # training names it when it is read
    assert len(open_dataset(str(warned), check=True, limits=Limits(allow_warnings=True))) == 24
    monkeypatch.setattr("fastofa.data.check_images.read_image", lambda *_, **__: pytest.fail("decoded again"))
    assert len(open_dataset(str(warned), check=True)) == 24  # the index records what the first command accepted
    monkeypatch.undo()
    assert len(open_dataset(str(warned), skip_corrupt=True)) == 23
    assert len(open_dataset(str(warned), check=True)) == 23
    assert len(open_dataset(str(warned), skip_corrupt=True, limits=Limits(allow_warnings=True))) == 24


def test_the_limit_on_pixels(photos: Path, tmp_path: Path):
    """By the header, for a folder and a file of FFCV; a flag raises it, which the index records."""
    (tmp_path / "data/train/a").mkdir(parents=True)
    (tmp_path / "data/train/a/0.png").write_bytes(wide_png(30_000))
    shutil.copy(photos / "train/china/000.jpg", tmp_path / "data/train/a")
    for name in ("x.pack", "x.beton"):
        with pytest.raises(BadInput, match=r"a/0\.png \(its header claims 1 x 30,000, more than 20,000 pixels"):
            write(WriteConfig(str(tmp_path / "data"), tmp_path / name, max_pixels=0.02))
    write(WriteConfig(str(tmp_path / "data"), tmp_path / "x.pack", max_pixels=0.03))
    assert len(open_dataset(str(tmp_path / "data"), limits=Limits(20_000))) == 2
    write(WriteConfig(str(tmp_path / "data"), tmp_path / "y.pack", max_pixels=0.02, skip_corrupt=True))
    assert len(open_dataset(str(tmp_path / "y.pack"))) == 1


@pytest.mark.parametrize("size", [32, 40, 512])
def test_a_pack_of_any_size(tmp_path: Path, size: int):
    write(WriteConfig("digits:10", tmp_path / "x.pack", size=size))
    assert open_dataset(str(tmp_path / "x.pack")).pixels.shape == (10, size, size, 3)
    shutil.rmtree(tmp_path / "x.pack")


def test_an_image_too_large_for_a_beton_is_named(tmp_path: Path):
    (tmp_path / "data/train/a").mkdir(parents=True)
    (tmp_path / "data/train/a/0.png").write_bytes(wide_png(70000))
    with pytest.raises(BadInput, match=r"a/0\.png: expected at most 65535 pixels per side .*1 x 70000.*--max-size"):
        write(WriteConfig(str(tmp_path / "data"), tmp_path / "x.beton"))
    for name, options in (("x.beton", {"max_size": 1000}), ("x.pack", {})):
        write(WriteConfig(str(tmp_path / "data"), tmp_path / name, verify=True, **options))
        assert open_dataset(str(tmp_path / name)).sizes.tolist() == [[1, 70000]]


def test_a_failing_thread_ends_the_job(photos: Path, tmp_path: Path, monkeypatch):
    """With its own error; nothing is waited for."""

    def fail(*_: object) -> None:
        raise MemoryError("no more")

    for name in ("x.pack", "x.beton"):
        monkeypatch.setattr("fastofa.data.write.resize", fail)
        with pytest.raises(MemoryError):
            write(WriteConfig(str(photos), tmp_path / name))
        assert list(tmp_path.iterdir()) == []


# --- Whole or not at all ----------------------------------------------------------------------------------------------


def _write(data: str, out: Path, options: dict[str, Any], die_at: int) -> None:
    """Write, and die when the `die_at`-th file is renamed."""
    calls = 0
    replace = os.replace

    def dying(*args: Any) -> None:
        nonlocal calls
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        replace(*args)

    os.replace = dying
    os.environ["XDG_CACHE_HOME"] = str(out.parent / "cache")
    fastofa.data.write.write(WriteConfig(data, out, **options))


def contents(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in files(path)]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pack", "jpeg", "raw"])
def test_killed_at_any_moment_then_written_again(photos: Path, tmp_path: Path, form: str):
    """At every rename, and at random: a renamed file is whole, and the next run gives the same bytes."""
    truth = contents(written(form, photos, tmp_path / "truth"))
    name, options = FORMS[form]
    out = tmp_path / "killed" / name
    out.parent.mkdir()
    rng = random.Random(form)
    deaths = 0
    for attempt in range(12):
        die_at = attempt if attempt < 4 else 10**9
        process = CONTEXT.Process(target=_write, args=(str(photos), out, options, die_at))
        process.start()
        if attempt >= 4:
            process.join(rng.uniform(0, 0.5))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        deaths += process.exitcode != 0
        if out.exists():
            verify(out, workers=1)
            assert contents(out) == truth
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        else:
            with pytest.raises(BadInput, match="found none"):
                open_dataset(str(out))
    assert deaths >= 2
    written(form, photos, out.parent)
    assert contents(out) == truth
    assert sorted(f.name for f in out.parent.iterdir() if f.name != "cache") == sorted(
        {f.relative_to(out.parent).parts[0] for f in files(out)}
    )


def test_a_full_disk_leaves_nothing(photos: Path, tmp_path: Path, monkeypatch):
    """A lack of space is reported at once; a disk that fills up, when it does."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    for name, options in (("x.pack", {}), ("x.beton", {"raw": True})):
        with pytest.raises(BadInput, match=rf"{name}: needs .*B, but only 1\.0 kB are free"):
            write(WriteConfig(str(photos), tmp_path / name, **options))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr("os.fsync", full)
    for name in ("x.pack", "x.beton"):
        with pytest.raises(BadInput, match=r"could not write .*No space left on device"):
            write(WriteConfig(str(photos), tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(photos: Path, pack: Path, beton: Path):
    for path in (pack, beton):
        before = contents(path)
        with pytest.raises(BadInput, match="already exists"):
            write(WriteConfig(str(photos), path))
        assert contents(path) == before


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pack", "jpeg"])
def test_verify_finds_any_flipped_byte(form: str, pack: Path, beton: Path, tmp_path: Path, capsys):
    """In every file at random positions, also between images; a damaged image by its name."""
    source = pack if form == "pack" else beton
    path = tmp_path / source.name
    for file in files(source):
        path.mkdir(exist_ok=True) if form == "pack" else None
        shutil.copy(file, path / file.name if form == "pack" else tmp_path / file.name)
    rng = random.Random(0)
    for file in files(path):
        whole = file.read_bytes()
        for place in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))]:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(BadInput) as error:
                verify(path, workers=1)
            assert file.name in str(error.value) or "damaged: " in str(error.value)
            assert "\n" not in str(error.value)
        file.write_bytes(whole)
    verify(path, workers=1)
    dataset = open_dataset(str(path))
    file = path / "images.npy" if form == "pack" else path
    at = (
        file.stat().st_size - 36 * 128 * 128 * 3 + 17 * 128 * 128 * 3 + 5
        if form == "pack"
        else dataset.spans[17, 0] + 50
    )
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1
    file.write_bytes(whole)
    with pytest.raises(SystemExit):
        main(["write", str(path), str(path), "--verify"])
    assert f"1 damaged: train/{dataset.names[17]} (its checksum does not match" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_the_tables_of_a_beton_are_compared_when_it_is_opened(form: str, photos: Path, tmp_path: Path):
    """Any byte of labels, sizes and spans, and any header, whatever it claims: one line and little memory."""
    path = written(form, photos, tmp_path)
    whole = bytearray(path.read_bytes())
    spans_at = int(np.frombuffer(whole[:24], HEADER)[0]["spans_at"])
    records_at = HEADER.itemsize + 2 * FIELD.itemsize
    rng = random.Random(form)
    places = [*range(24), records_at + 16, *(records_at + rng.randrange(24 * RECORD.itemsize) for _ in range(30))]
    for place in [*places, *(spans_at + rng.randrange(24 * SPAN.itemsize) for _ in range(30))]:
        damaged = whole.copy()
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(BadInput) as error:
            open_dataset(str(path))
        assert "\n" not in str(error.value)
    path.write_bytes(whole)


def test_exchanged_sizes_of_raw_images(photos: Path, tmp_path: Path):
    """Height and width exchanged or enlarged, also without a checksum: memory outside the image is never read."""
    path = written("raw", photos, tmp_path)
    index_path(path).unlink()
    whole = bytearray(path.read_bytes())
    at = whole.index(MARK)
    whole[at : at + len(MARK)] = bytes(len(MARK))  # as FFCV writes it
    path.write_bytes(whole)
    assert len(open_dataset(str(path))) == 24
    records_at = HEADER.itemsize + 2 * FIELD.itemsize
    for width, height in ((65535, 65535), (0, 5), (1, 1)):
        damaged = whole.copy()
        damaged[records_at + 1 : records_at + 5] = struct.pack("<HH", width, height)
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="the sizes of its images do not match their bytes"):
            open_dataset(str(path))


def test_a_pack_with_another_file_as_labels(pack: Path, tmp_path: Path):
    """A pickle, another shape, a header that claims a lot: compared with the checksum before it is parsed."""
    shutil.copytree(pack, tmp_path / "x.pack")
    labels = tmp_path / "x.pack/labels.npy"
    whole = labels.read_bytes()
    for change in (
        whole.replace(b"'<i8'", b"'|O8'"), whole.replace(b"(36,)", b"(9e9)"), b"\x93NUMPY" + b"\xff" * 1000,
        whole.replace(b"False", b"True "),
    ):  # fmt: skip
        labels.write_bytes(change[: len(whole)].ljust(len(whole), b"\0"))
        with pytest.raises(BadInput, match=r"labels\.npy: its checksum does not match"):
            open_dataset(str(tmp_path / "x.pack"))


def test_another_file_in_place_of_the_index(beton: Path, pack: Path, tmp_path: Path):
    for source in (beton, pack):
        for file in files(source):
            place = tmp_path / source.name / file.name if source.suffix == ".pack" else tmp_path / file.name
            place.parent.mkdir(exist_ok=True)
            shutil.copy(file, place)
        path = tmp_path / source.name
        for tensors, info in (
            ({}, {}),
            ({}, {"schema": 2}),
            ({"a": torch.zeros(3)}, {"schema": 2, "splits": {"train": 3}, "files": [], "classes": 4, "source": 5}),
        ):
            save_tensors(index_path(path), tensors, info)
            with pytest.raises(BadInput, match="expected an index that `fastofa write` wrote, got another file"):
                open_dataset(str(path))
        index_path(path).write_bytes(b"[" * 100_000)
        with pytest.raises(BadInput, match=r"expected a safetensors file"):
            open_dataset(str(path))


# --- What FFCV's own writer wrote -------------------------------------------------------------------------------------


def foreign(path: Path, labels: list[int], names: tuple[bytes, bytes] = (b"image", b"label")) -> Path:
    """A file as from FFCV's writer: without our mark and index, samples in any order."""
    rng = np.random.default_rng(0)
    images = [
        StoredImage(np.full((8 + i, 9, 3), i, np.uint8).tobytes(), 8 + i, 9)
        for i in rng.permutation(len(labels)).tolist()
    ]
    order = np.array([image.data[0] for image in images])
    write_beton(path, images, order, np.array(labels), raw=True, largest=9 * 30 * 3)
    data = path.read_bytes().replace(MARK, bytes(len(MARK)))
    for before, after in zip((b"image", b"label"), names, strict=True):
        data = data.replace(before.ljust(16, b"\0"), after.ljust(16, b"\0"), 1)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("val", ["train.val.beton", "val.beton"])
def test_a_file_that_fastofa_did_not_write(tmp_path: Path, capsys, val: str):
    """Samples by label, then number; the classes of both splits; fields with other names."""
    path = foreign(tmp_path / "train.beton", [2, 0, 1, 0, 2], (b"photo", b"target"))
    with pytest.raises(
        BadInput, match=r"expected its validation split next to it as .*train\.val\.beton or .*/val\.beton"
    ):
        open_dataset(str(path), "val")
    foreign(tmp_path / val, [3, 0])
    train_set, val_set = open_dataset(str(path)), open_dataset(str(path), "val")
    assert train_set.labels.tolist() == [0, 0, 1, 2, 2]
    assert list(train_set.names) == [f"{i:08d}" for i in (1, 3, 2, 0, 4)]
    assert train_set.classes == val_set.classes == ("0", "1", "2", "3")
    for dataset in (train_set, val_set):
        for i, name in enumerate(dataset.names):
            image = dataset.read(i)
            assert image.shape == (3, 8 + int(name), 9)
            assert (image == int(name)).all()
    assert train_set.page_ids is None
    write(WriteConfig(str(path), tmp_path / "x.pack", size=32, verify=True))
    assert open_dataset(str(tmp_path / "x.pack")).fingerprint == train_set.fingerprint
    with pytest.raises(BadInput, match=r"sample \d claims \d+ x 9, more than 80 pixels"):
        open_dataset(str(path), limits=Limits(80))


def test_a_file_of_ffcv_without_one_image_and_one_label(tmp_path: Path):
    path = foreign(tmp_path / "a.beton", [0, 1])
    whole = path.read_bytes()
    for kind, words in ((0, "label (another type)"), (2, "label (RGBImageField)"), (9, "an unknown type")):
        data = bytearray(whole)
        data[HEADER.itemsize + FIELD.itemsize] = kind
        path.write_bytes(data)
        with pytest.raises(BadInput) as error:
            open_dataset(str(path))
        assert words in str(error.value)
    for labels in ([-1, 0], [0, 10**12]):
        with pytest.raises(BadInput, match="expected labels from 0 to 999,999"):
            open_dataset(str(foreign(path, labels)))


@pytest.mark.ffcv
def test_a_file_with_all_features_of_ffcvs_writer(photos: Path, tmp_path: Path):
    """Additional fields, pixels and JPEGs mixed, samples shuffled."""
    from ffcv.fields import FloatField, IntField, JSONField, RGBImageField
    from ffcv.writer import DatasetWriter

    source = open_dataset(str(photos))

    class Samples:
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, i: int) -> tuple[Any, ...]:
            return 0.5, int(source.labels[i]), source.read(i).permute(1, 2, 0).contiguous().numpy(), {"number": int(i)}

    fields = {
        "weight": FloatField(), "class": IntField(), "photo": RGBImageField("proportion", compress_probability=0.5),
        "more": JSONField(),
    }  # fmt: skip
    path = tmp_path / "train.ffcv"
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Samples(), shuffle_indices=True)
    found = open_dataset(str(path))
    assert 0 < found.is_raw.sum() < 24
    assert found.labels.tolist() == source.labels.tolist()
    # Which sample a number is, the writer decided: by their sizes.
    for i in range(24):
        same = [j for j in range(24) if source.read(j).shape == found.read(i).shape]
        assert min((found.read(i).int() - source.read(j).int()).abs().float().mean() for j in same) < 4


@pytest.mark.parametrize("form", ["pack", "jpeg"])
def test_incomplete_datasets_are_refused(form: str, photos: Path, tmp_path: Path):
    """Files that are truncated, missing, edited or of other data."""
    path = written(form, photos, tmp_path)
    for file in files(path):
        whole = file.read_bytes()
        for change in (whole[:-1], whole[: len(whole) // 2], b"", None, b"\x01" * len(whole)):
            file.unlink() if change is None else file.write_bytes(change)
            with pytest.raises(BadInput) as error:
                [open_dataset(str(path), split) for split in ("train", "val")] and verify(path, workers=1)
            assert str(path.parent) in str(error.value)
            file.write_bytes(whole)
    index = index_path(path)
    index.write_bytes(index.read_bytes().replace(b"china", b"chine"))
    with pytest.raises(BadInput, match="its checksum does not match"):
        open_dataset(str(path))


def test_verify_reports_another_form_than_requested(photos: Path, pack: Path, beton: Path):
    with pytest.raises(BadInput, match=r"pack: expected images of 256 pixels because of --size, got 128"):
        write(WriteConfig(str(photos), pack, size=256, verify=True))
    with pytest.raises(BadInput, match=r"beton: expected pixels because of --raw, got JPEGs"):
        write(WriteConfig(str(photos), beton, raw=True, verify=True))
    write(WriteConfig(str(photos), pack, size=128, verify=True))
    write(WriteConfig(str(photos), beton, verify=True))


def test_verify_reports_data_that_have_changed(photos: Path, pack: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / "data", ignore=shutil.ignore_patterns(".fastofa"))
    write(WriteConfig(str(tmp_path / "data"), pack, verify=True))
    (tmp_path / "data/train/china/000.jpg").unlink()
    with pytest.raises(BadInput, match=r"expected the present images of .*, got .* \(train\)"):
        write(WriteConfig(str(tmp_path / "data"), pack, verify=True))


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("photos", {}, r"OUT: expected a name ending in \.pack or \.beton, got photos"),
        ("x.pack", {"raw": True}, r"--raw: expected OUT\.beton, got x\.pack"),
        ("x.pack", {"max_size": 400}, r"--max-size: expected OUT\.beton"),
        ("x.pack", {"max_size": 0}, r"--max-size: expected OUT\.beton"),
        ("x.pack", {"quality": 0}, r"--quality: expected OUT\.beton"),
        ("x.beton", {"size": 0}, r"--size: expected OUT\.pack"),
        ("x.beton", {"size": 128}, r"--size: expected OUT\.pack"),
        ("x.beton", {"quality": 101}, "quality: expected 1 to 100, got 101"),
        ("x.beton", {"quality": 0}, "quality: expected 1 to 100"),
        ("x.beton", {"quality": 90, "raw": True}, "quality: expected none with --raw"),
        ("x.beton", {"max_size": 0}, "max-size: expected at least 1 pixel, got 0"),
        ("x.pack", {"workers": 0}, "workers: expected at least 1, got 0"),
        ("x.pack", {"size": 24}, "size: expected a multiple of 8 from 32 to 512, got 24"),
        ("x.pack", {"size": 100}, "size: expected a multiple of 8 from 32 to 512, got 100"),
        ("x.pack", {"size": 520}, "size: expected a multiple of 8 from 32 to 512, got 520"),
        ("x.pack", {"max_pixels": 0}, "max-pixels: expected millions of pixels, above 0 and below 1,000,000, got 0"),
        ("x.pack", {"max_pixels": float("nan")}, "max-pixels: expected millions of pixels"),
    ],
)
def test_invalid_options_are_refused(out, options, message):
    with pytest.raises(BadInput, match=message):
        WriteConfig("digits", Path(out), **options)


def test_a_written_dataset_may_be_moved_and_renamed(beton: Path, pack: Path, tmp_path: Path):
    shutil.copytree(pack, tmp_path / "other.pack")
    for file, name in zip(files(beton), ("other.beton", "other.val.beton", "other.beton.safetensors"), strict=True):
        shutil.copy(file, tmp_path / name)
    for name in ("other.pack", "other.beton"):
        verify(tmp_path / name, workers=1)
        assert len(open_dataset(str(tmp_path / name), "val")) == 12


def test_the_validation_file_alone_is_refused(beton: Path):
    with pytest.raises(BadInput, match=r"photos\.val\.beton: expected the training split .*photos\.beton as --data"):
        open_dataset(str(beton.with_suffix(".val.beton")))


def test_missing_paths_are_refused(tmp_path: Path):
    for name in ("x.pack", "x.beton"):
        with pytest.raises(BadInput, match=rf"{name}: expected a written dataset, found none; `fastofa write DATA"):
            open_dataset(str(tmp_path / name))
    (tmp_path / "x.pack").mkdir()
    (tmp_path / "x.beton").write_bytes(b"another program's")
    with pytest.raises(BadInput, match=r"expected .*\.safetensors, which"):
        open_dataset(str(tmp_path / "x.pack"))
    with pytest.raises(BadInput, match=r"x\.beton: expected an FFCV file.* but it is truncated or in"):
        open_dataset(str(tmp_path / "x.beton"))
