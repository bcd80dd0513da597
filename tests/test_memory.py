"""The memory that `auto` compares a file with: the machine's, or a container's limit."""

import re
from pathlib import Path

import pytest

from fastofa import memory


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", "1048576\n"])
def test_the_smaller_of_machine_and_limit(limit, tmp_path, monkeypatch):
    (tmp_path / "limit").write_text(limit)
    monkeypatch.setattr(memory, "LIMITS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    machine = 1024 * int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    expected = 1 << 20 if limit == "1048576\n" else machine
    assert memory.memory_bytes() == pytest.approx(expected, rel=0.05)
