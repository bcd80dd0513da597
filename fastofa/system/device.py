"""Where to compute, and how precisely."""

import os
import shutil

import torch

from fastofa.system.errors import BadInput


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" (a GPU where there is one), "cuda", "cuda:1", "cpu". Raises BadInput for one that is not here.

    Of the processes on one host each takes the GPU of its number, unless one is named.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"expected at most {torch.cuda.device_count()} processes on this host, one for each GPU, this is "
                f"number {local_rank + 1}; lower --nproc-per-node"
            )
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise BadInput(
            f"device {name!r}: expected auto, cpu, or a GPU of this machine ({reason}); see `fastofa doctor`"
        ) from None
    return device


def choose_bf16(precision: str, device: torch.device) -> bool:
    """ "auto" is bf16 on a GPU and fp32 on a CPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def choose_compile(compile_: str, device: torch.device) -> bool:
    """ "auto" is on with a GPU and off on a CPU. Raises BadInput where it is on and there is no compiler for it."""
    chosen = compile_ == "on" or (compile_ == "auto" and device.type == "cuda")
    # What torch.compile looks for: on a CPU to build C++, with a GPU to build what launches Triton's kernels.
    given = os.environ.get("CXX" if device.type == "cpu" else "CC")
    names = [given] if given else ["g++"] if device.type == "cpu" else ["gcc", "clang"]
    if chosen and not any(map(shutil.which, names)):
        raise BadInput(
            f"compile: expected a compiler ({' or '.join(names)}), found none; apt-get install g++, or --compile off"
        )
    return chosen


def choose_workers(workers: int | None, processes: int = 1) -> int:
    """One decoding process per core, at most 16, shared by the training processes of this host."""
    return max(min(len(os.sched_getaffinity(0)) // processes, 16), 1) if workers is None else workers
