"""The peaks of this machine, arithmetic and memory bandwidth, measured in the same run as the step."""

from dataclasses import dataclass

import torch

from bench.lib.timing import timed_ms

ROUNDS = 10
BF16_PAYS = 1.2  # bf16 pays if it multiplies matrices this much faster than fp32


@dataclass(frozen=True)
class Machine:
    """Peaks to compare a step with."""

    tflops: float
    """TFLOP/s of a large matrix product."""
    gb_per_second: float
    """GB/s of a large copy, counting bytes read and bytes written."""
    dtype: str


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the best of many short rounds. It takes a quarter of a second on a GPU, a second on a CPU."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device).to(dtype)
    product = torch.empty_like(a)
    source = torch.ones(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fastest_ms(call: object, calls: int) -> float:
        assert callable(call)
        timed_ms(call, device, calls)
        return min(timed_ms(call, device, calls) for _ in range(ROUNDS))

    matmul_ms = fastest_ms(lambda: torch.mm(a, a, out=product), 2 if device.type == "cuda" else 1)
    copy_ms = fastest_ms(lambda: target.copy_(source), 2)
    return Machine(2 * n**3 / matmul_ms / 1e9, 2 * source.numel() / copy_ms / 1e6, str(dtype).removeprefix("torch."))


def best(device: torch.device) -> Machine:
    """Measure in the dtype that trains fastest: bf16, or fp32 on a CPU without bf16 instructions."""
    bf16 = measure(device, torch.bfloat16)
    if device.type == "cuda":
        return bf16
    fp32 = measure(device, torch.float32)
    return bf16 if bf16.tflops > BF16_PAYS * fp32.tflops else fp32
