"""Report an error in a user's file in one line: file, line number, code and error."""

import linecache
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastofa.methods.options import is_own
from fastofa.system.errors import BadInput, Failed

LONGEST = 200  # characters of an error's text


@contextmanager
def explained(methods: Iterable[str]) -> Iterator[None]:
    """Report errors that are raised in the files of these methods, also while torch compiles them.

    Args:
        methods: names; those of built-in methods have no effect.

    Raises:
        BadInput: the body called code of such a file that raised an error. Other errors pass unchanged.
    """
    try:
        yield
    except (BadInput, Failed, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's code may raise anything
        for name in filter(is_own, methods):
            if place := _place(error, Path(name.rpartition(":")[0])):
                raise BadInput(f"method {name}: {place}") from None
        raise


def _place(error: Exception, file: Path) -> str:
    """The last line of the file that led to the error, with the error; empty if none did."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    # An error of torch.compile names the lines in its text.
    frames += [(name, int(line)) for name, line in re.findall(r'File "([^"\n]+)", line (\d+)', str(error))]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno or 0))
    lines = [line for name, line in frames if name == str(file.resolve())]
    if not lines:
        return ""
    compiled = type(error).__module__.startswith("torch._dynamo")
    code = linecache.getline(str(file.resolve()), lines[-1]).strip()
    what = "torch.compile cannot compile it" if compiled else type(error).__name__
    remedy = "correct the file or give --compile off" if compiled else "correct the file"
    return f"line {lines[-1]}, `{code}`: {what}{_text(error)}; {remedy}"


def _text(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f": {first[:LONGEST]}" if first else ""
