"""How much memory this machine has, or lets this process have."""

import os
from pathlib import Path

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # a container's: cgroup 2 and 1


def memory_bytes() -> int:
    """The machine's memory, or a container's limit where that is smaller; what files keep of it included."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, LIMITS):
        limit = path.read_text().strip() if path.exists() else "max"
        if limit != "max":
            found.append(int(limit))
    return min(found)
