"""Settings of the whole process. Importing fastofa changes none of them; all that are changed are changed here.

own_process()         by the command line, before anything imports torch
keep_freed_memory()   by `open_pipeline`, and so by train, precompute and evaluate
allow_image_sizes(n)  by a training step that is compiled
"""

import functools
import getpass
import os
import warnings


def own_process() -> None:
    """Of a process that runs a command and nothing else; torch and its libraries read the variables when imported.

    OpenMP threads that wait by spinning make a busy machine many times slower, threads that sleep at once a quiet one
    by a third: with GOMP_SPINCOUNT they spin for some microseconds. Torch cannot be imported by a container's user
    without a name, who gets a number for one. And Pillow warns of EXIF data and of many pixels, without the file's
    name; both are checked and reported with it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    warnings.filterwarnings("ignore", module="PIL")


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed.

    By default it returns them to the system, which has to clear new ones for every operation; that takes longer than
    the operation. It keeps them once a larger one, of up to 32 MiB, has been freed (mallopt(3)).
    """
    bytes(31 << 20)


def allow_image_sizes(count: int) -> None:
    """Have torch.compile specialise a function for as many input sizes; beyond its own limit of 8 it gives up."""
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = count
