"""The table of a data set: labels, class names, image sizes, a fingerprint, and the pixels or where they lie."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastofa.data.beton import PAGE
from fastofa.data.decode import decode, read_image
from fastofa.data.headers import DEFAULT, Limits
from fastofa.data.names import Names
from fastofa.system.errors import BadInput

Split = Literal["train", "val"]
FORMS = (".pack", ".beton")  # what `fastofa write` writes
FFCV = (".beton", ".ffcv")  # what FFCV's own writer writes


@dataclass(frozen=True)
class Dataset:
    """One split. Samples are in one order everywhere: class, then name; a sample id is a position in it."""

    spec: str
    split: str
    classes: tuple[str, ...]
    names: Sequence[str]
    """Of each sample: the path below the split's folder, or the name inside the archive."""
    labels: np.ndarray
    """int64 [N]."""
    sizes: np.ndarray
    """int64 [N, 2]: height and width of the original picture in pixels, EXIF orientation applied."""
    fingerprint: str
    """sha256 over names, byte sizes, labels and a sample of the content (see fastofa.data.content) of the originals."""
    pixels: np.ndarray | None = None
    """uint8 [N, H, W, 3] when the whole data set is one array, of a pack one mapped from its file; else None."""
    root: Path | None = None
    """Folder that `names` are relative to."""
    index: Path | None = None
    """File that keeps sizes and the list of unreadable files."""
    skipped: tuple[str, ...] = ()
    """Files that were left out as unreadable, each with the reason."""
    file: Path | None = None
    """Which holds the pictures: a .beton, or the images.npy of a .pack."""
    stored: np.ndarray | None = None
    """int64 [N, 2]: height and width of the pictures in `file`."""
    spans: np.ndarray | None = None
    """int64 [N, 2]: where in `file` each picture begins, and its bytes."""
    is_raw: np.ndarray | None = None
    """bool [N]: which images of a .beton are pixels; the others are JPEGs."""
    shuffled: bool = True
    """Where the images in `file` do not lie in the order of samples, they lie in random order."""
    limits: Limits = DEFAULT
    """Which images are read."""

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, sample_id: int) -> Path:
        """Where the picture lies, for data sets made of files."""
        assert self.root is not None
        return self.root / self.names[sample_id]

    @property
    def stored_sizes(self) -> np.ndarray:
        """int64 [N, 2]: height and width of what `read` gives, which is what crops are cut from."""
        return self.sizes if self.stored is None else self.stored

    @property
    def raw(self) -> bool:
        """A .beton of pixels only."""
        return self.is_raw is not None and bool(self.is_raw.all())

    @property
    def pages(self) -> np.ndarray | None:
        """int64 [N]: the page of 8 MiB of `file` in which each picture begins, where a page is a random sample.

        None where images are files, or lie in the order of samples, class by class, or as FFCV's writer laid them.
        """
        if self.spans is None or not self.shuffled or (np.diff(self.spans[:, 0]) > 0).all():
            return None
        return self.spans[:, 0] // PAGE

    def read(self, sample_id: int, strict: bool = False) -> Tensor:
        """An image, uint8 [3, H, W], of an array a view. Raises BadInput, naming one that is damaged.

        Args:
            strict: see `fastofa.data.decode.read_image`.
        """
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[sample_id]).permute(2, 0, 1)
        if self.spans is None:
            image = read_image(self.path(sample_id), self.limits, strict)
            again = f"delete {self.index} to read the folder anew" if self.index else "start again"
            return self._checked(sample_id, image, f"as when the folder was read; {again}")
        return self.unpack(sample_id, bytearray(self.stored_bytes(sample_id)), strict)

    def stored_bytes(self, sample_id: int) -> bytes:
        """Of a picture's file, or of its part of `file`; of data sets made of either."""
        if self.spans is None:
            return self.path(sample_id).read_bytes()
        assert self.file is not None
        begin, count = self.spans[sample_id].tolist()
        with open(self.file, "rb") as file:
            file.seek(begin)
            return file.read(count)

    def unpack(self, sample_id: int, data: bytearray | np.ndarray, strict: bool = False) -> Tensor:
        """The same from a picture's bytes in a .beton; if they are pixels a view of them."""
        assert self.spans is not None
        if len(data) != self.spans[sample_id, 1]:
            raise BadInput(f"image {self.names[sample_id]} in {self.file} is cut short; write that again")
        if self.is_raw is not None and self.is_raw[sample_id]:
            height, width = self.stored_sizes[sample_id].tolist()
            return torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
        name = f"{self.names[sample_id]} in {self.file}"
        claim = replace(self.limits, max_pixels=int(self.stored_sizes[sample_id].prod()))  # more is damage
        return self._checked(
            sample_id, decode(data, name, claim, strict), f"as {self.file} says of it; write that again"
        )

    def _checked(self, sample_id: int, image: Tensor, remedy: str) -> Tensor:
        """Raises BadInput if it has not the size that is known of it."""
        height, width = self.stored_sizes[sample_id].tolist()
        if list(image.shape[1:]) != [height, width]:
            raise BadInput(
                f"image {self.names[sample_id]} is {image.shape[1]} x {image.shape[2]} pixels, expected {height} x "
                f"{width} {remedy}"
            )
        return image


def from_array(
    spec: str, split: str, classes: tuple[str, ...], names: list[str], labels: np.ndarray, pixels: np.ndarray
) -> Dataset:
    """A data set held as one array, brought into the one order (class, then name)."""
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    names = [names[i] for i in order]
    labels = np.asarray(labels, dtype=np.int64)[order]
    pixels = np.ascontiguousarray(pixels[order])
    sizes = np.tile(np.array(pixels.shape[1:3], dtype=np.int64), (len(names), 1))
    fingerprint = fingerprint_of(names, np.full(len(names), pixels[0].nbytes), labels, pixels)
    return Dataset(spec, split, classes, names, labels, sizes, fingerprint, pixels)


def fingerprint_of(names: Sequence[str], byte_sizes: np.ndarray, labels: np.ndarray, content: np.ndarray) -> str:
    """sha256 over names, byte sizes, labels and content in sample order; `content` is uint8, of any shape."""
    digest = hashlib.sha256(Names.of(names).text)
    digest.update(np.asarray(byte_sizes, dtype="<i8").tobytes())
    digest.update(np.asarray(labels, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(content, dtype=np.uint8).data)
    return digest.hexdigest()
