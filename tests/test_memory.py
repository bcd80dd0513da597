"""The memory that `auto` compares a file with: the machine's, or the limit of a container or job."""

import re
from pathlib import Path

import pytest

from fastofa.system import memory

MACHINE = 1024 * int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/\n", {"memory.max": "max"}, MACHINE),
        ("0::/\n", {"memory.max": "1048576"}, 1 << 20),
        ("0::/job/step\n", {"job/memory.max": "1048576", "job/step/memory.max": "max"}, 1 << 20),
        ("0::/job/step\n", {"job/memory.max": "4194304", "job/step/memory.max": "2097152"}, 2 << 20),
        ("0::/job\n", {"other/memory.max": "1048576", "memory.max": "max"}, MACHINE),
        ("4:memory:/job\n3:cpu:/x\n0::/\n", {"memory/job/memory.limit_in_bytes": "1048576"}, 1 << 20),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        (None, {"memory.max": "1048576"}, MACHINE),
    ],
)
def test_the_smallest_of_machine_and_limits(tmp_path, monkeypatch, groups, limits, expected):
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "MOUNT", tmp_path / "mount")
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    for name, limit in limits.items():
        file = tmp_path / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert memory.memory_bytes() == pytest.approx(expected, rel=0.05)
