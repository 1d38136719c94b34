"""What a folder of generated sounds knows about itself: how they are made, which are done, and in the end the table.

::

    generations.json        the settings that determine the sounds; written before the first of them
    .generations.*.jsonl    journals: while a run lasts, one line for each output that is in place, by each rank
    generations.csv         one row for each output, in the order of the inputs; written last

A kill at any moment costs what was in flight: an output counts once its line is in a journal, and journals are read
whatever rank of whatever run wrote them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from vab.files import explain_full_disk, lock_folder, sync_folder, write_atomically
from vab.spec import UserError

SETTINGS, TABLE = "generations.json", "generations.csv"
_JOURNALS = ".generations.*.jsonl"
_EARLIER = ".generations.earlier.jsonl"

COLUMNS = (
    "file",  # as listed
    "input",  # its size in bytes and its time of change in ns: another file under its name is another input
    "variation",
    "output",  # relative to the folder; empty where there is none
    "seconds",  # of sound
    "seed",
    "sampler",  # JSON, as the next
    "fine_sampler",  # empty without a fine stage
    "checkpoint",
    "checkpoint_sha256",
    "wall_seconds",  # this output's share of the time that its group took to generate
    "peak",
    "rms_db",
    "silence",
    "entropy",  # of each level, joined by ;
    "longest_repeat_seconds",
    "gain_db",  # by which the sound was turned down so as not to clip
    "warnings",  # in words, joined by ;
    "error",  # why there is no output
)

Row = dict[str, str]
"""One line of the table: a text for each of `COLUMNS`."""


class Ledger:
    """The settings, journals and table of one folder.

    Rank 0 calls `begin`, then every rank writes its own `journal`, then rank 0 calls `finish`.
    """

    def __init__(self, folder: Path, outputs: Mapping[str, str]) -> None:
        """Look at nothing yet.

        Args:
            folder: Where the outputs go.
            outputs: The outputs wanted, in order, as paths relative to the folder; and what the column ``input`` is
                to say of each.
        """
        self.folder, self.outputs = folder, outputs

    @contextmanager
    def hold(self, alone: bool) -> Iterator[None]:
        """Keep other runs out of the folder while this one writes, also one whose first process was killed.

        Args:
            alone: Demand that no other process holds the folder; for as long as the context lasts, it is then shared
                with those that ask without.

        Raises:
            UserError: If another run is at work there, or the folder cannot be made.
        """
        with lock_folder(self.folder, "vab generate", alone, share=True):
            yield

    def begin(self, settings: Mapping[str, Any], about: Mapping[str, Any], overwrite: bool = False) -> set[str]:
        """Begin, or go on with what an interrupted run left.

        Args:
            settings: What determines the sounds, in plain JSON. A run with other settings is refused.
            about: What is written beside it for the reader.
            overwrite: Delete what an earlier run made, and begin again.

        Returns:
            Those of the outputs that are done already.

        Raises:
            UserError: If the folder was begun with other settings, holds sounds of inputs that are not listed any
                more, or outputs that no run knows of.
        """
        settings = json.loads(json.dumps(settings))
        if overwrite:
            self._clear()
        elif (theirs := self._settings()) is not None:
            if differences := _differences(theirs, settings):
                raise UserError(
                    f"{self.folder} was begun with other settings ({'; '.join(differences)}): use the same to go on, "
                    "give another folder, or --overwrite to make all its sounds again"
                )
        else:
            strangers = [self.folder / name for name in (TABLE, *self.outputs)]
            if found := next((path for path in strangers if path.exists()), None):
                raise UserError(
                    f"{found} exists, but no {SETTINGS} beside it says how it was made: give another folder, or "
                    "--overwrite to replace it"
                )
        # An output that is not there any more, or of an input that has changed, is made again; one that failed is
        # tried again.
        done = {output: row for output, row in self._rows() if row["output"] and (self.folder / output).is_file()}
        if lost := sorted(done.keys() - set(self.outputs)):
            raise UserError(
                f"{self.folder} holds {len(lost)} sounds of inputs that --video does not list any more, the first is "
                f"{lost[0]}: list them again, give another folder, or --overwrite to make all sounds again"
            )
        done = {output: row for output, row in done.items() if row["input"] == self.outputs[output]}
        if not (self.folder / SETTINGS).exists():
            content = {"settings": settings, "about": about}
            write_atomically(self.folder / SETTINGS, (json.dumps(content, indent=2) + "\n").encode())
        # One journal of all that counts, so that this run's journals begin empty: no torn line is appended to.
        write_atomically(self.folder / _EARLIER, b"".join(_line(output, row) for output, row in done.items()))
        for path in self.folder.glob(_JOURNALS):
            if path.name != _EARLIER:
                path.unlink()
        return set(done)

    def journal(self, rank: int) -> Journal:
        """The journal of one rank of this run."""
        return Journal(self.folder / f".generations.rank_{rank}.jsonl")

    def finish(self) -> list[Row]:
        """Merge all journals into the table.

        Returns:
            The table's rows: one for each output wanted, in order.

        Raises:
            UserError: If an output is in no journal, or the disk is full.
        """
        journals = sorted(self.folder.glob(_JOURNALS))
        rows = {output: row for path in journals for output, row in _journal_rows(path)}
        if missing := [output for output in self.outputs if output not in rows]:
            raise UserError(
                f"{self.folder}: {len(missing)} outputs are in no journal, the first is {missing[0]}; other machines' "
                "journals may not be visible here yet: run the same command again"
            )
        table = [rows[output] for output in self.outputs]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_atomically(self.folder / TABLE, text.getvalue())
        for path in journals:
            path.unlink()
        return table

    def _settings(self) -> dict[str, Any] | None:
        """What the folder was begun with; None if it was not."""
        path = self.folder / SETTINGS
        if not path.exists():
            return None
        try:
            settings: dict[str, Any] = json.loads(path.read_text())["settings"]
            return settings
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path} is damaged: give another folder, or --overwrite to make all sounds again"
            ) from error

    def _rows(self) -> Iterator[tuple[str, Row]]:
        """Outputs and their rows in the table, then in all journals; later ones count."""
        path = self.folder / TABLE
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
            if tuple(reader.fieldnames or ()) != COLUMNS or any(None in (*row, *row.values()) for row in rows):
                raise UserError(f"{path} is not as vab wrote it: restore it, or --overwrite to start again")
            yield from ((row["output"], row) for row in rows if row["output"])
        for path in sorted(self.folder.glob(_JOURNALS)):
            yield from _journal_rows(path)

    def _clear(self) -> None:
        """Delete the sounds that are listed, and the lists. Files that no list names stay."""
        try:
            outputs = [output for output, _ in self._rows()]
        except UserError:  # a damaged list, which names nothing
            outputs = []
        for output in outputs:
            if not Path(output).is_absolute() and ".." not in Path(output).parts:
                (self.folder / output).unlink(missing_ok=True)
        for path in (self.folder / TABLE, *self.folder.glob(_JOURNALS), self.folder / SETTINGS):
            path.unlink(missing_ok=True)


class Journal:
    """One line for each output that is in place, on disk before the next output is begun."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        self._file = path.open("ab", buffering=0)
        sync_folder(self.folder)

    def add(self, output: str, row: Row) -> None:
        """Note that an output is in place, or why it cannot be made.

        Raises:
            UserError: If the disk is full.
        """
        line = _line(output, row)
        try:
            rest = line
            while rest:  # a disk that fills up may take a part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise explain_full_disk(error, self.folder, len(line)) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _line(output: str, row: Row) -> bytes:
    return json.dumps([output, row]).encode() + b"\n"


def _journal_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Outputs and rows of a journal, without the torn line at the end that a kill may leave."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            output, row = json.loads(line)
        except (ValueError, TypeError):  # after a power cut the end may be anything
            return
        if tuple(row) != COLUMNS:
            raise UserError(f"{path} was written by another version of vab: --overwrite makes all sounds again")
        yield output, row


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every setting in which the two differ, as ``name: theirs != mine``."""
    found = []
    for name in dict.fromkeys([*theirs, *mine]):
        their, my = theirs.get(name), mine.get(name)
        if isinstance(their, dict) and isinstance(my, dict):
            found += _differences(their, my, f"{prefix}{name}.")
        elif their != my:
            found.append(f"{prefix}{name}: {json.dumps(their)} != {json.dumps(my)}")
    return found
