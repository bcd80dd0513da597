"""Which files processes use, so that no other process removes them.

A file or folder has a *mark*, a small file beside it. A process that uses it holds a shared flock on the mark until it
ends, for whatever reason; a process that removes it holds an exclusive one. The mark's time is that of the last use. On
a network file system this also works between hosts. If the file system does not support flock, everything counts as in
use.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastofa.system.locks import NO_FLOCK, is_open_at

_marks: dict[Path, int] = {}  # file descriptors of the marks that this process holds
FLAGS = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def use(mark: Path) -> None:
    """Use what the mark stands for until this process ends, and record the time. Waits while another removes it.

    Whether it exists is certain only afterwards.

    Raises:
        OSError: the mark can neither be created nor read.
    """
    while (file := _marks.get(mark)) is None or not is_open_at(mark, file):  # it may have been removed meanwhile
        if file is not None:
            os.close(file)
            del _marks[mark]
        file = os.open(mark, os.O_RDONLY | FLAGS, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                os.close(file)
                raise
        _marks[mark] = file
    now = time.time_ns()
    with suppress(OSError):  # another user's
        os.utime(file, ns=(now, now))


@contextmanager
def unused(mark: Path) -> Iterator[bool]:
    """Whether no process uses what the mark stands for; if so, none begins to before the block ends.

    The block may remove it, and then the mark.
    """
    try:
        file = os.open(mark, os.O_RDWR | FLAGS, 0o666)
    except OSError:
        yield False
        return
    try:
        yield _is_free(mark, file)
    finally:
        os.close(file)


def _is_free(mark: Path, file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return is_open_at(mark, file)
