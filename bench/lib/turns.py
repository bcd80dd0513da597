"""Benchmarks that share one GPU: all compile at the same time, then each measures alone, in its turn.

`bench.gpu` starts them with BENCH_TURN=FOLDER/NAME in the environment and gives each its turn by the file NAME.go.
Without the variable, a benchmark has the machine to itself.
"""

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "BENCH_TURN"
PATIENCE = 8  # attempts while other jobs hold the device's memory


def wait_for_turn() -> None:
    """Wait for the turn, between compiling and measuring; meanwhile, PyTorch's cached device memory is released."""
    if VARIABLE not in os.environ:
        return
    turn = Path(os.environ[VARIABLE])
    gc.collect()
    if "torch" in sys.modules:  # a benchmark that has not imported it holds no device memory
        sys.modules["torch"].cuda.empty_cache()
    turn.with_suffix(".ready").touch()
    while not turn.with_suffix(".go").exists():
        time.sleep(0.05)


def patiently(call: Callable[[], Any]) -> Any:
    """The result of the call, which is repeated while other jobs hold the device's memory."""
    for _ in range(PATIENCE - 1 if VARIABLE in os.environ else 0):
        try:
            return call()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        sys.modules["torch"].cuda.empty_cache()
        time.sleep(5)
    return call()


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is PyTorch's own error, or that of a library without memory for its workspace."""
    return "out of memory" in str(error) or "_STATUS_ALLOC_FAILED" in str(error)
