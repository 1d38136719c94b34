"""Metrics of parts of an evaluation: of each class, and of each sound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vab.data.inputs.listing import MEDIA_SUFFIXES
from vab.data.inputs.tables import read_columns
from vab.evaluation.figures import Comparison
from vab.files import csv_text, write_atomically
from vab.frozen.protocols import Judge
from vab.metrics.by_class import frechet_by_class, kld_by_class
from vab.spec import UserError


def read_labels(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read the classes of sounds, by key, from a CSV with the columns file and labels (joined by ;).

    A file may be listed with its suffix or without.

    Raises:
        UserError: If the file cannot be understood.
    """
    table: dict[str, tuple[str, ...]] = {}
    for _, cells in read_columns(Path(path), "file", "labels"):
        stem = Path(cells["file"])
        key = stem.with_suffix("").as_posix() if stem.suffix.lower() in MEDIA_SUFFIXES else stem.as_posix()
        if key in table:
            raise UserError(f"--labels {path} lists {key!r} more than once")
        table[key] = tuple(dict.fromkeys(label.strip() for label in cells["labels"].split(";") if label.strip()))
    return table


def by_class(comparison: Comparison, judges: Sequence[Judge], labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Frechet distance and divergence of each class, by judge, and why a class has none.

    Args:
        comparison: Two sides.
        judges: Some that ran.
        labels: As ``read_labels`` gives.
    """
    sides = (comparison.real, comparison.generated)
    names = sorted({label for key in comparison.generated.keys for label in labels.get(key, ())})
    truths = [torch.tensor([[name in labels.get(key, ()) for name in names] for key in side.keys]) for side in sides]
    found: dict[str, Any] = {"classes": names, "sounds_without_label": int((~truths[1].any(1)).sum())}
    for judge in judges:
        real, made = (side.outputs[judge.name] for side in sides)
        of_real, of_made = (
            truth.repeat_interleave(one.rows, 0) for truth, one in zip(truths, (real, made), strict=True)
        )
        distances = frechet_by_class(real.embedding, made.embedding, of_real, of_made, names)
        found[f"fad_{judge.name}"] = asdict(distances)
        if comparison.paired and judge.classes:
            found[f"kld_{judge.name}"] = asdict(kld_by_class(real.logits, made.logits, truths[1], names))
    return found


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
