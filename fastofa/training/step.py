"""The training step: student, exits and loss as one compiled program, then one update. It never waits for the device.

Shapes: B images of a part of a step, C classes, H heads.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastofa.methods.objective import PARTS, Objective
from fastofa.methods.targets import Targets
from fastofa.pipelines import Batch
from fastofa.runs.config import TrainConfig
from fastofa.student.kernels import check_kernels, use_kernels
from fastofa.student.model import Student
from fastofa.system.device import choose_bf16, choose_compile
from fastofa.system.errors import BadInput
from fastofa.system.tuning import allow_image_sizes
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.training.distributed import World
from fastofa.training.optim import check_optimizer, create_optimizer, set_learning_rate

SUMS = (*PARTS, "grad_norm")
MOST_SIZES = 64  # of pictures that one run compiles for


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raises BadInput for what the device cannot do."""
    check_kernels(config.kernels, device)
    if config.sync_bn and device.type != "cuda":
        raise BadInput("sync-bn: expected GPUs, the student is on the CPU; leave it out")
    if config.sync_bn and choose_compile(config.compile, device):
        raise BadInput("sync-bn: expected --compile off, PyTorch's synchronised batch norm cannot be compiled as one")
    check_optimizer(config.optimizer, device)


class Program(nn.Module):
    """What is compiled: uint8 images -> the loss and its parts, fp32 [len(PARTS)]."""

    def __init__(self, student: Student, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.student, self.objective = student, Objective(config.objective, device)
        self.device_type, self.bf16 = device.type, choose_bf16(config.precision, device)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Targets | None,
        partner_labels: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            logits = self.student(images)  # [H, B, C]
        return self.objective(logits, labels, targets, partner_labels, mix)


class Step:
    """One update of the student on its device; makes its optimiser and its moving average.

    `steps` counts the updates; `sums` holds what SUMS names, added up over the `summed` updates since `reset_sums`: the
    losses of this rank's images, the norm of everybody's gradient. A number that is not finite stays in the sums.
    """

    def __init__(self, student: Student, config: TrainConfig, device: torch.device, world: World | None = None) -> None:
        self.config, self.device, self.world = config, device, world or World()
        check_device(config, device)
        student = student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.compiled = choose_compile(config.compile, device)
        if config.sync_bn and self.world.size > 1:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        use_kernels(student, config.kernels, device, report=self.world.rank == 0)
        self.student = student
        self.parameters = list(student.parameters())
        self.optimizer = create_optimizer(student, config)
        self.ema = None if config.ema is None else ModelEmaV3(student, decay=config.ema)
        program = Program(student, config, device)
        self.bf16 = program.bf16
        if self.compiled:
            allow_image_sizes(MOST_SIZES)
            program.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if config.cuda_graphs else None)
        self.program: Any = program if self.world.size == 1 else self._distributed(program)
        self.steps = 0
        self.reset_sums()

    def _distributed(self, program: Program) -> DistributedDataParallel:
        """Gradients become the mean over the ranks while the backward pass still runs."""
        for parameter in self.student.unused_parameters():
            parameter.requires_grad_(False)  # or every rank would wait for its gradient
        ddp = DistributedDataParallel(program, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.config.grad_compression == "bf16":
            ddp.register_comm_hook(None, bf16_compress_hook)
        return ddp

    def __call__(self, parts: Sequence[Batch], targets: DeviceTargets | None, lr: float) -> None:
        """Take one step on this rank's images, which come in one part, or in several where memory is short.

        Args:
            targets: the teacher's answers to this epoch's views; None without a teacher.
        """
        c = self.config
        torch.manual_seed(_random_state(c.seed, self.steps, self.world.rank))  # dropout and the like
        set_learning_rate(self.optimizer, lr)
        for number, batch in enumerate(parts, start=1):
            if c.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # which imports all of the compiler: a second
            found = None if targets is None else targets.lookup(batch.rows)
            last = number == len(parts) or self.world.size == 1
            with nullcontext() if last else self.program.no_sync():
                losses = self.program(batch.images, batch.labels, found, batch.partner_labels, batch.mix) / len(parts)
                losses[0].backward()
            self.sums[:-1] += losses.detach()
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if c.clip is not None:
            clip_grads_with_norm_(self.parameters, c.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.student, self.steps)
        self.sums[-1] += norm
        self.summed += 1

    def is_finite(self) -> bool:
        """Are weights and statistics, and their average? Waits for the device."""
        states = [self.student.state_dict(), {} if self.ema is None else self.ema.module.state_dict()]
        norm = get_total_norm([t for state in states for t in state.values() if t.is_floating_point()])
        return bool(norm.isfinite())

    def reset_sums(self) -> None:
        self.sums = torch.zeros(len(SUMS), device=self.device)
        self.summed = 0


def _random_state(seed: int, step: int, rank: int) -> int:
    """A state of the random generators for each step and rank, so that a resumed run needs none saved.

    Mixed into 32 bits, since more are cut off by PyTorch's generator for the CPU.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
