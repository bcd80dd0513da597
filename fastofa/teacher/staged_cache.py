"""Train from a teacher cache at a URL: each view is downloaded ahead of its use, and removed afterwards.

    fastofa train --data photos --cache s3://bucket/cache ...

While one epoch's views are in use, a thread downloads the next epoch's. No others are kept, so that each process holds
two epochs' views on the disk, in the folder for temporary files (TMPDIR).
"""

import shutil
import tempfile
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput, counted
from fastofa.system.files import remove_leftovers, temporary_name
from fastofa.system.remote import PATIENCE, Patience, Remote, open_remote, persistently, recorded_info
from fastofa.system.threads import in_order
from fastofa.system.urls import is_url
from fastofa.teacher.cache import Table, TeacherCache
from fastofa.teacher.cache_files import CLASSIFIER, VAL, check_origin, view_file
from fastofa.teacher.cache_header import AGAIN, HEADER, policy_from_json, write_header
from fastofa.teacher.push_pull import REPORTS, fetch, remote_header

PROBES = 8  # views whose headers are read at the same time


def open_cache(place: str | Path, patience: Patience = PATIENCE) -> TeacherCache:
    """Open a cache in a folder or at a URL.

    Raises:
        BadInput: as `TeacherCache.open`, or the URL cannot be reached.
    """
    return StagedCache.at(str(place), patience) if is_url(str(place)) else TeacherCache.open(place)


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedCache(TeacherCache):
    """A cache at a URL. `path` is a local folder with its header, its reports, its small tables and the views in
    use."""

    remote: Remote
    patience: Patience
    checksums: tuple[str, ...]
    """The recorded checksum of each finished view."""
    arrivals: dict[int, "Future[bool]"] = field(default_factory=dict)
    """The views that have arrived or are being downloaded. Only the thread that reads the cache changes it."""

    @classmethod
    def at(cls, url: str, patience: Patience) -> "StagedCache":
        """Open the cache at a URL, and download everything but the views."""
        remote = open_remote(url, patience)
        header = remote_header(remote, patience)
        if header is None:
            raise BadInput(f"{url}: expected a teacher cache, but found no {HEADER} there; correct the URL")
        checksums = _checksums(remote, header, patience)
        repeats = policy_from_json(header["policy"]).repeats
        views = len(checksums) // repeats * repeats
        if not views:
            least = counted(repeats, "finished view")
            raise BadInput(f"{url}: expected at least {least} from view 0 on, got {len(checksums)}; {AGAIN}")
        place = Path(tempfile.gettempdir(), f"fastofa-{sha256(url.encode()).hexdigest()[:12]}")
        remove_leftovers(place)
        folder = temporary_name(place)
        cache = cls(folder, header, views, remote=remote, patience=patience, checksums=checksums[:views])
        weakref.finalize(cache, shutil.rmtree, folder, ignore_errors=True)
        write_header(folder, header)
        for name in (VAL, *([CLASSIFIER] if cache.pooled_dim else [])):
            if not fetch(remote, name, folder / name, patience, header, name):
                raise BadInput(f"{url}: expected {name}, but it is missing; {AGAIN}, then `fastofa cache push`")
        for name in REPORTS:
            fetch(remote, name, folder / name, patience)
        cache.val_predictions()
        cache.classifier()
        return cache

    def digests(self, count: int) -> tuple[str, ...]:
        """As for a local cache, without downloading the views."""
        if count > self.views:
            raise BadInput(
                f"{self.remote.url}: expected {counted(count, 'view')}, finished: {self.finished}; {AGAIN}, then "
                "`fastofa cache push`"
            )
        return tuple(checksum[:16] for checksum in self.checksums[:count])

    def table(self, view: int) -> Table:
        """As for a local cache. Downloads the view if it has not arrived, and after it those of the next epoch."""
        if not 0 <= view < self.views:
            raise BadInput(f"{self.remote.url}: expected a view from 0 to {self.views - 1}, got {view}")
        repeats = self.policy.repeats
        first = view // repeats * repeats
        wanted = [(first + i) % self.views for i in range(2 * repeats)]
        for other in [other for other in self.arrivals if other not in wanted]:
            self._remove(other)
        if view in self.arrivals and self.arrivals[view].done() and self.arrivals[view].exception() is not None:
            del self.arrivals[view]  # it failed while the last epoch ran; try again
        self._order([view, *wanted])
        if not self.arrivals[view].result():
            raise BadInput(f"{self.remote.url}/{view_file(view)}: expected a view, but it has been removed; {AGAIN}")
        return super().table(view)

    def _remove(self, view: int) -> None:
        """Remove a view, unless it is still being downloaded; a later call then removes it."""
        if self.arrivals[view].done():
            del self.arrivals[view]
            (self.path / view_file(view)).unlink(missing_ok=True)

    def _order(self, views: list[int]) -> None:
        """Download the views that have not been ordered yet, one after the other, in a thread."""
        new = [view for view in dict.fromkeys(views) if view not in self.arrivals]
        for view in new:
            self.arrivals[view] = Future()
        if new:
            orders = [(view, self.arrivals[view]) for view in new]
            source = self.remote, self.path, self.patience, self.header
            threading.Thread(target=_deliver, args=(orders, *source), daemon=True).start()


def _deliver(
    orders: list[tuple[int, "Future[bool]"]], remote: Remote, folder: Path, patience: Patience, header: dict[str, Any]
) -> None:
    """Download views, in order. The result of each future is whether its view exists, or the error."""
    for view, arrival in orders:
        try:
            name = view_file(view)
            arrival.set_result(fetch(remote, name, folder / name, patience, header, view))
        except BaseException as error:  # reported when the view is used
            arrival.set_exception(error)


def _checksums(remote: Remote, header: dict[str, Any], patience: Patience) -> tuple[str, ...]:
    """The recorded checksums of the views up to the first missing one. Raises BadInput if a view is truncated or
    belongs to another cache."""

    def probe(view: int) -> str | None:
        name = view_file(view)
        where = f"{remote.url}/{name}"
        try:
            recorded = persistently(lambda: recorded_info(remote, name), where, patience)
        except FileNotFoundError:
            return None
        if recorded is None:
            raise BadInput(f"{where}: expected a view, got another file or part of one; push it again")
        check_origin(where, recorded[0], header, view)
        return recorded[1]

    found = []
    for checksum in in_order(probe, range(header["views"]), PROBES):
        if checksum is None:
            break
        found.append(checksum)
    return tuple(found)
