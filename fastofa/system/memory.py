"""How much memory this machine has, or lets this process have."""

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_bytes() -> int:
    """The machine's memory, or a container's or job's limit where that is smaller; what files keep of it included."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits()])


def _limits() -> Iterator[int]:
    """Of the control groups that this process is in, in bytes."""
    for line in GROUPS.read_text().splitlines() if GROUPS.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            top, name = (MOUNT / "memory", "memory.limit_in_bytes") if controllers else (MOUNT, "memory.max")
            folder = top / group.lstrip("/")
            for file in (place / name for place in (folder, *folder.parents) if place.is_relative_to(top)):
                if file.exists() and (limit := file.read_text().strip()) != "max":
                    yield int(limit)
