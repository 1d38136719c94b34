"""Reports of ``vab evaluate`` side by side, where their numbers are of the same kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vab import UserError
from vab.evaluation.report_file import number, read_figures
from vab.metrics.card import Figure, differences, remarks

SURE = 1.96
"""Standard errors that equal systems are apart in 5 of 100 cases only."""


def compare(reports: list[str], only: list[str] | None = None) -> dict[str, list[Figure | None]]:
    """Put reports of vab evaluate side by side.

    Numbers are compared only if their cards agree in all that numbers depend on: judge and weights, rate, lengths,
    definition, counts, the real set. Otherwise nothing is shown but the differences. A figure that a report lacks is a
    gap. With two reports the difference is shown, with its standard error as if the two were independent: for systems
    that were given the same videos it is on the large side.

    Args:
        reports: Two or more .json files of vab evaluate.
        only: Figures to compare, such as fad_vggish; all if not given.

    Raises:
        UserError: If numbers are of unlike kinds, or a report cannot be read.
    """
    if len(reports) < 2:
        raise UserError(f"vab compare takes two or more reports of vab evaluate, got {len(reports)}")
    all_figures = [read_figures(Path(path)) for path in reports]
    names = list(dict.fromkeys(name for figures in all_figures for name in figures))
    if only is not None:
        if unknown := [name for name in only if name not in names]:
            raise UserError(f"--only {unknown[0]}: the reports have {', '.join(names)}")
        names = list(dict.fromkeys(only))
    if not names:
        raise UserError("the reports have no figures to compare")
    rows = {name: [figures.get(name) for figures in all_figures] for name in names}
    _require_alike(rows, reports)
    _print(rows, reports)
    return rows


def _require_alike(rows: dict[str, list[Figure | None]], reports: Sequence[str]) -> None:
    unlike = []
    for name, row in rows.items():
        there = [(path, figure) for path, figure in zip(reports, row, strict=True) if figure is not None]
        for path, figure in there[1:]:
            if found := differences(there[0][1].card, figure.card):
                unlike.append(f"  {name} ({there[0][0]} vs {path}): {'; '.join(found)}")
    if unlike:
        raise UserError(
            "these numbers are of different things and do not compare:\n"
            + "\n".join(unlike)
            + "\nevaluate again with the same settings and sets; --only restricts to figures that compare"
        )


def _print(rows: dict[str, list[Figure | None]], reports: Sequence[str]) -> None:
    console = Console(width=None if Console().is_terminal else 130)
    table = Table(title="figures whose cards agree", title_justify="left")
    table.add_column("metric")
    table.add_column("better")
    for path in _short(reports):
        table.add_column(escape(path), justify="right")
    two = len(reports) == 2
    if two:
        table.add_column("difference", justify="right")
        table.add_column("beyond 95 %")
    for name, row in rows.items():
        first = next(figure for figure in row if figure is not None)
        cells = ["" if figure is None else _with_error(figure.value, figure.error) for figure in row]
        table.add_row(name, first.card.better, *cells, *(_difference(row) if two else ()))
    console.print(table)
    for words in dict.fromkeys(words for row in rows.values() for words in _remarks(row)):
        console.print(f"note: {words}", style="dim", highlight=False, markup=False)


def _with_error(value: float, error: float | None) -> str:
    return number(value) + ("" if error is None else f" +- {number(error)}")


def _difference(row: Sequence[Figure | None]) -> tuple[str, str]:
    """Second less first, and what that means."""
    first, second = row
    if first is None or second is None:
        return "", ""
    apart = second.value - first.value
    if first.error is None or second.error is None:
        return f"{apart:+.4g}", ""
    error = math.hypot(first.error, second.error)
    return f"{apart:+.4g} +- {number(error)}", "yes" if abs(apart) > SURE * error else "no"


def _remarks(row: Sequence[Figure | None]) -> list[str]:
    there = [figure for figure in row if figure is not None]
    return [words for figure in there[1:] for words in remarks(there[0].card, figure.card)]


def _short(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [str(Path(*part[shared:])) for part in parts]
