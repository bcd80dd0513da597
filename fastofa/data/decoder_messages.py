"""What libjpeg and libpng print while they decode is kept from the terminal, and given to who asked for the image.

torchvision's decoders hide that there was a warning: libjpeg's is printed by C code, and that is all there is of it.
"""

import ctypes
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


class _Messages:
    """C's `stderr` leads to a file in memory while anything is decoded. Python's own messages do not go through it."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self.file = os.memfd_create("decoder messages")
        fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)
        libc.fdopen.restype = ctypes.c_void_p
        libc.setbuf.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self.pointer = ctypes.c_void_p.in_dll(libc, "stderr")
        self.usual, self.ours = self.pointer.value, libc.fdopen(self.file, b"a")
        libc.setbuf(self.ours, None)
        self.changed = threading.Condition()
        self.decoding, self.alone = 0, False

    @contextmanager
    def listening(self, alone: bool) -> Iterator[None]:
        """While threads decode, or this one alone."""
        with self.changed:
            self.changed.wait_for(lambda: not (self.alone or (alone and self.decoding)))
            self.decoding, self.alone = self.decoding + 1, alone
            self.pointer.value = self.ours
            if alone:
                os.ftruncate(self.file, 0)
        try:
            yield
        finally:
            with self.changed:
                self.decoding, self.alone = self.decoding - 1, False
                if not self.decoding:
                    self.pointer.value = self.usual
                self.changed.notify_all()

    def size(self) -> int:
        return os.fstat(self.file).st_size


def with_messages(decode: Callable[[], T]) -> tuple[T, str]:
    """What `decode` returns, and what C code printed for it: its first line, "" if none.

    Decoding goes on in many threads; where one of them printed something, each that may have been it decodes again
    alone.
    """
    if _messages is None:
        return decode(), ""
    with _messages.listening(alone=False):
        before = _messages.size()
        result = decode()
        if _messages.size() == before:
            return result, ""
    with _messages.listening(alone=True):
        result = decode()
        text = os.pread(_messages.file, 1000, 0).decode(errors="replace")
    return result, text.strip().partition("\n")[0]


def _begin() -> None:
    global _messages
    inherited, _messages = _messages, None
    if inherited is not None:  # of the process that this one was forked from, whose threads may have been decoding
        inherited.pointer.value = inherited.usual
        os.close(inherited.file)
    with suppress(AttributeError, ValueError):  # raised where it is not Linux: then nobody knows of messages
        _messages = _Messages()


_messages: _Messages | None = None
_begin()
os.register_at_fork(after_in_child=_begin)
