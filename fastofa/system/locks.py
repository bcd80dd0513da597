"""One writer at a time: a second one is refused at once, with the name of the first.

The lock is flock's on a small file that names the holder, so it ends with the process, however that ends. On a network
file system it holds between hosts, too. On one that has no flock the named holder counts: on this host if the process
lives, from another one until its file is removed.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastofa.system.errors import BadInput

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def is_alive(pid: int) -> bool:
    """Does this host have the process?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def writing(out: Path, inside: bool = False) -> Iterator[None]:
    """Hold the lock on `out`, a file beside it, or inside the folder that it is or will be.

    Folders on the way to the lock are made, and removed again where nothing was written.

    Raises:
        BadInput: another process holds it, or the place cannot be written.
    """
    place = Path(os.path.abspath(out))
    lock = place / ".lock" if inside else place.parent / f".{place.name}.lock"
    missing = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _take(out, lock)
    except OSError as error:
        _remove_empty(missing)
        no_folder = isinstance(error, FileExistsError | NotADirectoryError)
        cause = "Not a directory" if no_folder else error.strerror
        raise BadInput(f"{out}: cannot be written ({cause}: {error.filename}); choose another place") from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: nobody else can have it, or take a file that is removed for it
            lock.unlink()
        os.close(file)
        _remove_empty(missing)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _take(out: Path, lock: Path) -> int:
    """An open file of the lock, held."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            _hold(out, lock, file)
            if _is(lock, file):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # whoever had it has removed it meanwhile


def _hold(out: Path, lock: Path, file: int) -> None:
    """Raises BadInput if another process does."""
    pid, host = _holder(file)
    remedy = "wait for its end or choose another place"
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
        remedy += f"; if it is gone, remove {lock}"
    who = f"another fastofa (pid {pid} on {host})" if pid else "another fastofa"
    raise BadInput(f"{out}: {who} is writing there; {remedy}")


def _is(lock: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder(file: int) -> tuple[int, str]:
    """(0, "") where it is not known."""
    pid, _, host = os.pread(file, 300, 0).decode(errors="replace").strip().partition(" ")
    return (int(pid), host) if pid.isascii() and pid.isdecimal() else (0, "")
