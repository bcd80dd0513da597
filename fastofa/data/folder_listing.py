"""List the images of a split's folder and their classes, by file names and types only.

    DIR/train/CLASS/*.jpg       also in subfolders of CLASS

Links to folders and files are followed. Other entries are counted by kind and reported, never skipped silently. Some of
them are opened to find images with the wrong suffix.
"""

import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastofa.data.decode import SUFFIXES, check_still, read_file
from fastofa.data.headers import kind_of
from fastofa.data.names import Names
from fastofa.data.quick_checks import no_split
from fastofa.system.errors import BadInput, Reason, counted
from fastofa.system.threads import in_order

MAX_NAMED = 5  # examples that an error names
EXAMPLES = 2  # examples of each kind that a notice names
MAX_OPENED = 300  # files with other suffixes that are opened
START, GIF_START = 12, 1 << 20  # bytes that show whether a file is an image, and whether a GIF has one frame
THREADS = 16  # they wait for a disk or a network more than they compute
SPLITS = ("train", "val")

# Names that operating systems, file managers and editors leave behind; never a class or an image.
LEFTOVERS = {
    "__macosx", "network trash folder", "temporary items", "icon\r",  # macOS
    "$recycle.bin", "recycler", "recycled", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "lost+found", "lost.dir", "aquota.user", "aquota.group",  # file systems
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",  # network storage
    "__pycache__",
}  # fmt: skip
BACKUP = re.compile(r".*~|~\$.*|#.*#|.*\.(bak|orig|tmp|swp)", re.IGNORECASE | re.DOTALL)

_SPECIAL = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_LINKS = {errno.ENOENT: "a broken link", errno.ELOOP: "a circular link"}
HIDDEN, LEFTOVER, OUTSIDE = "hidden", "of the system or an editor", "outside the class folders"
LOOP, BROKEN = "linked to a folder that contains it or is already listed", "linked to a missing target"


class Listing(NamedTuple):
    classes: tuple[str, ...]
    """The classes of the training split, whichever split is listed."""
    names: Names
    """Paths relative to the split's folder in the order of sample ids: class, then name."""
    labels: np.ndarray
    """int64 [N]."""
    byte_sizes: np.ndarray
    """int64 [N], 0 for entries that are not regular files."""
    unreadable: dict[int, str]
    """Indices of broken links, FIFOs and the like, which must not be opened, with reasons."""
    notices: list[str]
    """One-line messages for the user."""


class _Skipped(NamedTuple):
    kind: str
    name: str
    other_suffix: bool = False
    """A regular file, skipped only because of its suffix."""


class _Class(NamedTuple):
    """The contents of one class folder."""

    text: bytes
    byte_sizes: list[int]
    unreadable: dict[int, str]
    skipped: list[_Skipped]
    nested: list[str]
    """Images in subfolders."""


def list_images(top: Path, split: str) -> Listing:
    """List one split of the dataset in folder `top`.

    Raises:
        BadInput: the folder is missing or not readable, has no class or an unknown one, or a class has no images.
    """
    root = top / split
    if not is_folder(root):
        raise no_split(top, split)
    classes, skipped = _class_folders(top, root)
    train = classes
    if split != "train" and is_folder(top / "train"):
        train = _class_folders(top, top / "train")[0]
    if extra := sorted(classes.keys() - train.keys()):
        more = f" and {len(extra) - MAX_NAMED} more" if len(extra) > MAX_NAMED else ""
        raise BadInput(
            f"{root}: expected the classes of {top / 'train'}, found {counted(len(extra), 'other')}: "
            f"{', '.join(extra[:MAX_NAMED])}{more}; rename or remove such folders, or add training images for them"
        )

    listed, labels, done = [], [], 0
    unreadable: dict[int, str] = {}
    first_with = {identity: name for name, identity in reversed(classes.items())}
    excluded = _parent_folders(*(top / split for split in SPLITS)) | first_with.keys()
    labelled = [(label, name) for label, name in enumerate(train) if name in classes]
    for (label, _), contents in zip(
        labelled, in_order(lambda item: _list_class(root, item[1], excluded), labelled, THREADS), strict=True
    ):
        listed.append(contents)
        labels.append(np.full(len(contents.byte_sizes), label, dtype=np.int64))
        unreadable |= {done + i: reason for i, reason in contents.unreadable.items()}
        done += len(contents.byte_sizes)
    if not done:
        raise BadInput(
            f"{root}: expected a folder per class with images ({', '.join(SUFFIXES)}), found no image"
            + (f" but {_by_kind(skipped)}" if skipped else "")
        )
    notices = []
    if skipped := skipped + [entry for contents in listed for entry in contents.skipped]:
        notices.append(_skipped_notice(root, skipped))
    if nested := [name for contents in listed for name in contents.nested]:
        folder = nested[0].partition("/")[0]
        notices.append(
            f"{root}: found {counted(len(nested), 'image')} in subfolders of the class folders, such as {nested[0]}, "
            f"which gets the class {folder}"
        )
    for name, identity in classes.items():
        if (other := first_with[identity]) != name:
            notices.append(f"{root}: {name} is the same folder as {other}; its images are in both classes")
    return Listing(
        classes=tuple(train),
        names=Names(b"".join(contents.text for contents in listed)),
        labels=np.concatenate(labels),
        byte_sizes=np.array([size for contents in listed for size in contents.byte_sizes], dtype=np.int64),
        unreadable=unreadable,
        notices=notices,
    )


def list_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The images in a folder and in all its subfolders, sorted by path; and notices on what was skipped.

    Raises:
        BadInput: no image, a folder that is not readable, a name that is not UTF-8.
    """
    contents = _list_class(folder, ".", _parent_folders(folder))
    skipped = [entry._replace(name=entry.name.removeprefix("./")) for entry in contents.skipped]
    return [folder / name for name in Names(contents.text)], [_skipped_notice(folder, skipped)] if skipped else []


def is_folder(path: Path) -> bool:
    """Whether it is a folder. Raises BadInput if a parent folder is not readable, or links are circular."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        return False
    except OSError as error:
        raise BadInput(f"could not open {path}: {error.strerror}; give this user access or another path") from None


def _class_folders(top: Path, root: Path) -> tuple[dict[str, tuple[int, int]], list[_Skipped]]:
    """Class names in order, with the device and inode of each folder; and the other entries of a split's folder."""
    classes, skipped, parents = {}, [], _parent_folders(*(top / split for split in SPLITS))
    for entry in _entries(str(root)):
        if kind := _leftover(entry.name):
            skipped.append(_Skipped(kind, entry.name))
            continue
        try:
            status = entry.stat()
        except OSError as error:
            if entry.is_symlink() and entry.name.lower().endswith(SUFFIXES):
                skipped.append(_Skipped(OUTSIDE, entry.name))
                continue
            raise BadInput(
                f"{entry.path}: expected a class folder, got {_why(entry, error)}; {remedy(error)}"
            ) from None
        if not stat.S_ISDIR(status.st_mode):
            skipped.append(_Skipped(OUTSIDE, entry.name))
        elif (identity := (status.st_dev, status.st_ino)) in parents:
            skipped.append(_Skipped(LOOP, entry.name))
        else:
            classes[entry.name] = identity
    return dict(sorted(classes.items())), skipped


def _parent_folders(*roots: Path) -> set[tuple[int, int]]:
    """Device and inode of these folders and of all folders above them; no link makes them part of a class."""
    parents = set()
    for root in roots:
        for path in (root, *root.absolute().parents, *Path(os.path.realpath(root)).parents):
            try:
                status = os.stat(path)
            except OSError:
                continue
            parents.add((status.st_dev, status.st_ino))
    return parents


def _list_class(root: Path, name: str, excluded: set[tuple[int, int]]) -> _Class:
    """List one class folder and its subfolders. No folder is entered twice, so that circular links end.

    Args:
        root: the split's folder.
        name: the class.
        excluded: device and inode of folders that are never entered.

    Raises:
        BadInput: there is no image, a folder is not readable, or a name is not UTF-8.
    """
    images: list[tuple[str, int, str | None]] = []  # path, bytes, why it is unreadable
    skipped: list[_Skipped] = []
    folders, entered = [name], set(excluded)
    while folders:
        folder = folders.pop()
        for entry in _entries(str(root / folder)):
            path = f"{folder}/{entry.name}"
            is_image = entry.name.lower().endswith(SUFFIXES)
            if kind := _leftover(entry.name):
                skipped.append(_Skipped(kind, path))
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if is_image:
                    images.append((path, 0, _why(entry, error)))
                else:
                    skipped.append(_Skipped(BROKEN if entry.is_symlink() else _why(entry, error), path))
                continue
            if stat.S_ISDIR(status.st_mode):
                if (identity := (status.st_dev, status.st_ino)) in entered:
                    skipped.append(_Skipped(LOOP, path))
                else:
                    entered.add(identity)
                    folders.append(path)
            elif not is_image:
                suffix = os.path.splitext(entry.name)[1].lower() or "without suffix"
                skipped.append(_Skipped(suffix, path, stat.S_ISREG(status.st_mode)))
            elif stat.S_ISREG(status.st_mode):
                images.append((path, status.st_size, None))
            else:
                images.append((path, 0, f"{_SPECIAL.get(stat.S_IFMT(status.st_mode), 'a special file')}, not a file"))
    if not images:
        raise BadInput(
            f"{root / name}: expected images ({', '.join(SUFFIXES)}), found none"
            + (f" but {_by_kind(skipped)}" if skipped else "")
            + (_misnamed(root, skipped) or "; add some, or remove the folder")
        )
    images.sort()
    try:
        text = "".join(f"{path}\0" for path, _, _ in images).encode()
    except UnicodeEncodeError:
        path = next(path for path, _, _ in images if not _is_utf8(path))
        raise BadInput(f"{root}: expected names in UTF-8, got {path!r}; rename it") from None
    return _Class(
        text=text,
        byte_sizes=[size for _, size, _ in images],
        unreadable={i: reason for i, (_, _, reason) in enumerate(images) if reason is not None},
        skipped=skipped,
        nested=[path for path, _, _ in images if path.count("/") > 1],
    )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Sorted by name with links last, so that every copy of the dataset enters a folder by the same path."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise BadInput(f"could not list {folder}: {error.strerror}; {remedy(error)}") from None


def _leftover(name: str) -> str | None:
    """The kind of leftover that the name of a file or folder indicates, if any."""
    if name.startswith("."):
        return HIDDEN
    return LEFTOVER if name.lower() in LEFTOVERS or BACKUP.fullmatch(name) else None


def _why(entry: os.DirEntry[str], error: OSError) -> str:
    """Why the status of an entry cannot be read."""
    if entry.is_symlink() and error.errno in _LINKS:
        return _LINKS[error.errno]
    return Reason.of(error)


def remedy(error: OSError) -> str:
    """Advice for a folder or file that cannot be opened."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit on open files (`ulimit -n 4096`) and run the command again"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "make it readable for this user (`chmod a+rX`) or remove it"
    return "repair or remove it"


def _skipped_notice(root: Path, skipped: list[_Skipped]) -> str:
    """One line on the files and folders that are not part of the dataset."""
    entries = "1 file or folder" if len(skipped) == 1 else f"{len(skipped):,} files and folders"
    return (
        f"{root}: skipped {entries}: {_by_kind(skipped)}; images end in {', '.join(SUFFIXES)}{_misnamed(root, skipped)}"
    )


def _by_kind(skipped: list[_Skipped]) -> str:
    """Counts and examples of each kind, the most frequent first."""
    kinds: dict[str, list[str]] = {}
    for entry in skipped:
        kinds.setdefault(entry.kind, []).append(entry.name)
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(sorted(names)[:EXAMPLES])}{', ...' if len(names) > EXAMPLES else ''})"
        for kind, names in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    )


def _misnamed(root: Path, skipped: list[_Skipped]) -> str:
    """How many files with other suffixes are images by content, and what to do about it; "" if there are none."""
    files = [entry.name for entry in skipped if entry.other_suffix]
    opened = files[:: -(-len(files) // MAX_OPENED)] if files else []
    images = [name for name in opened if _is_image(root / name)]
    if not images:
        return ""
    of = "those files" if opened == files else f"{len(opened)} of those files that were opened"
    examples = f"{', '.join(sorted(images)[:EXAMPLES])}{', ...' if len(images) > EXAMPLES else ''}"
    what, them = ("is an image", "it") if len(images) == 1 else ("are images", "such files")
    return f"; {len(images)} of {of} {what} by content ({examples}): rename {them} to end in one of these suffixes"


def _is_image(path: Path) -> bool:
    """Whether the file's content is an image that would be accepted with another name."""
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
