"""The command line: `fastofa COMMAND ...`.

Each command is a module with `main(config)`, imported only when its arguments were parsed: torch takes seconds.
"""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from itertools import pairwise
from types import FrameType
from typing import NoReturn

from fastofa import __version__
from fastofa.system import torchrun, tuning
from fastofa.system.errors import BadInput, Failed, escaped
from fastofa.system.interrupt import Stopped

COMMANDS = {
    "demo": "distil a small student on handwritten digits, from nothing, in a minute or two",
    "write": "write a data set in a form that is read faster: a pack of pixels, or FFCV's .beton",
    "precompute": "ask a teacher about every view of every image, and keep its answers",
    "train": "distil a student from a teacher cache",
    "evaluate": "top-1, top-5 and agreement with the teacher of a run",
    "export": "write a run's student as a model that plain timm loads",
    "predict": "the classes of images without labels, by a run's student or an exported model",
    "cache": "info on a teacher cache, or verify its checksums",
    "doctor": "what acceleration is present here, and what the missing parts need",
}
USAGE = "usage: fastofa COMMAND [--help]\n\n" + "\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())


URL = re.compile(r"[a-z][a-z0-9+.-]*://.*", re.IGNORECASE | re.DOTALL)
INTERRUPTED = "interrupted; nothing more was saved"
# How libraries say that memory ran out, beside MemoryError and ENOMEM.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)

REMEDIES = {
    errno.EACCES: "its owner must allow you to use it, or choose another place",
    errno.EPERM: "its owner must allow you to use it, or choose another place",
    errno.ELOOP: "a link leads to itself: remove it",
    errno.ENOSPC: "free space or choose another place",
    errno.EDQUOT: "free space or choose another place",
}


def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0; 1 after a failure of the machine, or with a traceback of ours; 2 after bad input (one line on
    standard error); 128 + signal after a saved interruption.

    Without `argv` this is the process of the command, which then ends at once, whatever its threads are waiting for.
    """
    own = argv is None or torchrun.is_rank()
    argv = sys.argv[1:] if argv is None else argv
    code = _main(argv, own)
    if code == 2 and torchrun.is_rank():
        torchrun.stop()
    if torchrun.is_rank() or (own and code):  # the connections of a rank can hang while Python ends
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _main(argv: list[str], own: bool) -> int:
    """The exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"fastofa {__version__}")
        return 0
    tuning.own_process()
    try:
        _run(argv, own)
    except BadInput as error:
        return _say(str(error), 2)
    except Stopped as stop:
        code = 128 + stop.signum
        if torchrun.is_main():  # all ranks stop together, one says so
            _say(str(stop), code)
        return code
    except Failed as error:
        return _say(str(error), 1)
    except BrokenPipeError:  # `fastofa ... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _say(INTERRUPTED, 130)
    except SystemExit as end:  # of tyro, which has said why
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if known := _known(error):
            return _say(*known)
        traceback.print_exc()
        return 1
    return 0


def _run(argv: list[str], own: bool) -> None:
    if argv[0] not in COMMANDS:
        raise BadInput(f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}")
    if argv[0] != "train" and torchrun.is_rank():
        raise BadInput(
            f"{argv[0]}: expected one process, torchrun started {os.environ['WORLD_SIZE']} (WORLD_SIZE); start it "
            "without torchrun"
        )
    for before, argument in pairwise(argv):
        if found := URL.search(argument):
            name = before.lstrip("-") if before.startswith("-") else argument.partition("=")[0].lstrip("-")
            where = f"{name}: " if argument != found[0] or before.startswith("-") else ""
            raise BadInput(
                f"{where}expected a path on this machine, got the URL {found[0]}; mount it, or copy the files"
            )
    with _interrupted_at_once() if own else nullcontext():
        from fastofa.commands.arguments import parse
        from fastofa.commands.quick_checks import check

        config = parse(argv[0], argv[1:])
        check(config)
        command = import_module(f"fastofa.commands.{argv[0]}").main
    command(config)


@contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """Around imports, where libraries make something else of Ctrl-C, and where there is nothing to save."""

    def leave(_signum: int, _: FrameType | None) -> NoReturn:
        _say(INTERRUPTED, 130)
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it is ignored in a shell's background
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _known(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code for what the machine lacks or refuses, wherever that was noticed."""
    text, code = " ".join(str(error).split()), error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or code == errno.ENOMEM or OUT_OF_MEMORY.search(text):
        return (
            f"memory ran out ({text[:200] or type(error).__name__}); lower --batch-size, or for train raise "
            "--accumulate; fewer --workers need less, too",
            1,
        )
    if code in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return f"too many open files ({text[:200]}); raise the limit (ulimit -n 4096) or use fewer --workers", 2
    if "Python.h" in text:
        return "compile: expected Python's headers, found none; apt-get install python3-dev, or --compile off", 2
    if isinstance(error, OSError) and error.filename is not None:
        remedy = REMEDIES.get(error.errno or 0, "mend it or choose another place")
        return f"{error.filename}: {error.strerror}; {remedy}", 2
    return None


def _say(message: str, code: int) -> int:
    print(f"fastofa: {'error: ' if code == 2 else ''}{escaped(message)}", file=sys.stderr)
    return code
