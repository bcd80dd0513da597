"""The index of an image folder: what opening every image once showed, so that the next opening need not.

DIR/.fastofa/SPLIT.safetensors, or below the user's cache folder where DIR cannot be written. It is a convenience: where
it cannot be read it is made again, where it cannot be kept the images are opened each time.

Of 14 million made-up names it has 642 MB. Once they are listed, the folder is opened in 12 s, in 2.9 GB at most (the
listing has 0.7 of them, Python with its libraries 0.7); in 63 s and 4.5 GB where a thousandth of the files were removed
since. That was on two cores of a machine with five times as much to do.
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
    """By which an index recognises N files."""

    names: Names
    byte_sizes: np.ndarray
    """int64 [N]."""
    content: np.ndarray
    """uint8 [n, 16]: digests of those that `content.sample` names."""


@dataclass
class Known:
    """What is known of N files."""

    sizes: np.ndarray
    """int64 [N, 2]: height and width, 0 where unknown."""
    decoded: np.ndarray
    """bool [N]: all of the image was decoded, not only its header."""
    skipped: dict[int, str]
    """By place: unreadable files that --skip-corrupt leaves out, and why."""
    limits: Limits | None = None
    """Within which that is so; None where nothing is known."""

    @classmethod
    def nothing(cls, count: int) -> "Known":
        return cls(np.zeros((count, 2), dtype=np.int64), np.zeros(count, dtype=bool), {})

    def limit(self, limits: Limits, skip_corrupt: bool) -> None:
        """Forget what is otherwise within these. What one command was told to take, later ones take as well, unless
        they are to leave out again what is unreadable."""
        before = self.limits or limits
        if not skip_corrupt:
            most, allow = max(limits.max_pixels, before.max_pixels), limits.allow_warnings or before.allow_warnings
            limits = Limits(most, allow)
        elif limits != before:
            self.skipped, self.decoded[:] = {}, False
        self.limits = limits


def index_paths(top: Path, split: str) -> list[Path]:
    """Where the index may be, the best place first."""
    beside = top / ".fastofa"
    key = hashlib.sha256(os.path.realpath(os.fsencode(top))).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [beside, Path(cache) / "fastofa" / key]
    if not os.access(beside if beside.is_dir() else top, os.W_OK):
        places.reverse()
    # Without a home the second place is unknown. Through a planted link somebody's own file would be overwritten.
    return [place / f"{split}.safetensors" for place in places if not (place.is_symlink() or str(place)[0] == "~")]


def read_index(paths: list[Path], files: Files, again: bool = False) -> tuple[Known, Path | None]:
    """What the first whole index says of these files, and where it is; a damaged one is reported, but not `again`."""
    for path in paths:
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise BadInput(f"{path}: expected an index of images, got what is no file")
            there, known = _load(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = f"could not read {path}: {error.strerror}"
        except RecursionError:
            problem = f"{path}: expected an index of images, got JSON of too many levels"
        except BadInput as error:
            problem = str(error)
        else:
            return _recognise(files, there, known), path
        if not again:
            notice(f"{problem}; reading the folder anew")
    return Known.nothing(len(files.names)), None


def write_index(paths: list[Path], files: Files, known: Known) -> Path | None:
    """The first place that took it. None if none did, which is reported."""
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
    refused = []
    for path in paths:
        try:
            save_tensors(path, tensors, {})
            return path
        except BadInput as error:
            refused.append(str(error))
    why = refused[0] if refused else "no place for an index"
    notice(f"the sizes of the images cannot be kept and are read again each time: {why}")
    return None


@contextmanager
def making(paths: list[Path]) -> Iterator[None]:
    """One process at a time makes an index; the others wait here, however long, and then find it made.

    By a lock that ends with its holder. Where no place or file system offers one, each process makes its own index.
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
                notice(f"another process is making the index of these images; waiting for it ({paths[0].parent})")
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
    """Raises BadInput for whatever is not an index."""
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
        most, allow = columns["limits"].tolist()
        left = dict(zip(skipped.tolist(), reasons, strict=True))
        known = Known(sizes.astype(np.int64), columns["decoded"], left, Limits(most, bool(allow)))
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: expected an index of images, got another safetensors file") from None
    return Files(names, columns["byte_sizes"], columns["content"]), known


def _recognise(files: Files, there: Files, known: Known) -> Known:
    """Of these files, what is known of those that are still the same by name, size and content."""
    if files.names == there.names and all(map(np.array_equal, files[1:], there[1:])):
        return known
    found = Known.nothing(len(files.names))
    place = files.names.places_in(there.names)
    here = np.flatnonzero(place >= 0)
    here = here[there.byte_sizes[place[here]] == files.byte_sizes[here]]
    mine, theirs = _rows(len(files.names))[here], _rows(len(there.names))[place[here]]
    both = np.flatnonzero((mine >= 0) & (theirs >= 0))
    changed = (files.content[mine[both]] != there.content[theirs[both]]).any(axis=1)
    here = np.delete(here, both[changed])
    found.sizes[here] = known.sizes[place[here]]
    found.decoded[here] = known.decoded[place[here]]
    found.limits = known.limits
    if known.skipped:
        back = np.full(len(there.names), -1)
        back[place[here]] = here
        found.skipped = {int(back[i]): reason for i, reason in known.skipped.items() if back[i] >= 0}
    return found


def _rows(count: int) -> np.ndarray:
    """int64 [N]: the row in `Files.content` of each file, -1 of those outside the sample."""
    rows = np.full(count, -1)
    rows[sample(count)] = np.arange(len(sample(count)))
    return rows
