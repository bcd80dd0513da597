"""A path has one writer at a time. A second writer is refused with the pid of the first; a killed one blocks nobody."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fastofa.system.errors import BadInput
from fastofa.system.files import filling, new_folder
from fastofa.system.locks import close_inherited, writing

HOLD = (
    "import sys; from pathlib import Path; from fastofa.system.locks import close_inherited, writing\n"
    "with writing(Path(sys.argv[1]), inside=True):\n    print('held', flush=True); input()"
)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("inside", [True, False])
def test_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path: Path, inside: bool) -> None:
    out = tmp_path / "a" / "out"
    who = rf"out: another fastofa \(pid {os.getpid()} on {socket.gethostname()}\) is writing there; wait"
    with writing(out, inside):
        with pytest.raises(BadInput, match=who), writing(out, inside):
            raise AssertionError("must not get here")
        with writing(tmp_path / "a" / "other", inside):
            pass
    assert files(tmp_path) == []  # nothing was written, nothing is left
    with writing(out, inside):
        out.mkdir(exist_ok=True)
        (out / "file").write_text("")
    assert files(out) == ["file"]


def test_a_writer_can_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until the other has ended; one notice names it."""
    out, order = tmp_path / "out", list[str]()

    def second() -> None:
        with writing(out, wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with writing(out):
        thread.start()
        end = time.monotonic() + 30
        while "waiting" not in (notice := capsys.readouterr().err):
            assert time.monotonic() < end
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert f"another fastofa (pid {os.getpid()} on" in notice.replace("\n", " ")


def test_a_killed_holder_releases_the_lock(tmp_path: Path) -> None:
    """Its half-written files are removed."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match=rf"pid {process.pid} on"), writing(out, inside=True):
        raise AssertionError("must not get here")
    process.kill()
    process.communicate()
    (out / "checkpoints").mkdir()
    for name in (f".config.json.{process.pid}-00-12ab.tmp", "checkpoints/.step-1.safetensors.1-00-12ab.tmp", "kept"):
        (out / name).write_text("")
    with filling(out):
        assert files(out) == [".lock", "checkpoints", "kept"]
    assert files(out) == ["checkpoints", "kept"]


def test_without_flock_the_named_holder_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running process of this host holds the lock; one of another host does until the file is removed."""

    def flock(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock, here = tmp_path / ".lock", socket.gethostname()
    for holder in ("", "nonsense", f"{2**22 + 1} {here}"):
        lock.write_text(holder)
        with writing(tmp_path, inside=True):
            assert lock.read_text() == f"{os.getpid()} {here}\n"
    for holder in (f"{os.getppid()} {here}", "1 elsewhere"):
        lock.write_text(holder)
        with pytest.raises(BadInput, match=rf"if it no longer runs, remove {lock}"), writing(tmp_path, inside=True):
            raise AssertionError("must not get here")
        assert lock.read_text() == holder


def test_a_path_that_is_not_writable_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for place, cause in (("file/out", "Not a directory"), ("loop", "Not a directory"), ("file", "Not a directory")):
        with (
            pytest.raises(BadInput, match=f"{place}: expected a writable path, got .*{cause}"),
            writing(tmp_path / place, True),
        ):
            raise AssertionError("must not get here")


def test_a_planted_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to("victim")
    with pytest.raises(BadInput, match="expected a writable path"), writing(tmp_path, inside=True):
        raise AssertionError("must not get here")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "student"
    with new_folder(path), pytest.raises(BadInput, match="another fastofa"), new_folder(path):
        raise AssertionError("must not get here")
    with pytest.raises(BadInput, match="already exists"), new_folder(path):
        raise AssertionError("must not get here")


def test_a_forked_process_does_not_keep_its_parents_lock(tmp_path):
    """Otherwise a run killed by SIGKILL could not be resumed before its decoding processes have ended."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            with writing(tmp_path / "run"):
                child = os.fork()
                if child == 0:
                    close_inherited()
                    os.write(write, f"{os.getpid()}\n".encode())
                    signal.pause()
                signal.pause()
        finally:
            os._exit(1)
    child = int(os.read(read, 100).decode())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        with writing(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
