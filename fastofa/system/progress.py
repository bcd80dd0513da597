"""What a person sees while he waits: one bar with images a second and the time left, and one-line notices.

Where the output is no terminal (a file, a pipe, a cluster's log) there is no bar: a line each time something is done
(an epoch, a view), and a line a minute.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from fastofa.system.errors import escaped

console = Console(stderr=True)
LINE_EVERY_S = 60
T = TypeVar("T")


class ImagesPerSecond(ProgressColumn):
    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} img/s", style="cyan")


class TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        time = super().render(task)
        return Text(f"in {time}" if task.finished else f"{time} left", style=time.style)


class Bar(Progress):
    """A bar counted in images; tasks may set the field `note` (loss and the like)."""

    def __init__(self, shown: bool) -> None:
        self.drawn = shown and is_terminal()
        self.lines = shown and not self.drawn
        self.said_at = time.monotonic()
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            ImagesPerSecond(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeLeft(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            console=console,
            speed_estimate_period=10,
            disable=not self.drawn,
        )

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        return super().add_task(escaped(description), *args, **{"note": "", **fields})

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if self.lines and time.monotonic() - self.said_at > LINE_EVERY_S:
            self._say(task_id)

    def done(self, task_id: TaskID, note: str) -> None:
        """An epoch, a view: the bar's note, or a line."""
        self.update(task_id, note=note)
        if self.lines:
            self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        """The same as the bar shows, but for the bar."""
        (task,) = (task for task in self.tasks if task.id == task_id)
        speed, left = (
            ImagesPerSecond().render(task).plain,
            TimeLeft(compact=True, elapsed_when_finished=True).render(task).plain,
        )
        parts = (task.description, f"{task.percentage:.0f}%", speed, task.fields["note"], left)
        notice(", ".join(part for part in parts if part and "-:--" not in part))
        self.said_at = time.monotonic()


def progress_bar(shown: bool = True) -> Bar:
    return Bar(shown)


def is_terminal() -> bool:
    """Where a bar can move. FORCE_COLOR makes colours, not a terminal."""
    return console.is_interactive and console.file.isatty()


def track(items: Iterable[T], total: int, title: str, images: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Yield the items with a bar counted in images (one an item unless told) that goes away at the end.

    Without a title there is no bar: something else shows the progress.
    """
    if not title:
        yield from items
        return
    with progress_bar() as bar:
        task = bar.add_task(title, total=total)
        for item in items:
            yield item
            bar.advance(task, images(item))
        bar.remove_task(task)


def plain(text: str) -> Text:
    """For a cell or the title of a table: what a name holds is neither markup nor an order to the terminal."""
    return Text(escaped(text))


def notice(text: str) -> None:
    """One line on standard error."""
    console.print(escaped(text), markup=False, highlight=False, soft_wrap=True)
