"""The memory of this machine, or the limit on this process."""

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_bytes() -> int:
    """The machine's memory in bytes, or the limit of a container or job if smaller; the page cache counts as well."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits()])


def _limits() -> Iterator[int]:
    """The limits in bytes of the control groups to which this process belongs."""
    for line in GROUPS.read_text().splitlines() if GROUPS.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            top, name = (MOUNT / "memory", "memory.limit_in_bytes") if controllers else (MOUNT, "memory.max")
            folder = top / group.lstrip("/")
            for file in (place / name for place in (folder, *folder.parents) if place.is_relative_to(top)):
                if file.exists() and (limit := file.read_text().strip()) != "max":
                    yield int(limit)
