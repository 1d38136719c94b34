"""The result of reading a published data set: rows for ``vab extract``, and what is missing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vab import UserError
from vab.files import as_utf8, csv_text

_PIECE = 10_000
"""Rows that become text at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """An input of an extraction."""

    file: str
    """Path relative to the folder of the media."""
    labels: tuple[str, ...] = ()
    start: float | None = None
    """s, start of its only segment; None to extract the whole file."""
    id: str = ""
    """Name of its record, if it is not the file's name."""


@dataclass(frozen=True)
class Listing:
    """The entries of a published list that have a file, and the others."""

    rows: dict[str, list[Row]]
    """By part: train, test, ..."""
    missing: list[str] = field(default_factory=list)
    """Names of the entries without a file."""
    classes: tuple[str, ...] = ()
    """In the order of their numbers; empty if the list does not define them."""
    unused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Number of the files without an entry and an example, by reason."""
    repeats: int = 0
    """Number of the entries that repeat an earlier one, with the same labels."""

    def checked(self, table: Path, media: Path) -> Listing:
        """Refuse a listing without a row.

        Args:
            table: Path of the published list, for the message.
            media: Folder of the files, for the message.

        Raises:
            UserError: If there is no row.
        """
        if any(self.rows.values()):
            return self
        such_as = f", such as {self.missing[0]}" if self.missing else ""
        raise UserError(f"{media} has none of the {len(self.missing)} files that {table} lists{such_as}")


def rows_csv(rows: Iterable[Row]) -> Iterator[bytes]:
    """The CSV that ``vab extract`` reads, in pieces, because there can be millions of rows."""
    yield b"file,labels,start,id\n"
    rest = iter(rows)
    while some := list(itertools.islice(rest, _PIECE)):
        yield as_utf8(
            csv_text(
                (row.file, ";".join(row.labels), "" if row.start is None else f"{row.start:.10g}", row.id)
                for row in some
            )
        )


def stem_of(file: str) -> str:
    """The name of a file without folders and suffix."""
    return os.path.splitext(file.rpartition("/")[2])[0]


def by_stem(files: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The files whose names without folders and suffix are wanted, by these names.

    Raises:
        UserError: If several files have one name.
    """
    found: dict[str, str] = dict.fromkeys(wanted, "")
    repeated: dict[str, tuple[str, str]] = {}
    for file in files:
        stem = stem_of(file)
        if found.get(stem):
            repeated.setdefault(stem, (found[stem], file))
        elif stem in found:
            found[stem] = file
    refuse_repeated("names", repeated.values())
    return {stem: file for stem, file in found.items() if file}


def refuse_repeated(entries: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Refuse a folder with several files of one entry.

    Args:
        entries: What the entries are, in words.
        pairs: Two files of each such entry.

    Raises:
        UserError: If there are any.
    """
    if several := list(pairs):
        first, other = several[0]
        raise UserError(
            f"{len(several)} listed {entries} have more than one file, such as {first} and {other}: keep one of each,"
            " or give a folder that has one"
        )
