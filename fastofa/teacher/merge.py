"""Join parts of one teacher cache: views that were computed separately, by other people or on other machines.

    fastofa cache merge part-a part-b --out cache
    fastofa cache extend cache part-b

Parts belong together if their headers have the same identity: the same images, classes, teacher, view policy and seed.
Every file is verified before it is added. Files are linked if the disk allows it, otherwise copied; the parts stay as
they are. Each file appears complete or not at all, so that an interrupted merge continues when it is repeated.
"""

import errno
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastofa.methods.targets import agreement
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import filling, read_info, replacing, temporary_name
from fastofa.system.progress import notice, track
from fastofa.teacher.cache import TeacherCache
from fastofa.teacher.cache_files import VAL, check_origin, view_file, views_in
from fastofa.teacher.cache_header import HEADER, check_same, check_vacant, read_header, united, write_header

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES)


def merge(parts: Sequence[Path], out: Path) -> TeacherCache:
    """Add the views of all parts to the cache `out`, which may exist already.

    Args:
        parts: folders of caches, which need not contain view 0.
        out: folder of the joined cache; may be one of the parts.

    Raises:
        BadInput: the parts do not belong together, two of them contain different predictions for one view, a file is
            damaged, or another process is writing to `out`. Nothing was added then, except files that were verified.
    """
    headers = [read_header(part) for part in parts]
    for part, header in zip(parts[1:], headers[1:], strict=True):
        check_same(parts[0], headers[0], part, header)
    check_vacant(out)
    with filling(out):
        if (out / HEADER).exists():
            header = read_header(out)
            check_same(out, header, parts[0], headers[0])
            parts, headers = [out, *parts], [header, *headers]
        found = [views_in(part, header) for part, header in zip(parts, headers, strict=True)]
        owners = {view: [p for p, views in zip(parts, found, strict=True) if view in views] for view in _union(found)}
        for view, each in owners.items():
            _check_equal(view, each, headers[0])
        header = functools.reduce(united, headers)
        write_header(out, header)
        _add_other_files(out, parts, owners, header)
        whole, images = {part: TeacherCache(part, header, header["views"]) for part in parts}, header["num_samples"]
        todo = [view for view in owners if not (out / view_file(view)).is_file()]
        for view in track(todo, len(todo) * images, f"merging into {out}", lambda _: images):
            part = owners[view][0]
            whole[part].table(view)  # verifies it
            _add(part / view_file(view), out / view_file(view))
    return TeacherCache.open(out, part=True)


def _union(found: list[list[int]]) -> list[int]:
    return sorted({view for views in found for view in views})


def _check_equal(view: int, parts: list[Path], header: dict[str, Any]) -> None:
    """Raises BadInput if the parts contain different predictions for a view, or one of its files is truncated."""
    sums = []
    for part in parts:
        info, checksum = read_info(part / view_file(view))
        check_origin(part / view_file(view), info, header, view)
        sums.append(checksum)
    for part, checksum in zip(parts, sums, strict=True):
        if checksum != sums[0]:
            raise BadInput(
                f"{part / view_file(view)}: expected the predictions of {parts[0] / view_file(view)}, got others "
                "(another machine may round differently); delete one of the two files"
            )


def _add_other_files(out: Path, parts: Sequence[Path], owners: dict[int, list[Path]], header: dict[str, Any]) -> None:
    """Add the files other than views from the first part that has each, beginning with the one that has view 0."""
    order = [*owners.get(0, []), *parts]
    skipped = (HEADER, "part-", ".", "view-")
    names = {f.name for part in parts for f in part.iterdir() if f.is_file() and not f.name.startswith(skipped)}
    for name in sorted(names):
        have = [part for part in dict.fromkeys(order) if (part / name).is_file()]
        if not (out / name).is_file():
            if name.endswith(".safetensors"):
                info, _ = read_info(have[0] / name)
                check_origin(have[0] / name, info, header, name)
            _add(have[0] / name, out / name)
        if name == VAL:
            _report_other_validation(out, have, header)


def _report_other_validation(out: Path, parts: list[Path], header: dict[str, Any]) -> None:
    """A notice for each part whose validation predictions differ from those in `out`."""
    kept = TeacherCache(out, header, 0).val_targets()
    for part in parts:
        if read_info(part / VAL)[1] != read_info(out / VAL)[1]:
            best = TeacherCache(part, header, 0).val_targets().classes[:, 0].long().numpy()
            same = agreement(best, kept)
            notice(
                f"{part / VAL}: differs from {out / VAL}; both have the same best class for {same:.2%} of the images"
            )


def _add(source: Path, target: Path) -> None:
    """Link or copy a file, which appears under its name when it is complete."""
    temporary = temporary_name(target)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise BadInput(f"could not link {source} to {target}: {error.strerror}; correct it and repeat") from None
        with open(source, "rb") as file, replacing(target) as copy:
            shutil.copyfileobj(file, copy)


def gaps(cache: TeacherCache) -> str:
    """Which views are missing although later ones exist, for a notice; empty if none are."""
    found = views_in(cache.path, cache.header)
    missing = sorted(set(range(cache.first, max(found, default=0))) - set(found))
    if not missing:
        return ""
    return f"{cache.path}: {counted(len(missing), 'view')} missing, the first is view {missing[0]}"
