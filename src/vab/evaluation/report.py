"""Write, read and print ``report.json``.

This module must not import torch: ``vab compare`` and ``vab export`` read reports without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vab import UserError, __version__
from vab.console import print_table
from vab.files import write_atomically
from vab.metrics.card import Figure, MetricCard

if TYPE_CHECKING:
    from vab.evaluation.sides import Side

FORMAT = 1
"""Version of ``report.json``."""


@dataclass(frozen=True)
class Measured:
    """All metrics of two sides."""

    figures: dict[str, Figure]
    """By name, such as fad_vggish."""
    left_out: dict[str, str]
    """Metrics that could not be computed, and why."""
    warnings: list[str]


def write_report(path: Path, measured: Measured, sides: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write ``report.json``, whole or not at all.

    Raises:
        UserError: If the disk is full.
    """
    values = {"format": FORMAT, "vab": __version__, **sides, **asdict(measured), **more}
    write_atomically(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def read_figures(path: Path) -> dict[str, Figure]:
    """Read the metrics of a ``report.json``.

    Raises:
        UserError: If it cannot be read, or is no report.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(f"{path} is a report of format {values['format']}, this version of vab reads {FORMAT}")
        return {
            name: Figure(
                float(entry["value"]),
                None if entry["error"] is None else float(entry["error"]),
                MetricCard.from_dict(entry["card"]),
                dict(entry["details"]),
            )
            for name, entry in values["figures"].items()
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a report of vab evaluate, or it is damaged: {error}") from error


def describe(side: Side, place: str, unpaired: int) -> dict[str, Any]:
    """What a report says of a side."""
    seconds = side.seconds
    return {
        "path": place,
        "files": len(side),
        "embeddings": {name: len(outputs.embedding) for name, outputs in side.outputs.items()},
        "seconds": {
            "shortest": float(seconds.min()),
            "mean": float(seconds.mean()),
            "longest": float(seconds.max()),
        },
        "silent": int((side.level_db == -math.inf).sum()),
        "set": side.set_hash,
        "left_out": side.left_out,
        "without_counterpart": unpaired,
        "ignored_files": len(side.ignored),
        "ignored": list(side.ignored[:10]),
    }


def print_report(measured: Measured, sides: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Print the metrics, and what a reader must know of the two sides.

    Args:
        measured: The metrics.
        sides: ``real`` and ``generated``, as ``describe`` has them.
        notes: More lines below the table.
    """
    has_chance = any("chance" in figure.details for figure in measured.figures.values())
    rows = []
    for name, figure in measured.figures.items():
        details = figure.details
        chance = [with_error(details.get("chance"), details.get("chance_error"))] if has_chance else []
        error = "" if figure.error is None else number(figure.error)
        card = figure.card
        rows.append([name, number(figure.value), error, *chance, card.better, card.direction, _counts(card)])
    notes = list(notes)
    for name in ("real", "generated"):
        side = sides[name]
        lacks = {
            "left out as unusable": len(side["left_out"]),
            "without counterpart": side["without_counterpart"],
            "silent": side["silent"],
            "other files ignored": side["ignored_files"],
        }
        if words := ", ".join(f"{count} {what}" for what, count in lacks.items() if count):
            first = next((f" (the first unusable: {file})" for file in side["left_out"]), "")
            notes.append(f"{name}: {side['files']} sounds used; {words}{first}")
    if has_chance:
        notes.append("chance: the same metric with each generated sound paired with other sounds' real onsets")
    notes += [f"no {name}: {reason}" for name, reason in measured.left_out.items()]
    chance = ["chance"] if has_chance else []
    headings = ["metric", "value", "+-", *chance, "better", "compares", "N real / generated"]
    left = {headings.index(name) for name in ("metric", "better", "compares")}
    print_table(f"{sides['generated']['path']} against {sides['real']['path']}", headings, rows, left, notes)


def number(value: float) -> str:
    """A value as tables show it; what is left of 0 after rounding as 0."""
    value = 0.0 if abs(value) < 1e-12 else value
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def with_error(value: float | None, error: float | None) -> str:
    """A value with its standard error, ``0.376 +- 0.01``; without what is None."""
    return " +- ".join(number(given) for given in (value, error) if given is not None)


def _counts(card: MetricCard) -> str:
    """``400 / 398``, or with the windows: ``400 (4000) / 398 (3980)``."""

    def side(files: int | None, rows: int | None) -> str:
        return "-" if files is None else f"{files}" if rows in (None, files) else f"{files} ({rows})"

    return f"{side(card.num_real, card.num_real_rows)} / {side(card.num_generated, card.num_generated_rows)}"
