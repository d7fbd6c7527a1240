"""Progress of work that counts to a known total."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10
"""Lines of a whole progress where there is no terminal."""

Report = Callable[[int, str], None]
"""Takes how many are done, and figures to be shown beside it."""


@contextmanager
def counting(title: str, *, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show ``title`` and a bar; the yielded function takes (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def reporting(title: str, total: int, *, console: Console | None = None) -> Iterator[Report]:
    """Show a bar and figures in a terminal; elsewhere a plain line each time another tenth is done."""
    console = console or Console()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, figures="")
            yield lambda done, figures: bar.update(task, completed=done, figures=figures)
        return
    printed = 0

    def show_line(done: int, figures: str) -> None:
        nonlocal printed
        tenths = done * LINES // max(total, 1)
        if tenths > printed:
            printed = tenths
            console.print(f"{title} {done}/{total}  {figures}", soft_wrap=True, highlight=False)

    yield show_line
