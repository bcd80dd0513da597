"""Write a folder of drawn characters, a data set of 94 classes that needs no download: the printable ASCII characters.

    python -m bench.characters_folder characters

A character is drawn in one of the fonts that come with matplotlib, in a random size, position, angle and contrast, with
noise. The folder of a class has the character's code point in decimal: 065 is A. Some characters differ only in size,
such as o and O, so that no model is certain of all.
"""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench.lib import command_line

CHARACTERS = [chr(code) for code in range(33, 127)]
SIDE = 32  # pixels
COUNTS = {"train": 24, "val": 8}  # images of each class
FONTS = [
    f"{family}{style}.ttf"
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
]


def draw(character: str, rng: np.random.Generator) -> Image.Image:
    """A grey image of SIDE x SIDE pixels."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[rng.integers(len(FONTS))]
    font = ImageFont.truetype(str(file), int(rng.integers(16, 27)))
    ink = Image.new("L", (SIDE, SIDE))
    x, y = SIDE / 2 + rng.uniform(-3, 3, 2)
    ImageDraw.Draw(ink).text((x, y), character, fill=255, font=font, anchor="mm")
    ink = ink.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    dark, light = rng.uniform(0, 90), rng.uniform(140, 255)
    pixels = light + (dark - light) * np.asarray(ink) / 255 + rng.normal(0, 12, (SIDE, SIDE))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_folder(out: Path, counts: dict[str, int] | None = None) -> None:
    """Write OUT/train/CODE/NUMBER.png and OUT/val/CODE/NUMBER.png, `counts` images of each class; None for `COUNTS`."""
    rng = np.random.default_rng(0)
    for split, count in (counts or COUNTS).items():
        for character in CHARACTERS:
            folder = out / split / f"{ord(character):03d}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw(character, rng).convert("RGB").save(folder / f"{number:02d}.png")


def main() -> None:
    parser = command_line.parser(__doc__, out=None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_folder(folder)
    print(f"{folder}: {sum(COUNTS.values()) * len(CHARACTERS):,} images of {SIDE} x {SIDE} pixels, 94 classes")


if __name__ == "__main__":
    main()
