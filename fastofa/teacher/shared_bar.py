"""The progress of all ranks in one bar, which rank 0 shows."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import TaskID

from fastofa.system.progress import Bar, progress_bar
from fastofa.teacher.shares import Shares


class SharedBar:
    """Counts the predictions and the views of all ranks; rank 0 shows both."""

    def __init__(self, bar: Bar, task: TaskID, shares: Shares, views: int, finished: int) -> None:
        self.bar, self.task, self.shares, self.views, self.finished = bar, task, shares, views, finished
        self.rows_shown, self.views_shown = 0, 0

    def advance(self, rows: int = 0, views: int = 0) -> None:
        """Add predictions and views that this rank has finished."""
        computed = self.shares.report(rows)
        finished = self.shares.report_views(views) if views or self.shares.is_main else 0
        if not self.shares.is_main:
            return
        self.bar.advance(self.task, computed - self.rows_shown)
        if finished > self.views_shown:
            self.bar.done(self.task, _note(self.finished + finished, self.views))
        self.rows_shown, self.views_shown = computed, finished


@contextmanager
def shared_bar(shares: Shares, rows: int, computed: int, views: int, finished: int) -> Iterator[SharedBar]:
    """A bar for a cache.

    Args:
        shares: the counters of all ranks.
        rows: the number of predictions in the whole cache.
        computed: how many of them earlier runs have made.
        views: the number of views in the whole cache.
        finished: how many of them earlier runs have finished.
    """
    with progress_bar(shares.is_main) as bar:
        task = bar.add_task("precompute", total=rows, completed=computed, note=_note(finished, views))
        yield SharedBar(bar, task, shares, views, finished)


def _note(finished: int, views: int) -> str:
    return f"{finished} of {views} view{'s' * (views != 1)} done"
