"""Hashes of weight files: the expected hash of a file, its source, and whether the file has it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vab import UserError
from vab.files import sha256_of

RECORD = "weights.json"
"""File beside fetched weights: ``{"format", "files": {"NAME": {"sha256", "bytes", "source", "licence"}}}``; a NAME may
contain folders."""
FORMAT = "vab-weights"
HUB_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
"""The hash that the hub states: git's of a small file, SHA-256 of a large one."""
_DEPTH = 3
"""Folders above a file that may contain its record: a NAME has two slashes at most."""


class Checked(NamedTuple):
    """The result of comparing a file with its expected hash."""

    state: Literal["ok", "changed", "unchecked"]
    expected: str = ""
    """Hex: SHA-256 or the beginning of it, or 40 digits of a git blob; empty if no hash is known."""
    source: str = ""
    """Source of the expected hash, in words."""
    got: str = ""
    """The hash of the file, as long as the expected one."""

    def __str__(self) -> str:
        if self.state == "changed":
            return f"its hash is {self.got}, expected {self.expected} {self.source}"
        return f"hash {self.source}" if self.state == "ok" else "unchecked, no hash is known"


def check(path: Path, declared: str = "", declarer: str = "as published") -> Checked:
    """Read a file and compare its hash with the expected one.

    Args:
        path: Path of the file.
        declared: The hash that this package or the hub states. If empty, the hash is taken from a `RECORD` in the
            folders above the file, from the file's name in the hub's cache, or from its name by the convention of
            torch.hub.
        declarer: Source of that hash, in words.

    Raises:
        UserError: If a record cannot be read.
    """
    expected, source = (declared, declarer) if declared else _stated(path)
    got = _digest(path, len(expected)) if expected else ""
    # The end of a name may be a date instead of a hash.
    if not expected or (got != expected and source == "as its name says"):
        return Checked("unchecked")
    return Checked("ok" if got == expected else "changed", expected, source, got)


def _stated(path: Path) -> tuple[str, str]:
    for folder in list(path.absolute().parents)[:_DEPTH]:
        if recorded := read_record(folder).get(path.absolute().relative_to(folder).as_posix()):
            return recorded["sha256"], "as recorded at fetching"
    blob = path.absolute()
    while blob.exists():  # the hub's cache links to a file whose name is its hash; that may be a link to a shared file
        if blob.parent.name == "blobs" and HUB_HASH.fullmatch(blob.name):
            return blob.name, "as the hub says"
        if not blob.is_symlink():
            break
        blob = blob.parent / blob.readlink()
    named = re.search(r"-([0-9a-f]{8,64})\.[^.]+", path.name)  # torch.hub: the name contains the first digits
    return (named[1], "as its name says") if named else ("", "")


def _digest(path: Path, digits: int) -> str:
    """The hash of a file: of 40 digits git's hash of a blob, which the hub states for small files; else SHA-256."""
    if digits != 40:
        return sha256_of(path)[:digits]
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a folder's `RECORD` by name; empty if there is no such file, or it is another program's.

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
        for name, entry in files.items():
            if not re.fullmatch("[0-9a-f]{8,64}", entry["sha256"]):
                raise ValueError(f"the hash of {name} is not hexadecimal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}, the record of fetched weights, cannot be read ({error}): delete it") from error
    return files
