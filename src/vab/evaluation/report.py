"""Write and read ``report.json``, and show what is in it: a table, and a CSV with a line for each sound.

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
from vab.files import csv_text, write_atomically
from vab.metrics.card import Figure, MetricCard

if TYPE_CHECKING:
    from vab.evaluation.figures import Comparison
    from vab.evaluation.sides import Side
    from vab.frozen.protocols import Judge

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


def print_report(measured: Measured, comparison: Comparison, sides: Mapping[str, Any]) -> None:
    """Print the metrics, and what a reader must know of the two sides, as ``describe`` has them."""
    has_chance = any("chance" in figure.details for figure in measured.figures.values())
    rows = []
    for name, figure in measured.figures.items():
        details = figure.details
        chance = [with_error(details.get("chance"), details.get("chance_error"))] if has_chance else []
        error = "" if figure.error is None else number(figure.error)
        card = figure.card
        rows.append([name, number(figure.value), error, *chance, card.better, card.direction, _counts(card)])
    notes = [
        f"{'paired by name' if comparison.paired else 'not paired'}; heard: {comparison.listening.length}; "
        f"mono: {comparison.listening.mono}; resampled with soxr HQ; +- is the standard error over generated sounds"
    ]
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
    print_table(f"{sides['generated']['path']} beside {sides['real']['path']}", headings, rows, left, notes)


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


def write_per_file(path: Path, comparison: Comparison, judges: Sequence[Judge]) -> None:
    """Write a CSV with a line for each generated sound, whole or not at all.

    Raises:
        UserError: If the disk is full.
    """
    columns: dict[str, list[Any]] = {"file": list(comparison.generated.keys)}
    sides = {"generated": comparison.generated} | ({"real": comparison.real} if comparison.paired else {})
    for judge in judges:
        columns[f"fad_{judge.name}"] = comparison.distances(judge.name).tolist()
        if not judge.classes:
            continue
        if comparison.paired:
            columns[f"kld_{judge.name}"] = comparison.divergences(judge.name).tolist()
        for name, side in sides.items():
            top = side.outputs[judge.name].logits.argmax(1).tolist()
            columns[f"top_class_{name}_{judge.name}"] = [judge.classes[place] for place in top]
    for name, side in sides.items():
        columns[f"onsets_{name}"] = [len(onsets) for onsets in side.onsets]
        columns[f"level_db_{name}"] = [level if math.isfinite(level) else "" for level in side.level_db.tolist()]
        columns[f"seconds_{name}"] = side.seconds.tolist()
    write_atomically(path, csv_text([columns, *zip(*columns.values(), strict=True)]))
