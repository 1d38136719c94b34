"""Reports of ``vab evaluate`` side by side, if their numbers are of the same kind. No torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vab import UserError
from vab.console import print_table
from vab.evaluation.report import number, read_figures, with_error
from vab.metrics.card import Figure, differences, remarks

SURE = 1.96
"""Standard errors by which equal systems differ in 5 of 100 cases only."""


def read_alike(reports: Sequence[str], only: Sequence[str] | None = None) -> dict[str, list[Figure | None]]:
    """Read reports whose metrics compare.

    Args:
        reports: Two or more .json files.
        only: Names of the metrics to read; all if None.

    Returns:
        By metric, its figure in each report; None where a report lacks it.

    Raises:
        UserError: If a report cannot be read or lacks all metrics, or the cards of two figures differ.
    """
    if len(reports) < 2:
        raise UserError(f"vab compare takes two or more reports of vab evaluate, got {len(reports)}")
    read = [read_figures(Path(path)) for path in reports]
    names = list(dict.fromkeys(name for figures in read for name in figures))
    if only is not None:
        if unknown := [name for name in only if name not in names]:
            raise UserError(f"--only {unknown[0]}: the reports have {', '.join(names)}")
        names = list(dict.fromkeys(only))
    if not names:
        raise UserError("the reports have no figures to compare")
    unlike = []
    for name in names:
        given = [(path, figures[name]) for path, figures in zip(reports, read, strict=True) if name in figures]
        for path, figure in given[1:]:
            if found := differences(given[0][1].card, figure.card):
                unlike.append(f"  {name} ({given[0][0]} vs {path}): {'; '.join(found)}")
    if unlike:
        raise UserError(
            "these numbers are of different things and do not compare:\n"
            + "\n".join(unlike)
            + "\nevaluate again with the same settings and sets; --only restricts to figures that compare"
        )
    return {name: [figures.get(name) for figures in read] for name in names}


def print_side_by_side(rows: Mapping[str, Sequence[Figure | None]], reports: Sequence[str]) -> None:
    """Print a table of ``read_alike``'s figures, for two reports with their difference; notes on unlike versions."""
    two = len(reports) == 2
    headings = ["metric", "better", *_short(reports), *(["difference", "beyond 95 %"] if two else [])]
    lines, notes = [], []
    for name, row in rows.items():
        given = [figure for figure in row if figure is not None]
        cells = ["" if figure is None else with_error(figure.value, figure.error) for figure in row]
        lines.append([name, given[0].card.better, *cells, *(_difference(*row) if two else ())])
        notes += [f"note: {words}" for figure in given[1:] for words in remarks(given[0].card, figure.card)]
    left = {0, 1, len(headings) - 1} if two else {0, 1}
    print_table("figures whose cards agree", headings, lines, left, dict.fromkeys(notes))


def _difference(first: Figure | None, second: Figure | None) -> tuple[str, str]:
    """Second less first, and whether that is more than chance."""
    if first is None or second is None:
        return "", ""
    apart = second.value - first.value
    if first.error is None or second.error is None:
        return f"{apart:+.4g}", ""
    error = math.hypot(first.error, second.error)
    return f"{apart:+.4g} +- {number(error)}", "yes" if abs(apart) > SURE * error else "no"


def _short(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [str(Path(*part[shared:])) for part in parts]
