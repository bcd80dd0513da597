"""A folder of images: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.

Names, byte sizes, labels and a sample of the content come from the folder each time; the sizes of the images need every
file opened, so they are read once and kept in an index.
"""

import errno
import os
from pathlib import Path

import numpy as np

from fastofa.data.check_images import checked_size, header_size, in_parallel
from fastofa.data.content import DIGEST, digests, sample
from fastofa.data.dataset import Dataset, fingerprint_of
from fastofa.data.folder_index import Files, Known, index_paths, making, read_index, write_index
from fastofa.data.folder_listing import Listing, list_images, remedy
from fastofa.data.headers import DEFAULT, Limits
from fastofa.data.names import Names
from fastofa.system import torchrun
from fastofa.system.errors import BadInput, Reason, counted
from fastofa.system.progress import notice

NAMED = 5  # how many unreadable files an error names; all are named before it
BLOCK = 100_000  # files whose paths are held at a time
NOT_THE_FILES = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)  # errors that do not mean damage


def open_image_folder(
    spec: str, split: str, skip_corrupt: bool = False, check: bool = False, limits: Limits = DEFAULT
) -> Dataset:
    """See `fastofa.data.open.open_dataset`."""
    listing = list_images(Path(spec), split)
    if torchrun.is_main():
        for remark in listing.remarks:
            notice(remark)
    root, names, byte_sizes = Path(spec) / split, listing.names, listing.byte_sizes
    content, unreadable = _content(root, listing)
    files, paths = Files(names, byte_sizes, content), index_paths(Path(spec), split)
    check = check or skip_corrupt
    known, index = read_index(paths, files)
    known.limit(limits, skip_corrupt)
    bad: dict[int, str] = {}
    if len(_unknown(known, check)):
        with making(paths):
            known, index = read_index(paths, files, again=True)
            known.limit(limits, skip_corrupt)
            if len(_unknown(known, check)):
                bad = _look(root, names, known, unreadable, skip_corrupt, check)
                index = write_index(paths, files, known)
    if bad:
        _refuse(root, names, bad)
    if torchrun.is_main():
        for i, reason in known.skipped.items():
            notice(f"left out: {root / names[i]}: {reason}")
        if known.skipped:
            notice(f"{root}: left out {counted(len(known.skipped), 'unreadable image')}")

    skipped = np.array(sorted(known.skipped), dtype=np.int64)
    labels, sizes = listing.labels, known.sizes
    reasons = tuple(f"{names[i]}: {known.skipped[i]}" for i in skipped.tolist())
    if len(skipped):
        names, labels, sizes = names.without(skipped), np.delete(labels, skipped), np.delete(sizes, skipped, axis=0)
        byte_sizes = np.delete(byte_sizes, skipped)
        _check_classes(root, listing, labels)
        content, _ = _content(root, listing._replace(names=names, byte_sizes=byte_sizes, unreadable={}))
    return Dataset(
        spec=spec,
        split=split,
        classes=listing.classes,
        names=names,
        labels=labels,
        sizes=sizes,
        fingerprint=fingerprint_of(names, byte_sizes, labels, content),
        root=root,
        index=index,
        skipped=reasons,
        limits=known.limits or DEFAULT,
    )


def _content(root: Path, listing: Listing) -> tuple[np.ndarray, dict[int, str]]:
    """Digests uint8 [n, 16] of the sample, zeros where unreadable; and which files are not readable, and why."""
    places, unreadable = sample(len(listing.names)), dict(listing.unreadable)
    content = np.zeros((len(places), DIGEST), dtype=np.uint8)
    rows = [row for row, i in enumerate(places.tolist()) if i not in unreadable]
    wanted = ((f"{root}/{listing.names[i]}", int(listing.byte_sizes[i])) for i in places[rows].tolist())
    for row, found in zip(rows, digests(wanted), strict=True):
        if isinstance(found, bytes):
            content[row] = np.frombuffer(found, dtype=np.uint8)
        else:
            unreadable[int(places[row])] = Reason.of(found)
    _check_access(root, listing.names, unreadable)
    return content, unreadable


def _unknown(known: Known, check: bool) -> np.ndarray:
    """int64: places of the files that have to be opened."""
    unknown = (known.sizes[:, 0] == 0) | (~known.decoded if check else False)
    unknown[list(known.skipped)] = False
    return np.flatnonzero(unknown)


def _look(
    root: Path, names: Names, known: Known, unreadable: dict[int, str], skip_corrupt: bool, check: bool
) -> dict[int, str]:
    """Open the files of which the size is not known and note it; returns those that stand in the way, with reasons."""
    bad: dict[int, str] = {}

    def look(places: np.ndarray, decoded: bool, title: str) -> None:
        for begin in range(0, len(places), BLOCK):
            block = places[begin : begin + BLOCK].tolist()
            size_of = checked_size if decoded else header_size
            found = in_parallel(size_of, [root / names[i] for i in block], known.limits or DEFAULT, title)
            bad.update({i: size for i, size in zip(block, found, strict=True) if isinstance(size, str)})
            known.sizes[block] = [(0, 0) if isinstance(size, str) else size for size in found]
            known.decoded[block] |= [decoded and not isinstance(size, str) for size in found]

    unknown = _unknown(known, check)
    is_unreadable = np.isin(unknown, list(unreadable))
    bad.update({i: unreadable[i] for i in unknown[is_unreadable].tolist()})
    look(unknown[~is_unreadable], check, f"indexing {root}")
    _check_access(root, names, bad)
    if bad and not skip_corrupt:  # all are decoded, to name every one at once
        rest = ~known.decoded
        rest[[*bad, *known.skipped]] = False
        look(np.flatnonzero(rest), True, f"decoding {root}")
    if skip_corrupt:
        known.skipped |= bad
        return {}
    return bad


def _refuse(root: Path, names: Names, bad: dict[int, str]) -> None:
    raise BadInput(
        f"{counted(len(bad), 'unreadable image')}: {_named(root, names, bad)}; mend or remove such files, or give "
        "`fastofa precompute`, `fastofa write` or `fastofa train` --skip-corrupt, which names them and leaves them out"
    )


def _check_access(root: Path, names: Names, unreadable: dict[int, str]) -> None:
    """Raises BadInput for files that cannot be opened although nothing is known to be wrong with them."""
    for number in NOT_THE_FILES:
        closed = {i: reason for i, reason in unreadable.items() if getattr(reason, "errno", 0) == number}
        if closed:
            what = remedy(OSError(number, os.strerror(number)))
            raise BadInput(f"could not open {counted(len(closed), 'image')}: {_named(root, names, closed)}; {what}")


def _named(root: Path, names: Names, files: dict[int, str]) -> str:
    """A few of the files with the reasons; where there are more, each of them was named before."""
    lines = [f"{root / names[i]} ({files[i]})" for i in sorted(files)]
    if len(lines) > NAMED and torchrun.is_main():
        for line in lines:
            notice(f"unreadable: {line}")
    return "; ".join(lines[:NAMED]) + (f" and {len(lines) - NAMED} more" if len(lines) > NAMED else "")


def _check_classes(root: Path, listing: Listing, labels: np.ndarray) -> None:
    """Raises BadInput if a class has lost all of its images."""
    if not len(labels):
        files = counted(len(listing.names), "file")
        raise BadInput(f"{root}: expected images, but of {files} none is readable; mend some")
    if len(lost := np.setdiff1d(listing.labels, labels)):
        classes = [listing.classes[label] for label in lost[:NAMED].tolist()] + ["..."] * (len(lost) > NAMED)
        raise BadInput(
            f"{root}: all images of {counted(len(lost), 'class')} are unreadable ({', '.join(classes)}); mend some of "
            "each, or remove such folders"
        )
