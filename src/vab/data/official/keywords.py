"""Data sets as they are published, as the CSVs that ``vab extract`` reads: file, labels, start, id."""

from __future__ import annotations

import csv
import io
import re
import wave
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vab.data.sources import MEDIA_SUFFIXES
from vab.spec import UserError

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE, NOISE = "_unknown_", "_silence_", "_background_noise_"
KEYWORDS = (*WORDS, UNKNOWN, SILENCE)
"""The 12 classes of keyword spotting in SUPERB (Yang et al. 2021), in its order."""
_HELD_OUT = 10
"""Every so manieth second of the noise is validated on."""
_YOUTUBE_ID = 11


@dataclass(frozen=True)
class Row:
    """An input of an extraction."""

    file: str
    """From the folder of the media."""
    labels: tuple[str, ...]
    start: float | None = None
    """s, of its only segment; None where the whole file counts."""
    id: str = ""
    """Of its record, if not the file's name."""


def speech_commands(root: Path, test_root: Path | None = None) -> dict[str, list[Row]]:
    """Speech Commands v0.01 with 12 classes: train, val, and test where its own archive is given.

    Source: SUPERB's keyword spotting: ten words, all other words are ``_unknown_``; the data set's own
    ``validation_list.txt`` and ``testing_list.txt`` (which its hash of the speaker gives, too) divide the recordings,
    and those of the testing list are not used; the test is the archive ``speech_commands_test_set_v0.01``. SUPERB
    takes ``_silence_`` at random from all of the background noise in training and validation; here every tenth second
    of it is validated on and the others are trained on, so that none is in both.

    Args:
        root: Unpacked folder of the data set.
        test_root: Unpacked folder of the test archive; its files must be below ``root`` or a folder beside it.

    Returns:
        By set; files from the folder that both are in (``root`` itself if there is no ``test_root``).

    Raises:
        UserError: If something of it is missing.
    """
    needed = [root / name for name in (*WORDS, NOISE, "validation_list.txt", "testing_list.txt")]
    if missing := [path.name for path in needed if not path.exists()]:
        raise UserError(f"{root} is not Speech Commands v0.01: it lacks {', '.join(missing)}")
    base = media_root(root, test_root)
    listed = {name: _lines(root / f"{name}_list.txt") for name in ("validation", "testing")}
    sets: dict[str, list[Row]] = {"train": [], "val": []}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != NOISE):
        label = folder.name if folder.name in WORDS else UNKNOWN
        for path in sorted(folder.glob("*.wav")):
            name = f"{folder.name}/{path.name}"
            if name not in listed["testing"]:
                part = "val" if name in listed["validation"] else "train"
                sets[part].append(Row(path.relative_to(base).as_posix(), (label,)))
    for path in sorted((root / NOISE).glob("*.wav")):
        for second in range(_seconds(path)):
            part = "val" if second % _HELD_OUT == 0 else "train"
            file = path.relative_to(base)
            record = f"{file.with_suffix('').as_posix()}-{second:03d}"
            sets[part].append(Row(file.as_posix(), (SILENCE,), float(second), record))
    if test_root is not None:
        if missing := [name for name in KEYWORDS if not (test_root / name).is_dir()]:
            raise UserError(f"{test_root} is not the test set of Speech Commands v0.01: it lacks {', '.join(missing)}")
        sets["test"] = [
            Row(path.relative_to(base).as_posix(), (name,))
            for name in KEYWORDS
            for path in sorted((test_root / name).glob("*.wav"))
        ]
    return sets


def media_root(root: Path, test_root: Path | None) -> Path:
    """The folder that rows of Speech Commands are relative to.

    Raises:
        UserError: If the two folders are not in one.
    """
    if test_root is None:
        return root
    if test_root.parent.resolve() != root.parent.resolve():
        raise UserError(f"put both into one folder, they are in {root.parent} and {test_root.parent}")
    return root.parent


def audioset(segments: Path, media: Path, whole_videos: bool = False) -> tuple[list[Row], list[str]]:
    """AudioSet's list of segments, for the files that are there.

    Args:
        segments: As published: comments after ``#``, then ``YTID, start, end, "mid,mid"``.
        media: Folder of files, with subfolders, whose names begin with the id, or with Y and the id.
        whole_videos: The files are whole videos, of which a segment starts where the list says; else each file is the
            segment.

    Returns:
        The rows, labelled by id (``/m/...``); and the YouTube ids that have no file.

    Raises:
        UserError: If a line is not of this form, or several files are of one id.
    """
    files = _by_youtube_id(media)
    rows, missing = [], []
    for line, cells in _table(segments, comments=True):
        if len(cells) != 4:
            raise UserError(f'{segments}, line {line}: not of the form YTID, start, end, "label,label": {cells}')
        name, start = cells[0], _number(cells[1], segments, line)
        labels = tuple(label.strip() for label in cells[3].split(",") if label.strip())
        found = files.get(name, [])
        if len(found) > 1:
            raise UserError(f"{media}: {found[0]} and {found[1]} are both of {name}: keep one")
        if found:
            rows.append(Row(found[0], labels, start if whole_videos else None, name))
        else:
            missing.append(name)
    return _some(rows, missing, segments, media), missing


def vggsound(table: Path, media: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """VGGSound's list, for the files that are there.

    Args:
        table: ``vggsound.csv`` as published: ``YTID,start,"label",train or test``.
        media: Folder of files, with subfolders, called ``YTID_START.*``, START with or without leading zeros.

    Returns:
        The rows of ``train`` and ``test``; and the names without a file.

    Raises:
        UserError: If a line is not of this form.
    """
    files: dict[str, list[str]] = {}
    for path in _media(media):
        if match := re.fullmatch(r"(.{11})_0*(\d+)", path.stem):
            files.setdefault(f"{match[1]}_{match[2]}", []).append(path.relative_to(media).as_posix())
    sets: dict[str, list[Row]] = {"train": [], "test": []}
    missing = []
    for line, cells in _table(table):
        if len(cells) != 4 or cells[3] not in sets:
            raise UserError(f'{table}, line {line}: not of the form YTID,start,"label",train or test: {cells}')
        name = f"{cells[0]}_{_number(cells[1], table, line):.0f}"
        found = files.get(name, [])
        if len(found) > 1:
            raise UserError(f"{media}: {found[0]} and {found[1]} are both of {name}: keep one")
        if found:
            sets[cells[3]].append(Row(found[0], (cells[2],)))
        else:
            missing.append(name)
    _some([row for rows in sets.values() for row in rows], missing, table, media)
    return sets, missing


def rows_csv(rows: Iterable[Row]) -> str:
    """The CSV that ``vab extract`` reads."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "labels", "start", "id"])
    for row in rows:
        writer.writerow([row.file, ";".join(row.labels), "" if row.start is None else f"{row.start:g}", row.id])
    return text.getvalue()


def _by_youtube_id(media: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for path in _media(media):
        # An id may itself begin with Y: the list says which of the two it is.
        for name in {path.stem[:_YOUTUBE_ID], path.stem.removeprefix("Y")[:_YOUTUBE_ID]}:
            files.setdefault(name, []).append(path.relative_to(media).as_posix())
    return files


def _media(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in MEDIA_SUFFIXES)


def _some(rows: list[Row], missing: Sequence[str], table: Path, media: Path) -> list[Row]:
    if not rows:
        example = f", such as {missing[0]}" if missing else ""
        raise UserError(f"{media} has none of the {len(missing)} files that {table} lists{example}")
    return rows


def _table(path: Path, comments: bool = False) -> list[tuple[int, list[str]]]:
    """Lines of a CSV with their numbers, from 1."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    return [(line, cells) for line, cells in rows if not (comments and cells[0].startswith("#"))]


def _lines(path: Path) -> set[str]:
    return {line.strip() for line in path.read_text().splitlines() if line.strip()}


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"{path}, line {line}: a start is seconds, 0 or more, got {text!r}")
    return value


def _seconds(path: Path) -> int:
    """Whole seconds of a .wav file."""
    try:
        with wave.open(str(path)) as file:
            return file.getnframes() // file.getframerate()
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path} is not a .wav file: {error}") from error
