"""AudioSet and VGGSound: lists of excerpts of YouTube videos, of which each copy has only some."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from vab import UserError
from vab.data.inputs.published.names import FORMS, Excerpts, find_files, parse_name
from vab.data.inputs.published.rows import Listing, Row
from vab.data.inputs.tables import Table

VAL = "val"
"""Name of the validation part, which the published lists do not have."""


def is_held_out(recording: str, share: float) -> bool:
    """Whether a recording is held out of training for validation.

    Only a hash of its id decides: a recording is on the same side in every list, also after others are deleted, and a
    larger share contains all of a smaller one.

    Args:
        recording: YouTube id; all segments of a video are on one side.
        share: Share of the recordings that are held out, 0 to 1.
    """
    digest = hashlib.sha256(recording.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def audioset(
    table: Path, media: Path, files: Iterable[str], whole_videos: bool = False, val_share: float | None = None
) -> Listing:
    """AudioSet's list of segments, for the files that are there.

    Args:
        table: As published: comments after ``#``, then ``YTID, start, end, "mid,mid"``.
        media: Folder of the files, for messages.
        files: Its files, as paths with ``/``; ``names.parse_name`` reads their names.
        whole_videos: Whether files named by the id alone are whole videos, of which the list's segments are parts.
        val_share: Share of the recordings that become the part ``val``; None for no such part.

    Returns:
        The rows of its one part, ``listed``, and of ``val`` if there is a share, labelled by id (``/m/...``). A record
        is named by its video's id, followed by ``_START`` (s, six digits) if the list has several excerpts of it.

    Raises:
        UserError: If a line has another form, several files belong to one entry, there is no file, or the share leaves
            nothing to train on or nothing to validate on.
    """

    def read(cells: list[str]) -> tuple[str, int, tuple[str, ...], str]:
        if len(cells) != 4:
            raise ValueError(f'not of the form YTID, start, end, "label,label": {cells}')
        labels = tuple(label.strip() for label in cells[3].split(",") if label.strip())
        return cells[0], _milliseconds(cells[1]), labels, "listed"

    entries = _entries(Table(table, comments=True), read)
    ids = [
        video if len(entries.of(video)) == 1 else _with_start(video, start)
        for video, start in zip(entries.ids, entries.starts, strict=True)
    ]
    return _listing(entries, ids, table, media, files, whole_videos, val_share, "listed")


def vggsound(
    table: Path, media: Path, files: Iterable[str], whole_videos: bool = False, val_share: float | None = None
) -> Listing:
    """VGGSound's list, for the files that are there.

    Args:
        table: As published: ``vggsound.csv`` (``YTID,start,"label",train or test``), or the list of a split, such as
            ``test.csv`` (``YTID_START.mp4,"label"``), which is one part, named as the file.
        media: As of `audioset`.
        files: As of `audioset`.
        whole_videos: As of `audioset`.
        val_share: Share of the recordings of ``train`` that become the part ``val``; None for no such part.

    Returns:
        The rows of ``train`` and ``test``, or of the one part, and of ``val`` if there is a share. A record is named
        ``YTID_START`` (s, six digits), as in VGGSound and in lists for retrieval.

    Raises:
        UserError: As of `audioset`.
    """

    def read(cells: list[str]) -> tuple[str, int, tuple[str, ...], str]:
        if len(cells) == 4 and cells[3] in ("train", "test"):
            return cells[0], _milliseconds(cells[1]), (cells[2],), cells[3]
        if len(cells) != 2:
            raise ValueError(f'not of the form YTID,start,"label",train or test, nor YTID_START.mp4,"label": {cells}')
        name = parse_name(os.path.splitext(cells[0])[0])
        if name is None or not name.starts:
            raise ValueError(f"{cells[0]!r} is not YTID_START.mp4, such as {FORMS}")
        return name.id, name.starts[0], (cells[1],), table.stem

    entries = _entries(Table(table), read)
    ids = [_with_start(video, start) for video, start in zip(entries.ids, entries.starts, strict=True)]
    return _listing(entries, ids, table, media, files, whole_videos, val_share, "train")


def _entries(table: Table, read: Callable[[list[str]], tuple[str, int, tuple[str, ...], str]]) -> Excerpts:
    """The entries of a list; ``read`` gives id, start (ms), labels and part of a line, or raises ValueError."""
    entries = Excerpts()
    for line, cells in table:
        try:
            entries.add(*read(cells))
        except ValueError as error:
            raise table.wrong(line, str(error)) from error
    return entries


def _listing(
    entries: Excerpts,
    ids: list[str],
    table: Path,
    media: Path,
    files: Iterable[str],
    whole_videos: bool,
    val_share: float | None,
    divided: str,
) -> Listing:
    """The rows of the entries that have a file; ``ids`` names their records, ``divided`` is the part to divide."""
    if val_share is not None:
        _hold_out(entries, table, val_share, divided)
    found = find_files(entries, files, whole_videos)
    rows: dict[str, list[Row]] = {part: [] for part in sorted(set(entries.parts), reverse=True)}
    for number, file in enumerate(found.files):
        if file is not None:
            start = entries.starts[number] / 1000 if found.starts_in_file[number] else None
            rows[entries.parts[number]].append(Row(file, entries.labels[number], start, ids[number]))
    missing = [name for name, file in zip(ids, found.files, strict=True) if file is None]
    return Listing(rows, missing, unused=found.unused, repeats=entries.repeats).checked(table, media)


def _hold_out(entries: Excerpts, table: Path, share: float, divided: str) -> None:
    """Move a share of a part's recordings to the part ``val``."""
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


def _with_start(video: str, milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{video}_{seconds:06d}" + (f".{rest:03d}" if rest else "")


def _milliseconds(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"a start is seconds, 0 or more, got {text!r}")
    return round(1000 * value)
