"""Rows of what is to be extracted, and the tables that data sets are published with."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vab.data.inputs.tables import not_csv
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


def read_table(path: Path, comments: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Lines of a CSV with their numbers, from 1; empty ones are passed over.

    Args:
        path: Of the CSV.
        comments: Pass over lines that begin with ``#``.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            for cells in reader:
                if cells and not (comments and cells[0].startswith("#")):
                    yield reader.line_num, [cell.strip() for cell in cells]
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise not_csv(path, error) from error


def read_columns(path: Path, *needed: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV whose first line names its columns, with their numbers.

    Raises:
        UserError: If it cannot be read, lacks one of the ``needed`` columns, or a line has too few or too many cells.
    """
    lines = read_table(path)
    _, names = next(lines, (1, []))
    if missing := [name for name in needed if name not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)} in its first line, only {', '.join(names)}")
    for line, cells in lines:
        if len(cells) != len(names):
            raise UserError(f"{path}, line {line}: {len(cells)} cells for the {len(names)} columns {', '.join(names)}")
        yield line, dict(zip(names, cells, strict=True))


def none_there(missing: Iterable[str], count: int, table: Path, media: Path) -> UserError:
    """What to say where not one of ``count`` files is there."""
    example = next(iter(missing), None)
    such_as = f", such as {example}" if example is not None else ""
    return UserError(f"{media} has none of the {count} files that {table} lists{such_as}")
