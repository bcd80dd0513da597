"""The table of a dataset: labels, class names, image sizes, a fingerprint, and the pixels or their location."""

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
    """One split of N samples. Every form has the same order, by class, then name; a sample id is an index into it."""

    spec: str
    split: str
    classes: tuple[str, ...]
    names: Sequence[str]
    """For each sample, its path relative to the split's folder, or its name in the archive."""
    labels: np.ndarray
    """int64 [N]."""
    sizes: np.ndarray
    """int64 [N, 2]: height and width of the original image in pixels, after EXIF orientation."""
    fingerprint: str
    """sha256 of the originals' names, byte sizes, labels and a sample of their content (see fastofa.data.content)."""
    pixels: np.ndarray | None = None
    """uint8 [N, H, W, 3] if the whole dataset is one array (a pack's is memory-mapped); else None."""
    root: Path | None = None
    """The folder to which `names` are relative."""
    index: Path | None = None
    """The file that caches image sizes and the list of unreadable files."""
    skipped: tuple[str, ...] = ()
    """Unreadable files that were skipped, each with the reason."""
    file: Path | None = None
    """The file that contains the images: a .beton, or the images.npy of a .pack."""
    stored: np.ndarray | None = None
    """int64 [N, 2]: height and width of the images in `file`."""
    spans: np.ndarray | None = None
    """int64 [N, 2]: byte offset of each image in `file`, and its length in bytes."""
    is_raw: np.ndarray | None = None
    """bool [N]: which images of a .beton are stored as pixels; the others are JPEGs."""
    shuffled: bool = True
    """Whether `file` stores its images in random order; irrelevant if it stores them in order of sample ids."""
    limits: Limits = DEFAULT
    """The limits within which images are accepted."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def samples_fingerprint(self) -> str:
        """sha256 of the samples' names and labels, which remains when the images are compressed or resized again."""
        return fingerprint_of(self.names, np.zeros(0), self.labels, np.zeros(0))

    def path(self, sample_id: int) -> Path:
        """The image's file, for datasets made of image files."""
        assert self.root is not None
        return self.root / self.names[sample_id]

    @property
    def stored_sizes(self) -> np.ndarray:
        """int64 [N, 2]: height and width of the images that `read` returns, from which crops are cut."""
        return self.sizes if self.stored is None else self.stored

    @property
    def raw(self) -> bool:
        """Whether the dataset is a .beton that stores only pixels, no JPEGs."""
        return self.is_raw is not None and bool(self.is_raw.all())

    @property
    def page_ids(self) -> np.ndarray | None:
        """int64 [N]: the 8 MiB page of `file` in which each image begins, if each page is a random set of samples.

        None if images are separate files, are stored in order of sample ids (class by class), or FFCV wrote the file.
        """
        if self.spans is None or not self.shuffled or (np.diff(self.spans[:, 0]) > 0).all():
            return None
        return self.spans[:, 0] // PAGE

    def read(self, sample_id: int, strict: bool = False) -> Tensor:
        """An image, uint8 [3, H, W]; if the dataset is an array, a view of it.

        Args:
            sample_id: index of the image.
            strict: see `fastofa.data.decode.read_image`.

        Raises:
            BadInput: the image is damaged; the message names it.
        """
        if self.pixels is not None:
            return torch.from_numpy(self.pixels[sample_id]).permute(2, 0, 1)
        if self.spans is None:
            image = read_image(self.path(sample_id), self.limits, strict)
            remedy = f"delete {self.index} to index the folder again" if self.index else "run the command again"
            return self._checked(sample_id, image, "when the folder was indexed", remedy)
        return self.unpack(sample_id, bytearray(self.stored_bytes(sample_id)), strict)

    def stored_bytes(self, sample_id: int) -> bytes:
        """The bytes of an image's own file, or of its span of `file`."""
        if self.spans is None:
            return self.path(sample_id).read_bytes()
        assert self.file is not None
        begin, count = self.spans[sample_id].tolist()
        with open(self.file, "rb") as file:
            file.seek(begin)
            return file.read(count)

    def unpack(self, sample_id: int, data: bytearray | np.ndarray, strict: bool = False) -> Tensor:
        """Same as `read`, from an image's bytes in a .beton; if they are pixels, the result is a view of them."""
        assert self.spans is not None
        if len(data) != self.spans[sample_id, 1]:
            raise BadInput(
                f"image {self.names[sample_id]} in {self.file}: expected {self.spans[sample_id, 1]:,} bytes, got "
                f"{len(data):,}; write that file again"
            )
        if self.is_raw is not None and self.is_raw[sample_id]:
            height, width = self.stored_sizes[sample_id].tolist()
            return torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
        name = f"{self.names[sample_id]} in {self.file}"
        limits = replace(self.limits, max_pixels=int(self.stored_sizes[sample_id].prod()))  # a larger image is damaged
        image = decode(data, name, limits, strict)
        return self._checked(sample_id, image, f"in the table of {self.file}", "write that file again")

    def _checked(self, sample_id: int, image: Tensor, recorded: str, remedy: str) -> Tensor:
        """The image itself. Raises BadInput if its size differs from the one that was `recorded`."""
        height, width = self.stored_sizes[sample_id].tolist()
        if list(image.shape[1:]) != [height, width]:
            raise BadInput(
                f"image {self.names[sample_id]}: expected {height} x {width} pixels, its size {recorded}, got "
                f"{image.shape[1]} x {image.shape[2]}; {remedy}"
            )
        return image


def from_array(
    spec: str, split: str, classes: tuple[str, ...], names: list[str], labels: np.ndarray, pixels: np.ndarray
) -> Dataset:
    """A dataset from arrays of N samples, sorted by class, then name.

    Args:
        spec: the name by which the user opened it.
        split: "train" or "val".
        classes: class names.
        names: the name of each sample.
        labels: integers [N].
        pixels: uint8 [N, H, W, 3].
    """
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    names = [names[i] for i in order]
    labels = np.asarray(labels, dtype=np.int64)[order]
    pixels = np.ascontiguousarray(pixels[order])
    sizes = np.tile(np.array(pixels.shape[1:3], dtype=np.int64), (len(names), 1))
    fingerprint = fingerprint_of(names, np.full(len(names), pixels[0].nbytes), labels, pixels)
    return Dataset(spec, split, classes, names, labels, sizes, fingerprint, pixels)


def fingerprint_of(names: Sequence[str], byte_sizes: np.ndarray, labels: np.ndarray, content: np.ndarray) -> str:
    """sha256 of N names, byte sizes [N], labels [N] and content (uint8 of any shape), in order of sample ids."""
    digest = hashlib.sha256(Names.of(names).text)
    digest.update(np.asarray(byte_sizes, dtype="<i8").tobytes())
    digest.update(np.asarray(labels, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(content, dtype=np.uint8).data)
    return digest.hexdigest()
