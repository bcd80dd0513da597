"""Write a folder of JPEGs for trying the commands: scikit-learn's digits, enlarged, a folder per class.

python -m bench.digits_folder photos
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.io import write_jpeg

from bench.lib import command_line
from fastofa.data.open import open_dataset

SIDE = 64  # pixels
QUALITY = 95


def write_folder(out: Path) -> None:
    """Write OUT/train/CLASS/NAME.jpg and OUT/val/CLASS/NAME.jpg: 1,198 and 599 images."""
    for split in ("train", "val"):
        dataset = open_dataset("digits", split)
        assert dataset.pixels is not None
        pixels = torch.from_numpy(dataset.pixels).permute(0, 3, 1, 2)
        images = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        for name, label, image in zip(dataset.names, dataset.labels, images, strict=True):
            folder = out / split / dataset.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            write_jpeg(image, str(folder / f"{name}.jpg"), quality=QUALITY)


def main() -> None:
    parser = command_line.parser(__doc__, out=None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_folder(folder)
    print(f"{folder}: 1,797 JPEGs of {SIDE} x {SIDE} pixels, 10 classes")


if __name__ == "__main__":
    main()
