"""The arguments of `fastofa write`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastofa.data.headers import Limits, given_limits
from fastofa.system.errors import BadInput, at_least

FLAGS = {".pack": ("size",), ".beton": ("max_size", "quality", "raw")}  # of `write`, by the form that takes them


@dataclass(frozen=True)
class WriteConfig:
    """Write a data set as a .pack (pixels of one size) or as a .beton (FFCV's format), both splits."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Data set: a folder with train/ and val/, or any other that --data takes."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Where to: NAME.pack, a folder, or NAME.beton, with NAME.val.beton and NAME.beton.safetensors
    beside it."""
    size: int | None = None
    """.pack: side in pixels, a multiple of 8 from 32 to 512, by default 256. The whole picture is squeezed to a square;
    its crops have their shape again."""
    max_size: int | None = None
    """.beton: the longer side in pixels at most; larger pictures are made smaller. By default all stay as they are."""
    quality: int | None = None
    """.beton: compress every picture at this JPEG quality, 1 to 100. By default JPEGs keep their bytes where nothing is
    to change; others get 95."""
    raw: bool = False
    """.beton: pixels instead of JPEGs: larger, and faster to read."""
    skip_corrupt: bool = False
    """Decode every file first, list the unreadable ones and leave them out for good."""
    allow_warnings: bool = False
    """Take images that decode with signs of damage, too, as they decode."""
    max_pixels: float = 200
    """Millions of pixels of an image at most, by its header; larger ones are unreadable."""
    verify: bool = False
    """Compare every byte with the checksums and decode every picture; where OUT is there already, write nothing."""
    workers: int | None = None
    """Threads that decode; by default one per core, at most 16."""

    def __post_init__(self) -> None:
        if self.out.suffix not in FLAGS:
            raise BadInput(f"OUT: expected a name ending in {' or '.join(FLAGS)}, got {self.out}")
        (other,) = FLAGS.keys() - {self.out.suffix}
        for name in FLAGS[other]:
            if not (getattr(self, name) is None or getattr(self, name) is False):  # 0 was given
                raise BadInput(f"--{name.replace('_', '-')}: expected OUT{other}, got {self.out}")
        if self.size is not None and (self.size % 8 or not 32 <= self.size <= 512):
            raise BadInput(f"size: expected a multiple of 8 from 32 to 512, got {self.size}")
        self.limits()
        if self.max_size is not None and self.max_size < 1:
            raise BadInput(f"max-size: expected at least 1 pixel, got {self.max_size}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise BadInput(f"quality: expected 1 to 100, got {self.quality}")
        if self.quality is not None and self.raw:
            raise BadInput(f"quality: expected none with --raw, whose pixels are not compressed, got {self.quality}")
        at_least(self, 1, "workers")

    def limits(self) -> Limits:
        """Which images are taken."""
        return given_limits(self.max_pixels, self.allow_warnings)
