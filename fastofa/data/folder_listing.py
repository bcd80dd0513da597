"""Which files of a split's folder are images, and of which class: by names and kinds only.

    DIR/train/CLASS/*.jpg       and in folders below CLASS

Links to folders and files are followed. What is not taken is counted by kind and reported, never dropped in silence;
some of it is opened, to tell of images that have other names.
"""

import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastofa.data.decode import SUFFIXES, check_still, read_file
from fastofa.data.early import no_split
from fastofa.data.headers import kind_of
from fastofa.data.names import Names
from fastofa.system.errors import BadInput, Reason, counted
from fastofa.system.threads import in_order

NAMED = 5  # how many examples an error names
EXAMPLES = 2  # how many a remark names of each kind
OPENED = 300  # how many files with other suffixes are looked into
START, GIF_START = 12, 1 << 20  # bytes that say whether it is an image; and whether a GIF has one frame
THREADS = 16  # they wait for a disk or a network more than they compute
SPLITS = ("train", "val")

# What systems, file managers and editors leave behind; never a class, never an image.
LEFTOVERS = {
    "__macosx", "network trash folder", "temporary items", "icon\r",  # macOS
    "$recycle.bin", "recycler", "recycled", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "lost+found", "lost.dir", "aquota.user", "aquota.group",  # file systems
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",  # network storage
    "__pycache__",
}  # fmt: skip
BACKUP = re.compile(r".*~|~\$.*|#.*#|.*\.(bak|orig|tmp|swp)", re.IGNORECASE | re.DOTALL)

_SPECIAL = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_LINKS = {errno.ENOENT: "a link that leads nowhere", errno.ELOOP: "a link that leads in a circle"}
HIDDEN, LEFTOVER, OUTSIDE = "hidden", "of the system or an editor", "outside the class folders"
LOOP, BROKEN = "leading back to a folder that lies above or is taken already", "leading nowhere"


class Listing(NamedTuple):
    classes: tuple[str, ...]
    """Of the training split, whichever split is listed."""
    names: Names
    """Paths below the split's folder in sample order: class, then name."""
    labels: np.ndarray
    """int64 [N]."""
    byte_sizes: np.ndarray
    """int64 [N], 0 for what is no file."""
    unreadable: dict[int, str]
    """Why, by place in the order: links that lead nowhere, FIFOs and the like, which must not be opened."""
    remarks: list[str]
    """What a person should know."""


class _Left(NamedTuple):
    kind: str
    name: str
    other_file: bool = False
    """A file left out for nothing but its suffix."""


class _Class(NamedTuple):
    """What one class folder holds."""

    text: bytes
    byte_sizes: list[int]
    unreadable: dict[int, str]
    left: list[_Left]
    nested: list[str]
    """Images in folders below."""


def list_images(top: Path, split: str) -> Listing:
    """Raises BadInput: no such folder, one that may not be read, no classes, a class without images, unknown ones."""
    root = top / split
    if not is_folder(root):
        raise no_split(top, split)
    classes, left = _class_folders(top, root)
    train = classes
    if split != "train" and is_folder(top / "train"):
        train = _class_folders(top, top / "train")[0]
    if extra := sorted(classes.keys() - train.keys()):
        more = f" and {len(extra) - NAMED} more" if len(extra) > NAMED else ""
        raise BadInput(
            f"{root}: expected the classes of {top / 'train'}, found {counted(len(extra), 'other')}: "
            f"{', '.join(extra[:NAMED])}{more}; rename or remove such folders, or give them training images"
        )

    listed, labels, done = [], [], 0
    unreadable: dict[int, str] = {}
    taken = {identity: name for name, identity in reversed(classes.items())}
    above = _folders_above(top) | taken.keys()
    here = [(label, name) for label, name in enumerate(train) if name in classes]
    for (label, _), found in zip(
        here, in_order(lambda item: _list_class(root, item[1], above), here, THREADS), strict=True
    ):
        listed.append(found)
        labels.append(np.full(len(found.byte_sizes), label, dtype=np.int64))
        unreadable |= {done + i: reason for i, reason in found.unreadable.items()}
        done += len(found.byte_sizes)
    if not done:
        raise BadInput(
            f"{root}: expected a folder per class with images ({', '.join(SUFFIXES)}), found no image"
            + (f"; there are {_by_kind(left)}" if left else "")
        )
    remarks = []
    if left := left + [one for found in listed for one in found.left]:
        kinds = ", ".join(SUFFIXES)
        what = "1 file or folder" if len(left) == 1 else f"{len(left):,} files and folders"
        remarks.append(f"{root}: left out {what}: {_by_kind(left)}; images end in {kinds}{_misnamed(root, left)}")
    if nested := [name for found in listed for name in found.nested]:
        folder = nested[0].partition("/")[0]
        remarks.append(
            f"{root}: folders below the class folders hold {counted(len(nested), 'image')}, such as {nested[0]}, which "
            f"counts as {folder}"
        )
    for name, identity in classes.items():
        if taken[identity] != name:
            remarks.append(f"{root}: {name} is the same folder as {taken[identity]}; its images count for both classes")
    return Listing(
        classes=tuple(train),
        names=Names(b"".join(found.text for found in listed)),
        labels=np.concatenate(labels),
        byte_sizes=np.array([size for found in listed for size in found.byte_sizes], dtype=np.int64),
        unreadable=unreadable,
        remarks=remarks,
    )


def is_folder(path: Path) -> bool:
    """Raises BadInput where that cannot be known: a folder above it may not be read, links lead in a circle."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        return False
    except OSError as error:
        raise BadInput(f"could not open {path}: {error.strerror}; give this user access or another path") from None


def _class_folders(top: Path, root: Path) -> tuple[dict[str, tuple[int, int]], list[_Left]]:
    """Class names in order, with the identity of each folder; and what else lies in a split's folder."""
    classes, left, above = {}, [], _folders_above(top)
    for entry in _entries(str(root)):
        if kind := _leftover(entry.name):
            left.append(_Left(kind, entry.name))
            continue
        try:
            status = entry.stat()
        except OSError as error:
            if entry.is_symlink() and entry.name.lower().endswith(SUFFIXES):
                left.append(_Left(OUTSIDE, entry.name))
                continue
            raise BadInput(
                f"{entry.path}: expected a class folder, got {_why(entry, error)}; {remedy(error)}"
            ) from None
        if not stat.S_ISDIR(status.st_mode):
            left.append(_Left(OUTSIDE, entry.name))
        elif (identity := (status.st_dev, status.st_ino)) in above:
            left.append(_Left(LOOP, entry.name))
        else:
            classes[entry.name] = identity
    return dict(sorted(classes.items())), left


def _folders_above(top: Path) -> set[tuple[int, int]]:
    """Identities of the splits' folders and of all folders that hold them: no part of a class, by whatever link."""
    above = set()
    for root in (top / split for split in SPLITS):
        for path in (root, *root.absolute().parents, *Path(os.path.realpath(root)).parents):
            try:
                status = os.stat(path)
            except OSError:
                continue
            above.add((status.st_dev, status.st_ino))
    return above


def _list_class(root: Path, name: str, above: set[tuple[int, int]]) -> _Class:
    """Raises BadInput: no image, a folder that may not be read, a name that is not UTF-8.

    Args:
        above: folders that are never entered; nor is any folder twice, so links that lead in circles come to an end.
    """
    found: list[tuple[str, int, str | None]] = []  # name, bytes, why it cannot be read
    left: list[_Left] = []
    folders, entered = [name], set(above)
    while folders:
        folder = folders.pop()
        for entry in _entries(str(root / folder)):
            path = f"{folder}/{entry.name}"
            image = entry.name.lower().endswith(SUFFIXES)
            if kind := _leftover(entry.name):
                left.append(_Left(kind, path))
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if image:
                    found.append((path, 0, _why(entry, error)))
                else:
                    left.append(_Left(BROKEN if entry.is_symlink() else _why(entry, error), path))
                continue
            if stat.S_ISDIR(status.st_mode):
                if (identity := (status.st_dev, status.st_ino)) in entered:
                    left.append(_Left(LOOP, path))
                else:
                    entered.add(identity)
                    folders.append(path)
            elif not image:
                suffix = os.path.splitext(entry.name)[1].lower() or "without suffix"
                left.append(_Left(suffix, path, stat.S_ISREG(status.st_mode)))
            elif stat.S_ISREG(status.st_mode):
                found.append((path, status.st_size, None))
            else:
                found.append((path, 0, f"{_SPECIAL.get(stat.S_IFMT(status.st_mode), 'a special file')}, not a file"))
    if not found:
        raise BadInput(
            f"{root / name}: expected images ({', '.join(SUFFIXES)}), found none"
            + (f" but {_by_kind(left)}" if left else "")
            + (_misnamed(root, left) or "; add some, or remove the folder")
        )
    found.sort()
    try:
        text = "".join(f"{path}\0" for path, _, _ in found).encode()
    except UnicodeEncodeError:
        path = next(path for path, _, _ in found if not _is_utf8(path))
        raise BadInput(f"{root}: expected names in UTF-8, got {path!r}; rename it") from None
    return _Class(
        text=text,
        byte_sizes=[size for _, size, _ in found],
        unreadable={i: reason for i, (_, _, reason) in enumerate(found) if reason is not None},
        left=left,
        nested=[path for path, _, _ in found if path.count("/") > 1],
    )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """By name, links last: of two ways into a folder the one without a link is taken, in every copy the same."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise BadInput(f"could not list {folder}: {error.strerror}; {remedy(error)}") from None


def _leftover(name: str) -> str | None:
    """What kind of leftover a name says the file or folder is, if any."""
    if name.startswith("."):
        return HIDDEN
    return LEFTOVER if name.lower() in LEFTOVERS or BACKUP.fullmatch(name) else None


def _why(entry: os.DirEntry[str], error: OSError) -> str:
    """What an entry is that leads to nothing that can be looked at."""
    if entry.is_symlink() and error.errno in _LINKS:
        return _LINKS[error.errno]
    return Reason.of(error)


def remedy(error: OSError) -> str:
    """What to do about a folder or file that cannot be opened."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit on open files (`ulimit -n 4096`) and start again"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "let this user read it (`chmod a+rX`) or remove it"
    return "mend or remove it"


def _by_kind(left: list[_Left]) -> str:
    """By kind, the most frequent first, with examples."""
    kinds: dict[str, list[str]] = {}
    for one in left:
        kinds.setdefault(one.kind, []).append(one.name)
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(sorted(names)[:EXAMPLES])}{', ...' if len(names) > EXAMPLES else ''})"
        for kind, names in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    )


def _misnamed(root: Path, left: list[_Left]) -> str:
    """How many of the files with other suffixes are images nevertheless, and what to do; empty if there are none."""
    files = [one.name for one in left if one.other_file]
    opened = files[:: -(-len(files) // OPENED)] if files else []
    found = [name for name in opened if _is_image(root / name)]
    if not found:
        return ""
    of = "those files" if opened == files else f"{len(opened)} of those files that were opened"
    examples = f"{', '.join(sorted(found)[:EXAMPLES])}{', ...' if len(found) > EXAMPLES else ''}"
    what, them = ("is an image", "it") if len(found) == 1 else ("are images", "such files")
    return f"; {len(found)} of {of} {what} by content ({examples}): rename {them} to end so"


def _is_image(path: Path) -> bool:
    """By its content: one that would be read if it had another name."""
    try:
        kind = kind_of(read_file(path, START))
        if kind == "GIF":
            check_still(read_file(path, GIF_START))
    except (OSError, ValueError):
        return False
    return kind is not None


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
