"""ESC-50, and ESC-10 within it."""

from __future__ import annotations

import re
from pathlib import Path

from vab import UserError
from vab.data.inputs.listing import files_below
from vab.data.inputs.published.rows import Listing, Row, by_stem
from vab.data.inputs.tables import read_columns

_TABLE, _AUDIO = "meta/esc50.csv", "audio"


def esc50(root: Path, esc10: bool = False) -> Listing:
    """The recordings of ESC-50 with their classes, as the part ``all``.

    The first number of a file's name is its fold, which ``fold_pattern`` of ``configs/data/esc50.yaml`` reads.

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
    there = by_stem(files_below(root / _AUDIO), (Path(name).stem for name, _ in listed))
    rows, missing = [], []
    for name, label in listed:
        if file := there.get(Path(name).stem):
            rows.append(Row(f"{_AUDIO}/{file}", (label,)))
        else:
            missing.append(name)
    classes = tuple(numbers[target] for target in sorted(numbers))
    return Listing({"all": rows}, missing, classes).checked(table, root / _AUDIO)
