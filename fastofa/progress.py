"""What a person sees while he waits: one bar with images a second and the time left, and one-line notices."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

console = Console(stderr=True)
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


def progress_bar(shown: bool = True) -> Progress:
    """A bar counted in images; tasks may set the field `note` (loss and the like)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        ImagesPerSecond(),
        TextColumn("{task.fields[note]}"),
        TimeLeft(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        console=console,
        speed_estimate_period=10,
        disable=not shown,
    )


def track(items: Iterable[T], total: int, title: str, images: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Yield the items with a bar counted in images (one an item unless told) that goes away at the end.

    Without a title there is no bar: something else shows the progress; nor where it could not go away, in a file.
    """
    if not (title and console.is_interactive):
        yield from items
        return
    with progress_bar() as bar:
        task = bar.add_task(title, total=total, note="")
        for item in items:
            yield item
            bar.advance(task, images(item))
        bar.remove_task(task)


def notice(text: str) -> None:
    """One line on standard error."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
