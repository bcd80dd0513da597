"""Pictures of every kind become upright uint8 RGB as Pillow sees them; what is no picture is refused by name."""

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps
from torch import Tensor

from fastofa.errors import BadInput
from fastofa.images import SUFFIXES, crop_resize_one, read_image

HEIGHT, WIDTH = 67, 101
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0][100 : 100 + HEIGHT, 200 : 200 + WIDTH])


def with_alpha(photo: Image.Image) -> Image.Image:
    """Fades out from left to right: how alpha is dropped would show."""
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


# --- Kinds of pictures ------------------------------------------------------------------------------------------------


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
    """Up to one level, the freedom that JPEG and WebP decoders have."""
    path = tmp_path / name
    assert path.suffix.lower() in SUFFIXES
    convert(photo).save(path, **options)
    image, expected = read(path), by_pillow(path)
    assert image.shape == expected.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - expected).max() <= (0 if path.suffix == ".png" else 1)


def write_png16(path: Path, values: np.ndarray) -> None:
    """A PNG of 16 bits a channel, uint16 [H, W] or [H, W, 3]; Pillow cannot write it in colour."""
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
def test_16_bits_a_channel_are_brought_to_8(tmp_path: Path, grey: bool) -> None:
    """Scaled, not cut off: 65535 becomes 255, and every level is within one of value / 257."""
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH) if grey else (HEIGHT, WIDTH, 3))
    values[0, :2] = [[0], [65535]] if not grey else [0, 65535]
    write_png16(tmp_path / "deep.png", values.astype(np.uint16))
    image = read(tmp_path / "deep.png")
    expected = values[..., None].repeat(3, axis=2) if grey else values
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[0, 1].tolist() == [255, 255, 255]
    assert np.abs(image - expected / 257).max() <= 1


def test_smallest_and_thinnest_pictures(tmp_path: Path) -> None:
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
    """As Pillow does it, and as the eye sees it: the mark lies where the orientation's definition puts it."""
    marked = photo.copy()
    marked.paste((255, 0, 0), (0, 0, 16, 16))  # the stored picture's top left
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
def test_undefined_orientation_is_none(tmp_path: Path, photo: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo.save(tmp_path / "odd.png", exif=exif)
    assert (read(tmp_path / "odd.png") == np.asarray(photo)).all()


# --- What is no picture -----------------------------------------------------------------------------------------------


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
    """Down, up, no resize at all, and a single pixel; exact, for it is the same kernel."""
    image: Tensor = tv.pil_to_tensor(photo)
    expected = tv.resized_crop(image, *box, [size, size], antialias=True)
    got = crop_resize_one(image, box, flip, size)
    assert got.dtype == torch.uint8
    assert torch.equal(got, expected.flip(-1) if flip else expected)
