"""Images of every kind become upright uint8 RGB as in Pillow; other files are refused by name."""

import errno
import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps
from torch import Tensor

from fastofa.data.check_images import checked_size, header_size
from fastofa.data.decode import SUFFIXES, crop_resize_one, decode, read_image
from fastofa.data.headers import DEFAULT, Limits
from fastofa.system.errors import BadInput, Reason

HEIGHT, WIDTH = 67, 101
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0][100 : 100 + HEIGHT, 200 : 200 + WIDTH])


def with_alpha(photo: Image.Image) -> Image.Image:
    """Fades out from left to right, so that the treatment of alpha is visible."""
    fading = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    result = photo.copy()
    result.putalpha(Image.fromarray(fading))
    return result


def by_pillow(path: Path) -> np.ndarray:
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # palettes with transparency
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as error:
        read_image(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert "skip-corrupt" in text
    return text


# --- Kinds of images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "convert", "options"),
    [
        ("rgb.jpg", lambda photo: photo, {"quality": 90}),
        ("progressive.jpg", lambda photo: photo, {"progressive": True}),
        ("full_chroma.jpg", lambda photo: photo, {"subsampling": 0}),
        ("grey.jpg", lambda photo: photo.convert("L"), {}),
        ("cmyk.jpg", lambda photo: photo.convert("CMYK"), {}),
        ("rgb.png", lambda photo: photo, {}),
        ("grey.png", lambda photo: photo.convert("L"), {}),
        ("black_and_white.png", lambda photo: photo.convert("1"), {}),
        ("rgba.png", with_alpha, {}),
        ("grey_alpha.png", lambda photo: with_alpha(photo).convert("LA"), {}),
        ("palette.png", lambda photo: photo.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        ("palette_16.png", lambda photo: photo.quantize(16), {}),
        ("palette_transparent.png", lambda photo: with_alpha(photo).quantize(64), {}),
        ("lossy.webp", lambda photo: photo, {}),
        ("lossless.webp", lambda photo: photo, {"lossless": True}),
        ("rgba.webp", with_alpha, {"lossless": True}),
        ("suffix_in_capitals.JPEG", lambda photo: photo, {"format": "JPEG"}),
        ("png_named.jpg", lambda photo: photo, {"format": "PNG"}),
    ],
)
def test_equals_pillow(
    tmp_path: Path,
    photo: Image.Image,
    name: str,
    convert: Callable[[Image.Image], Image.Image],
    options: dict[str, Any],
) -> None:
    """To one level, by which JPEG and WebP decoders may differ."""
    path = tmp_path / name
    assert path.suffix.lower() in SUFFIXES
    convert(photo).save(path, **options)
    image, expected = read(path), by_pillow(path)
    assert image.shape == expected.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - expected).max() <= (0 if path.suffix == ".png" else 1)


def write_png16(path: Path, values: np.ndarray) -> None:
    """A PNG with 16 bits per channel, uint16 [H, W] or [H, W, 3], which Pillow cannot write in colour."""
    kind = 2 if values.ndim == 3 else 0
    height, width = values.shape[:2]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("grey", [True, False])
def test_16_bits_per_channel_are_scaled_to_8(tmp_path: Path, grey: bool) -> None:
    """65535 becomes 255, and every level is within one of value / 257."""
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH) if grey else (HEIGHT, WIDTH, 3))
    values[0, :2] = [[0], [65535]] if not grey else [0, 65535]
    write_png16(tmp_path / "deep.png", values.astype(np.uint16))
    image = read(tmp_path / "deep.png")
    expected = values[..., None].repeat(3, axis=2) if grey else values
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[0, 1].tolist() == [255, 255, 255]
    assert np.abs(image - expected / 257).max() <= 1


def test_smallest_and_thinnest_images(tmp_path: Path) -> None:
    for height, width in ((1, 1), (1, 50), (50, 1)):
        values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "small.png")
        assert (read(tmp_path / "small.png") == values).all()


def test_names_with_spaces_and_other_letters(tmp_path: Path, photo: Image.Image) -> None:
    path = tmp_path / "größe 1 (世界).png"
    photo.save(path)
    assert (read(path) == np.asarray(photo)).all()


# --- Orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, photo: Image.Image, suffix: str, orientation: int) -> None:
    """As by Pillow, and the mark is where the definition of the orientation puts it."""
    marked = photo.copy()
    marked.paste((255, 0, 0), (0, 0, 16, 16))  # the stored image's top left
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"turned.{suffix}"
    marked.save(path, exif=exif, **({"quality": 95, "subsampling": 0} if suffix == "jpg" else {}))
    image = read(path)
    assert image.shape == ((HEIGHT, WIDTH, 3) if orientation < 5 else (WIDTH, HEIGHT, 3))
    assert np.abs(image.astype(int) - by_pillow(path)).max() <= (0 if suffix == "png" else 1)
    at_bottom, at_right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    corner = image[-8 if at_bottom else 7, -8 if at_right else 7].astype(int)
    assert np.abs(corner - [255, 0, 0]).max() < 20


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_undefined_orientation_is_ignored(tmp_path: Path, photo: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo.save(tmp_path / "odd.png", exif=exif)
    assert (read(tmp_path / "odd.png") == np.asarray(photo)).all()


# --- Files that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9, 0.99])
def test_truncated(tmp_path: Path, photo: Image.Image, suffix: str, part: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    photo.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"a text file\n", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_empty_text_or_only_a_signature(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"none{suffix}"
    path.write_bytes(content)
    refusal(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.jpg")
    refusal(tmp_path)


@pytest.mark.parametrize("name", ["moving.webp", "gif_named.jpg"])
def test_animation(tmp_path: Path, photo: Image.Image, name: str) -> None:
    frames = [photo.rotate(90), photo.rotate(180)]
    photo.save(tmp_path / name, format="WEBP" if name.endswith("webp") else "GIF", save_all=True, append_images=frames)
    assert "nimated" in refusal(tmp_path / name)


# --- Damage that a decoder makes something of -------------------------------------------------------------------------


def as_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def holed(jpeg: bytes) -> bytes:
    """Remove some bytes of the pixels: libjpeg decodes a half-grey image and warns."""
    middle = len(jpeg) // 2
    return jpeg[:middle] + jpeg[middle + 300 :]


def adobe_rgb(photo: Image.Image) -> bytes:
    """Stored as red, green and blue, which an APP14 segment states."""
    return as_bytes(photo, "JPEG", keep_rgb=True)


def with_thumbnail(photo: Image.Image) -> bytes:
    """A JPEG with another in its EXIF data."""
    thumbnail = as_bytes(photo.resize((16, 12)), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\x0e\0\0\0" + struct.pack("<HHHII", 1, 0x0201, 4, 1, 32) + thumbnail
    return as_bytes(photo, "JPEG", exif=exif)


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """Insert a chunk before the pixels."""
    at = png.index(b"IDAT") - 4
    return png[:at] + struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) + png[at:]


@pytest.mark.parametrize(
    "make",
    [
        lambda photo: as_bytes(photo, "JPEG", quality=10),
        lambda photo: as_bytes(photo, "JPEG", quality=100, subsampling=0),
        lambda photo: as_bytes(photo, "JPEG", progressive=True),
        lambda photo: as_bytes(photo, "JPEG", optimize=True, restart_marker_blocks=12),
        lambda photo: as_bytes(photo, "JPEG", progressive=True, restart_marker_rows=1),
        lambda photo: as_bytes(photo.convert("CMYK"), "JPEG"),
        lambda photo: as_bytes(photo.convert("L"), "JPEG"),
        adobe_rgb,
        with_thumbnail,
        lambda photo: as_bytes(photo, "JPEG", comment="x" * 60_000, icc_profile=bytes(90_000)),
        lambda photo: as_bytes(photo, "JPEG") + b"what a camera adds" * 9,
        lambda photo: as_bytes(photo, "MPO", save_all=True, append_images=[photo.rotate(180)]),
        lambda photo: as_bytes(photo.quantize(16), "PNG"),
        lambda photo: as_bytes(photo, "PNG", save_all=True, append_images=[photo.rotate(180)]),
        lambda photo: with_chunk(as_bytes(photo, "PNG"), b"iCCP", b"odd\0\0" + zlib.compress(b"no profile")),
        lambda photo: as_bytes(photo, "PNG") + b"more",
        lambda photo: as_bytes(photo, "WEBP", quality=5),
        lambda photo: as_bytes(photo, "WEBP", quality=99, method=6),
        lambda photo: as_bytes(photo, "WEBP", lossless=True),
        lambda photo: as_bytes(with_alpha(photo), "WEBP"),
        lambda photo: as_bytes(photo, "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", icc_profile=bytes(301)),
        lambda photo: as_bytes(photo.crop((0, 0, 1, 1)), "WEBP"),
        lambda photo: as_bytes(photo.crop((0, 0, 1, 1)), "JPEG"),
        lambda photo: as_bytes(photo.convert("P"), "GIF"),
    ],
)
def test_intact_images_are_accepted(
    tmp_path: Path, photo: Image.Image, capfd, make: Callable[[Image.Image], bytes]
) -> None:
    (tmp_path / "a.jpg").write_bytes(make(photo))
    image = read_image(tmp_path / "a.jpg", strict=True)
    assert header_size(tmp_path / "a.jpg", DEFAULT) == tuple(image.shape[1:])
    assert capfd.readouterr() == ("", "")


def test_a_warning_belongs_to_its_file(tmp_path: Path, photo: Image.Image, capfd) -> None:
    """It is refused when images are checked, unless warnings are allowed; otherwise a notice names it once."""
    path = tmp_path / "half_grey.jpg"
    path.write_bytes(holed(as_bytes(photo.resize((300, 200)), "JPEG")))
    with pytest.raises(BadInput, match=r"half_grey\.jpg \(Corrupt JPEG data: .*; --allow-warnings accepts it"):
        read_image(path, strict=True)
    reason = checked_size(path, DEFAULT)
    assert reason == "Corrupt JPEG data: premature end of data segment; --allow-warnings accepts it as decoded"
    assert capfd.readouterr().err == ""
    image = read_image(path, Limits(allow_warnings=True), strict=True)
    assert torch.equal(read_image(path), image)
    line = capfd.readouterr().err.strip()
    assert line.startswith(f"image {path}: Corrupt JPEG data: ")
    assert "\n" not in line


def test_threads_attribute_warnings_to_their_images(photo: Image.Image, capfd) -> None:
    good = as_bytes(photo.resize((120, 100)), "JPEG")
    files = [holed(good) if i % 7 == 3 else good for i in range(140)]

    def warned(i: int) -> bool:
        try:
            decode(bytearray(files[i]), f"{i}", strict=True)
        except BadInput as error:
            return "Corrupt JPEG data" in str(error)
        return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(warned, range(140))) == [i % 7 == 3 for i in range(140)]
    assert capfd.readouterr().err == ""


def test_a_forked_process_captures_its_own_warnings(photo: Image.Image) -> None:
    """Also if it is forked while a thread decodes."""
    bad = holed(as_bytes(photo.resize((300, 200)), "JPEG"))
    with ThreadPoolExecutor(1) as pool:
        busy = [pool.submit(decode, bytearray(as_bytes(photo, "JPEG")), "a") for _ in range(20)]
        if not (child := os.fork()):
            try:
                decode(bytearray(bad), "b", strict=True)
            except BadInput as error:
                os._exit(3 if "Corrupt JPEG data" in str(error) else 1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert all(one.result().shape == (3, HEIGHT, WIDTH) for one in busy)


def test_unused_data_of_a_webp_is_detected(photo: Image.Image) -> None:
    """After a flipped bit, the pixels take another number of bytes: nearly all of 60 positions are detected."""
    data, found = as_bytes(photo.resize((200, 160)), "WEBP"), 0
    places = range(60, len(data) - 200, (len(data) - 260) // 60)
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 16
        try:
            decode(damaged, "x", strict=True)
        except BadInput:
            found += 1
    assert found >= 0.9 * len(places)


def test_a_png_is_refused_for_any_flipped_bit(photo: Image.Image) -> None:
    """Also in chunks about which libpng only warns, such as the orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = as_bytes(photo.crop((0, 0, 9, 5)), "PNG", exif=exif)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(BadInput, match="unreadable image x"):
            decode(damaged, "x", strict=True)


# --- What a header claims ---------------------------------------------------------------------------------------------


def claiming(photo: Image.Image, kind: str, side: int) -> bytes:
    """A small file whose header claims a large size."""
    if kind == "PNG":
        data = bytearray(as_bytes(photo, "PNG"))
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "JPEG":
        data = bytearray(as_bytes(photo, "JPEG"))
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    elif kind == "GIF":
        data = bytearray(as_bytes(photo.convert("P"), "GIF"))
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "WEBP lossless":
        data = bytearray(as_bytes(photo, "WEBP", lossless=True))
        data[21:25] = struct.pack("<I", (side - 1) | (side - 1) << 14)
    else:
        data = bytearray(as_bytes(photo, "WEBP"))
        data[26:30] = struct.pack("<HH", side, side)
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "side"), [("JPEG", 30_000), ("PNG", 1 << 30), ("WEBP", 16_383), ("WEBP lossless", 16_384), ("GIF", 65_535)]
)
def test_too_many_pixels_are_refused(tmp_path: Path, photo: Image.Image, monkeypatch, kind: str, side: int) -> None:
    """By the header; nothing is decoded."""
    path = tmp_path / "bomb.jpg"
    path.write_bytes(claiming(photo, kind, side))
    monkeypatch.setattr("fastofa.data.decode.decode_image", lambda *_, **__: pytest.fail("decoded"))
    claim = f"its header claims {side:,} x {side:,}, more than 200,000,000 pixels; resize it"
    assert claim in refusal(path)
    assert header_size(path, DEFAULT) == checked_size(path, DEFAULT)
    assert str(header_size(path, DEFAULT)).startswith(claim)
    assert header_size(path, Limits(max_pixels=side * side)) == (side, side)


def test_the_largest_accepted_size(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", Limits(max_pixels=HEIGHT * WIDTH)).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(BadInput, match="its header claims 67 x 101, more than 6,766 pixels"):
        read_image(tmp_path / "a.png", Limits(max_pixels=HEIGHT * WIDTH - 1))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"BM\x36\x75", "a BMP"),
        (b"II*\0\x08\0", "a TIFF"),
        (b"\0\0\0\x1cftypavif", "an AVIF"),
        (b"\0\0\0\x1cftypheic", "a HEIC or video"),
        (b"\r\n<!DOCTYPE HTML>", "a web page"),
        (b"PK\x03\x04", "a zip archive"),
        (b"version https://git-lfs", "no image"),
    ],
)
def test_the_real_kind_of_a_file_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    """Downloads are often not what their names say."""
    (tmp_path / "a.jpg").write_bytes(content + bytes(80))
    assert f"(it is {what}, expected a JPEG, PNG or WebP)" in refusal(tmp_path / "a.jpg")
    assert header_size(tmp_path / "a.jpg", DEFAULT) == f"it is {what}, expected a JPEG, PNG or WebP"


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert "not a regular file" in refusal(tmp_path / "a.jpg")
    assert header_size(tmp_path / "a.jpg", DEFAULT) == "not a regular file"


# --- crop_resize_one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ([0, 0, HEIGHT, WIDTH], 32),
        ([5, 11, 40, 30], 24),
        ([5, 11, 10, 12], 48),
        ([3, 4, 24, 24], 24),
        ([66, 100, 1, 1], 8),
    ],
)
def test_crop_and_resize_equal_torchvision(photo: Image.Image, box: list[int], size: int, flip: bool) -> None:
    """Down, up, without resizing, and a single pixel; exact, since the kernel is the same."""
    image: Tensor = tv.pil_to_tensor(photo)
    expected = tv.resized_crop(image, *box, [size, size], antialias=True)
    got = crop_resize_one(image, box, flip, size)
    assert got.dtype == torch.uint8
    assert torch.equal(got, expected.flip(-1) if flip else expected)


@pytest.mark.parametrize(("box", "size"), [([0, 0, HEIGHT, WIDTH], 32), ([5, 11, 40, 30], 24), ([5, 11, 10, 12], 48)])
def test_bicubic_resizing_equals_pillows(photo: Image.Image, box: list[int], size: int) -> None:
    """To 1 of 255, if Pillow resizes the rows first, as torch does."""
    top, left, height, width = box
    cropped = photo.crop((left, top, left + width, top + height))
    rows = cropped.resize((size, height), Image.Resampling.BICUBIC)
    expected = tv.pil_to_tensor(rows.resize((size, size), Image.Resampling.BICUBIC))
    got = crop_resize_one(tv.pil_to_tensor(photo), box, False, size, bicubic=True)
    assert (got.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(got, crop_resize_one(tv.pil_to_tensor(photo), box, False, size))


def test_the_cause_is_a_field_of_the_error(tmp_path):
    """Without the file's name and the remedy; with the system's error number if the system refused the file."""
    folder = tmp_path / "a (b); c"
    folder.mkdir()
    (folder / "web.jpg").write_bytes(b"<html>")
    with pytest.raises(BadInput) as refused:
        read_image(folder / "web.jpg")
    assert (
        refused.value.reason
        == "it is a web page, expected a JPEG, PNG or WebP"
        == checked_size(folder / "web.jpg", DEFAULT)
    )
    with pytest.raises(BadInput) as missing:
        read_image(folder / "none.jpg")
    assert isinstance(missing.value.reason, Reason)
    assert (missing.value.reason, missing.value.reason.errno) == (os.strerror(errno.ENOENT), errno.ENOENT)
    again = pickle.loads(pickle.dumps(missing.value))  # as a worker process hands it over
    assert (str(again), again.reason, again.reason.errno) == (str(missing.value), missing.value.reason, errno.ENOENT)
