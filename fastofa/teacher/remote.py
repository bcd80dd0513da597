"""Copy a teacher cache to and from a URL: an object store, a web server, or any other place that fsspec opens.

    fastofa cache push cache s3://bucket/cache
    fastofa cache pull https://host/cache cache

A cache at a URL is the same files under the same names. Every file appears complete or not at all, there and here, and
complete ones are skipped, so that an interrupted copy continues when it is repeated. Errors of the network are retried,
from the byte that arrived last, with growing pauses.

http and https use Python's own client, and are read-only. Other schemes need fsspec's adapter for them, such as s3fs.
"""

import json
import os
import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import fsspec

from fastofa.system.errors import BadInput, counted
from fastofa.system.files import filling, load_tensors, read_info, reason, temporary_name
from fastofa.system.progress import notice, track
from fastofa.teacher.cache import CLASSIFIER, VAL, TeacherCache, check_origin, view_file, views_in
from fastofa.teacher.cache_header import HEADER, check_same, check_vacant, read_header, united, write_header
from fastofa.teacher.fidelity import FIDELITY
from fastofa.teacher.reference_images import SEEN

REPORTS = (SEEN, FIDELITY)  # files that a cache may lack, and that have no checksum
BLOCK = 1 << 20  # bytes per read
LONGEST_HEADER = 100 << 20  # bytes of a safetensors file's header
T = TypeVar("T")
Blocks: TypeAlias = Generator[bytes, None, None]


@dataclass(frozen=True)
class Patience:
    """How long to try."""

    attempts: int = 6
    """Attempts without a new byte, after which an operation fails."""
    wait_s: float = 1
    """Pause after the first failure; it doubles with each further one."""
    timeout_s: float = 30
    """http and https: time without a new byte, after which an attempt fails. Adapters have their own."""


PATIENCE = Patience()


@dataclass(frozen=True)
class Web:
    """A folder on a web server."""

    url: str
    patience: Patience

    def stream(self, name: str, start: int = 0) -> Blocks:
        """The bytes of a file from `start` on. Raises FileNotFoundError, or another OSError if the server fails."""
        request = urllib.request.Request(f"{self.url}/{name}", headers={"Range": f"bytes={start}-"} if start else {})
        try:
            response = urllib.request.urlopen(request, timeout=self.patience.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(f"{self.url}/{name}") from None
            if error.code < 500 and error.code not in (408, 429):
                raise PermissionError(f"HTTP {error.code} {error.reason}") from None
            raise ConnectionError(f"HTTP {error.code} {error.reason}") from None
        with response:
            skipped = 0 if response.status == 206 else start  # a server may ignore the range
            length = response.headers.get("Content-Length")
            size = None if length is None else start - skipped + int(length)
            yield from _complete(response.read1, start - skipped, start, size)


@dataclass(frozen=True)
class Store:
    """A folder in a file system that fsspec opens."""

    url: str
    files: Any
    """The file system, an fsspec.AbstractFileSystem."""
    path: str
    """The folder in it."""

    def stream(self, name: str, start: int = 0) -> Blocks:
        """The bytes of a file from `start` on. Raises FileNotFoundError, or another exception if the store fails."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{name}")
        with self.files.open(f"{self.path}/{name}", "rb") as file:
            file.seek(start)
            yield from _complete(file.read, start, start, size)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        self.files.invalidate_cache()
        try:
            return self.files.size(f"{self.path}/{name}")
        except FileNotFoundError:
            return None

    def write(self, name: str, source: Path) -> None:
        """Upload a file under a temporary name, and rename it when it is complete."""
        temporary = f"{self.path}/.{name}.{secrets.token_hex(4)}.tmp"
        self.files.makedirs(self.path, exist_ok=True)
        try:
            self.files.put_file(str(source), temporary)
            if (written := self.files.size(temporary)) != source.stat().st_size:
                raise ConnectionError(f"{written:,} of {source.stat().st_size:,} bytes arrived")
            self.files.mv(temporary, f"{self.path}/{name}")
        except BaseException:
            with suppress(Exception):
                self.files.rm(temporary)
            raise


Remote: TypeAlias = Web | Store


def _complete(read: Callable[[int], bytes], at: int, start: int, size: int | None) -> Blocks:
    """The bytes of a file from `start` on, which is read from `at` on. Raises ConnectionError if it ends before
    `size`."""
    while block := read(BLOCK):
        at += len(block)
        if at > start:
            yield block[-(at - start) :] if at - len(block) < start else block
    if size is not None and at < size:
        raise ConnectionError(f"it ended after {at:,} of {size:,} bytes")


def open_remote(url: str, patience: Patience = PATIENCE) -> Remote:
    """The folder at a URL. Raises BadInput for an unknown scheme, or one whose adapter is not installed."""
    url = url.rstrip("/")
    if url.lower().startswith(("http://", "https://")):
        return Web(url, patience)
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BadInput(f"{url}: expected a URL that fsspec opens, got: {error}; install its adapter") from None
    except Exception as error:  # of the adapter, such as invalid credentials
        raise BadInput(f"could not open {url}: {_text(error)}; correct it") from None
    return Store(url, files, path)


def pull(url: str, out: Path, patience: Patience = PATIENCE) -> TeacherCache:
    """Copy a cache, or the views of it that are missing in `out`, from a URL.

    Args:
        url: folder that contains the files of a cache, or of a part of one.
        out: folder of the cache on this machine.
        patience: how long to try.

    Raises:
        BadInput: there is no cache, it is damaged, it is another one than the one in `out`, or it cannot be reached.
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
        BadInput: the cache is damaged, the URL is read-only or cannot be reached, or it contains another cache or other
            predictions for one of the views.
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
        Whether it exists.
    """
    temporary, where = temporary_name(target), f"{remote.url}/{name}"
    try:
        for again in (True, False):
            try:
                with open(temporary, "wb") as file:
                    _download(remote, name, file, patience)
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


def _download(remote: Remote, name: str, file: BinaryIO, patience: Patience) -> None:
    """Append a file's bytes to an empty local one, continuing after errors. Raises FileNotFoundError."""
    failures = 0
    while True:
        before = file.tell()
        try:
            with closing(remote.stream(name, before)) as blocks:
                for block in blocks:
                    try:
                        file.write(block)
                    except OSError as error:
                        raise BadInput(f"could not write {file.name}: {reason(error)}") from None
            return
        except (FileNotFoundError, BadInput, MemoryError):
            raise
        except Exception as error:
            failures = 1 if file.tell() > before else failures + 1
            _wait(error, failures, f"{remote.url}/{name}", patience)


def persistently(action: Callable[[], T], where: str, patience: Patience) -> T:
    """The result of `action`, which is repeated after errors of the network.

    Raises:
        FileNotFoundError: as raised by `action`.
        BadInput: all attempts failed.
    """
    failures = 0
    while True:
        try:
            return action()
        except (FileNotFoundError, BadInput, MemoryError):
            raise
        except Exception as error:
            failures += 1
            _wait(error, failures, where, patience)


def _wait(error: Exception, failures: int, where: str, patience: Patience) -> None:
    """Wait before the next attempt. Raises BadInput if there is none, or if it would fail, too."""
    if isinstance(error, PermissionError | ImportError):
        raise BadInput(f"{where}: expected access, got: {_text(error)}; check the URL and your credentials") from None
    if failures >= patience.attempts:
        tried = counted(failures, "attempt")
        raise BadInput(
            f"{where}: expected an answer, got none in {tried} ({_text(error)}); check the URL and the connection, and "
            "repeat the command, which continues"
        ) from None
    pause = patience.wait_s * 2 ** (failures - 1)
    notice(f"{where}: {_text(error)}; trying again in {pause:g} s")
    time.sleep(pause)


def _text(error: Exception) -> str:
    """The error in one line."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split())[:200] or type(inner).__name__


def _is_complete(path: Path, header: dict[str, Any], table: int | str) -> bool:
    """Whether a table exists here, complete. Raises BadInput if it is another cache's."""
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


def recorded_info(remote: Remote, name: str) -> tuple[dict[str, Any], str] | None:
    """What `read_info` returns for a file at a URL, of which only the beginning is read; None if it is not such a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    start = _first_bytes(remote, name, 8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > LONGEST_HEADER:
        return None
    try:
        metadata = json.loads(_first_bytes(remote, name, 8 + length)[8:])["__metadata__"]
        header = json.loads(metadata["fastofa"])
        return header["info"], header["sha256"]
    except (ValueError, KeyError, TypeError):
        return None


def _first_bytes(remote: Remote, name: str, count: int) -> bytes:
    data = b""
    with closing(remote.stream(name)) as blocks:
        for block in blocks:
            data += block
            if len(data) >= count:
                break
    return data[:count]
