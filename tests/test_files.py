"""Files are written whole or not at all, are read back bit for bit, and are refused in one line after any change."""

import errno
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastofa.system.files
from fastofa.system.errors import BadInput
from fastofa.system.files import (
    is_pickle,
    load_tensors,
    map_file,
    new_folder,
    read_file,
    read_json,
    save_tensors,
    temporary_name,
    write_atomic,
    write_json,
)

ROOT = Path(fastofa.system.files.__file__).parents[1]
DTYPES = [
    *(torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.bool),
]
NOBODY = 2**22 + 1  # larger than any process's number
INFO = {"views": 3, "eps": 1.5, "name": "é ∀ \n", "list": [1, None, True], "nested": {"b": 1, "a": []}}


def some_tensors() -> dict[str, Tensor]:
    return {
        "classes": torch.tensor([[0, 7], [65535, 1]], dtype=torch.uint16),
        "flip": torch.tensor([True, False, True]),
        "log_probs": torch.tensor([[-0.5, -65504.0], [0.0, float("nan")]], dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert bits(got[name]) == bits(tensor), name


def one_line(error: pytest.ExceptionInfo[BadInput], path: Path) -> str:
    """The message of an error, which must be one line that names the file."""
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that fills up; Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing(code: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# --- write_atomic -----------------------------------------------------------------------------------------------------


def test_files_are_written_and_replaced_and_folders_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"one")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file.bin"]


def test_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    """The write runs out of space half-way."""
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    with disk_of(100_000), pytest.raises(BadInput) as error:
        write_atomic(path, b"x" * 300_000)
    assert "0.3 MB" in one_line(error, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_the_last_steps_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """File systems may report a full disk only when the data is flushed or the file is renamed."""
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, step, failing(errno.ENOSPC))
    with pytest.raises(BadInput, match="No space left on device") as error:
        write_atomic(path, b"new")
    one_line(error, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_data_is_flushed_before_the_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(("fsync", os.fstat(file).st_size)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append(("replace", 0)), replace(*names)))
    write_atomic(tmp_path / "file.bin", b"x" * 1000)
    assert steps == [("fsync", 1000), ("replace", 0)]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    """A file instead of a folder, a folder instead of the file."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below.bin", tmp_path / "folder"):
        with pytest.raises(BadInput) as error:
            write_atomic(path, b"new")
        one_line(error, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_readers_see_the_old_or_the_new_file(tmp_path: Path) -> None:
    """One thread reads continuously while another replaces the file many times."""
    path = tmp_path / "file.bin"
    contents = [bytes([i]) * (1_000_000 + i) for i in range(4)]
    write_atomic(path, contents[0])
    seen, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(40):
            write_atomic(path, contents[i % 4])
    finally:
        stop.set()
        reader.join()
    assert seen
    assert seen <= set(contents)


def test_killed_while_writing(tmp_path: Path) -> None:
    """The old file is kept; the next write removes the temporary file of the killed process."""
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from fastofa.system.files import write_atomic\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(Path(sys.argv[1]), b'new' * 100_000)"
    )
    killed = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_temporary_files_of_running_processes_are_kept(tmp_path: Path) -> None:
    """The next writer removes only those of dead processes of this host, and old ones, and only for this file."""
    path, here = tmp_path / "file.bin", temporary_name(tmp_path / "file.bin").name.split("-")[1]
    left = [f".file.bin.{NOBODY}-{here}-0123abcd.tmp", ".file.bin.1-00ff-0123abcd.tmp"]
    kept = [
        f".file.bin.{os.getppid()}-{here}-0123abcd.tmp",  # alive
        ".file.bin.2-00ff-0123abcd.tmp",  # of another host, just now
        f".file.bin.more.{NOBODY}-{here}-0123abcd.tmp",
        ".file.bin.tmp",
    ]
    for name in (*left, *kept):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / left[1], (0, 0))
    write_atomic(path, b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "file.bin"])


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if somebody guesses the temporary name, the link's target is unchanged."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = {temporary_name(tmp_path / "file.bin").name for _ in range(20)}
    assert len(names) == 20
    monkeypatch.setattr(fastofa.system.files.secrets, "token_hex", lambda _: "guessed")
    temporary_name(tmp_path / "file.bin").symlink_to(victim)
    with pytest.raises(BadInput, match="File exists"):
        write_atomic(tmp_path / "file.bin", b"new")
    assert victim.read_text() == "precious"


def test_a_link_at_the_files_path_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file.bin").symlink_to("victim")
    write_atomic(tmp_path / "file.bin", b"new")
    assert ((tmp_path / "victim").read_text(), (tmp_path / "file.bin").read_text()) == ("precious", "new")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free space"), (errno.EACCES, "write access"), (errno.EROFS, "writable"),
        (errno.ENOENT, "another path"), (errno.EMFILE, "ulimit -n"),
    ],
)  # fmt: skip
def test_the_remedy_matches_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str) -> None:
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(BadInput, match=f"{os.strerror(code)}; .*{remedy}") as error:
        write_atomic(tmp_path / "file.bin", b"new")
    assert ("free space" in str(error.value)) == (code == errno.ENOSPC)


# --- What is no file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_json, load_tensors, map_file, read_file], ids=lambda read: read.__name__)
def test_only_regular_files_are_opened(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """Reading a pipe could block forever; a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("none")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
    for name, message in {
        "pipe": "expected a file, got a pipe", "socket": "got a socket", "loop": "symbolic links",
        "nowhere": "No such file", ".": "got a folder", "pipe/below": "Not a directory", "/dev/zero": "got a device",
        "\0": "null",
    }.items():  # fmt: skip
        with pytest.raises(BadInput, match=message) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, INFO)
    assert read_json(path) == INFO
    for damage in (b"", b'{"views": 3', b"\x80\x02}q\x00.", b"\xff\xfe"):
        path.write_bytes(damage)
        with pytest.raises(BadInput, match="expected JSON") as error:
            read_json(path)
        one_line(error, path)
    path.write_text("[" * 100_000)
    with pytest.raises(BadInput, match="nested too deep") as error:
        read_json(path)
    one_line(error, path)
    with pytest.raises(BadInput, match="No such file"):
        read_json(tmp_path / "none.json")


# --- new_folder -------------------------------------------------------------------------------------------------------


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "cache"
    left = [tmp_path / "a" / name for name in (f".cache.{NOBODY}-0000-12ab.tmp", f".cache.{os.getpid()}-00-12ab.tmp")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "left by a killed process").write_text("")
    with new_folder(target) as folder:
        (folder / "cache.json").write_text("{}")
        assert not target.exists()
    assert os.listdir(target) == ["cache.json"]
    assert os.listdir(target.parent) == ["cache"]


@pytest.mark.parametrize("error", [BadInput("no such teacher"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_the_folder_of_a_failed_command_is_removed(tmp_path: Path, error: BaseException) -> None:
    expected = BadInput if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), new_folder(tmp_path / "cache") as folder:  # noqa: PT012
        (folder / "cache.json").write_text("{}")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, Path("."), Path("/")):
        with pytest.raises(BadInput, match="already exists"), new_folder(path):
            raise AssertionError("must not get here")
    assert (tmp_path / "file").read_text() == "mine"


# --- Tensors: what is written comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_round_trip_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit patterns are preserved, including the payload of NaNs."""
    raw = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8)
    tensor = raw > 127 if dtype == torch.bool else raw.view(dtype)
    save_tensors(tmp_path / "x.safetensors", {"x": tensor}, {})
    tensors, info = load_tensors(tmp_path / "x.safetensors")
    assert_same(tensors, {"x": tensor})
    assert info == {}


def test_round_trip_of_several_tensors_and_info(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, some_tensors(), INFO)
    tensors, info = load_tensors(path)
    assert_same(tensors, some_tensors())
    assert info == INFO
    with safetensors.safe_open(path, framework="pt") as file:  # and it is a plain safetensors file
        assert sorted(file.keys()) == sorted(some_tensors())


def test_round_trip_of_transposed_sliced_and_trained_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    given = {"transposed": base.t(), "strided": base[::2, 1::2], "trained": torch.nn.Parameter(torch.ones(2))}
    save_tensors(tmp_path / "x.safetensors", given, {})
    tensors, _ = load_tensors(tmp_path / "x.safetensors")
    assert_same(tensors, {name: tensor.detach() for name, tensor in given.items()})


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    st.text(max_size=8),
)
def test_files_are_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[torch.dtype, list[int]]], note: str
) -> None:
    """To the byte: names, dtypes and shapes in any combination, also without values."""
    tensors = {
        name: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        for number, (name, (dtype, shape)) in enumerate(kinds.items())
    }
    path = tmp_path_factory.mktemp("library") / "file.safetensors"
    save_tensors(path, tensors, {"note": note})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata)


def test_round_trip_without_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {}, INFO)
    assert load_tensors(tmp_path / "x.safetensors") == ({}, INFO)


def test_equal_contents_give_equal_bytes_in_any_process(tmp_path: Path) -> None:
    """Two processes with other hash seeds and the opposite order of names write the same file."""
    code = (
        "import sys, torch; from pathlib import Path; from fastofa.system.files import save_tensors\n"
        "step = int(sys.argv[2]); names = [f'tensor{i}' for i in range(20)][::step]\n"
        "tensors = {n: torch.full((3,), int(n[6:])) for n in names}\n"
        "save_tensors(Path(sys.argv[1]), tensors, {n: {'b': 1, 'a': n} for n in names})"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / seed), step],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed, step in (("1", "1"), ("2", "-1"))
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_other_contents_give_other_checksums(tmp_path: Path) -> None:
    """Name, dtype, shape, values and info all affect it."""
    x = torch.zeros(4, dtype=torch.int32)
    contents: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        ({"x": x}, {}),
        ({"y": x}, {}),
        ({"x": x.view(torch.uint32)}, {}),
        ({"x": x.reshape(2, 2)}, {}),
        ({"x": x + 1}, {}),
        ({"x": x}, {"a": 1}),
    ]
    checksums = set()
    for tensors, info in contents:
        save_tensors(tmp_path / "x.safetensors", tensors, info)
        with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
            checksums.add(file.metadata()["fastofa"].partition('"sha256": ')[2])
    assert len(checksums) == len(contents)


def test_full_disk_while_saving_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, some_tensors(), INFO)
    with disk_of(100_000), pytest.raises(BadInput):
        save_tensors(path, {"x": torch.zeros(100_000)}, {})
    assert_same(load_tensors(path)[0], some_tensors())
    assert os.listdir(tmp_path) == ["x.safetensors"]


# --- Tensors: what was touched is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    save_tensors(path, some_tensors(), INFO)
    return path.read_bytes()


@pytest.fixture(scope="module")
def touched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("touched") / "x.safetensors"


def data_start(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


def test_every_truncation_is_refused(whole: bytes, touched: Path) -> None:
    for length in range(len(whole)):
        touched.write_bytes(whole[:length])
        with pytest.raises(BadInput) as error:
            load_tensors(touched)
        one_line(error, touched)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), change=st.integers(1, 255))
def test_a_changed_byte_of_the_data_is_refused(whole: bytes, touched: Path, data: st.DataObject, change: int) -> None:
    position = data.draw(st.integers(data_start(whole), len(whole) - 1))
    touched.write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
    with pytest.raises(BadInput, match="checksum does not match") as error:
        load_tensors(touched)
    one_line(error, touched)


@settings(max_examples=1000, deadline=None)
@given(data=st.data(), change=st.integers(1, 255))
def test_a_changed_byte_of_the_header_is_refused(whole: bytes, touched: Path, data: st.DataObject, change: int) -> None:
    """Or it changes nothing: "1.5" may become "1.50", or é another spelling of é, but never another value."""
    position = data.draw(st.integers(0, data_start(whole) - 1))
    touched.write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
    try:
        tensors, info = load_tensors(touched)
    except BadInput:
        return
    assert_same(tensors, some_tensors())
    assert info == INFO


@pytest.mark.parametrize("word", [b"sha256", b"info", b"fastofa", b"__metadata__"])
def test_every_key_of_the_header_is_needed(whole: bytes, touched: Path, word: bytes) -> None:
    touched.write_bytes(whole.replace(word, word[::-1], 1))
    with pytest.raises(BadInput) as error:
        load_tensors(touched)
    one_line(error, touched)


def test_swapped_values_are_refused(tmp_path: Path) -> None:
    """The data of two tensors are exchanged."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.full((4,), 1, dtype=torch.uint8), "b": torch.full((4,), 2, dtype=torch.uint8)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + whole[-4:] + whole[-8:-4])
    with pytest.raises(BadInput, match="checksum"):
        load_tensors(path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_renamed_pickle_is_named_as_one_and_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(Witness(tmp_path / "ran"), protocol=protocol))
    assert is_pickle(path)
    with pytest.raises(BadInput, match="a pickle") as error:
        load_tensors(path)
    one_line(error, path)
    assert not (tmp_path / "ran").exists()


class Witness:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_a_renamed_torch_checkpoint_is_named_as_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"x": torch.ones(3)}, path)
    with pytest.raises(BadInput, match="a pickle") as error:
        load_tensors(path)
    one_line(error, path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"fastofa": "[" * 100_000},
        {"fastofa": '{"sha256": "", "info": []}'},
        None,
        {"format": "pt"},
        {"fastofa": "not json"},
        {"fastofa": '{"info": {}}'},
        {"fastofa": "[]"},
    ],
)
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.ones(3)}, path, metadata)
    with pytest.raises(BadInput) as error:
        load_tensors(path)
    one_line(error, path)


@pytest.mark.parametrize("content", [b"", b"a text file\n", b"\x00" * 64, b"\xff" * 64])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="truncated or damaged") as error:
        load_tensors(path)
    one_line(error, path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        load_tensors(tmp_path / "none.safetensors")
    with pytest.raises(BadInput) as error:
        load_tensors(tmp_path)
    one_line(error, tmp_path)


def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path):
    """A sparse file, which takes no space. Writes to the mapping do not reach the file."""
    with open(tmp_path / "large", "wb") as file:
        file.write(b"begin")
        file.truncate(4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    mapped = map_file(tmp_path / "large")
    assert mapped[:6] == b"begin\0"
    assert mapped[-1:] == b"\0"
    mapped[:1] = b"B"
    assert map_file(tmp_path / "large")[:5] == b"begin"
