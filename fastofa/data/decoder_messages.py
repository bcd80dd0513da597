"""Capture what libjpeg and libpng print while they decode, so that it goes to the caller and not to the terminal.

torchvision does not report decoder warnings; the text that libjpeg's C code prints is the only sign of them.
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
    """Redirects C's `stderr` to an in-memory file while any thread decodes. Python's messages do not go through it."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self.file = os.memfd_create("decoder messages")
        fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)
        libc.fdopen.restype = ctypes.c_void_p
        libc.setbuf.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self.pointer = ctypes.c_void_p.in_dll(libc, "stderr")
        self.terminal, self.memory = self.pointer.value, libc.fdopen(self.file, b"a")
        libc.setbuf(self.memory, None)
        self.changed = threading.Condition()
        self.decoding, self.alone = 0, False

    @contextmanager
    def listening(self, alone: bool) -> Iterator[None]:
        """Redirect while this thread decodes: at the same time as others, or `alone` with an empty file."""
        with self.changed:
            self.changed.wait_for(lambda: not (self.alone or (alone and self.decoding)))
            self.decoding, self.alone = self.decoding + 1, alone
            self.pointer.value = self.memory
            if alone:
                os.ftruncate(self.file, 0)
        try:
            yield
        finally:
            with self.changed:
                self.decoding, self.alone = self.decoding - 1, False
                if not self.decoding:
                    self.pointer.value = self.terminal
                self.changed.notify_all()

    def size(self) -> int:
        return os.fstat(self.file).st_size


def with_messages(decode: Callable[[], T]) -> tuple[T, str]:
    """The result of `decode`, and the first line that C code printed meanwhile ("" if it printed nothing).

    Many threads decode at the same time. If something was printed while several did, each of them decodes again alone
    to find out whose message it was.
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
    if inherited is not None:  # this process was forked, perhaps while threads of its parent were decoding
        inherited.pointer.value = inherited.terminal
        os.close(inherited.file)
    with suppress(AttributeError, ValueError):  # not on Linux: messages are not captured
        _messages = _Messages()


_messages: _Messages | None = None
_begin()
os.register_at_fork(after_in_child=_begin)
