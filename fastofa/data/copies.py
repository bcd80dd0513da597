"""The local copies of datasets at URLs, and which of them are kept.

    ~/.cache/fastofa/datasets/KEY           a copy (XDG_CACHE_HOME replaces ~/.cache)
    ~/.cache/fastofa/datasets/KEY.partial   an unfinished one
    ~/.cache/fastofa/datasets/KEY.used      its mark: who uses it, and when that began last (fastofa.system.in_use)

The folder keeps two copies, unfinished ones included, and those in use.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from fastofa.system.errors import BadInput
from fastofa.system.in_use import unused, use
from fastofa.system.progress import notice

KEPT = 2
KEY = r"[0-9a-f]{16}"


def folder_of_copies() -> Path:
    """Raises BadInput if the user has no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        raise BadInput("expected a home folder for downloaded datasets, got none; set XDG_CACHE_HOME to a folder")
    return Path(cache, "fastofa", "datasets")


def partial_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.partial")


def keep(copy: Path) -> None:
    """Use this copy, which need not exist yet, until the process ends, and remove others until at most two are left."""
    with suppress(OSError):  # a folder that cannot be written can still be read
        copy.parent.mkdir(parents=True, exist_ok=True)
        use(_mark(copy))
    remove_unused(copy, KEPT - 1)


def remove_unused(copy: Path, kept: int) -> None:
    """Remove copies until there are `kept` beside this one, from the one used least recently on; none that is in
    use."""
    try:
        names = [path.name.partition(".") for path in copy.parent.iterdir()]
    except OSError:
        return
    keys = {key for key, _, kind in names if re.fullmatch(KEY, key) and kind in ("", "partial", "used")}
    others = [copy.with_name(key) for key in keys - {copy.name}]
    left = sum(map(_has_data, others))
    for other in sorted(others, key=_last_use):
        is_copy = _has_data(other)  # otherwise only a mark, of a download that did not begin
        if is_copy and left <= kept:
            continue
        with unused(_mark(other)) as free:
            if free and _remove(other) and is_copy:
                left -= 1
                notice(f"{other}: removed the copy of a dataset, which no process uses")


def _mark(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.used")


def _has_data(copy: Path) -> bool:
    return copy.exists() or partial_of(copy).exists()


def _last_use(copy: Path) -> int:
    with suppress(OSError):
        return _mark(copy).stat().st_mtime_ns
    return 0  # an earlier version downloaded it


def _remove(copy: Path) -> bool:
    """Remove a copy and its mark. Returns whether that succeeded; an interrupted removal leaves an unfinished copy."""
    try:
        if copy.exists():
            shutil.rmtree(partial_of(copy), ignore_errors=True)
            os.replace(copy, partial_of(copy))
        if partial_of(copy).exists():
            shutil.rmtree(partial_of(copy))
        _mark(copy).unlink()
    except OSError:  # another user's
        return False
    return True
