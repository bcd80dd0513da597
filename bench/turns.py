"""Benchmarks that share one GPU: all compile at the same time, then each measures alone, in its turn.

`bench.gpu` starts them with BENCH_TURN=FOLDER/NAME in the environment and gives each its turn by the file NAME.go.
Without the variable a benchmark has the machine to itself.
"""

import gc
import os
import sys
import time
from pathlib import Path

VARIABLE = "BENCH_TURN"


def wait_for_turn() -> None:
    """Called between compiling and measuring; gives back the device memory that PyTorch caches while it waits."""
    if VARIABLE not in os.environ:
        return
    turn = Path(os.environ[VARIABLE])
    gc.collect()
    if "torch" in sys.modules:  # a benchmark that has not imported it keeps nothing
        sys.modules["torch"].cuda.empty_cache()
    turn.with_suffix(".ready").touch()
    while not turn.with_suffix(".go").exists():
        time.sleep(0.05)
