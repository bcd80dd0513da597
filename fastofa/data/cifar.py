"""Read CIFAR-100 from its published python archive without trusting its pickles."""

import gzip
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastofa.data.dataset import Dataset, from_array
from fastofa.data.decode import read_file
from fastofa.system.errors import BadInput

ARCHIVE, FOLDER = "cifar-100-python.tar.gz", "cifar-100-python"
MAX_BYTES = 1 << 30  # unpacked; CIFAR-100 takes 186 MB
PLAIN = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, lists, dicts and numpy arrays; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"its pickle refers to {module}.{name}")
        return super().find_class(module, name)


def open_cifar100(spec: str, split: str, folder: Path) -> Dataset:
    """See `fastofa.data.open.open_dataset`. Raises BadInput if the archive is missing, damaged or not CIFAR-100."""
    meta = _load(folder, "meta")
    data = _load(folder, "train" if split == "train" else "test")
    try:
        classes = tuple(meta["fine_label_names"])
        names, labels = data["filenames"], np.asarray(data["fine_labels"], dtype=np.int64)
        if not all(isinstance(name, str) for name in (*classes, *names)):
            raise TypeError("names of type str")
        pixels = np.asarray(data["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder}: expected CIFAR-100's python archive, got one without {error}; download it again"
        ) from None
    if not len(names) == len(labels) == len(pixels) > 0 or not 0 <= labels.min() <= labels.max() < len(classes):
        raise BadInput(
            f"{folder}: expected one name, label and image per sample in CIFAR-100's archive, got "
            f"{len(names)} names, {len(labels)} labels and {len(pixels)} images, or labels out of range; "
            "download it again"
        )
    return from_array(spec, split, classes, list(names), labels, pixels)


def _load(folder: Path, member: str) -> dict[str, Any]:
    try:
        if (folder / FOLDER / member).exists():
            data = bytes(read_file(folder / FOLDER / member))
        elif (folder / member).exists():
            data = bytes(read_file(folder / member))
        else:
            with gzip.open(io.BytesIO(read_file(folder / ARCHIVE))) as whole:
                unpacked = whole.read(MAX_BYTES)  # to the end, so that gzip compares the checksum
                if whole.read(1):
                    raise OSError(0, f"more than {MAX_BYTES:,} bytes")
            with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
                file = archive.extractfile(f"{FOLDER}/{member}")
                assert file is not None
                data = file.read()
    except (OSError, KeyError, AssertionError, tarfile.TarError, EOFError, zlib.error) as error:
        raise BadInput(
            f"cifar100:{folder}: expected {ARCHIVE} or the folder {FOLDER} it unpacks to, with {member}; got {error}"
        ) from None
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise BadInput(
            f"cifar100:{folder}: expected {member} as published, got another file ({error}); download it again"
        ) from None
