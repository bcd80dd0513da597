"""94 printable characters drawn in the fonts that matplotlib ships: images, classes and a split, without a download."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = tuple(map(chr, range(33, 127)))
VAL_FONTS = ("DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneral")
TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Italic", "STIXGeneralBol", "STIXGeneralItalic",
)  # fmt: skip


def characters(split: str, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """White characters on black.

    Args:
        split: "train" or "val", which have different fonts.
        size: side of an image in pixels.

    Returns:
        Images uint8 [N, size, size] and labels int64 [N] from 0 to 93, a block of 94 for each font.
    """
    names = VAL_FONTS if split == "val" else TRAIN_FONTS
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), int(size * 0.7)) for name in names]
    images = [_drawn(character, font, size) for font in fonts for character in CHARACTERS]
    return np.stack(images), np.tile(np.arange(len(CHARACTERS)), len(fonts))


def _drawn(character: str, font: ImageFont.FreeTypeFont, size: int) -> np.ndarray:
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).text((size / 2, size / 2), character, fill=255, font=font, anchor="mm")
    return np.asarray(image)
