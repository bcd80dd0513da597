"""Files that appear whole or not at all, and safetensors with one JSON header."""

import hashlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastofa.errors import BadInput

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # in Python's mmap since 3.13


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read when they are touched. Private: PyTorch wants memory it may write to, the file stays.

    Without a reserve for what might be written, which Linux refuses for a file larger than the machine's memory.
    """
    with open(path, "rb") as file:
        flags, prot = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename: readers see the old file or the new one.

    The temporary name is fixed, so what a killed process left is overwritten by the next one.

    Raises:
        BadInput: the disk is full or the folder cannot be written; the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise BadInput(
            f"could not write {path} ({len(data) / 1e6:.1f} MB): {error.strerror}; free space or choose another place, "
            "nothing half-written was left"
        ) from None


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises BadInput if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); it was edited or damaged, make it again") from None


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
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["fastofa"])
            info, expected = header["info"], header["sha256"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror or error}") from None
    except (KeyError, TypeError):
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
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["fastofa"])
        return header["info"], header["sha256"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        load_tensors(path)  # says what is wrong with it
        raise


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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when it is whole.

    Raises:
        BadInput: `path` exists already, or the disk is full; nothing is left behind.
    """
    if path.exists():
        raise BadInput(f"{path}: exists already; choose another place or remove it")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o644)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"could not write {path}: {error}; free space or choose another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
