"""Which implementation of a kernel runs: the Triton kernel, or its plain-PyTorch twin in reference.py.

A twin runs wherever PyTorch does, and under torch.compile becomes a few fused kernels. Triton kernels need a GPU, or
Triton's interpreter (TRITON_INTERPRET=1), which tests use on a CPU.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

IMPLEMENTATIONS = (None, "triton", "torch")
HAS_TRITON = find_spec("triton") is not None

# Kernels that were measured to be faster than their compiled twins (docs/kernels.md): chosen on a GPU by impl=None.
MEASURED_FASTER = frozenset({"crop_resize", "norm_act", "norm_act_pool"})


def use_triton(kernel: str, impl: str | None, device: torch.device) -> bool:
    """Resolve `impl`: "triton", "torch", or None, which takes what was measured to be faster.

    Raises:
        ValueError: `impl` is none of the three, or "triton" where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        if not HAS_TRITON:
            raise ValueError("impl: expected Triton to be installed for 'triton', it is not; leave impl out")
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            raise ValueError(f"impl: expected tensors on a GPU for 'triton', got {device}; leave impl out")
        return True
    return impl is None and kernel in MEASURED_FASTER and device.type == "cuda" and HAS_TRITON


def interpreted() -> bool:
    """Do Triton kernels run in its interpreter, on a CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_run_triton(x: Tensor) -> bool:
    """Can Triton kernels, which know no float64, run on x?"""
    return x.dtype != torch.float64 and (x.device.type == "cuda" or interpreted()) and HAS_TRITON
