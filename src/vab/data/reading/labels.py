"""Lists that data sets are published with: the names of classes, which records make a split or a gallery."""

from __future__ import annotations

import codecs
import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vab.data.inputs.tables import Table
from vab.spec import UserError

_INDEX, _ID, _NAME = "index", "mid", "display_name"
"""Columns of the class lists of AudioSet, and of VGGSound's and ESC-50's in its form."""
_USUAL = ("key", "video_id", "id", "file")
"""What columns of keys are called."""
_TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a data set in their order."""

    path: str
    """The file that names them."""
    names: tuple[str, ...]
    """L different names."""
    numbers: dict[str, int] = field(repr=False)
    """Every way in which a class is written to its number: its name, its id, its name with commas for underscores."""

    def number(self, label: str) -> int:
        """The number of a class, by its name or its id.

        VGGSound's class list writes "bird chirping_ tweeting" for what its other lists call "bird chirping, tweeting":
        both are found.

        Raises:
            UserError: If there is no such class.
        """
        found = self.numbers.get(label.strip())
        if found is None:
            close = difflib.get_close_matches(label, self.numbers, n=1)
            hint = f"; the nearest is {close[0]!r}" if close else ""
            raise UserError(f"no class {label!r} among the {len(self.names)} of {self.path}{hint}")
        return found


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read the names of classes from the list that a data set is published with, as it is.

    Args:
        path: A .csv with the columns index, mid and display_name (AudioSet, VGGSound, ESC-50; in the order of index);
            a .csv without such a line, whose first column is the name; or text with one name a line. A .csv may have
            tabs or semicolons instead of commas.

    Raises:
        UserError: If there is no such file, it cannot be read so, a line is broken, or a class is there twice.
    """
    content = _read(path, "a list of classes")
    if Path(path).suffix.lower() not in _TABLES:
        rows = [[line.strip()] for line in _text(path, content, "a list of classes").splitlines() if line.strip()]
    else:
        table, rows = Table(path, (_INDEX, _ID, _NAME), content=content), []
        for line, row in table:
            if rows and len(row) != len(rows[0]):
                raise table.wrong(
                    line,
                    f"{len(row)} columns instead of {len(rows[0])}: a name with a comma in it must stand in double "
                    'quotes, as in 5,/m/2qldy,"Narration, monologue"',
                )
            rows.append(row)
    if not rows:
        raise UserError(f"{path} names no class")
    if _NAME in rows[0]:
        names, ids = _from_table(path, rows[0], rows[1:])
    else:
        names, ids = [row[0] for row in rows], []
    if "" in names:
        raise UserError(f"{path}: class {names.index('')} has no name")
    for kind, values in (("class", names), ("id", ids)):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"{path}: the {kind} {twice[0]!r} is there more than once ({len(twice)} such)")
    numbers = {name.replace("_ ", ", "): number for number, name in enumerate(names)}
    for known in (ids, names):  # names last: they count most
        numbers |= {name: number for number, name in enumerate(known)}
    return Vocabulary(str(path), tuple(names), numbers)


def _from_table(path: str | Path, header: list[str], rows: list[list[str]]) -> tuple[list[str], list[str]]:
    """Names and ids in the order of the index."""
    entries = [dict(zip(header, row, strict=True)) for row in rows]
    if _INDEX in header:
        try:
            entries.sort(key=lambda entry: int(entry[_INDEX]))
            found = [int(entry[_INDEX]) for entry in entries]
        except ValueError as error:
            raise UserError(f"{path}: column {_INDEX} must hold whole numbers: {error}") from error
        if found != list(range(len(found))):
            wrong = next(number for number, its in enumerate(found) if its != number)
            raise UserError(
                f"{path}: column {_INDEX} must count 0 to {len(found) - 1}, each once: {wrong} is not there"
            )
    return [entry[_NAME] for entry in entries], [entry[_ID] for entry in entries] if _ID in header else []


def read_keys(path: str, key_column: str | None, class_column: str | None, per_class: int | None) -> tuple[str, ...]:
    """Keys of a gallery from a file that names them, in its order.

    Args:
        path: Text with one key a line, .csv, or .json (a list, or {"data": list}, of keys or of tables).
        key_column: Where the keys are in a .csv (a name from its first line, or a number from 0 for one without such a
            line) or in the tables of a .json; None where one is called key or video_id, or the only one id or file.
        class_column: Where the classes are.
        per_class: How many keys of each class there must be.

    Raises:
        UserError: If the file is none of these, a key is there twice, or a class has another number of keys.
    """
    suffix, content = Path(path).suffix.lower(), _read(path, "a list of keys")
    named = [name for name in (key_column, class_column) if name is not None]
    if suffix == ".json":
        entries = _json_entries(path, _text(path, content, "a list of keys"))
    elif suffix in _TABLES:
        entries = _table_entries(Table(path, (*_USUAL, *named), content=content), named)
        if entries and key_column is None and len(entries[0]) == 1 and (first := next(iter(entries[0]))) not in _USUAL:
            raise UserError(
                f"{path}: is its first line, {first!r}, a name or a key? Say --key_column {first!r} or --key_column 0"
            )
    else:
        if named:
            raise UserError(f"{path} is read as one key a line and has no columns: name it .csv or .json if it has")
        lines = _text(path, content, "a list of keys").splitlines()
        entries = [{"key": line.strip()} for line in lines if line.strip()]
    if not entries:
        raise UserError(f"{path} names no key")
    column = key_column if key_column is not None else _usual_column(path, entries[0])
    keys = _column(path, entries, column)
    refuse_duplicates(path, keys)
    if class_column is not None and per_class is not None:
        counts = Counter(_column(path, entries, class_column))
        odd = [f"{name}: {number}" for name, number in counts.items() if number != per_class]
        if odd:
            raise UserError(f"{path} must have {per_class} keys of each class; {len(odd)} differ ({first_of(odd)})")
    elif class_column is not None:
        _column(path, entries, class_column)
    return keys


def refuse_duplicates(path: str, keys: Sequence[str]) -> None:
    """Refuse keys of which one is there twice.

    Raises:
        UserError: With the first few.
    """
    repeated = [key for key, number in Counter(keys).items() if number > 1]
    if repeated:
        raise UserError(f"{path}: {len(repeated)} keys are there more than once ({first_of(repeated)})")


def first_of(names: Sequence[str]) -> str:
    """``a, b, c, ...``."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read as {what}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read as {what}: {error}") from error


def _text(path: str | Path, content: bytes, what: str) -> str:
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as {what}: {error}") from error


def _json_entries(path: str, text: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    entries = content.get("data") if isinstance(content, dict) else content
    if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
        return [{"key": entry} for entry in entries]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must be a list of keys or of tables, or {{'data': such a list}}")
    return entries


def _table_entries(table: Table, named: Sequence[str]) -> list[dict[str, Any]]:
    rows = [cells for _, cells in table]
    if rows and named and all(name.isdecimal() for name in named):  # numbers of columns: no line names them
        rows.insert(0, [str(number) for number in range(len(rows[0]))])
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]


def _usual_column(path: str, entry: dict[str, Any]) -> str:
    if len(entry) == 1:
        return next(iter(entry))
    for name in _USUAL[:2]:
        if name in entry:
            return name
    raise UserError(f"{path} has the columns {', '.join(entry)}: say which holds the keys with --key_column")


def _column(path: str, entries: list[dict[str, Any]], name: str) -> tuple[str, ...]:
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry.get(name), str | int) or entry[name] == "":
            held = ", ".join(entry)
            raise UserError(f"{path}: entry {number} has no text in column {name!r}; its columns are {held}")
    return tuple(str(entry[name]).strip() for entry in entries)
