"""Locks that allow one writer at a time. A second writer is refused at once, with the pid and host of the first, or
waits for it.

A lock is an flock on a small file that names the holder. It is released when the process ends, for whatever reason. On
a network file system it also works between hosts. If the file system does not support flock, the named holder decides:
the lock is held while its process exists on this host, or, if it is on another host, until the file is removed.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastofa.system.errors import BadInput
from fastofa.system.progress import notice

_held: set[int] = set()  # file descriptors of the locks that this process holds
RETRY_S = 0.2  # pause between two attempts of a writer that waits
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Held(BadInput):
    """Another process holds the lock."""


def is_alive(pid: int) -> bool:
    """Whether the process exists on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def writing(out: Path, inside: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock on `out`, which is a file next to it, or inside the folder `out` if `inside`.

    Missing parent folders are created, and removed again if they stay empty.

    Args:
        out: the path to write.
        inside: `out` is a folder that exists while it is written.
        wait: wait until no other process holds the lock.

    Raises:
        Held: another process holds it, unless `wait`.
        BadInput: the folder is not writable.
    """
    place = Path(os.path.abspath(out))
    lock = place / ".lock" if inside else place.parent / f".{place.name}.lock"
    missing = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _take(out, lock, wait)
    except OSError as error:
        _remove_empty(missing)
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        cause = "Not a directory" if no_folder else error.strerror
        raise BadInput(
            f"{out}: expected a writable path, got {cause!r} for {error.filename}; choose another path"
        ) from None
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)
        with suppress(OSError):  # removed while held, so that no other process can hold it or mistake the file for it
            lock.unlink()
        os.close(file)
        _remove_empty(missing)


def close_inherited() -> None:
    """In a forked process: close the parent's locks, which would otherwise be held until this process ends, too."""
    for file in _held:
        os.close(file)
    _held.clear()


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _take(out: Path, lock: Path, wait: bool) -> int:
    """Open the lock's file and acquire the lock."""
    told = False
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            _hold(out, lock, file)
            if is_open_at(lock, file):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file
        except Held as held:
            os.close(file)
            if not wait:
                raise
            if not told:
                notice(f"{str(held).partition(';')[0]}; waiting for it")
                told = True
            time.sleep(RETRY_S)
            continue
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the previous holder has removed the file meanwhile


def _hold(out: Path, lock: Path, file: int) -> None:
    """Acquire the lock. Raises Held if another process holds it."""
    pid, host = _holder(file)
    remedy = "wait until it ends or choose another path"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        if not pid or (host == socket.gethostname() and not is_alive(pid)):
            return
        remedy += f"; if it no longer runs, remove {lock}"
    who = f"another fastofa (pid {pid} on {host})" if pid else "another fastofa"
    raise Held(f"{out}: {who} is writing there; {remedy}")


def is_open_at(path: Path, file: int) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder(file: int) -> tuple[int, str]:
    """The holder's pid and host; (0, "") if unknown."""
    pid, _, host = os.pread(file, 300, 0).decode(errors="replace").strip().partition(" ")
    return (int(pid), host) if pid.isascii() and pid.isdecimal() else (0, "")
