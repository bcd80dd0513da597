"""Put kernels into a student: those named, or whichever are fastest on its GPU."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastofa.kernels.choice import HAS_TRITON, interpreted
from fastofa.kernels.comparison import Chooses, Comparison
from fastofa.student.fused_depthwise import use_depthwise_kernel
from fastofa.student.fused_layer_norms import use_layer_norm_kernels
from fastofa.student.fused_norms import use_norm_kernels
from fastofa.student.fused_stem import use_stem_kernels
from fastofa.student.fused_tokens import use_token_kernels
from fastofa.student.measure_kernels import KernelChoice
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.system.progress import notice

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


def measures_kernels(kernels: Sequence[str], device: torch.device) -> bool:
    """Whether TrainConfig.kernels leaves the choice to measurements: on a CPU, plain PyTorch runs without any."""
    return "auto" in kernels and device.type == "cuda" and HAS_TRITON


def use_kernels(
    student: Student, kernels: Sequence[str], device: torch.device, choice: KernelChoice, batch_size: int, bf16: bool
) -> Any:
    """Switch the student's modules to the kernels of TrainConfig.kernels, except "loss", which is not part of a module.

    Kernels that are named run in every module that is recognised. With "auto" on a GPU, `choice` selects the fastest
    implementation for each module. If that fails for any reason, the student stays unchanged, and a notice reports it.

    Args:
        batch_size: images that the student processes at once.
        bf16: whether autocast computes in bf16.

    Returns:
        With "auto" on a GPU, a fake tensor like the student's logits for such a batch; else None.

    Raises:
        BadInput: kernels that need a GPU are named and `device` is not a GPU.
    """
    check_kernels(kernels, device)
    automatic = measures_kernels(kernels, device)
    if "auto" in kernels and device.type == "cuda" and not HAS_TRITON and choice.is_main:
        notice("kernels auto: Triton is not installed; PyTorch's own kernels are used")
    kinds = [(module, type(module)) for module in student.modules()]
    try:
        for kernel, switch in SWITCHES.items():
            if kernel in kernels or automatic:
                switch(student)
        if not automatic:
            return None
        began = time.monotonic()
        logits, found = record_comparisons(student, batch_size, bf16)
        choice.spent_s += time.monotonic() - began
    except Exception as error:
        if not automatic:
            raise
        for module, kind in kinds:
            module.__class__ = kind
        if choice.is_main:
            notice(f"kernels auto: {type(error).__name__} in this student ({error}); PyTorch's own kernels are used")
        return None
    choice.choose(found)
    return logits


def record_comparisons(
    student: Student, batch_size: int, bf16: bool
) -> tuple[Any, list[tuple[object, str, Comparison]]]:
    """Find the implementations to choose from in a student, at the sizes of its own inputs, with fake images.

    A training pass of fake tensors, which have shapes but no memory and are not computed, reaches every module. The
    student's state does not change.

    Returns:
        Fake logits; and the modules, the attributes that name their implementations, and the comparisons.
    """
    found: list[tuple[object, str, Comparison]] = []

    def record(module: Any, inputs: tuple[Any, ...]) -> None:
        found.extend((module, name, comparison) for name, comparison in module.comparisons(*inputs).items())

    hooks = [m.register_forward_pre_hook(record) for m in student.modules() if isinstance(m, Chooses)]
    training, device = student.training, student.mean.device
    tensors = [*student.named_parameters(), *student.named_buffers()]
    shape = (batch_size, 3, student.image_size, student.image_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            state: dict[str, Any] = {name: fake.from_tensor(t) for name, t in tensors}
            images = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = torch.func.functional_call(student.train(), state, (images,))
    finally:
        student.train(training)
        for hook in hooks:
            hook.remove()
    return logits, found
