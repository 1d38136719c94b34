"""How far the making of shards is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vab.data.extract.collector import Watch


@contextmanager
def files_progress(words: str, total: int, show: bool = True) -> Iterator[Watch]:
    """A bar with rate, hours of sound and time left, on stderr if that is a terminal; gives what to tell."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda done, here, seconds: None
        return
    columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TextColumn("{task.fields[hours]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(words, total=total, rate="", hours="")

        def watch(done: int, here: int, seconds: float) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{here / elapsed:.1f} files/s" if elapsed > 0 else ""
            bar.update(task, completed=done, rate=rate, hours=f"{seconds / 3600:.2f} h")

        yield watch
