"""Whether a step is launch-bound: the GPU computes its kernels faster than the CPU launches them.

Such a step is faster as CUDA graphs, which launch all kernels of a program together. Whether to use them is fixed when
the program is compiled, so measuring the compiled program would mean compiling it twice. Instead the uncompiled one is
measured. If its GPU lags behind the CPU, so does the GPU of the compiled one, since compilation saves a larger share of
the launches than of the GPU's time. If its CPU lags behind, compilation may change that; a graph then only costs a copy
of the batch and some memory, and makes the step independent of how busy the CPU is.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TRIALS = 3
LAUNCHING = 0.9
"""If the CPU launches kernels for more than this fraction of a step's time, the step is launch-bound. If the GPU is the
slower one, it still has to compute the kernels in its queue after the last launch. The queue holds about 1,000 kernels,
which take less than a tenth of the time only in steps of more than 10,000 kernels. Unmeasured on a GPU."""


def launch_share(launch: Callable[[], object], wait: Callable[[], object], trials: int = TRIALS) -> float:
    """The smallest fraction, 0 to 1, of the time of `launch(); wait()` that `launch()` takes, after one warm-up.

    Args:
        launch: launches the work on the device and returns.
        wait: returns when the device is idle.
    """
    launch()
    shares = []
    for _ in range(trials):
        wait()
        began = time.perf_counter()
        launch()
        launched = time.perf_counter()
        wait()
        shares.append((launched - began) / (time.perf_counter() - began))
    return min(shares)


def is_launch_bound(program: nn.Module, inputs: Sequence[object]) -> bool:
    """Whether forward and backward pass of a program on the current GPU are launch-bound. Its buffers are unchanged.

    Args:
        program: not compiled; `program(*inputs)` returns fp32 losses, the first of which has gradients.
    """
    parameters = [parameter for parameter in program.parameters() if parameter.requires_grad]
    before = [(buffer, buffer.clone()) for buffer in program.buffers()]

    def launch() -> tuple[Tensor, ...]:
        return torch.autograd.grad(program(*inputs)[0], parameters, allow_unused=True)

    try:
        return launch_share(launch, torch.cuda.synchronize) > LAUNCHING
    except torch.OutOfMemoryError:  # the uncompiled program needs more memory; a batch that large is not launch-bound
        torch.cuda.empty_cache()
        return False
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
