"""Rows of what is to be extracted."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vab.files import as_utf8
from vab.spec import UserError

_PIECE = 10_000
"""Rows that become text at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """An input of an extraction."""

    file: str
    """From the folder of the media."""
    labels: tuple[str, ...] = ()
    start: float | None = None
    """s, of its only segment; None where the whole file counts."""
    id: str = ""
    """Of its record, if not the file's name."""


def rows_csv(rows: Iterable[Row]) -> Iterator[bytes]:
    """The CSV that ``vab extract`` reads, in pieces, as there can be millions of rows."""
    yield b"file,labels,start,id\n"
    rest = iter(rows)
    while some := list(itertools.islice(rest, _PIECE)):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(
            (row.file, ";".join(row.labels), "" if row.start is None else f"{row.start:.10g}", row.id) for row in some
        )
        yield as_utf8(text.getvalue())


def none_there(missing: Iterable[str], count: int, table: Path, media: Path) -> UserError:
    """What to say where not one of ``count`` files is there."""
    example = next(iter(missing), None)
    such_as = f", such as {example}" if example is not None else ""
    return UserError(f"{media} has none of the {count} files that {table} lists{such_as}")
