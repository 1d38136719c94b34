"""A folder of results that an interrupted run can resume: settings, lock, journals and table.

::

    NAME.json       the settings that determine the results; written first
    .NAME.*.jsonl   journals: one line for each finished row, by each process; deleted at the end
    NAME.csv        the table of all rows

A result counts once its row is in a journal or in the table. Journals are read whatever process of whatever run wrote
them, so a kill at any moment costs only the work in progress.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vab.files import csv_text, explain_full_disk, sync_folder, write_atomically
from vab.spec import UserError

Row = dict[str, str]
"""A row of the table: the text of each column."""


class ResumableFolder:
    """The files with which a command resumes its work in a folder.

    Args:
        folder: Where the results go.
        name: Name of the files.
        remedy: What to type if the folder cannot be resumed, for messages.
    """

    def __init__(self, folder: Path, name: str, remedy: str = "give another --out") -> None:
        self.folder, self._remedy = folder, remedy
        self.settings_file, self.table_file = folder / f"{name}.json", folder / f"{name}.csv"
        self._prefix = f".{name}."

    def check(self, settings: Mapping[str, Any], outputs: Iterable[str] = ()) -> None:
        """Refuse to resume the folder if it was not begun with these settings.

        Args:
            settings: What determines the results, in plain JSON.
            outputs: Files of the results, relative to the folder.

        Raises:
            UserError: If it was begun with other settings, or has results but no settings.
        """
        path = self.settings_file
        if not path.exists():
            results = (self.table_file, *map(self.folder.joinpath, outputs))
            if found := next((file for file in results if file.exists()), None):
                raise UserError(f"{found} exists, but no {path.name} beside it says how it was made: {self._remedy}")
            return
        try:
            theirs = json.loads(path.read_text())["settings"]
            differences = list(_differences(theirs, json.loads(json.dumps(settings))))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self.not_readable(path) from error
        if differences:
            raise UserError(
                f"{self.folder} was begun with other settings ({'; '.join(differences)}): use the same to resume, or "
                f"{self._remedy}"
            )

    def table_rows(self, columns: Sequence[str] = ()) -> list[Row]:
        """The rows of the table; none if there is no table.

        Args:
            columns: The columns that are expected; any if empty.

        Raises:
            UserError: If the table has other columns, or rows of another length.
        """
        if not self.table_file.exists():
            return []
        with self.table_file.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        has_others = columns and tuple(reader.fieldnames or ()) != tuple(columns)
        if has_others or any(None in (*row, *row.values()) for row in rows):
            raise self.not_readable(self.table_file)
        return rows

    def journal_rows(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """The results and their rows in all journals; of two rows for one result, the later counts.

        Raises:
            UserError: If a row has other columns.
        """
        for path in self._journals():
            for line in path.read_bytes().split(b"\n")[:-1]:  # a kill may leave half a line at the end
                try:
                    result, row = json.loads(line)
                except (ValueError, TypeError):  # after a power cut the end may hold anything
                    break
                if tuple(row) != tuple(columns):
                    raise self.not_readable(path)
                yield result, row

    def begin(self, settings: Mapping[str, Any], about: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
        """Write the settings, unless an earlier run has, and replace all journals by one of the rows that count.

        Args:
            settings: What determines the results, in plain JSON.
            about: Written beside it for the reader.
            rows: By result the rows of earlier runs that this run keeps.
        """
        if not self.settings_file.exists():
            content = {"settings": settings, "about": about}
            write_atomically(self.settings_file, (json.dumps(content, indent=2) + "\n").encode())
        earlier = self.folder / f"{self._prefix}earlier.jsonl"
        if rows:
            write_atomically(earlier, b"".join(_line(*item) for item in rows.items()))
        for path in self._journals():  # this run's journals begin empty: nothing is appended to half a line
            if path != earlier or not rows:
                path.unlink()

    def journal(self, rank: int) -> closing[Journal]:
        """The journal of one process of this run, as a context manager."""
        return closing(Journal(self.folder / f"{self._prefix}rank_{rank}.jsonl"))

    def write_table(self, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Write the table, which replaces the journals."""
        write_atomically(self.table_file, csv_text([columns, *([row[name] for name in columns] for row in rows)]))
        for path in self._journals():
            path.unlink()

    def clear(self) -> None:
        """Delete settings, journals and table."""
        for path in (self.table_file, *self._journals(), self.settings_file):
            path.unlink(missing_ok=True)

    def not_readable(self, path: Path) -> UserError:
        """The error for a file that this version of vab did not write."""
        return UserError(f"{path} is damaged, or of another version of vab: {self._remedy}")

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._prefix}*.jsonl"))


class Journal:
    """A file of results with their rows; each line is on disk before the next result is begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        sync_folder(path.parent)

    def add(self, result: str, row: Row) -> None:
        """Note that a result is in place, or has failed.

        Raises:
            UserError: If the disk is full.
        """
        line = _line(result, row)
        try:
            rest = line
            while rest:  # a disk that fills up may take a part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise explain_full_disk(error, self.path.parent, len(line)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(result: str, row: Row) -> bytes:
    return json.dumps([result, row]).encode() + b"\n"


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every setting in which the two differ, as ``name: theirs != ours``."""
    for name in dict.fromkeys([*theirs, *ours]):
        their, our = theirs.get(name), ours.get(name)
        if isinstance(their, dict) and isinstance(our, dict):
            yield from _differences(their, our, f"{prefix}{name}.")
        elif their != our:
            yield f"{prefix}{name}: {json.dumps(their)} != {json.dumps(our)}"
