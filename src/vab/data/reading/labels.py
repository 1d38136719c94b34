"""Lists published with data sets: class names, and the keys of a retrieval gallery."""

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
"""Columns of AudioSet's class list, and of those of VGGSound and ESC-50 in the same form."""
_USUAL = ("key", "video_id", "id", "file")
"""Usual names of a column of keys."""
_TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Vocabulary:
    """The ordered classes of a data set."""

    path: str
    """The file that lists them."""
    names: tuple[str, ...]
    """L different names."""
    numbers: dict[str, int] = field(repr=False)
    """Number of each class by its name, its id, and its name with commas instead of underscores."""

    def number(self, label: str) -> int:
        """The number of a class, by its name or its id.

        VGGSound's class list has "bird chirping_ tweeting" where its other lists have "bird chirping, tweeting"; both
        are accepted.

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
    """Read class names from the list that a data set is published with.

    Args:
        path: A .csv with the columns index, mid and display_name (AudioSet, VGGSound, ESC-50; in the order of index);
            a .csv without a header, whose first column is the name; or text with one name per line. A .csv may have
            tabs or semicolons instead of commas.

    Raises:
        UserError: If the file is missing or cannot be read, a line is malformed, or a class is listed twice.
    """
    if Path(path).suffix.lower() not in _TABLES:
        rows = [[line.strip()] for line in _text(path).splitlines() if line.strip()]
    else:
        table, rows = Table(path, (_INDEX, _ID, _NAME)), []
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
    for known in (ids, names):  # names last: they take precedence
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
    """Keys of a retrieval gallery from a file, in the file's order.

    Args:
        path: Text with one key per line, a .csv, or a .json (a list, or {"data": list}, of keys or of objects).
        key_column: Column of the keys: a name from the header of a .csv, a number from 0 for a .csv without a header,
            or a field of the objects in a .json. None if a column is called key or video_id, or if there is only one.
        class_column: Column of the classes.
        per_class: Required number of keys of each class.

    Raises:
        UserError: If the file has another form, a key is listed twice, or a class has another number of keys.
    """
    suffix = Path(path).suffix.lower()
    named = [name for name in (key_column, class_column) if name is not None]
    if suffix == ".json":
        entries = _json_entries(path, _text(path))
    elif suffix in _TABLES:
        entries = _table_entries(Table(path, (*_USUAL, *named)), named)
        if entries and key_column is None and len(entries[0]) == 1 and (first := next(iter(entries[0]))) not in _USUAL:
            raise UserError(
                f"{path}: is its first line, {first!r}, a name or a key? Say --key_column {first!r} or --key_column 0"
            )
    else:
        if named:
            raise UserError(f"{path} is read as one key a line and has no columns: name it .csv or .json if it has")
        entries = [{"key": line.strip()} for line in _text(path).splitlines() if line.strip()]
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
    """Refuse duplicate keys.

    Raises:
        UserError: With the first few duplicates.
    """
    repeated = [key for key, number in Counter(keys).items() if number > 1]
    if repeated:
        raise UserError(f"{path}: {len(repeated)} keys are there more than once ({first_of(repeated)})")


def first_of(names: Sequence[str]) -> str:
    """``a, b, c, ...``."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _text(path: str | Path) -> str:
    """Text of a file in UTF-8, or in UTF-16 with a byte order mark."""
    try:
        content = Path(path).read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"{path} cannot be read as text in UTF-8: {reason}") from error


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
    if rows and named and all(name.isdecimal() for name in named):  # columns are given by number: there is no header
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
