"""The settings of a command's process: where the compiler keeps its cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = "from fastofa.system.tuning import own_process as own; import os; own(); print(os.environ.get({!r}, 'unset'))"


def cache_folder(**variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR", "XDG", "HOME"))}
    command = [sys.executable, "-c", SHOW.format("TORCHINDUCTOR_CACHE_DIR")]
    return subprocess.run(command, env={**kept, **variables}, check=True, capture_output=True, text=True).stdout.strip()


def test_the_compilers_cache_is_in_the_users_cache_folder(tmp_path: Path):
    """A variable that is set is kept."""
    home, cache = tmp_path / "home", tmp_path / "cache"
    assert cache_folder(HOME=str(home)) == str(home / ".cache" / "fastofa" / "inductor")
    assert cache_folder(HOME=str(home), XDG_CACHE_HOME=str(cache)) == str(cache / "fastofa" / "inductor")
    assert cache_folder(HOME=str(home), TORCHINDUCTOR_CACHE_DIR="mine") == "mine"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_without_a_folder_it_stays_torchs_own(tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    assert cache_folder(HOME=str(tmp_path / place)) == "unset"
