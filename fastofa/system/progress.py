"""Progress for the user: a bar with images or bytes per second and the time left, and one-line notices.

If the output is not a terminal (but a file, a pipe or a cluster's log), there is no bar, but a line after each finished
unit (an epoch or a view) and a line per minute.
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


class Speed(ProgressColumn):
    """Images per second, or the speed in another unit, of which one is `size` of what the bar counts."""

    def __init__(self, unit: str = "img/s", size: float = 1) -> None:
        self.unit, self.size = unit, size
        super().__init__()

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / self.size:,.0f} {self.unit}", style="cyan")


class TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        time = super().render(task)
        return Text(f"in {time}" if task.finished else f"{time} left", style=time.style)


class Bar(Progress):
    """A progress bar. Tasks may set the field `note`, such as the loss."""

    def __init__(self, enabled: bool, speed: Speed) -> None:
        self.speed = speed
        self.drawn = enabled and is_terminal()
        self.prints_lines = enabled and not self.drawn
        self.printed_at = time.monotonic()
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            speed,
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
        if self.prints_lines and time.monotonic() - self.printed_at > LINE_EVERY_S:
            self._print_line(task_id)

    def done(self, task_id: TaskID, note: str) -> None:
        """Report a finished unit, such as an epoch or a view: in the bar's note, or by a line."""
        self.update(task_id, note=note)
        if self.prints_lines:
            self._print_line(task_id)

    def _print_line(self, task_id: TaskID) -> None:
        """Print the texts of the bar as a line."""
        (task,) = (task for task in self.tasks if task.id == task_id)
        speed, left = (
            self.speed.render(task).plain,
            TimeLeft(compact=True, elapsed_when_finished=True).render(task).plain,
        )
        parts = (task.description, f"{task.percentage:.0f}%", speed, task.fields["note"], left)
        notice(", ".join(part for part in parts if part and "-:--" not in part))
        self.printed_at = time.monotonic()


def progress_bar(enabled: bool = True) -> Bar:
    """A bar that counts images."""
    return Bar(enabled, Speed())


def bytes_bar() -> Bar:
    """A bar that counts bytes."""
    return Bar(True, Speed("MB/s", 1e6))


def is_terminal() -> bool:
    """Whether the output is a terminal, in which a bar can move. FORCE_COLOR only enables colours."""
    return console.is_interactive and console.file.isatty()


def track(items: Iterable[T], total: int, title: str, images: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Yield the items, with a progress bar in images that disappears at the end.

    Args:
        items: the items.
        total: number of images.
        title: title of the bar; "" for no bar, if progress is shown elsewhere.
        images: number of images of an item; by default 1.
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
    """Text for a table's cell or title, in which neither markup nor control characters have an effect."""
    return Text(escaped(text))


def notice(text: str) -> None:
    """Print one line on standard error."""
    console.print(escaped(text), markup=False, highlight=False, soft_wrap=True)
