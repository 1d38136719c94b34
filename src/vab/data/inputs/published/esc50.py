"""ESC-50, and ESC-10 within it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vab.data.inputs.listing import files_below
from vab.data.inputs.published.names import by_stem
from vab.data.inputs.published.rows import Row, none_there
from vab.data.inputs.tables import read_columns
from vab.spec import UserError

_TABLE, _AUDIO = "meta/esc50.csv", "audio"


@dataclass(frozen=True)
class Esc:
    """What of the data set is there."""

    rows: list[Row]
    """Files from its folder, in the order of its table."""
    classes: tuple[str, ...]
    """In the order of their numbers."""
    missing: list[str]
    """Files of the table that are not there."""


def esc50(root: Path, esc10: bool = False) -> Esc:
    """The recordings of ESC-50 with their classes.

    Their folds are the first numbers of their names, where ``fold_pattern`` of ``configs/data/esc50.yaml`` reads them.

    Args:
        root: Unpacked folder of the data set, with ``meta/esc50.csv`` and ``audio``, whose files may have another
            suffix than .wav.
        esc10: Only the ten classes of ESC-10.

    Raises:
        UserError: If the table is not as published, a fold is not that of the name, or there is no file.
    """
    if lacking := [name for name in (_TABLE, _AUDIO) if not (root / name).exists()]:
        raise UserError(f"{root} is not ESC-50: it lacks {', '.join(lacking)}")
    table = root / _TABLE
    listed: list[tuple[str, str]] = []
    numbers: dict[int, str] = {}
    for line, cells in read_columns(table, "filename", "fold", "target", "category", "esc10"):
        name = cells["filename"]
        if not re.match(rf"{re.escape(cells['fold'])}-", name) or not cells["target"].isdecimal():
            raise UserError(f"{table}, line {line}: {name} is not of fold {cells['fold']}, or its target no number")
        if cells["esc10"] not in ("True", "False"):
            raise UserError(f"{table}, line {line}: esc10 is True or False, got {cells['esc10']!r}")
        if esc10 and cells["esc10"] == "False":
            continue
        target = int(cells["target"])
        if numbers.setdefault(target, cells["category"]) != cells["category"]:
            raise UserError(f"{table}, line {line}: target {target} is {cells['category']}, before {numbers[target]}")
        listed.append((name, cells["category"]))
    stems = {name: Path(name).stem for name, _ in listed}
    there = by_stem(files_below(root / _AUDIO), set(stems.values()))
    rows = [Row(f"{_AUDIO}/{there[stems[name]]}", (label,)) for name, label in listed if stems[name] in there]
    missing = [name for name, _ in listed if stems[name] not in there]
    if not rows:
        raise none_there(missing, len(missing), table, root / _AUDIO)
    return Esc(rows, tuple(numbers[target] for target in sorted(numbers)), missing)
