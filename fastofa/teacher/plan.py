"""Estimate the hours and disk space of a teacher cache from batches timed on this machine.

fastofa precompute --data photos --teacher teacher --views 100 --topk 16 --out cache --plan
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from fastofa.system.interrupt import Interrupt
from fastofa.system.progress import notice
from fastofa.teacher.cache_columns import as_stored, packed_columns
from fastofa.teacher.cache_files import view_file
from fastofa.teacher.downloads import Columns, Downloads
from fastofa.teacher.ensemble import kept
from fastofa.teacher.parts import rows_in
from fastofa.teacher.precompute import CacheJob, check_early, open_images, open_job
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.teacher.shares import shares_of_ranks

SECONDS = 3.0  # per measurement


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a cache."""

    images: int
    """Training images, and thus rows of a view."""
    val_images: int
    """Validation images."""
    views: int
    """Views of the whole cache."""
    finished: int
    """Views that exist already."""
    ranks: int
    """Ranks that share the work."""
    teacher: float
    """Images/s of the teacher alone, all ranks together."""
    rate: float
    """Images/s of `precompute`, all ranks together: reading, cropping, the teacher and its top K."""
    topk: int
    """Classes stored per prediction."""
    row_bytes: float
    """Bytes that a view stores per image; flips are bits."""

    @property
    def passes(self) -> int:
        """Images that the teacher has yet to see."""
        return (self.views - self.finished) * self.images + self.val_images

    @property
    def hours(self) -> float:
        return self.passes / self.rate / 3600

    @property
    def rank_hours(self) -> float:
        """Hours of all ranks together: GPU hours, with one GPU per rank."""
        return self.hours * self.ranks

    @property
    def bytes(self) -> int:
        """Size of the views."""
        return round(self.views * self.images * self.row_bytes)

    def epochs(self, students: int) -> int:
        """The smallest number of epochs per student at which the cache takes fewer passes than an online teacher.

        A teacher that runs in training sees every image in every epoch of every student: students x epochs x images
        passes. The cache takes views x images + validation images, once.
        """
        return (self.views * self.images + self.val_images) // (students * self.images) + 1


def measure(job: CacheJob) -> Plan:
    """Time batches of view 0 on all ranks at once. Writes nothing."""
    if job.shares.is_main:
        compiles = " (compiling takes minutes)" if job.program.to_compile else ""
        notice(f"plan: timing the teacher and the pipeline{compiles}")
    source, views, parts = job.open_table(0)
    with closing(job.teachers.batches(source.pipeline, views, parts.order)) as batches:
        images = [batch.images for batch in next(batches)]
    columns = job.program(*images)  # compiles, or lets cuDNN choose its algorithms
    predicted = kept(as_stored({name: values.cpu() for name, values in columns.items()}))
    drawn = {name: torch.from_numpy(values) for name, values in views[0].columns().items()}
    row_bytes = sum(_row_bytes(table, job.header) for table in (predicted, drawn))

    device = job.teachers.device
    calls = _repetitions(_seconds(lambda: job.program(*images), 1, device))
    teacher = calls * len(images[0]) / _seconds(lambda: job.program(*images), calls, device)
    return _of_all_ranks(job, teacher, _rate(job), row_bytes)


def _row_bytes(columns: Columns, header: dict[str, Any]) -> float:
    rows = len(next(iter(columns.values())))
    return sum(values.nbytes for values in packed_columns(columns, header).values()) / rows


def _rate(job: CacheJob) -> float:
    """Images/s of this rank, from reading to predictions on the CPU, once the first ones have arrived."""
    source, views, parts = job.open_table(0)
    downloads = Downloads(job.teachers.device)
    counts, times = [0], [time.perf_counter()]
    with closing(job.teachers.batches(source.pipeline, views, parts.order)) as batches:
        for each in batches:
            if arrived := downloads.add(job.program(*(batch.images for batch in each))):
                counts.append(counts[-1] + sum(map(rows_in, arrived)))
                times.append(time.perf_counter())
                if times[-1] - times[1] > SECONDS:
                    break
        else:
            counts.append(counts[-1] + sum(map(rows_in, downloads.finish())))
            times.append(time.perf_counter())
    first = 1 if counts[1] < counts[-1] else 0  # a table may arrive at once
    return (counts[-1] - counts[first]) / (times[-1] - times[first])


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _repetitions(seconds: float) -> int:
    """Number of calls, 2 to 100, that take about SECONDS in total if one takes `seconds`."""
    return min(max(int(SECONDS / seconds), 2), 100)


def _of_all_ranks(job: CacheJob, teacher: float, rate: float, row_bytes: float) -> Plan:
    shares, config = job.shares, job.config
    shares.announce(f"speeds of {shares.place.rank}", (teacher, rate))
    ranks = range(shares.place.size)
    speeds = [shares.wait_for(f"speeds of {rank}", job.stop_if_interrupted) for rank in ranks]
    return Plan(
        images=len(job.train.dataset),
        val_images=len(job.val.dataset),
        views=len(job.views),
        finished=sum((config.out / view_file(view)).is_file() for view in job.views),
        ranks=shares.place.size,
        teacher=sum(teacher for teacher, _ in speeds),
        rate=sum(rate for _, rate in speeds),
        topk=job.header["topk"],
        row_bytes=row_bytes,
    )


def plan(config: PrecomputeConfig) -> Plan | None:
    """Estimate the cost of a cache; writes nothing.

    Returns:
        The estimate; None on all ranks but the first.

    Raises:
        BadInput: as `precompute`.
    """
    with shares_of_ranks() as shares:
        device = check_early(config, shares.place.local_rank)
        train, val = open_images(config)
        with Interrupt() as interrupt:
            job = open_job(config, train, val, device, interrupt, shares)
            estimate = measure(job)
            if not shares.is_main:
                shares.wait_for_end(job.stop_if_interrupted)
                return None
            shares.announce_end()
    return estimate
