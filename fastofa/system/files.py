"""Files that appear whole or not at all, and safetensors with one JSON header."""

import errno
import functools
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastofa.system.errors import BadInput
from fastofa.system.locks import is_alive, writing
from fastofa.system.read import read_file as read_file
from fastofa.system.read import read_json as read_json
from fastofa.system.read import regular_file

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # in Python's mmap since 3.13
UNTOUCHED_S = 3600  # after which a temporary file of an unknown process is a leftover
# What helps against which error of a write; others need another place.
REMEDIES = {
    errno.ENOSPC: "free space or choose another place",
    errno.EDQUOT: "free space or choose another place",
    errno.EFBIG: "free space or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EACCES: "its owner must allow you to write there, or choose another place",
    errno.EPERM: "its owner must allow you to write there, or choose another place",
    errno.EROFS: "choose a place that may be written",
    errno.EIO: "look at the disk, or choose another place",
}


def reason(error: OSError) -> str:
    """What went wrong, and what helps."""
    return f"{error.strerror or error}; {REMEDIES.get(error.errno or 0, 'choose another place')}"


# --- Reading ----------------------------------------------------------------------------------------------------------


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read when they are touched. Private: PyTorch wants memory it may write to, the file stays.

    Without a reserve for what might be written, which Linux refuses for a file larger than the machine's memory.
    """
    with open(regular_file(path), "rb") as file:
        flags, prot = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename: readers see the old file or the new one.

    The temporary name is new each time, and is no link that somebody laid there. What killed processes left is removed.

    Raises:
        BadInput: the disk is full or the folder cannot be written; the temporary file is gone.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise BadInput(
            f"could not write {path} ({len(data) / 1e6:.1f} MB): {reason(error)}; nothing half-written was left"
        ) from None


def temporary_name(path: Path) -> Path:
    """A name beside `path` for what is to replace it, which says whose it is."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_here()}-{secrets.token_hex(4)}.tmp")


def remove_leftovers(path: Path, locked: bool = False) -> None:
    """Remove what killed processes left of `path`; with its lock held all that is there, but for this process's."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)-([0-9a-f]+)-[0-9a-f]+\.tmp")
    with suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if (named := pattern.fullmatch(entry.name)) and _is_left(entry, int(named[1]), named[2], locked):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _is_left(entry: os.DirEntry[str], pid: int, place: str, locked: bool) -> bool:
    if place != _here():
        return locked or time.time() - entry.stat(follow_symlinks=False).st_mtime > UNTOUCHED_S
    return not is_alive(pid) or (locked and pid == os.getpid())  # a killed process of the same number, then


@functools.cache
def _here() -> str:
    """Of this host and this container: where a process's number means that process."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    return hashlib.sha256(f"{socket.gethostname()} {container}".encode()).hexdigest()[:8]


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is filled file by file. What killed processes left in it is removed.

    Raises:
        BadInput: another process is writing there.
    """
    with writing(folder, inside=True):
        for left in {*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")}:
            name = left.name.rsplit(".", 2)[0].removeprefix(".")
            remove_leftovers(left.with_name(name), locked=True)
        yield


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when it is whole.

    Raises:
        BadInput: `path` exists already, another process is making it, or the disk is full; nothing is left behind.
    """
    _refuse_existing(path)
    temporary = temporary_name(path)
    with writing(path):
        _refuse_existing(path)  # made meanwhile
        remove_leftovers(path, locked=True)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o644)
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise BadInput(f"could not write {path}: {reason(error)}") from None
        except safetensors.SafetensorError as error:
            raise BadInput(f"could not write {path}: {error}; free space or choose another place") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise BadInput(f"{path}: exists already; choose another place or remove it")


# --- Tensors ----------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """A safetensors file with `info` and a checksum of everything in its header; equal contents give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One metadata key: safetensors writes several in an order that changes from process to process.
    header = {"fastofa": json.dumps({"sha256": _checksum(tensors, info), "info": info}, sort_keys=True)}
    write_atomic(path, safetensors.torch.save(tensors, header))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the info of a file made by `save_tensors`, verified against its checksum.

    Raises:
        BadInput: missing, truncated, edited, or not a safetensors file (a pickle, say: pickles are never loaded).
    """
    try:
        with safetensors.safe_open(_utf8(regular_file(path)), framework="pt") as file:
            header = json.loads((file.metadata() or {})["fastofa"])
            info, expected = header["info"], header["sha256"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(info, dict):
                raise TypeError
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror or error}") from None
    except (KeyError, TypeError, RecursionError):
        raise BadInput(f"{path} is a safetensors file, but not one that fastofa wrote") from None
    except (safetensors.SafetensorError, ValueError):
        kind = "a pickle" if is_pickle(path) else "truncated or damaged"
        raise BadInput(f"{path}: expected a safetensors file, got one that is {kind}; make it again") from None
    if _checksum(tensors, info) != expected:
        raise BadInput(f"{path}: its checksum does not match, it was edited or damaged; delete it and make it again")
    return tensors, info


def read_info(path: Path) -> tuple[dict[str, Any], str]:
    """The info of a file made by `save_tensors` and its checksum, as the file says it; the tensors are not read.

    Raises:
        BadInput: as `load_tensors`, but for an edited file.
    """
    try:
        with safetensors.safe_open(_utf8(regular_file(path)), framework="pt") as file:
            header = json.loads(file.metadata()["fastofa"])
        return header["info"], header["sha256"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        load_tensors(path)  # says what is wrong with it
        raise


def _utf8(path: Path) -> Path:
    """The path itself. Raises BadInput for a name that safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadInput(
            f"{path}: expected a path in UTF-8, which safetensors needs; rename the folder or file"
        ) from None
    return path


def is_pickle(path: Path) -> bool:
    """Does the file start like torch.save's zip or like a bare pickle?"""
    with open(path, "rb") as file:
        start = file.read(9)
    is_safetensors = start[4:] == b"\0\0\0\0{"  # its length may begin like a pickle
    return not is_safetensors and start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _checksum(tensors: dict[str, Tensor], info: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
