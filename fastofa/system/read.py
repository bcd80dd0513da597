"""Read whole files: bytes and JSON, from regular files only. Imports no torch, so configurations are read quickly."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput


def regular_file(path: Path) -> Path:
    """The path itself, if it is a regular file. Reading a pipe, for example, could block forever.

    Raises:
        BadInput: it is missing, a folder, pipe, socket or device, a broken or circular link, or not accessible.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise BadInput(f"could not read {path}: it does not exist ({error.strerror})") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise BadInput(f"could not read {path}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISREG(mode):
        return path
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }  # fmt: skip
    raise BadInput(f"{path}: expected a file, got {kinds.get(stat.S_IFMT(mode), 'something else')}")


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises BadInput if it is missing, not a regular file, or not readable."""
    try:
        return regular_file(path).read_bytes()
    except OSError as error:
        raise BadInput(f"could not read {path}: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises BadInput if the file is missing or not JSON."""
    data = read_file(path)
    try:
        return json.loads(data)
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:
        why = str(error)
    raise BadInput(
        f"{path}: expected JSON, got an edited or damaged file ({why}); restore it or run the command that wrote it "
        "again"
    )
