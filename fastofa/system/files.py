"""Atomic writing of files and folders, and safetensors files with a JSON header and a checksum."""

import errno
import functools
import hashlib
import itertools
import json
import mmap
import os
import re
import secrets
import shutil
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastofa.system.errors import BadInput
from fastofa.system.locks import is_alive, writing
from fastofa.system.read import read_file as read_file
from fastofa.system.read import read_json as read_json
from fastofa.system.read import regular_file

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE since Python 3.13
STALE_S = 3600  # age in seconds above which a temporary file of an unknown process is a leftover
FREE_SPACE, GET_ACCESS = "free space or choose another path", "get write access or choose another path"
# Remedies for errors on writing; for other errors, another path.
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: FREE_SPACE,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EACCES: GET_ACCESS,
    errno.EPERM: GET_ACCESS,
    errno.EROFS: "choose a path on a writable file system",
    errno.EIO: "check the disk or choose another path",
}
REWRITE = "delete it and run the command that wrote it again"


def reason(error: OSError) -> str:
    """The error's text and a remedy."""
    return f"{error.strerror or error}; {REMEDIES.get(error.errno or 0, 'choose another path')}"


# --- Reading ----------------------------------------------------------------------------------------------------------


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory. Its bytes are read on access.

    The mapping is private and writable, because PyTorch needs writable memory; the file does not change. No memory is
    reserved for writes, because Linux refuses that for files larger than the machine's memory.
    """
    with open(regular_file(path), "rb") as file:
        flags, prot = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file, flush it to the disk, then rename: readers see the old file or the new one.

    The temporary name is new each time, and a link planted there is not followed. Temporary files left by killed
    processes are removed.

    Raises:
        BadInput: the disk is full or the folder is not writable; the temporary file is removed.
    """
    with replacing(path, f" ({len(data) / 1e6:.1f} MB)") as file:
        file.write(data)


@contextmanager
def replacing(path: Path, size: str = "") -> Iterator[BinaryIO]:
    """A file to write piece by piece. It is renamed to `path` when the block ends, as in `write_atomic`.

    Args:
        size: how large the file will be, for the message.

    Raises:
        BadInput: the disk is full or the folder cannot be written; after this or any other exception nothing is left.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise BadInput(f"could not write {path}{size}: {reason(error)}; no partial file was left") from None
        raise


def temporary_name(path: Path) -> Path:
    """A temporary name next to `path` that identifies this process."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_here()}-{secrets.token_hex(4)}.tmp")


def remove_leftovers(path: Path, locked: bool = False) -> None:
    """Remove temporary files and folders of `path` that killed processes left behind.

    Args:
        path: the final path.
        locked: this process holds the lock of `path`, so that other hosts' temporary files are leftovers, too.
    """
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
        return locked or time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_S
    return not is_alive(pid) or (locked and pid == os.getpid())  # a killed process with the same pid left it


@functools.cache
def _here() -> str:
    """A hash of this host and container, within which a pid identifies a process."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    return hashlib.sha256(f"{socket.gethostname()} {container}".encode()).hexdigest()[:8]


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is filled file by file. Leftovers of killed processes are removed.

    Raises:
        BadInput: another process is writing there.
    """
    with writing(folder, inside=True):
        for leftover in {*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")}:
            name = leftover.name.rsplit(".", 2)[0].removeprefix(".")
            remove_leftovers(leftover.with_name(name), locked=True)
        yield


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `path` when it is complete.

    Raises:
        BadInput: `path` already exists, another process is writing it, or the disk is full; nothing is left behind.
    """
    _refuse_existing(path)
    temporary = temporary_name(path)
    with writing(path):
        _refuse_existing(path)  # another process may have created it meanwhile
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
            raise BadInput(f"could not write {path}: {error}; {FREE_SPACE}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise BadInput(f"{path}: already exists; choose another path or remove it")


# --- Tensors ----------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write a safetensors file whose header contains `info` and a checksum of both. Equal contents give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Only one metadata key, because safetensors writes several in an order that differs between processes.
    header = {"fastofa": json.dumps({"sha256": _checksum(tensors, info), "info": info}, sort_keys=True)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with replacing(path, f" ({size / 1e6:.1f} MB)") as file:
        for part in _safetensors(tensors, header):
            file.write(part)


# The names of dtypes in the order in which safetensors stores tensors, whose sizes fall.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of safetensors.torch.save(tensors, metadata), without its copy of the tensors, which may be large."""
    order = list(DTYPES)
    stored = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    ends = list(itertools.accumulate((tensor.nbytes for _, tensor in stored), initial=0))
    entries = {
        name: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        for (name, tensor), (start, end) in zip(stored, itertools.pairwise(ends), strict=True)
    }
    header = json.dumps({"__metadata__": metadata, **entries}, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    for _, tensor in stored:
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the info of a file from `save_tensors`, verified by its checksum.

    Raises:
        BadInput: the file is missing, truncated, edited, or not a safetensors file. Pickles are never loaded.
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
        raise BadInput(f"{path}: expected a file that fastofa wrote, got another safetensors file; {REWRITE}") from None
    except (safetensors.SafetensorError, ValueError):
        kind = "a pickle" if is_pickle(path) else "truncated or damaged"
        raise BadInput(f"{path}: expected a safetensors file, got one that is {kind}; {REWRITE}") from None
    if _checksum(tensors, info) != expected:
        raise BadInput(f"{path}: its checksum does not match, so it was edited or damaged; {REWRITE}")
    return tensors, info


def read_info(path: Path) -> tuple[dict[str, Any], str]:
    """The info and the recorded checksum of a file from `save_tensors`; the tensors are not read.

    Raises:
        BadInput: as `load_tensors`, except that edits are not detected.
    """
    try:
        with safetensors.safe_open(_utf8(regular_file(path)), framework="pt") as file:
            header = json.loads(file.metadata()["fastofa"])
        return header["info"], header["sha256"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        load_tensors(path)  # raises BadInput with the reason
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
    """Whether the file starts like torch.save's zip or like a plain pickle."""
    with open(path, "rb") as file:
        start = file.read(9)
    is_safetensors = start[4:] == b"\0\0\0\0{"  # its header's length may look like the start of a pickle
    return not is_safetensors and start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _checksum(tensors: dict[str, Tensor], info: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
