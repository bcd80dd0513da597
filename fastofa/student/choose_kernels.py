"""Choose the Triton kernels that run in a student: those named, or those measured to be faster."""

from collections.abc import Sequence

import torch
from torch import nn

from fastofa.kernels.choice import HAS_TRITON, interpreted
from fastofa.student.fused_depthwise import use_depthwise_kernel
from fastofa.student.fused_layer_norms import use_layer_norm_kernels
from fastofa.student.fused_norms import use_norm_kernels
from fastofa.student.fused_stem import use_stem_kernels
from fastofa.student.fused_tokens import use_token_kernels
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice

MEASURED_FASTER = ("exits", "stem", "norms")  # in a whole training step (docs/kernels.md)
MEASURED_ON = 9  # major compute capability of H100 and H200
SWITCHES = {  # applied in this order
    "exits": use_depthwise_kernel,
    "stem": use_stem_kernels,
    "norms": use_norm_kernels,
    "tokens": use_token_kernels,
    "layer_norms": use_layer_norm_kernels,
}


def check_kernels(kernels: Sequence[str], device: torch.device) -> None:
    """Raises BadInput if kernels that need a GPU are named and `device` is not a GPU."""
    named = [kernel for kernel in kernels if kernel not in ("auto", "off")]
    if named and device.type != "cuda" and not interpreted():
        raise BadInput(
            f"kernels: expected a GPU for {' '.join(named)}, but the student is on the CPU; omit these kernels"
        )


def use_kernels(student: nn.Module, kernels: Sequence[str], device: torch.device, report: bool = True) -> None:
    """Switch the student's modules to the kernels of TrainConfig.kernels, except "loss", which is not part of a module.

    If "auto" fails for any reason, the student stays unchanged, and a notice reports the failure if `report`.

    Raises:
        BadInput: kernels that need a GPU are named and `device` is not a GPU.
    """
    automatic = "auto" in kernels
    if automatic:
        kernels = MEASURED_FASTER if _was_measured(device) else ()
    check_kernels(kernels, device)
    if automatic and kernels and not HAS_TRITON:
        if report:
            notice("kernels auto: Triton is not installed; PyTorch's own kernels are used")
        return
    kinds = [(module, type(module)) for module in student.modules()]
    try:
        for kernel, switch in SWITCHES.items():
            if kernel in kernels:
                switch(student)
    except Exception as error:
        if not automatic:
            raise
        for module, kind in kinds:
            module.__class__ = kind
        if report:
            notice(f"kernels auto: {type(error).__name__} in this student ({error}); PyTorch's own kernels are used")


def _was_measured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == MEASURED_ON
