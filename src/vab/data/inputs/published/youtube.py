"""AudioSet and VGGSound: lists of excerpts of YouTube's videos, of which everybody has some."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vab.data.inputs.published.names import FORMS, Excerpts, find_files, parse_name
from vab.data.inputs.published.rows import Row, none_there
from vab.data.inputs.tables import Table
from vab.spec import UserError


@dataclass(frozen=True)
class Listing:
    """What of a list is there."""

    rows: dict[str, list[Row]]
    """By part: train, test, ..."""
    missing: list[str]
    """Entries without a file, as their records would be called."""
    unused: dict[str, tuple[int, str]]
    """Files that are of no entry: how many, and one of them, by why."""
    repeats: int
    """Entries that the list has more than once, with the same labels."""


VAL = "val"
"""The part that validation is done on, where the lists have none of their own."""


def is_held_out(recording: str, share: float) -> bool:
    """Whether a recording is one of those that are held out of training for validation.

    By a hash of its id alone: a recording is on the same side in every list, also after others have vanished, and a
    larger share holds all of a smaller one.

    Args:
        recording: Id of the video; all of its segments are on one side.
        share: Of the recordings that are held out, 0 to 1.
    """
    digest = hashlib.sha256(recording.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def audioset(
    table: Path, media: Path, files: Iterable[str], whole_videos: bool = False, val_share: float | None = None
) -> Listing:
    """AudioSet's list of segments, for the files that are there.

    Args:
        table: As published: comments after ``#``, then ``YTID, start, end, "mid,mid"``.
        media: Folder of the files, to be named in complaints.
        files: What is in it, as paths with ``/``; ``names.parse_name`` tells how they are called.
        whole_videos: Files called by the id alone are whole videos, of which a segment starts where the list says.
        val_share: Share of the recordings that become the part ``val``; None to divide nothing.

    Returns:
        The rows of its one part, ``listed``, and of ``val`` if there is a share, labelled by id (``/m/...``), each
        called by its video's id, with ``_START`` (s, six digits) behind it where the list has several excerpts of one.

    Raises:
        UserError: If a line is not of this form, several files are of one entry, there is no file, or the share leaves
            nothing to train on or nothing to validate on.
    """
    entries, part = Excerpts(), "listed"
    known: dict[str, tuple[str, ...]] = {}
    for line, cells in Table(table, comments=True):
        if len(cells) != 4:
            raise UserError(f'{table}, line {line}: not of the form YTID, start, end, "label,label": {cells}')
        if cells[3] not in known:
            known[cells[3]] = tuple(label.strip() for label in cells[3].split(",") if label.strip())
        _add(entries, table, line, cells[0], _milliseconds(cells[1], table, line), known[cells[3]], part)
    return _listing(
        entries,
        table,
        media,
        files,
        whole_videos,
        lambda number: entries.ids[number] if entries.is_only(number) else _with_start(entries, number),
        val_share,
        part,
    )


def vggsound(
    table: Path, media: Path, files: Iterable[str], whole_videos: bool = False, val_share: float | None = None
) -> Listing:
    """VGGSound's list, for the files that are there.

    Args:
        table: As published: ``vggsound.csv`` (``YTID,start,"label",train or test``), or the list of a split, such as
            ``test.csv`` (``YTID_START.mp4,"label"``), which is one part, called as the file.
        media: Folder of the files, to be named in complaints.
        files: What is in it, as paths with ``/``; ``names.parse_name`` tells how they are called.
        whole_videos: Files called by the id alone are whole videos, of which a segment starts where the list says.
        val_share: Share of the recordings of ``train`` that become the part ``val``; None to divide nothing.

    Returns:
        The rows of ``train`` and ``test``, or of the one part, and of ``val`` if there is a share; each called
        ``YTID_START`` (s, six digits), as VGGSound and lists for retrieval call it.

    Raises:
        UserError: If a line is not of this form, several files are of one entry, there is no file, or the share leaves
            nothing to train on or nothing to validate on.
    """
    entries = Excerpts()
    known: dict[str, tuple[str, ...]] = {}
    for line, cells in Table(table):
        if len(cells) == 4 and cells[3] in ("train", "test"):
            video, start, label, part = cells[0], _milliseconds(cells[1], table, line), cells[2], cells[3]
        elif len(cells) == 2:
            name = parse_name(os.path.splitext(cells[0])[0])
            if name is None or not name.starts:
                raise UserError(f"{table}, line {line}: {cells[0]!r} is not YTID_START.mp4, such as {FORMS}")
            video, start, label, part = name.id, name.starts[0], cells[1], table.stem
        else:
            raise UserError(
                f'{table}, line {line}: not of the form YTID,start,"label",train or test, nor YTID_START.mp4,"label":'
                f" {cells}"
            )
        _add(entries, table, line, video, start, known.setdefault(label, (label,)), part)
    return _listing(
        entries, table, media, files, whole_videos, lambda number: _with_start(entries, number), val_share, "train"
    )


def _add(entries: Excerpts, table: Path, line: int, video: str, start: int, labels: tuple[str, ...], part: str) -> None:
    try:
        entries.add(video, start, labels, part)
    except ValueError as error:
        raise UserError(f"{table}, line {line}: {error}") from error


def _listing(
    entries: Excerpts,
    table: Path,
    media: Path,
    files: Iterable[str],
    whole_videos: bool,
    call: Callable[[int], str],
    val_share: float | None,
    divided: str,
) -> Listing:
    """Rows for what is found; ``call`` gives what an entry's record is called, ``divided`` is the part to divide."""
    if val_share is not None:
        _hold_out(entries, table, val_share, divided)
    found = find_files(entries, files, whole_videos)
    rows: dict[str, list[Row]] = {part: [] for part in sorted(set(entries.parts), reverse=True)}
    missing = []
    for number, file in enumerate(found.files):
        if file is None:
            missing.append(call(number))
            continue
        start = entries.starts[number] / 1000 if found.starts_in_file[number] else None
        rows[entries.parts[number]].append(Row(file, entries.labels[number], start, call(number)))
    if len(missing) == len(entries):
        raise none_there(missing, len(entries), table, media)
    return Listing(rows, missing, found.unused, entries.repeats)


def _hold_out(entries: Excerpts, table: Path, share: float, divided: str) -> None:
    """Make the part ``val`` of a share of a part's recordings."""
    if not 0 < share < 1:
        raise UserError(f"val_share must be between 0 and 1, such as 0.02 for one recording of fifty, got {share}")
    parts = sorted(set(entries.parts))
    if divided not in parts:
        raise UserError(f"{table} has no part {divided!r} to divide, only {', '.join(parts)}: leave val_share out")
    whole = [number for number, part in enumerate(entries.parts) if part == divided]
    held_out = [number for number in whole if is_held_out(entries.ids[number], share)]
    if not 0 < len(held_out) < len(whole):
        rest = "nothing to validate on" if not held_out else "nothing to train on"
        raise UserError(f"val_share {share} of the {len(whole)} segments of {table} leaves {rest}: give another share")
    for number in held_out:
        entries.parts[number] = VAL


def _with_start(entries: Excerpts, number: int) -> str:
    seconds, rest = divmod(entries.starts[number], 1000)
    return f"{entries.ids[number]}_{seconds:06d}" + (f".{rest:03d}" if rest else "")


def _milliseconds(text: str, path: Path, line: int) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"{path}, line {line}: a start is seconds, 0 or more, got {text!r}")
    return round(1000 * value)
