"""The command line: `fastofa COMMAND ...`.

Each command is a module with `main(config)`. It is imported only after its arguments are parsed, since importing torch
takes seconds.
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
from types import FrameType
from typing import NoReturn

from fastofa import __version__
from fastofa.system import torchrun, tuning
from fastofa.system.errors import BadInput, Failed, escaped
from fastofa.system.interrupt import Stopped

COMMANDS = {
    "demo": "distil a small student on handwritten digits from scratch, in a minute or two",
    "write": "write a dataset in a format that is faster to read: a pack of pixels, or FFCV's .beton",
    "precompute": "run a teacher on every view of every image and store its predictions",
    "train": "distil a student from a teacher cache",
    "evaluate": "compute top-1 and top-5 of a run, a model or a checkpoint",
    "export": "write a run's student, or a checkpoint, as a model that plain timm loads",
    "predict": "predict the classes of unlabelled images with a run's student or an exported model",
    "cka": "compare the layers of two networks, of any architectures, by CKA of their features",
    "cache": "describe, verify, join, compare or copy teacher caches",
    "doctor": "report which accelerators work here, and how to install what is missing",
}
USAGE = "usage: fastofa COMMAND [--help]\n\n" + "\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())


INTERRUPTED = "interrupted; nothing else was saved"
# How libraries report that memory ran out, besides MemoryError and ENOMEM.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)

REMEDIES = {
    errno.EACCES: "get permission from its owner or choose another path",
    errno.EPERM: "get permission from its owner or choose another path",
    errno.ELOOP: "remove the link, which points to itself",
    errno.ENOSPC: "free some space or choose another path",
    errno.EDQUOT: "free some space or choose another path",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command. Without `argv`, the process belongs to the command alone: after an error it exits without waiting
    for its threads.

    Exit codes: 0 for success; 1 if the machine failed or an unexpected exception was raised (with a traceback); 2 for
    bad input (with one line on standard error); 128 + signal after an interruption.
    """
    own = argv is None or torchrun.is_rank()
    argv = sys.argv[1:] if argv is None else argv
    code = _main(argv, own)
    if code == 2 and torchrun.is_rank():
        torchrun.stop()
    if torchrun.is_rank() or (own and code):  # a rank's connections can block Python's exit
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _main(argv: list[str], own: bool) -> int:
    """Run the command and return its exit code."""
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
        if torchrun.is_main():  # all ranks stop together; one prints the message
            _say(str(stop), code)
        return code
    except Failed as error:
        return _say(str(error), 1)
    except BrokenPipeError:  # `fastofa ... | head`: the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _say(INTERRUPTED, 130)
    except SystemExit as end:  # raised by tyro, which has printed the reason
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
    if argv[0] not in ("train", "precompute") and torchrun.is_rank():
        raise BadInput(
            f"{argv[0]}: expected one process, torchrun started {os.environ['WORLD_SIZE']} (WORLD_SIZE); start it "
            "without torchrun"
        )
    with _exiting_on_interrupt() if own else nullcontext():
        from fastofa.commands.parse import parse
        from fastofa.commands.quick_checks import check

        config = parse(argv[0], argv[1:])
        check(config)
        command = import_module(f"fastofa.commands.{argv[0]}").main
    command(config)


@contextmanager
def _exiting_on_interrupt() -> Iterator[None]:
    """Exit at once on Ctrl-C. Used during imports, when there is nothing to save and libraries turn Ctrl-C into other
    errors."""

    def leave(_signum: int, _: FrameType | None) -> NoReturn:
        _say(INTERRUPTED, 130)
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell's background job ignores it
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _known(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code for an error caused by the machine or the operating system; None for other
    errors."""
    text, code = " ".join(str(error).split()), error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or code == errno.ENOMEM or OUT_OF_MEMORY.search(text):
        return (
            f"out of memory ({text[:200] or type(error).__name__}); lower --batch-size, use fewer --workers, or for "
            "train raise --accumulate",
            1,
        )
    if code in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return f"too many open files ({text[:200]}); raise the limit (ulimit -n 4096) or use fewer --workers", 2
    if "Python.h" in text:
        return "compile: expected Python's headers, found none; apt-get install python3-dev, or --compile off", 2
    if isinstance(error, OSError) and error.filename is not None:
        remedy = REMEDIES.get(error.errno or 0, "correct it or choose another path")
        return f"{error.filename}: {error.strerror}; {remedy}", 2
    return None


def _say(message: str, code: int) -> int:
    print(f"fastofa: {'error: ' if code == 2 else ''}{escaped(message)}", file=sys.stderr)
    return code
