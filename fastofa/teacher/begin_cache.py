"""Begin a cache, or compare it with the one that --out contains."""

from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput
from fastofa.system.progress import notice
from fastofa.teacher.cache_files import CLASSIFIER, VAL
from fastofa.teacher.cache_header import HEADER, identity, read_header, united, write_header
from fastofa.teacher.fidelity import FIDELITY
from fastofa.teacher.parts import PARTS
from fastofa.teacher.quick_checks import other_cache


def begin(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Write the header, or compare it with an existing one.

    Returns:
        The header that is now in cache.json.

    Raises:
        BadInput: `out` contains another cache, with predictions that would be lost.
    """
    if not (out / HEADER).exists():
        write_header(out, header)
        return header
    existing = read_header(out)
    new, old = identity(header), identity(existing)
    different = [key for key in {**new, **old} if new.get(key) != old.get(key)]
    if different and not _may_start_over(out, different):
        pairs = [(key, _short(old.get(key, "none")), _short(new.get(key, "none"))) for key in different]
        raise other_cache(out, [f"{key} (cached: {cached}, given: {given})" for key, cached, given in pairs])
    if different:
        notice(f"{out}: starts over, because {' and '.join(different)} changed and no view was finished")
        for file in (VAL, CLASSIFIER, FIDELITY, *(path.name for path in out.glob(PARTS))):
            (out / file).unlink(missing_ok=True)
        write_header(out, header)
        return header
    if header["views"] < existing["views"]:
        notice(f"{out}: was started with --views {existing['views']}; --views {header['views']} removes none of them")
    grown = united(existing, header)
    if grown != existing:
        write_header(out, grown)
    return grown


def _may_start_over(out: Path, different: list[str]) -> bool:
    """Whether starting over loses no work: there is no finished view, and no usable validation predictions."""
    data_only = set(different) <= {"dataset", "classes"}
    return not any(out.glob("view-*.safetensors")) and (data_only or not (out / VAL).exists())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def compare_with_main(out: Path, header: dict[str, Any], rank: int) -> dict[str, Any]:
    """The header that rank 0 has written. Raises BadInput if it is missing, or differs from this rank's `header`."""
    if not (out / HEADER).exists():
        raise BadInput(
            f"rank {rank}: expected {out / HEADER} as on rank 0, found none; put --out on a file system that all nodes "
            "share"
        )
    existing = read_header(out)
    own, main = identity(header), identity(existing)
    if different := [key for key in {**own, **main} if own.get(key) != main.get(key)]:
        raise BadInput(
            f"rank {rank}: expected the same {' and '.join(different)} as on rank 0, got another; copy rank 0's data "
            "and teacher to all nodes"
        )
    return existing
