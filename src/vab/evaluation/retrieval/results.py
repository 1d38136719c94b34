"""What a query found, as people read it: a table, and a page with players that opens in any browser."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from vab.console import print_table
from vab.data.inputs.listing import VIDEO_SUFFIXES
from vab.pages import render_page


@dataclass(frozen=True)
class Hit:
    """One item that was found."""

    rank: int
    """1 = nearest."""
    name: str
    """Its key in the gallery."""
    cosine: float
    """With the query."""
    file: str = ""
    """The media file that it is from, if known."""
    start_seconds: float | None = None
    """Where in that file it starts, if it is a segment of it."""
    labels: tuple[str, ...] = ()
    """Its classes, if known."""


def results_page(
    query: Path, by: str, hits: Sequence[Hit], among: int, folder: Path, sounds: Mapping[int, bytes]
) -> str:
    """The page as HTML.

    Args:
        query: Media file that was searched with.
        by: ``audio`` or ``video``: which side of it.
        hits: What was found, nearest first.
        among: Size of the gallery.
        folder: Where the page will be; files are linked relative to it.
        sounds: By rank, a .wav file that is put into the page. The files of other hits are linked.
    """
    return render_page(
        __package__,
        "found.html",
        name=query.name,
        by=by,
        among=among,
        hits=hits,
        query=_media(query, folder),
        files={hit.rank: _media(Path(hit.file), folder) for hit in hits if hit.file},
        sounds={rank: base64.b64encode(sound).decode() for rank, sound in sounds.items()},
    )


def _media(path: Path, folder: Path) -> dict[str, str]:
    """The HTML element of a media file, and its link."""
    kind = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "audio"
    return {"kind": kind, "link": quote(os.fsencode(os.path.relpath(path.resolve(), folder.resolve())))}


def print_hits(query: Path, by: str, hits: Sequence[Hit], among: int) -> None:
    """Print a table of what was found; arguments as of ``results_page``."""
    what = "sounds nearest to the picture of" if by == "video" else "videos nearest to the sound of"
    rows = []
    for hit in hits:
        start = "" if hit.start_seconds is None else f" at {hit.start_seconds:g} s"
        rows.append([str(hit.rank), f"{hit.cosine:.3f}", hit.name, hit.file + start, ", ".join(hit.labels)])
    headings = ["", "cosine", "", "from", "classes"]
    print_table(f"{what} {query.name}, among {among}", headings, rows, left=(2, 3, 4))
