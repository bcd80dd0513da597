"""Train from a .pack or .beton at a URL: it is downloaded once, into the user's cache folder, and opened there.

    fastofa train --data https://host/photos.pack ...

The copy is ~/.cache/fastofa/datasets/KEY/photos.pack (XDG_CACHE_HOME replaces ~/.cache). KEY is a hash of the URL and
of the index's checksum. The index contains a checksum of every image, so that a dataset that was written again is
downloaded again. KEY.partial becomes KEY when all its bytes have been compared with their checksums; an interrupted
download continues in it. The first process downloads; others wait for it.

A process uses the copies that it has opened until it ends. Beyond two, copies that no process uses are removed
(copies.py).
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

from fastofa.data.copies import folder_of_copies, keep, partial_of, remove_unused
from fastofa.data.quick_checks import check_url
from fastofa.data.written import files_of, index_path, verify
from fastofa.system.device import choose_workers
from fastofa.system.errors import BadInput
from fastofa.system.files import read_info, reason
from fastofa.system.locks import writing
from fastofa.system.progress import bytes_bar, notice
from fastofa.system.remote import PATIENCE, Patience, Remote, download, open_remote, persistently, recorded_info

COPY = "copy all its files there together"


def local_copy(url: str, patience: Patience = PATIENCE) -> Path:
    """The path of the local copy of a .pack or .beton that `fastofa write` wrote, which is downloaded if necessary.

    No fastofa removes the copy before this process ends; others may be removed.

    Raises:
        BadInput: the dataset is missing, damaged or of another form, it cannot be reached, or the disk lacks the space.
    """
    check_url(url)
    url = url.rstrip("/")
    above, _, name = url.rpartition("/")
    remote, index = open_remote(above, patience), str(index_path(Path(name)))
    where = f"{remote.url}/{index}"
    try:
        recorded = persistently(partial(recorded_info, remote, index), where, patience)
    except FileNotFoundError:
        raise BadInput(
            f"{url}: expected a dataset that `fastofa write` wrote, found no {where}; correct the URL or {COPY}"
        ) from None
    if recorded is None:
        raise BadInput(f"{where}: expected an index that `fastofa write` wrote, got another file; {COPY} again")
    checksum = recorded[1]
    folder = folder_of_copies() / sha256(f"{url} {checksum}".encode()).hexdigest()[:16]
    keep(folder)
    if not folder.exists():
        with writing(folder, wait=True):
            if not folder.exists():  # another process may have downloaded it meanwhile
                _fill(folder, url, name, checksum, remote, patience)
    return folder / name


def _fill(folder: Path, url: str, name: str, checksum: str, remote: Remote, patience: Patience) -> None:
    """Download and verify the dataset in KEY.partial, then rename that to `folder`."""
    unfinished = partial_of(folder)
    path = unfinished / name
    index = index_path(path)
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        _continue(remote, index, unfinished, patience)
        if read_info(index)[1] != checksum:
            raise BadInput(f"{url}: was replaced during the download; run the command again")
        path.mkdir(exist_ok=True) if path.suffix == ".pack" else path.touch()  # `read_index` expects it
        sizes = files_of(path)
        missing = _missing(sizes)
        total, left = sum(sizes.values()), sum(missing.values())
        _make_space(folder, url, left)
        notice(f"{url}: downloading {left:,} of {total:,} bytes to {folder / name}")
        with bytes_bar() as bar:
            task = bar.add_task(f"downloading {name}", total=total, completed=total - left)
            for file in missing:
                _continue(remote, file, unfinished, patience, lambda count: bar.advance(task, count))
    except OSError as error:
        raise BadInput(f"could not write {unfinished}: {reason(error)}") from None
    try:
        verify(path, choose_workers(None), decode=False)
    except BadInput as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise BadInput(str(error).replace(str(unfinished), remote.url)) from None
    os.replace(unfinished, folder)


def _missing(sizes: dict[Path, int]) -> dict[Path, int]:
    """The number of bytes that each incomplete file lacks. A file that is too long is removed."""
    missing = {}
    for file, size in sizes.items():
        have = file.stat().st_size if file.exists() else 0
        if have > size:
            file.unlink()
            have = 0
        if have < size:
            missing[file] = size - have
    return missing


def _make_space(folder: Path, url: str, needed: int) -> None:
    """Remove all other copies that are not in use if the disk lacks the space. Raises BadInput if it still does."""
    if shutil.disk_usage(folder.parent).free < needed:
        remove_unused(folder, 0)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise BadInput(
            f"{url}: expected {needed:,} bytes free in {folder.parent}, got {free:,}; free space or set XDG_CACHE_HOME "
            "to a folder on a larger disk"
        )


def _continue(
    remote: Remote,
    file: Path,
    folder: Path,
    patience: Patience,
    arrived: Callable[[int], None] = lambda _: None,
) -> None:
    """Download the bytes that a file in `folder` lacks."""
    name = str(file.relative_to(folder))
    try:
        with open(file, "ab") as out:
            download(remote, name, out, patience, arrived)
            os.fsync(out.fileno())
    except FileNotFoundError:
        raise BadInput(f"{remote.url}/{name}: expected a file of the dataset, found none; {COPY}") from None
