"""The training step: student, exits and loss compiled as one program, then one update. It never waits for the device.

Shapes: B images in a part of a step, C classes, H heads.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastofa.methods.find_method import needs_of
from fastofa.methods.method import Outputs, Sizes
from fastofa.methods.objective import Objective
from fastofa.methods.own_errors import explained
from fastofa.methods.targets import Targets
from fastofa.pipelines import Batch
from fastofa.runs.config import TrainConfig
from fastofa.student.choose_kernels import check_kernels, use_kernels
from fastofa.student.measure_kernels import KernelChoice
from fastofa.student.model import Student
from fastofa.student.shared_norms import share_statistics
from fastofa.system.device import choose_bf16, choose_compile
from fastofa.system.progress import notice
from fastofa.system.tuning import allow_image_sizes
from fastofa.teacher.online import TargetSource
from fastofa.training.distributed import World
from fastofa.training.launch_bound import is_launch_bound
from fastofa.training.moving_average import MovingAverage
from fastofa.training.optim import check_optimizer, create_optimizer, set_learning_rate

MAX_IMAGE_SIZES = 64  # maximum number for which one run compiles


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raises BadInput for options that the device does not support."""
    check_kernels(config.kernels, device)
    check_optimizer(config.optimizer, device)


class Program(nn.Module):
    """The compiled part of a step: uint8 images [B, 3, S, S] -> the loss and its parts, fp32 [parts]."""

    def __init__(self, student: Student, objective: Objective, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        needs = needs_of(config.methods)
        self.needs_pooled, self.needs_stages = "pooled vector" in needs, "stage features" in needs
        self.stages = list(student.find_stages().values()) if self.needs_stages else []
        self.device_type, self.bf16 = device.type, choose_bf16(config.precision, device)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Targets | None,
        partner_labels: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        return self.objective(self.outputs(images), labels, targets, partner_labels, mix)

    def outputs(self, images: Tensor) -> Outputs:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            if self.needs_pooled or self.needs_stages:
                return Outputs(*self.student.with_features(images, self.needs_pooled, self.stages))
            return Outputs(self.student(images))


class Step:
    """One update of the student on its device; owns the optimiser and the moving average of the weights.

    `steps` counts the updates. `sums`, fp32 [len(names)] on the device, accumulates the values called `names` over the
    `summed` updates since `reset_sums`: the losses of this rank's images and the norm of the gradient over all ranks.
    Once a value is not finite, its sum is not finite either.

    Args:
        sizes: what the modules of the methods depend on; None if these have none.
        kernels: the choice of kernels that an earlier start of the run recorded.
    """

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        device: torch.device,
        world: World | None = None,
        sizes: Sizes | None = None,
        kernels: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.device, self.world = config, device, world or World()
        check_device(config, device)
        objective = Objective(config.objective, sizes or Sizes(0))
        objective.impl = "triton" if "loss" in config.kernels else "torch"
        student.methods, self.names = objective.methods, (*objective.parts, "grad_norm")
        objective.to(device)
        student = student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.compiled = choose_compile(config.compile, device)
        if self.compiled:
            allow_image_sizes(MAX_IMAGE_SIZES)
        program = Program(student, objective, config, device)
        self.kernels = KernelChoice(device, self.compiled, kernels or {}, self.world.is_main, self.world.broadcast)
        images = config.batch_size // self.world.size // config.accumulate
        logits = use_kernels(student, config.kernels, device, self.kernels, images, program.bf16)
        if logits is not None:
            self.kernels.choose((program.objective, *each) for each in program.objective.comparisons(logits).items())
        if config.sync_bn and self.world.size > 1:
            share_statistics(student, dist.group.WORLD.group_name)  # type: ignore[union-attr]
        self.student = student
        self.parameters = list(student.parameters())
        self.optimizer = create_optimizer(student, config)
        self.ema = None if config.ema is None else MovingAverage(student, config.ema)
        self.bf16, self.outputs = program.bf16, program.outputs
        self.program: Any = program if self.world.size == 1 else self._distributed(program)
        possible = self.compiled and device.type == "cuda" and config.accumulate == 1
        self.cuda_graphs = possible and config.cuda_graphs == "on"
        self.uncompiled = program if possible and config.cuda_graphs == "auto" else None  # compiled by the first step
        if self.compiled and self.uncompiled is None:
            self._compile(program)
        self.steps = 0
        self.reset_sums()

    def _compile(self, program: Program) -> None:
        allow_image_sizes(MAX_IMAGE_SIZES)
        modes = {
            (False, True): "reduce-overhead",
            (True, False): "max-autotune-no-cudagraphs",
            (True, True): "max-autotune",
        }
        mode = modes.get((self.config.compile == "max-autotune", self.cuda_graphs))
        program.compile(fullgraph=True, dynamic=False, mode=mode)

    def _choose_cuda_graphs(self, program: Program, inputs: Sequence[Any]) -> None:
        """Measure the program before it is compiled; rank 0 decides for all ranks."""
        bound = bool(self.world.broadcast(int(is_launch_bound(program, inputs))))
        if self.world.is_main:
            how = "more slowly than the GPU computes" if bound else "fast enough for the GPU"
            notice(f"CUDA graphs {'on' if bound else 'off'}: the CPU launches the step's kernels {how}")
        self.cuda_graphs, self.uncompiled = bound, None
        self._compile(program)

    def _distributed(self, program: Program) -> DistributedDataParallel:
        """Wrap the program so that gradients are averaged over the ranks during the backward pass."""
        for parameter in self.student.unused_parameters():
            parameter.requires_grad_(False)  # DDP would wait for a gradient that never comes
        ddp = DistributedDataParallel(program, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.config.grad_compression == "bf16":
            ddp.register_comm_hook(None, bf16_compress_hook)
        return ddp

    def __call__(self, parts: Sequence[Batch], targets: TargetSource | None, lr: float) -> None:
        """Take one step on this rank's images, in one part or, to save memory, in several.

        Args:
            targets: the source of the teacher's targets for this epoch's views; None without a teacher.
        """
        c = self.config
        torch.manual_seed(_random_state(c.seed, self.steps, self.world.rank))  # dropout, stochastic depth
        set_learning_rate(self.optimizer, lr)
        for number, batch in enumerate(parts, start=1):
            part_targets = None if targets is None else targets.of(batch)
            inputs = (batch.images, batch.labels, part_targets, batch.partner_labels, batch.mix)
            if self.uncompiled is not None:
                self._choose_cuda_graphs(self.uncompiled, inputs)
                torch.manual_seed(_random_state(c.seed, self.steps, self.world.rank))
            if self.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # imports the whole compiler, which takes a second
            last = number == len(parts) or self.world.size == 1
            with nullcontext() if last else self.program.no_sync():
                with explained(c.methods):
                    losses = self.program(*inputs)
                losses = losses / len(parts)
                losses[0].backward()
            self.sums[:-1] += losses.detach()
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if c.clip is not None:
            clip_grads_with_norm_(self.parameters, c.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.steps)
        self.sums[-1] += norm
        self.summed += 1

    def is_finite(self) -> bool:
        """Whether the weights, statistics and moving average are finite. Waits for the device."""
        states = [self.student.state_dict(), {} if self.ema is None else self.ema.module.state_dict()]
        norm = get_total_norm([t for state in states for t in state.values() if t.is_floating_point()])
        return bool(norm.isfinite())

    def reset_sums(self) -> None:
        self.sums = torch.zeros(len(self.names), device=self.device)
        self.summed = 0


def _random_state(seed: int, step: int, rank: int) -> int:
    """The seed of the random generators at a step on a rank; a resumed run therefore needs no saved random state.

    It has 32 bits because PyTorch's CPU generator ignores the higher ones.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
