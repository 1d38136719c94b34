"""The two sides of an evaluation as files: which count, and how they pair."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vab.data.inputs.listing import MEDIA_SUFFIXES, find_sources
from vab.data.inputs.tables import read_columns
from vab.spec import UserError

Pair = Literal["auto", "name", "none"]


@dataclass(frozen=True)
class Folder:
    """The sound files of a folder, in the order of their paths."""

    path: Path
    """Of the folder."""
    keys: tuple[str, ...]
    """Of each file its path in the folder without the suffix (with it, where two differ in nothing else)."""
    files: tuple[Path, ...]
    """Where they are."""
    ignored: tuple[str, ...]
    """Other files, by their suffix not media; hidden ones are not counted."""


def find_folder(path: str | Path) -> Folder:
    """List a folder's sounds.

    Raises:
        UserError: If it is no folder, or has no media file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is {'not a folder of sounds' if folder.exists() else 'not there'}: give a folder")
    sources = find_sources(folder, "none")
    return Folder(folder, tuple(s.id for s in sources), tuple(s.path for s in sources), tuple(_others(folder)))


def _others(folder: Path) -> list[str]:
    """Files that are no media, with subfolders through links too, each once."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            seen.add(real)
            others = (name for name in files if not name.startswith("."))
            found += [Path(parent, name) for name in others if Path(name).suffix.lower() not in MEDIA_SUFFIXES]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def is_paired(pair: Pair, real: Sequence[str], generated: Sequence[str], skip: bool) -> bool:
    """Whether sounds are compared pair by pair, by their names.

    Args:
        pair: ``name``; ``none``; or ``auto``: by name if any name is on both sides.
        real: Keys.
        generated: Keys.
        skip: Leave unpaired names out, instead of refusing them.

    Raises:
        UserError: If names have no counterpart and ``skip`` is not set, or no name is on both sides.
    """
    common = set(real) & set(generated)
    if pair == "none":
        return False
    if pair == "auto" and not common:
        if {key.casefold() for key in real} & {key.casefold() for key in generated}:
            raise UserError(
                f"names of the two sides differ in upper and lower case only ({real[0]!r}, {generated[0]!r}): rename "
                f"them to pair, or give --pair none"
            )
        return False
    if not common:
        raise UserError(
            f"not one name is on both sides (real has {real[0]!r}, ..., generated {generated[0]!r}, ...): files pair "
            f"by their path in the folder without the suffix; --pair none compares the sets as wholes"
        )
    lonely = [("real", sorted(set(real) - common)), ("generated", sorted(set(generated) - common))]
    if any(names for _, names in lonely) and not skip:
        words = "; ".join(
            f"{len(names)} in {side} only ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for side, names in lonely
            if names
        )
        raise UserError(
            f"of {len(common)} pairs, names without counterpart: {words}. --on_error skip leaves them out and counts "
            f"them, --pair none compares the sets as wholes"
        )
    return True


def read_labels(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Classes of sounds by key, from a CSV with the columns file and labels (joined by ;).

    A file may be listed with its suffix or without.

    Raises:
        UserError: If the file cannot be understood.
    """
    table: dict[str, tuple[str, ...]] = {}
    for _, cells in read_columns(Path(path), "file", "labels"):
        stem = Path(cells["file"])
        key = stem.with_suffix("").as_posix() if stem.suffix.lower() in MEDIA_SUFFIXES else stem.as_posix()
        if key in table:
            raise UserError(f"--labels {path} lists {key!r} more than once")
        table[key] = tuple(dict.fromkeys(label.strip() for label in cells["labels"].split(";") if label.strip()))
    return table
