"""Figures as people and programs read them: a table, ``report.json``, a CSV with a line for each sound."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from vab import __version__
from vab.evaluation.figures import Comparison, Measured
from vab.evaluation.report_file import FORMAT, number
from vab.evaluation.sides import Side
from vab.files import write_atomically
from vab.frozen.protocols import Judge
from vab.metrics.by_class import ByClass, frechet_by_class, kld_by_class
from vab.metrics.card import MetricCard


def by_class(comparison: Comparison, judges: Sequence[Judge], labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Frechet distance and divergence of each class, by judge, and what has no number and why."""
    names = sorted({label for key in comparison.generated.keys for label in labels.get(key, ())})
    real, made = (_truth(side, labels, names) for side in (comparison.real, comparison.generated))
    found: dict[str, Any] = {"classes": names, "sounds_without_label": int((~made.any(1)).sum())}
    for judge in judges:
        heard = [side.heard[judge.name] for side in (comparison.real, comparison.generated)]
        classes = [truth.repeat_interleave(one.rows, 0) for truth, one in zip((real, made), heard, strict=True)]
        distances = frechet_by_class(heard[0].embedding, heard[1].embedding, classes[0], classes[1], names)
        found[f"fad_{judge.name}"] = _as_values(distances)
        if comparison.paired and judge.classes:
            found[f"kld_{judge.name}"] = _as_values(kld_by_class(heard[0].logits, heard[1].logits, made, names))
    return found


def _truth(side: Side, labels: Mapping[str, Sequence[str]], names: Sequence[str]) -> Tensor:
    """(B, L) bool."""
    return torch.tensor([[name in labels.get(key, ()) for name in names] for key in side.keys])


def _as_values(found: ByClass) -> dict[str, Any]:
    return {"figures": found.figures, "left_out": found.left_out}


def describe(side: Side, place: str, unpaired: int) -> dict[str, Any]:
    """What a side of the report says."""
    seconds = side.seconds
    return {
        "path": place,
        "files": len(side),
        "embeddings": {name: len(heard.embedding) for name, heard in side.heard.items()},
        "seconds": {
            "shortest": float(seconds.min()),
            "mean": float(seconds.mean()),
            "longest": float(seconds.max()),
        },
        "silent": int((side.level_db == -math.inf).sum()),
        "set": side.set_hash,
        "left_out": side.lost,
        "without_counterpart": unpaired,
        "ignored_files": len(side.ignored),
        "ignored": list(side.ignored[:10]),
    }


def write_report(path: Path, measured: Measured, sides: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write ``report.json``, whole or not at all.

    Raises:
        UserError: If the disk is full.
    """
    values = {
        "format": FORMAT,
        "vab": __version__,
        **sides,
        "figures": {name: asdict(figure) for name, figure in measured.figures.items()},
        "left_out": measured.left_out,
        "warnings": measured.warnings,
        **more,
    }
    write_atomically(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def print_table(measured: Measured, title: str, notes: Sequence[str]) -> None:
    """What was measured, on stdout."""
    console = Console(width=None if Console().is_terminal else 130)
    table = Table(title=escape(title), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("+-", justify="right")
    by_chance = any("chance" in figure.details for figure in measured.figures.values())
    if by_chance:
        table.add_column("chance", justify="right")
    table.add_column("better")
    table.add_column("compares")
    table.add_column("N real / generated", justify="right")
    for name, figure in measured.figures.items():
        card = figure.card
        error = "" if figure.error is None else number(figure.error)
        chance = [_chance(figure.details)] if by_chance else []
        table.add_row(name, number(figure.value), error, *chance, card.better, card.direction, _counts(card))
    console.print(table)
    if by_chance:
        notes = [*notes, "chance: the same metric with each generated sound paired with other sounds' real onsets"]
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)
    for name, reason in measured.left_out.items():
        console.print(f"no {name}: {reason}", style="dim", highlight=False, markup=False)


def _chance(details: Mapping[str, float]) -> str:
    """``0.376 +- 0.01``; empty where a metric has no chance level."""
    if "chance" not in details:
        return ""
    return number(details["chance"]) + (f" +- {number(details['chance_error'])}" if "chance_error" in details else "")


def _counts(card: MetricCard) -> str:
    """``400 / 398``, or with the windows: ``400 (4000) / 398 (3980)``."""

    def side(files: int | None, rows: int | None) -> str:
        return "-" if files is None else f"{files}" if rows in (None, files) else f"{files} ({rows})"

    return f"{side(card.num_real, card.num_real_rows)} / {side(card.num_generated, card.num_generated_rows)}"


def write_per_file(path: Path, comparison: Comparison, judges: Sequence[Judge]) -> None:
    """A CSV with a line for each generated sound, whole or not at all.

    Raises:
        UserError: If the disk is full.
    """
    real, made, paired = comparison.real, comparison.generated, comparison.paired
    columns: dict[str, list[Any]] = {"file": list(made.keys)}
    sides = [("generated", made), *([("real", real)] if paired else [])]
    for judge in judges:
        columns[f"fad_{judge.name}"] = comparison.distances(judge.name).tolist()
        if not judge.classes:
            continue
        if paired:
            columns[f"kld_{judge.name}"] = comparison.divergences(judge.name).tolist()
        for name, side in sides:
            top = side.heard[judge.name].logits.argmax(1).tolist()
            columns[f"top_class_{name}_{judge.name}"] = [judge.classes[place] for place in top]
    for name, side in sides:
        columns[f"onsets_{name}"] = [len(onsets) for onsets in side.onsets]
        columns[f"level_db_{name}"] = [level if math.isfinite(level) else "" for level in side.level_db.tolist()]
        columns[f"seconds_{name}"] = side.seconds.tolist()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(path, text.getvalue())
