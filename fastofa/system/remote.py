"""Read and write files at a URL: an object store, a web server, or any other place that fsspec opens.

Errors of the network are retried, with growing pauses. A download continues from the byte that arrived last.

http and https use Python's own client, and are read-only. Other schemes need fsspec's adapter for them, such as s3fs.
"""

import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import fsspec

from fastofa.system.errors import BadInput, counted
from fastofa.system.files import reason
from fastofa.system.progress import notice

BLOCK = 1 << 20  # bytes per read
LONGEST_HEADER = 100 << 20  # bytes of a safetensors file's header
T = TypeVar("T")
Blocks: TypeAlias = Generator[bytes, None, None]


@dataclass(frozen=True)
class Patience:
    """How often, and for how long, to try an operation."""

    attempts: int = 6
    """Attempts in a row without a new byte, after which an operation fails."""
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
    """The bytes of a file from `start` on, where `read` begins at byte `at`. Raises ConnectionError if the file ends
    before `size`."""
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


def download(
    remote: Remote,
    name: str,
    file: BinaryIO,
    patience: Patience,
    arrived: Callable[[int], None] = lambda _: None,
) -> None:
    """Append a file's bytes to a local one, which contains its first bytes or none, continuing after errors.

    Args:
        remote: the folder at a URL.
        name: the file's name there.
        file: the local file, at its end.
        patience: how long to try.
        arrived: called with the number of bytes of each block that was written.

    Raises:
        FileNotFoundError: there is no such file.
        BadInput: all attempts failed, or the local file cannot be written.
    """
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
                    arrived(len(block))
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
    """Wait before the next attempt. Raises BadInput if none is left, or another one would fail, too."""
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


def recorded_info(remote: Remote, name: str) -> tuple[dict[str, Any], str] | None:
    """What `read_info` returns for a file at a URL, from its first bytes; None if the file has no such information.

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
