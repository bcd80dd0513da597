"""Where to compute, and how precisely."""

import os

import torch

from fastofa.errors import BadInput


def choose_device(name: str) -> torch.device:
    """ "auto" (a GPU where there is one), "cuda", "cuda:1", "cpu". Raises BadInput for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def choose_workers(workers: int | None) -> int:
    """One decoding process per core, at most 16."""
    return min(len(os.sched_getaffinity(0)), 16) if workers is None else workers
