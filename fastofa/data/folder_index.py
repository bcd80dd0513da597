"""The index of an image folder: a cache of image sizes, so that the images need to be opened only once.

It is DIR/.fastofa/SPLIT.safetensors, or a file in the user's cache folder if DIR is not writable. An index that cannot
be read is rebuilt; if it cannot be written, the images are opened each time.

For 14 million synthetic names it takes 642 MB. After the files are listed, the folder opens in 12 s with a peak of
2.9 GB of memory (0.7 GB of it the listing, 0.7 GB Python and its libraries), or in 63 s and 4.5 GB if a thousandth of
the files have been removed since. Measured on two cores of a machine with five times as many busy processes.
"""

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastofa.data.content import DIGEST, sample
from fastofa.data.headers import DEFAULT, Limits
from fastofa.data.names import Names
from fastofa.system import torchrun
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from fastofa.system.progress import notice


class Files(NamedTuple):
    """The properties by which an index recognises N files."""

    names: Names
    byte_sizes: np.ndarray
    """int64 [N]."""
    content: np.ndarray
    """uint8 [n, 16]: digests of the files that `content.sample` selects."""


@dataclass
class Known:
    """What is known about N files."""

    sizes: np.ndarray
    """int64 [N, 2]: height and width, 0 where unknown."""
    decoded: np.ndarray
    """bool [N]: the whole image was decoded, not only its header read."""
    skipped: dict[int, str]
    """Indices of the unreadable files that --skip-corrupt skips, with reasons."""
    limits: Limits | None = None
    """The limits that were applied; None if nothing is known."""

    @classmethod
    def nothing(cls, count: int) -> "Known":
        return cls(np.zeros((count, 2), dtype=np.int64), np.zeros(count, dtype=bool), {})

    def limit(self, limits: Limits, skip_corrupt: bool) -> None:
        """Apply the limits of a command, and forget what no longer holds within them.

        Images that an earlier command was allowed to accept stay accepted. With `skip_corrupt`, exactly `limits` apply:
        if they changed, all images have to be decoded again.
        """
        before = self.limits or limits
        if not skip_corrupt:
            limits = limits.union(before)
        elif limits != before:
            self.skipped, self.decoded[:] = {}, False
        self.limits = limits


def index_paths(top: Path, split: str) -> list[Path]:
    """The paths at which the index may be, the preferred one first."""
    beside = top / ".fastofa"
    key = hashlib.sha256(os.path.realpath(os.fsencode(top))).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [beside, Path(cache) / "fastofa" / key]
    if not os.access(beside if beside.is_dir() else top, os.W_OK):
        places.reverse()
    # Left out: the second path without a home folder ("~"), and links, which could lead to another of the user's files.
    return [place / f"{split}.safetensors" for place in places if not (place.is_symlink() or str(place)[0] == "~")]


def read_index(paths: list[Path], files: Files, again: bool = False) -> tuple[Known, Path | None]:
    """What the first intact index contains about these files, and its path (None if there is none).

    A damaged index is reported, unless this is the second attempt (`again`).
    """
    for path in paths:
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise BadInput(f"{path}: expected an index of images, got a folder, link or device")
            indexed, known = _load(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = f"could not read {path}: {error.strerror}"
        except RecursionError:
            problem = f"{path}: expected an index of images, got JSON nested too deeply"
        except BadInput as error:
            problem = str(error)
        else:
            return _recognise(files, indexed, known), path
        if not again:
            notice(f"{problem}; indexing the folder again")
    return Known.nothing(len(files.names)), None


def write_index(paths: list[Path], files: Files, known: Known) -> Path | None:
    """Write the index to the first path that is writable and return that path; report it if there is none."""
    skipped = sorted(known.skipped)
    reasons = "".join(known.skipped[i].replace("\0", " ") + "\0" for i in skipped).encode(errors="replace")
    tensors = {
        "names": torch.tensor(np.frombuffer(files.names.text, dtype=np.uint8)),
        "byte_sizes": torch.from_numpy(files.byte_sizes),
        "content": torch.from_numpy(files.content),
        "sizes": torch.from_numpy(known.sizes.astype(np.int32)),
        "decoded": torch.from_numpy(known.decoded),
        "skipped": torch.tensor(skipped, dtype=torch.int64),
        "reasons": torch.tensor(np.frombuffer(reasons, dtype=np.uint8)),
        "limits": torch.tensor(astuple(known.limits or DEFAULT)),
    }
    errors = []
    for path in paths:
        try:
            save_tensors(path, tensors, {})
            return path
        except BadInput as error:
            errors.append(str(error))
    reason = errors[0] if errors else "no folder for an index"
    notice(f"could not write the index of the images, so every image is opened each time: {reason}")
    return None


@contextmanager
def index_lock(paths: list[Path]) -> Iterator[None]:
    """Let one process at a time build an index; the others wait for it without a time limit, and then read it.

    The lock is released when its holder ends. If no file system offers one, each process builds its own index.
    """
    file = _open_lock(paths)
    if file is None:
        yield
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if torchrun.is_main():
                notice(f"another process is indexing these images; waiting for its index in {paths[0].parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(file)


def _open_lock(paths: list[Path]) -> int | None:
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(path.with_name(".lock"), flags, 0o666)
        except OSError:
            continue
    return None


def _load(path: Path) -> tuple[Files, Known]:
    """Raises BadInput for a file that is not an index."""
    tensors, _ = load_tensors(path)
    try:
        columns = {name: tensor.numpy() for name, tensor in tensors.items()}
        names, reasons = (Names(columns[name].tobytes()) for name in ("names", "reasons"))
        count, skipped, sizes = len(names), columns["skipped"], columns["sizes"]
        expected = {
            "names": ("uint8", (len(names.text),)), "byte_sizes": ("int64", (count,)),
            "content": ("uint8", (len(sample(count)), DIGEST)), "sizes": ("int32", (count, 2)),
            "decoded": ("bool", (count,)), "skipped": ("int64", (len(reasons),)),
            "reasons": ("uint8", (len(reasons.text),)), "limits": ("int64", (2,)),
        }  # fmt: skip
        if {name: (str(column.dtype), column.shape) for name, column in columns.items()} != expected:
            raise ValueError
        if (sizes < 0).any() or (skipped < 0).any() or (skipped >= count).any():
            raise ValueError
        max_pixels, allow_warnings = columns["limits"].tolist()
        with_reasons = dict(zip(skipped.tolist(), reasons, strict=True))
        limits = Limits(max_pixels, bool(allow_warnings))
        known = Known(sizes.astype(np.int64), columns["decoded"], with_reasons, limits)
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: expected an index of images, got another safetensors file") from None
    return Files(names, columns["byte_sizes"], columns["content"]), known


def _recognise(files: Files, indexed: Files, known: Known) -> Known:
    """What is known about `files`, from what is known about the `indexed` ones with the same name, size and content."""
    if files.names == indexed.names and all(map(np.array_equal, files[1:], indexed[1:])):
        return known
    result = Known.nothing(len(files.names))
    place = files.names.places_in(indexed.names)
    same = np.flatnonzero(place >= 0)
    same = same[indexed.byte_sizes[place[same]] == files.byte_sizes[same]]
    row, indexed_row = _content_rows(len(files.names))[same], _content_rows(len(indexed.names))[place[same]]
    comparable = np.flatnonzero((row >= 0) & (indexed_row >= 0))
    changed = (files.content[row[comparable]] != indexed.content[indexed_row[comparable]]).any(axis=1)
    same = np.delete(same, comparable[changed])
    result.sizes[same] = known.sizes[place[same]]
    result.decoded[same] = known.decoded[place[same]]
    result.limits = known.limits
    if known.skipped:
        inverse = np.full(len(indexed.names), -1)
        inverse[place[same]] = same
        result.skipped = {int(inverse[i]): reason for i, reason in known.skipped.items() if inverse[i] >= 0}
    return result


def _content_rows(count: int) -> np.ndarray:
    """int64 [N]: each file's row in `Files.content`, -1 for files outside the sample."""
    rows = np.full(count, -1)
    rows[sample(count)] = np.arange(len(sample(count)))
    return rows
