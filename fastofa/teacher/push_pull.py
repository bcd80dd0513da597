"""Copy a teacher cache to and from a URL: an object store, a web server, or any other place that fsspec opens.

    fastofa cache push cache s3://bucket/cache
    fastofa cache pull https://host/cache cache

A cache at a URL has the same files under the same names. At either end, a file appears complete or not at all, and
complete files are skipped, so that an interrupted copy continues when it is repeated (fastofa.system.remote).
"""

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput
from fastofa.system.files import filling, load_tensors, read_info, reason, temporary_name
from fastofa.system.progress import notice, track
from fastofa.system.remote import (
    PATIENCE,
    Patience,
    Remote,
    Store,
    Web,
    download,
    open_remote,
    persistently,
    recorded_info,
)
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import CLASSIFIER, VAL, check_origin, view_file, views_in
from fastofa.teacher.cache_header import HEADER, check_same, check_vacant, read_header, united, write_header
from fastofa.teacher.fidelity import FIDELITY
from fastofa.teacher.reference_images import SEEN

REPORTS = (SEEN, FIDELITY)  # files that a cache may lack, and that have no checksum


def pull(url: str, out: Path, patience: Patience = PATIENCE) -> TeacherCache:
    """Copy a cache, or the views of it that are missing in `out`, from a URL.

    Args:
        url: folder that contains the files of a cache, or of a part of one.
        out: folder of the cache on this machine.
        patience: how long to try.

    Raises:
        BadInput: there is no cache, it is damaged, `out` contains another cache, or the URL cannot be reached.
    """
    remote = open_remote(url, patience)
    check_vacant(out)
    theirs = remote_header(remote, patience)
    if theirs is None:
        raise BadInput(f"{url}: expected a teacher cache, but found no {HEADER} there; correct the URL")
    with filling(out):
        header = theirs
        if (out / HEADER).exists():
            header = read_header(out)
            check_same(out, header, url, theirs)
            header = united(header, theirs)
        write_header(out, header)
        others = [VAL, *REPORTS, *([CLASSIFIER] if "features" in header else [])]
        views = [view for view in range(header["views"]) if not _is_complete(out, header, view)]
        for name in others:
            if name in REPORTS and not (out / name).exists():
                fetch(remote, name, out / name, patience)
            elif name not in REPORTS and not _is_complete(out, header, name):
                fetch(remote, name, out / name, patience, header, name)
        images = header["num_samples"]
        for view in track(views, len(views) * images, f"pulling {url}", lambda _: images):
            fetch(remote, view_file(view), out / view_file(view), patience, header, view)
    return TeacherCache.open(out, part=True)


def push(path: Path, url: str, patience: Patience = PATIENCE) -> TeacherCache:
    """Copy a cache, or the views of it that are missing there, to a URL. Every file is verified first.

    Raises:
        BadInput: the cache is damaged; the URL is read-only or cannot be reached; or there is another cache at the URL,
            or one with other predictions for one of the views.
    """
    cache, remote = TeacherCache.open(path, part=True), open_remote(url, patience)
    if isinstance(remote, Web):
        raise BadInput(f"{url}: expected a URL that can be written, got a web server, which can only be pulled from")
    theirs = remote_header(remote, patience)
    if theirs is not None:
        check_same(path, cache.header, url, theirs)
    images = cache.num_samples
    views = views_in(path, cache.header)
    tables: list[int | str] = [*views, VAL, *([CLASSIFIER] if cache.pooled_dim else [])]
    for table in track(tables, len(views) * images, f"pushing to {url}", lambda t: images * isinstance(t, int)):
        name = view_file(table) if isinstance(table, int) else table
        if not _is_there(remote, name, path / name, patience):
            _, info = load_tensors(path / name)
            check_origin(path / name, info, cache.header, table)
            persistently(partial(remote.write, name, path / name), f"{url}/{name}", patience)
    for report in REPORTS:
        where = f"{url}/{report}"
        if (path / report).exists() and persistently(partial(remote.size, report), where, patience) is None:
            persistently(partial(remote.write, report, path / report), where, patience)
    header = cache.header if theirs is None else united(theirs, cache.header)
    if header != theirs:  # last, so that a cache there is complete
        with tempfile.TemporaryDirectory() as folder:
            write_header(Path(folder), header)
            persistently(lambda: remote.write(HEADER, Path(folder, HEADER)), f"{url}/{HEADER}", patience)
    return cache


def remote_header(remote: Remote, patience: Patience) -> dict[str, Any] | None:
    """The header of the cache at a URL; None if there is none. Raises BadInput if it is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        if not fetch(remote, HEADER, Path(folder, HEADER), patience):
            return None
        try:
            return read_header(Path(folder))
        except BadInput as error:
            raise BadInput(str(error).replace(folder, remote.url)) from None


def fetch(
    remote: Remote,
    name: str,
    target: Path,
    patience: Patience,
    header: dict[str, Any] | None = None,
    table: int | str = "",
) -> bool:
    """Download a file. It appears complete, and verified if it is a table of the cache with this header.

    Returns:
        Whether it exists at the URL.

    Raises:
        BadInput: it cannot be downloaded or written, or is damaged even when it is downloaded again.
    """
    temporary, where = temporary_name(target), f"{remote.url}/{name}"
    try:
        for again in (True, False):
            try:
                with open(temporary, "wb") as file:
                    download(remote, name, file, patience)
                    os.fsync(file.fileno())
                if header is not None:
                    _, info = load_tensors(temporary)
                    check_origin(temporary, info, header, table)
                os.replace(temporary, target)
                return True
            except FileNotFoundError:
                return False
            except OSError as error:
                raise BadInput(f"could not write {target}: {reason(error)}") from None
            except BadInput as error:
                if str(temporary) not in str(error):
                    raise
                wrong = str(error).replace(str(temporary), where)
                if not again:
                    raise BadInput(wrong) from None
                notice(f"{wrong.partition(';')[0]}; downloading it once more")
    finally:
        temporary.unlink(missing_ok=True)
    raise AssertionError


def _is_complete(path: Path, header: dict[str, Any], table: int | str) -> bool:
    """Whether a table exists here and is complete. Raises BadInput if it belongs to another cache."""
    file = path / (view_file(table) if isinstance(table, int) else table)
    if not file.is_file():
        return False
    try:
        info, _ = read_info(file)
    except BadInput:
        return False  # truncated
    check_origin(file, info, header, table)
    return True


def _is_there(remote: Store, name: str, source: Path, patience: Patience) -> bool:
    """Whether the file exists at the URL with the same size and checksum. Raises BadInput if it has another checksum,
    except for the validation predictions."""
    where = f"{remote.url}/{name}"
    size = persistently(lambda: remote.size(name), where, patience)
    if size is None:
        return False
    recorded = persistently(lambda: recorded_info(remote, name), where, patience)
    if recorded is None:
        return False
    if recorded != read_info(source) and name == VAL:
        notice(f"{where}: differs from {source}, and is kept")  # as when parts are merged
        return True
    if recorded != read_info(source):
        raise BadInput(
            f"{where}: expected the predictions of {source}, got others (another machine may round differently); "
            "remove one of the two files"
        )
    return size == source.stat().st_size
