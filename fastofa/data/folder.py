"""Open a folder of images: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.

Names, byte sizes, labels and a sample of the content are read from the folder each time. Reading image sizes requires
opening every file, so they are read once and kept in an index.
"""

import errno
import os
from pathlib import Path

import numpy as np

from fastofa.data.check_images import checked_size, header_size, in_parallel
from fastofa.data.content import DIGEST, digests, sample
from fastofa.data.dataset import Dataset, fingerprint_of
from fastofa.data.folder_index import Files, Known, index_lock, index_paths, read_index, write_index
from fastofa.data.folder_listing import Listing, list_images, remedy
from fastofa.data.headers import DEFAULT, Limits
from fastofa.data.names import Names
from fastofa.system import torchrun
from fastofa.system.errors import BadInput, Reason, counted
from fastofa.system.progress import notice

MAX_NAMED = 5  # unreadable files that an error names; notices before it name all of them
BLOCK = 100_000  # files whose paths are in memory at a time
ACCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)  # none of these means that a file is damaged


def open_image_folder(
    spec: str, split: str, skip_corrupt: bool = False, check: bool = False, limits: Limits = DEFAULT
) -> Dataset:
    """See `fastofa.data.open.open_dataset`."""
    listing = list_images(Path(spec), split)
    if torchrun.is_main():
        for text in listing.notices:
            notice(text)
    root, names, byte_sizes = Path(spec) / split, listing.names, listing.byte_sizes
    content, unreadable = _content(root, listing)
    files, paths = Files(names, byte_sizes, content), index_paths(Path(spec), split)
    check = check or skip_corrupt
    known, index = read_index(paths, files)
    known.limit(limits, skip_corrupt)
    bad: dict[int, str] = {}
    if len(_unknown(known, check)):
        with index_lock(paths):
            known, index = read_index(paths, files, again=True)
            known.limit(limits, skip_corrupt)
            if len(_unknown(known, check)):
                bad = _open_unknown(root, names, known, unreadable, skip_corrupt, check)
                index = write_index(paths, files, known)
    if bad:
        _refuse(root, names, bad)
    if torchrun.is_main():
        for i, reason in known.skipped.items():
            notice(f"skipped: {root / names[i]}: {reason}")
        if known.skipped:
            notice(f"{root}: skipped {counted(len(known.skipped), 'unreadable image')}")

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
    """Digests of the sampled files, uint8 [n, 16] (zeros where unreadable), and the unreadable files with reasons."""
    sampled, unreadable = sample(len(listing.names)), dict(listing.unreadable)
    content = np.zeros((len(sampled), DIGEST), dtype=np.uint8)
    readable = [n for n, i in enumerate(sampled.tolist()) if i not in unreadable]
    files = ((f"{root}/{listing.names[i]}", int(listing.byte_sizes[i])) for i in sampled[readable].tolist())
    for n, result in zip(readable, digests(files), strict=True):
        if isinstance(result, bytes):
            content[n] = np.frombuffer(result, dtype=np.uint8)
        else:
            unreadable[int(sampled[n])] = Reason.of(result)
    _check_access(root, listing.names, unreadable)
    return content, unreadable


def _unknown(known: Known, check: bool) -> np.ndarray:
    """int64: indices of the files that must be opened; with `check`, of those that were not decoded yet."""
    unknown = (known.sizes[:, 0] == 0) | (~known.decoded if check else False)
    unknown[list(known.skipped)] = False
    return np.flatnonzero(unknown)


def _open_unknown(
    root: Path, names: Names, known: Known, unreadable: dict[int, str], skip_corrupt: bool, check: bool
) -> dict[int, str]:
    """Open the files of unknown size and record their sizes in `known`.

    Returns:
        The unreadable files with reasons; none with `skip_corrupt`, which records them in `known.skipped`.
    """
    bad: dict[int, str] = {}

    def read_sizes(indices: np.ndarray, decoded: bool, title: str) -> None:
        for begin in range(0, len(indices), BLOCK):
            block = indices[begin : begin + BLOCK].tolist()
            size_of = checked_size if decoded else header_size
            sizes = in_parallel(size_of, [root / names[i] for i in block], known.limits or DEFAULT, title)
            bad.update({i: size for i, size in zip(block, sizes, strict=True) if isinstance(size, str)})
            known.sizes[block] = [(0, 0) if isinstance(size, str) else size for size in sizes]
            known.decoded[block] |= [decoded and not isinstance(size, str) for size in sizes]

    unknown = _unknown(known, check)
    is_unreadable = np.isin(unknown, list(unreadable))
    bad.update({i: unreadable[i] for i in unknown[is_unreadable].tolist()})
    read_sizes(unknown[~is_unreadable], check, f"indexing {root}")
    _check_access(root, names, bad)
    if bad and not skip_corrupt:  # decode all, so that the error names every unreadable file
        rest = ~known.decoded
        rest[[*bad, *known.skipped]] = False
        read_sizes(np.flatnonzero(rest), True, f"decoding {root}")
    if skip_corrupt:
        known.skipped |= bad
        return {}
    return bad


def _refuse(root: Path, names: Names, bad: dict[int, str]) -> None:
    raise BadInput(
        f"{counted(len(bad), 'unreadable image')}: {_name_files(root, names, bad)}; repair or remove such files, or "
        "give `fastofa precompute`, `fastofa write` or `fastofa train` --skip-corrupt, which lists and skips them"
    )


def _check_access(root: Path, names: Names, unreadable: dict[int, str]) -> None:
    """Raises BadInput for files that may be whole but cannot be opened."""
    for number in ACCESS_ERRORS:
        closed = {i: reason for i, reason in unreadable.items() if getattr(reason, "errno", 0) == number}
        if closed:
            advice = remedy(OSError(number, os.strerror(number)))
            files = _name_files(root, names, closed)
            raise BadInput(f"could not open {counted(len(closed), 'image')}: {files}; {advice}")


def _name_files(root: Path, names: Names, files: dict[int, str]) -> str:
    """The first files with reasons, for an error; if there are more, notices name all of them first."""
    lines = [f"{root / names[i]} ({files[i]})" for i in sorted(files)]
    if len(lines) > MAX_NAMED and torchrun.is_main():
        for line in lines:
            notice(f"unreadable: {line}")
    return "; ".join(lines[:MAX_NAMED]) + (f" and {len(lines) - MAX_NAMED} more" if len(lines) > MAX_NAMED else "")


def _check_classes(root: Path, listing: Listing, labels: np.ndarray) -> None:
    """Raises BadInput if all images of a class were skipped."""
    if not len(labels):
        files = counted(len(listing.names), "file")
        raise BadInput(f"{root}: expected images, got {files} of which none is readable; repair some")
    if len(lost := np.setdiff1d(listing.labels, labels)):
        classes = [listing.classes[label] for label in lost[:MAX_NAMED].tolist()] + ["..."] * (len(lost) > MAX_NAMED)
        raise BadInput(
            f"{root}: all images of {counted(len(lost), 'class')} are unreadable ({', '.join(classes)}); repair some "
            "of each, or remove such folders"
        )
