"""What a command shows on a terminal: a progress bar, a table, and the state of each part of an installation."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


class ProgressBar:
    """A line on stderr with count, rate and time left; nothing if stderr is not a terminal.

    Args:
        words: What is being done.
        total: How many there are; None if not known yet.
        unit: What is counted, to show a rate, such as ``files``; ``bytes`` shows MB and MB/s.
        completed: How many are done at the start.
        show: False to show nothing, as on all ranks but one.
        transient: Remove the line at the end.

    Attributes:
        is_shown: Whether there is a terminal that shows it.
    """

    def __init__(
        self,
        words: str,
        total: float | None,
        unit: str = "",
        completed: int = 0,
        show: bool = True,
        transient: bool = False,
    ) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self.is_shown = show and total != 0 and console.is_terminal
        counts: tuple[progress.ProgressColumn, ...] = (
            (progress.DownloadColumn(), progress.TransferSpeedColumn())
            if unit == "bytes"
            else (progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[rate]}"))
        )
        self._unit = unit
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            *counts,
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=console,
            redirect_stdout=sys.stdout.isatty(),  # else it would write what goes to stdout to stderr
            transient=transient,
            disable=not self.is_shown,
        )
        self._task = self._bar.add_task(words, total=total, completed=completed, rate="", note="")

    def start(self) -> None:
        """Show the line; where there is a terminal."""
        if self.is_shown:
            self._bar.start()

    def stop(self) -> None:
        """Show it no longer, or leave it as it is."""
        if self.is_shown:  # older releases of rich print a line for a bar that was never shown
            self._bar.stop()

    def advance(self, count: float = 1) -> None:
        """Count so many more as done; a negative number for items that are to be done again."""
        if not self.is_shown:
            return
        self._bar.advance(self._task, count)
        self.update()

    def update(self, completed: float | None = None, total: float | None = None, note: str | None = None) -> None:
        """Set how many are done, how many there are, or the note behind; None leaves a value as it is."""
        if not self.is_shown:  # rich takes 0.1 ms to compute a rate that nobody sees
            return
        speed = self._bar.tasks[0].speed
        fields: dict[str, Any] = {} if note is None else {"note": note}
        fields["rate"] = f"{speed:.2f} {self._unit}/s" if self._unit and speed else ""
        self._bar.update(self._task, completed=completed, total=total, **fields)

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def track(items: Iterable[_T], words: str, total: int, unit: str = "") -> Iterator[_T]:
    """The items, with a ``ProgressBar`` of how many have been used."""
    with ProgressBar(words, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def print_table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str] | None],
    left: Collection[int] = (0,),
    notes: Iterable[str] = (),
) -> None:
    """Print a table on stdout, as wide as the terminal, or up to 150 characters into a file or a pipe.

    Args:
        title: The line above the table; "" for none.
        headings: One for each column.
        rows: The cells of each row as plain text; None draws a line between two rows.
        left: Numbers of the columns that are aligned to the left; the others are aligned to the right.
        notes: Dim lines below the table.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 150)
    table = Table(title=Text(title) if title else None, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if number in left else "right")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(Text, row))
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


_STYLES = {"ok": "green", "absent": "dim", "broken": "red", "forbidden": "bold white on red"}


def print_findings(findings: Sequence[Mapping[str, Any]]) -> None:
    """Print parts of an installation, one a line, and below a line what to type.

    Args:
        findings: Each with ``name``, ``state`` (ok, absent, broken or forbidden), ``detail`` and ``remedy``, which is
            what to type, or None.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    width = max((len(finding["name"]) for finding in findings), default=0)
    for finding in findings:
        line = Text("  ")
        line.append(f"{finding['state']:<10}", style=_STYLES[finding["state"]])
        line.append(f"{finding['name']:<{width}}  {finding['detail']}")
        line.rstrip()
        console.print(line, soft_wrap=True)
        if finding["remedy"]:
            console.print(Text(f"{'':<{width + 14}}-> {finding['remedy']}"), soft_wrap=True)
