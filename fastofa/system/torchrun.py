"""Communication of a rank with torchrun.

torchrun restarts all ranks whenever one fails, whatever its exit code; only a signal stops it.
"""

import os
import signal
from pathlib import Path


def is_rank() -> bool:
    """Whether this process is one of several ranks."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_main() -> bool:
    """Whether this process is rank 0 or the only one."""
    return os.environ.get("RANK", "0") == "0"


def stop() -> None:
    """Stop this host's torchrun if it would restart the ranks, which would fail in the same way."""
    restarts, maximum = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if restarts < maximum and (pid := _agent()):
        os.kill(pid, signal.SIGTERM)


def _agent() -> int | None:
    """The pid of torchrun: the nearest ancestor without the environment variables that torchrun sets for its ranks."""
    pid = os.getppid()
    try:
        while b"\0TORCHELASTIC_RUN_ID=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
    return pid if pid > 1 else None
