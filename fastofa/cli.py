"""The command line: `fastofa COMMAND ...`.

Each command is a module with `main(config)`, imported only when its arguments were parsed: torch takes seconds.
"""

import os
import sys
from importlib import import_module

from fastofa import __version__
from fastofa.arguments import parse
from fastofa.errors import BadInput, LostContact
from fastofa.interrupt import Stopped

COMMANDS = {
    "demo": "distil a small student on handwritten digits, from nothing, in a minute or two",
    "write": "write a data set in a form that is read faster: a pack of pixels, or FFCV's .beton",
    "precompute": "ask a teacher about every view of every image, and keep its answers",
    "train": "distil a student from a teacher cache",
    "evaluate": "top-1, top-5 and agreement with the teacher of a run",
    "export": "write a run's student as a model that plain timm loads",
    "cache": "info on a teacher cache, or verify its checksums",
    "doctor": "what acceleration is present here, and what the missing parts need",
}
USAGE = "usage: fastofa COMMAND [--help]\n\n" + "\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())


def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0, 2 after bad input (one line on standard error), 128 + signal after a saved interruption."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"fastofa {__version__}")
        return
    if argv[0] not in COMMANDS:
        sys.exit(_say(f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}", 2))
    # Before torch is imported. OpenMP threads that wait by spinning make a busy machine many times slower, threads that
    # sleep at once a quiet one by a third: they spin for some microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    code = 0
    try:
        config = parse(argv[0], argv[1:])
        import_module(f"fastofa.{argv[0]}").main(config)
    except BadInput as error:
        code = _say(str(error), 2)
    except Stopped as stop:
        code = 128 + stop.signum
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together, one says so
            _say(str(stop), code)
    except LostContact as error:
        code = _say(str(error), 1)
    except BrokenPipeError:  # `fastofa ... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        code = _say("interrupted; nothing more was saved", 130)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a rank leaves at once: its connections can hang while Python ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _say(message: str, code: int) -> int:
    print(f"fastofa: {'error: ' if code == 2 else ''}{message}", file=sys.stderr)
    return code
