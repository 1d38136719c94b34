"""The reader of CSV files, as spreadsheets, programs and people save them; malformed files are refused."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from vab import UserError

_DELIMITERS = (",", "\t", ";")


class Table:
    """The lines of a CSV file: UTF-8, or UTF-16 with a byte order mark; with commas, tabs or semicolons.

    Quotes are read strictly. Otherwise a quote that is not closed would make one cell of all lines that follow, and a
    list that was cut within quotes would seem complete.

    Args:
        path: Path of the file, for messages and, if ``content`` is None, to read.
        columns: Names that its first line may have, in any case: tabs or semicolons separate the cells if that gives
            more of these names than commas do. Without names only commas do, and tabs in a .tsv.
        comments: Skip lines that begin with ``#``.
        any_bytes: Accept cells that are not UTF-8, as ``os.fsdecode`` gives them; else they are refused.
        content: Content of the file, if it is not on this machine.

    Attributes:
        delimiter: The character between the cells.

    Raises:
        UserError: If there is no such file or it cannot be read; while reading, with the number of the line.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Collection[str] = (),
        comments: bool = False,
        any_bytes: bool = False,
        content: bytes | None = None,
    ) -> None:
        self.path, self._comments, self._any_bytes = path, comments, any_bytes
        self._file = _opened(path, content)
        try:
            first = next((line for line in self._file if line.strip() and not self._skips(line)), "")
            self._file.seek(0)
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error
        kinds = ("\t",) if Path(path).suffix.lower() == ".tsv" else _DELIMITERS if columns else (",",)
        self.delimiter = max(kinds, key=lambda kind: len({cell.lower() for cell in _cells(first, kind)} & {*columns}))
        self.first = _cells(first, self.delimiter)
        """Cells of the first line."""

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """The line numbers, from 1, and the cells, without blanks around them; empty lines are skipped."""
        reader = csv.reader(self._file, strict=True, skipinitialspace=True, delimiter=self.delimiter)
        try:
            with self._file:
                for cells in reader:
                    if not cells or self._skips(cells[0]):
                        continue
                    text = "".join(cells)
                    if "\n" in text or "\r" in text:
                        raise self.wrong(
                            reader.line_num, "a line break inside of double quotes: is a quote not closed before?"
                        )
                    if "\0" in text:
                        raise self.wrong(reader.line_num, "a zero byte: save the file as text in UTF-8")
                    if not (self._any_bytes or text.isascii()):
                        self.check_text(reader.line_num, text)
                    yield reader.line_num, [cell.strip() for cell in cells]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise self._unreadable(error) from error

    def wrong(self, line: int, problem: str) -> UserError:
        """The error for a line."""
        return UserError(f"{self.path}, line {line}: {problem}")

    def check_text(self, line: int, text: str) -> None:
        """Refuse text that is not UTF-8.

        Raises:
            UserError: With the line and the first such byte.
        """
        if odd := next((letter for letter in text if "\udc80" <= letter <= "\udcff"), None):
            raise UserError(
                f"{self.path} cannot be read as CSV in UTF-8: byte 0x{ord(odd) - 0xDC00:02x} in line {line}: save the "
                "file as UTF-8"
            )

    def _skips(self, line: str) -> bool:
        return self._comments and line.startswith("#")

    def _unreadable(self, error: Exception) -> UserError:
        is_open = isinstance(error, csv.Error) and "unexpected end" in str(error)
        reason = "a double quote is not closed: is the file cut?" if is_open else str(error)
        return UserError(f"{self.path} cannot be read as CSV in UTF-8: {reason}")


def read_columns(path: Path, *needed: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The line numbers and cells by column of a CSV whose first line names its columns.

    Raises:
        UserError: If it cannot be read, lacks one of the ``needed`` columns, or a line has too few or too many cells.
    """
    table = Table(path, needed)
    lines = iter(table)
    _, names = next(lines, (1, []))
    if missing := [name for name in needed if name not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)} in its first line, only {', '.join(names)}")
    for line, cells in lines:
        if len(cells) != len(names):
            raise table.wrong(line, f"{len(cells)} cells for the {len(names)} columns {', '.join(names)}")
        yield line, dict(zip(names, cells, strict=True))


def _opened(path: str | Path, content: bytes | None) -> TextIO:
    try:
        file = io.BytesIO(content) if content is not None else Path(path).open("rb")  # noqa: SIM115 (Table closes it)
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if wide:
        return io.TextIOWrapper(file, newline="", encoding="utf-16")
    return io.TextIOWrapper(file, newline="", encoding="utf-8-sig", errors="surrogateescape")


def _cells(line: str, delimiter: str) -> list[str]:
    """Cells of a line, read leniently: `Table.__iter__` refuses a malformed line."""
    return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True, delimiter=delimiter), [])]
