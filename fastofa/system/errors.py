"""Exceptions that end a command with one line instead of a traceback, and helpers for the wording of such lines."""

from collections.abc import Iterable
from typing import Any


class BadInput(Exception):
    """Invalid input. The message is one line: expected, got, remedy. Commands print it and exit with code 2.

    It is not a ValueError, because tyro catches those from a configuration and prints them in a box.
    """

    def __init__(self, line: str = "", reason: str = "") -> None:
        super().__init__(line)
        self.reason = reason
        """The cause alone, for a caller that composes its own line; a `Reason` if the system gave it."""


class Reason(str):
    """Why a file is unreadable, with the system's error number; 0 if the system did not refuse it."""

    errno = 0

    @classmethod
    def of(cls, error: Exception) -> "Reason":
        reason = cls(getattr(error, "strerror", None) or error)
        reason.errno = getattr(error, "errno", None) or 0
        return reason


class Failed(Exception):
    """The machine or another process failed. The message is one line with a remedy. Commands exit with code 1."""


class LostContact(Failed):
    """Another rank is gone, so that collective operations are no longer possible."""


def counted(number: int, noun: str) -> str:
    """ "1 image", "2,000 images", "0 classes"; `noun` is singular and may include adjectives."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def listed(names: Iterable[object]) -> str:
    """ "a, b, c and 4 more", "none"."""
    first, more = [str(name) for name in names], ""
    if len(first) > 3:
        first, more = first[:3], f" and {len(first) - 3:,} more"
    return f"{', '.join(first)}{more}" if first else "none"


def escaped(text: str) -> str:
    """One line that a terminal shows literally: control characters and invisible or bidirectional ones are escaped.

    File names may contain any of these, such as an escape sequence or a line break.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises BadInput if one of these fields is a number below `least`; None and tyro's placeholders are accepted."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int) and value < least:
            raise BadInput(f"{name.replace('_', '-')}: expected at least {least}, got {value}")
