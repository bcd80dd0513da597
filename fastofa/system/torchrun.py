"""What torchrun has to be told by its ranks.

It starts all ranks again whenever one fails, whatever the exit code says; only a signal stops it.
"""

import os
import signal
from pathlib import Path


def is_rank() -> bool:
    """Is this process one of several?"""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_main() -> bool:
    """Is it rank 0, or on its own?"""
    return os.environ.get("RANK", "0") == "0"


def stop() -> None:
    """Have the torchrun of this host stop now, where it would start the ranks again: that would fail alike."""
    tried, most = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if tried < most and (pid := _agent()):
        os.kill(pid, signal.SIGTERM)


def _agent() -> int | None:
    """The nearest process above this one that has not the variables which torchrun gives to what it starts."""
    pid = os.getppid()
    try:
        while b"\0TORCHELASTIC_RUN_ID=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
    return pid if pid > 1 else None
