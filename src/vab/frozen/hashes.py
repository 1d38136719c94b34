"""What is known of a file of weights: its hash, who stated it, and whether the file still has it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vab.files import sha256_of
from vab.spec import UserError

RECORD = "weights.json"
"""Beside fetched weights: ``{"format", "files": {"NAME": {"sha256", "bytes", "source", "licence"}}}``; a NAME may have
folders in it."""
FORMAT = "vab-weights"
_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]+")
"""A file that is called as torch.hub does it: the beginning of its SHA-256 is in its name."""
_DEPTH = 3
"""Folders above a file that may hold its record: names in one have two slashes at most."""


class Known(NamedTuple):
    """A hash that a file is said to have."""

    digest: str
    """Hex: 40 digits are git's of a blob; else SHA-256, or the beginning of it."""
    source: str
    """Who says so, in words."""


class Checked(NamedTuple):
    """A file held against what is known of it."""

    state: Literal["ok", "changed", "unchecked"]
    known: Known | None
    got: str
    """What it has, as long as the known one; empty where none is known."""


def digest_like(known: str, path: Path) -> str:
    """The hash of a file that is to be compared with a known one: of its kind, and of its length.

    Args:
        known: As in `Known.digest`.
        path: Of the file.
    """
    if len(known) != 40:
        return sha256_of(path)[: len(known)]
    # What the hub and git call small files: no secret hangs on it.
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def is_digest(text: str) -> bool:
    """Whether this can be a `Known.digest`."""
    return re.fullmatch(r"[0-9a-f]{8,64}", text) is not None


def known_digest(path: Path, declared: str = "") -> Known | None:
    """What hash a file is known to have, or None.

    Args:
        path: Of the file.
        declared: What the package itself knows; empty if nothing.

    Raises:
        UserError: If a record cannot be read.
    """
    if declared:
        return Known(declared, "as published")
    for folder in list(path.absolute().parents)[:_DEPTH]:
        recorded = read_record(folder).get(path.absolute().relative_to(folder).as_posix())
        if recorded is not None:
            return Known(recorded["sha256"], "as recorded at fetching")
    blob = path.resolve()  # the hub's cache calls its files by the hash that the hub stated
    if blob.parent.name == "blobs" and len(blob.name) in (40, 64) and is_digest(blob.name):
        return Known(blob.name, "as the hub says")
    named = _NAME.search(path.name)
    return Known(named[1], "as its name says") if named else None


def check(path: Path, declared: str = "") -> Checked:
    """Read a file and compare it with what is known of it; arguments are those of `known_digest`."""
    known = known_digest(path, declared)
    if known is None:
        return Checked("unchecked", None, "")
    got = digest_like(known.digest, path)
    if got == known.digest:
        return Checked("ok", known, got)
    if known.source == "as its name says":
        return Checked("unchecked", None, "")  # names may end in a date as well
    return Checked("changed", known, got)


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a folder's `RECORD` by name; none where there is no such file, or one of another program.

    Raises:
        UserError: If it cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            return {}
        files: dict[str, dict[str, Any]] = contents["files"]
        if wrong := [name for name, entry in files.items() if not is_digest(entry["sha256"])]:
            raise ValueError(f"the hash of {wrong[0]} is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}, which should say what was fetched, cannot be read ({error}): delete it") from error
    return files
