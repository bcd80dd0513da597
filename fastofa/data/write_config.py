"""The arguments of `fastofa write`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastofa.data.headers import Limits, parse_limits
from fastofa.system.errors import BadInput, at_least

FLAGS = {".pack": ("size",), ".beton": ("max_size", "quality", "raw")}  # flags that only one form accepts


@dataclass(frozen=True)
class WriteConfig:
    """Write both splits of a dataset as a .pack (pixels of one size) or as a .beton (FFCV's format)."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Dataset: a folder with train/ and val/, or any other form that --data accepts, but not a URL."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Output: NAME.pack, which is a folder, or NAME.beton, a file next to which NAME.val.beton and
    NAME.beton.safetensors are written."""
    size: int | None = None
    """.pack: side of the images in pixels, a multiple of 8 from 32 to 512; default 256. The whole image is resized to a
    square; crops from it have their original aspect ratio."""
    max_size: int | None = None
    """.beton: maximum length of the longer side in pixels; larger images are scaled down. Default: no maximum."""
    quality: int | None = None
    """.beton: compress every image at this JPEG quality, 1 to 100. By default, JPEGs that need no change are copied
    byte by byte, and other images are compressed at 95."""
    raw: bool = False
    """.beton: store pixels instead of JPEGs. They are larger but faster to read."""
    skip_corrupt: bool = False
    """Decode every file first, list the unreadable ones and skip them."""
    allow_warnings: bool = False
    """Accept images that decode with signs of damage, and use them as decoded."""
    max_pixels: float = 200
    """Maximum size of an image in millions of pixels, by its header; larger ones count as unreadable."""
    verify: bool = False
    """Compare every byte with the checksums and decode every image. If OUT exists, only verify it."""
    workers: int | None = None
    """Decoder threads; default: one per core, at most 16."""

    def __post_init__(self) -> None:
        if self.out.suffix not in FLAGS:
            raise BadInput(f"OUT: expected a name ending in {' or '.join(FLAGS)}, got {self.out}")
        (other,) = FLAGS.keys() - {self.out.suffix}
        for name in FLAGS[other]:
            if not (getattr(self, name) is None or getattr(self, name) is False):  # `in` would match 0, too
                raise BadInput(f"--{name.replace('_', '-')}: expected OUT{other}, got {self.out}")
        if self.size is not None and (self.size % 8 or not 32 <= self.size <= 512):
            raise BadInput(f"size: expected a multiple of 8 from 32 to 512, got {self.size}")
        self.limits()
        if self.max_size is not None and self.max_size < 1:
            raise BadInput(f"max-size: expected at least 1 pixel, got {self.max_size}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise BadInput(f"quality: expected 1 to 100, got {self.quality}")
        if self.quality is not None and self.raw:
            raise BadInput(f"quality: expected none with --raw, which does not compress pixels, got {self.quality}")
        at_least(self, 1, "workers")

    def limits(self) -> Limits:
        """The limits within which images are accepted."""
        return parse_limits(self.max_pixels, self.allow_warnings)
