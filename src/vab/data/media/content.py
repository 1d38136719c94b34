"""Check files without FFmpeg: WAV files that are cut off, and files that are not media at all."""

from __future__ import annotations

from pathlib import Path

_PIPED = (1 << 31) - (1 << 16)
"""Bytes. Tools that write to a pipe put 0 or more than this into the header: 0x7FFFF024 (sox), 0x80000024 (arecord),
2^31 - 1, 2^32 - 1 (FFmpeg)."""
_SLACK = 9
"""Bytes. Some writers also count the 8 bytes before the size, or omit the last padding byte."""


def missing_bytes(path: Path) -> int:
    """How many bytes a WAV or AIFF file is shorter than its header says; decoders read the rest without an error.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        head, size = file.read(12), file.seek(0, 2)
    order = {(b"RIFF", b"WAVE"): "little", (b"FORM", b"AIFF"): "big", (b"FORM", b"AIFC"): "big"}.get(
        (head[:4], head[8:])
    )
    if order is None:
        return 0
    promised = int.from_bytes(head[4:8], "little" if order == "little" else "big")
    lack = promised + 8 - size
    return lack if lack > _SLACK and promised < _PIPED else 0


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD_BYTES = 512
_QUOTED = 60
"""Characters of a text file that an error message shows."""


def explain_content(path: Path) -> str:
    """Say what a file is that FFmpeg cannot read, if it is a usual leftover of a download; else ""."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(_LFS_POINTER):
        return "is a pointer of Git LFS, not the file itself: type git lfs pull"
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return ""
    if not all(character.isprintable() or character in "\t\r\n" for character in text):
        return ""
    kind = "a web page" if text.lstrip().lower().startswith(("<!doctype html", "<html")) else "text"
    return f"is {kind}, not media: {' '.join(text.split())[:_QUOTED]!r}"
