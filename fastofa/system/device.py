"""Choose the device, the precision, compilation, and the number of workers."""

import os
import shutil

import torch

from fastofa.system.errors import BadInput


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for "auto" (a GPU if there is one), "cuda", "cuda:1" or "cpu".

    Each process on a host uses the GPU with its `local_rank`, unless a number is given.

    Raises:
        BadInput: this machine does not have the device, or has fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"expected at most {torch.cuda.device_count()} processes on this host, one per GPU, got number "
                f"{local_rank + 1}; lower --nproc-per-node"
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
    """Whether to compute in bf16; "auto" means bf16 on a GPU and fp32 on a CPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def choose_compile(compile_: str, device: torch.device) -> bool:
    """Whether to compile; "auto" means on with a GPU and off on a CPU. Raises BadInput if there is no C++ compiler."""
    chosen = compile_ in ("on", "max-autotune") or (compile_ == "auto" and device.type == "cuda")
    # torch.compile needs a compiler: on a CPU for C++ code, with a GPU for the launchers of Triton kernels.
    variable = os.environ.get("CXX" if device.type == "cpu" else "CC")
    names = [variable] if variable else ["g++"] if device.type == "cpu" else ["gcc", "clang"]
    if chosen and not any(map(shutil.which, names)):
        raise BadInput(
            f"compile: expected a compiler ({' or '.join(names)}), found none; run `apt-get install g++`, or give "
            "--compile off"
        )
    return chosen


def choose_workers(workers: int | None, processes: int = 1) -> int:
    """`workers`, or if None one decoder per core, at most 16, shared by the training `processes` of this host."""
    return max(min(len(os.sched_getaffinity(0)) // processes, 16), 1) if workers is None else workers
