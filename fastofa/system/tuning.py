"""Process-wide settings. They are changed only here, and never by importing fastofa.

own_process()         called by the command line, before torch is imported
keep_freed_memory()   called by `open_pipeline`, and so by train, precompute and evaluate
allow_image_sizes(n)  called by a compiled training step
"""

import functools
import getpass
import os
import warnings
from pathlib import Path


def own_process() -> None:
    """Set up a process that runs a single command. Call it before torch is imported, since torch and its libraries then
    read the environment variables.

    OpenMP: waiting threads that spin make a busy machine many times slower, and threads that sleep at once make an
    idle one slower by a third. GOMP_SPINCOUNT lets them spin for some microseconds first. User: torch cannot be
    imported by a user without a name, as in a container, so the user's number becomes the name. Pillow: its warnings
    about EXIF data and large images do not name the file; fastofa checks both and names it. Compiled programs: torch
    caches them in /tmp, which is emptied when the machine restarts; the user's cache folder is kept.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    if folder := _cache_folder():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    warnings.filterwarnings("ignore", module="PIL")


def _cache_folder() -> Path | None:
    """fastofa's folder in the user's cache folder (XDG Base Directory Specification); None if it is not writable."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastofa"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or a read-only one
        return None
    return folder if os.access(folder, os.W_OK) else None


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc keep large blocks of memory after they are freed.

    By default it returns them to the system, which must clear new ones for every operation, and that takes longer than
    the operation. Once a block of up to 32 MiB has been freed, glibc keeps blocks that are smaller (mallopt(3)).
    """
    bytes(31 << 20)


def allow_image_sizes(count: int) -> None:
    """Let torch.compile specialise a function for `count` input sizes. By default it stops compiling after 8."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = count
