"""Choose the implementation of a kernel: the Triton kernel, or its plain-PyTorch twin (most are in reference.py).

A twin runs wherever PyTorch does, and torch.compile turns it into a few fused kernels. Triton kernels need a GPU, or
Triton's interpreter (TRITON_INTERPRET=1), which tests use on a CPU.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

IMPLEMENTATIONS = (None, "triton", "torch")
HAS_TRITON = find_spec("triton") is not None


def use_triton(kernel: str, impl: str | None, device: torch.device) -> bool:
    """Whether to run the Triton kernel, for `impl` "triton", "torch", or None: Triton on a GPU.

    A training run passes `impl`: by default the implementation that it measured as the fastest (comparison.py).

    Raises:
        ValueError: `impl` has another value, or is "triton" where Triton cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{kernel}: impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        if not HAS_TRITON:
            raise ValueError(f"{kernel}: impl: expected Triton to be installed for 'triton', it is not; leave impl out")
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            raise ValueError(f"{kernel}: impl: expected tensors on a GPU for 'triton', got {device}; leave impl out")
        return True
    return impl is None and device.type == "cuda" and HAS_TRITON


def use_triton_for(kernel: str, impl: str | None, x: Tensor) -> bool:
    """As `use_triton`, for a kernel that does not support float64: with impl None, the twin then runs.

    Raises:
        ValueError: as `use_triton`, or `impl` is "triton" and x is float64.
    """
    triton = use_triton(kernel, impl, x.device)
    if triton and x.dtype == torch.float64:
        if impl is None:
            return False
        raise ValueError(f"{kernel}: impl: expected fp32, bf16 or fp16 for 'triton', got torch.float64; leave impl out")
    return triton


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_run_triton(x: Tensor) -> bool:
    """Whether Triton kernels, which do not support float64, can run on x."""
    return x.dtype != torch.float64 and (x.device.type == "cuda" or interpreted()) and HAS_TRITON
