"""Whether the CPU launches more slowly than the GPU computes."""

import pytest
import torch
from torch import nn

import fastofa.training.launch_bound
from fastofa.training.launch_bound import LAUNCHING, is_launch_bound, launch_share


class Machine:
    """A CPU that launches for `launch` seconds, and a GPU that computes for `compute` seconds."""

    def __init__(self, launch: float, compute: float) -> None:
        self.launch_s, self.compute_s, self.now, self.idle_at = launch, compute, 0.0, 0.0

    def launch(self) -> None:
        begin = max(self.now, self.idle_at)
        self.now += self.launch_s
        self.idle_at = max(begin + self.compute_s, self.now)

    def wait(self) -> None:
        self.now = max(self.now, self.idle_at)


@pytest.mark.parametrize(
    ("launch", "compute", "bound"), [(5.0, 1.0, True), (5.0, 4.9, True), (5.0, 6.0, False), (5.0, 50.0, False)]
)
def test_the_slower_of_cpu_and_gpu_decides(monkeypatch, launch, compute, bound):
    machine = Machine(launch, compute)
    monkeypatch.setattr(fastofa.training.launch_bound.time, "perf_counter", lambda: machine.now)
    share = launch_share(machine.launch, machine.wait)
    assert share == pytest.approx(min(1, launch / max(compute, launch)))
    assert (share > LAUNCHING) == bound


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(monkeypatch, fails):
    """Neither in running statistics nor in gradients, also where memory runs out, which means not bound."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    program = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 2))
    program[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    calls = []

    def losses(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if fails and len(calls) == 2:
            raise torch.OutOfMemoryError
        return nn.Sequential.forward(program, images).mean(0)

    monkeypatch.setattr(program, "forward", losses)
    bound = is_launch_bound(program, [torch.randn(5, 3, 2, 2)])
    assert len(calls) >= 2
    assert not (fails and bound)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    assert all(parameter.grad is None for parameter in program.parameters())
