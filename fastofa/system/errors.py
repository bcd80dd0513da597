"""What ends a command with one line instead of a traceback, and how such lines are worded."""

from typing import Any


class BadInput(Exception):
    """One clear line: what was expected, what came, what to do. Commands print it and exit with code 2.

    No ValueError, which tyro would catch from a configuration and print in a box.
    """

    def __init__(self, line: str = "", reason: str = "") -> None:
        super().__init__(line)
        self.reason = reason
        """The cause alone, where a caller words its own line; a `Reason` if the system gave it."""


class Reason(str):
    """Why a file is unreadable, with the system's error number; 0 if the system did not refuse it."""

    errno = 0

    @classmethod
    def of(cls, error: Exception) -> "Reason":
        reason = cls(getattr(error, "strerror", None) or error)
        reason.errno = getattr(error, "errno", None) or 0
        return reason


class Failed(Exception):
    """The machine or another process gave out: one line, with what to do. Commands print it and exit with code 1."""


class LostContact(Failed):
    """Another rank is gone; nothing more can be computed together."""


def counted(number: int, noun: str) -> str:
    """ "1 image", "2,000 images", "0 classes": the noun in the singular, with its adjectives."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def escaped(text: str) -> str:
    """One line that a terminal shows as it is: control characters, and those that turn or hide text, are spelled out.

    A name on the disk may hold any of them, an escape sequence or a second line, say.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises BadInput for a number below it; None, and what is left open while tyro parses, passes."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int) and value < least:
            raise BadInput(f"{name.replace('_', '-')}: expected at least {least}, got {value}")
