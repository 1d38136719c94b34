"""Files written whole or not at all, names that fit, and what to say of a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from vab import UserError

TEMPORARY_SUFFIX = ".tmp"

MAX_NAME_BYTES = 255
"""Length of a file name that the file systems in use allow (ext4, XFS, APFS, NTFS, Lustre, NFS)."""


def fitting_name(name: str, suffix: str = "") -> str:
    """``name`` and ``suffix`` as one file name, shortened where it would be longer than file systems allow.

    A shortened name is the beginning of ``name``, a hash of the whole of it, and ``suffix``.

    Args:
        name: Of a file, without folders; any bytes, as ``os.fsdecode`` gives them.
        suffix: What follows it; at most 200 bytes.
    """
    if len(os.fsencode(name + suffix)) <= MAX_NAME_BYTES:
        return name + suffix
    end = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:10]}{suffix}"
    return os.fsencode(name)[: MAX_NAME_BYTES - len(os.fsencode(end))].decode("utf-8", "ignore") + end


def as_utf8(text: str) -> bytes:
    """Text with names of files as UTF-8; names that are not UTF-8 keep their bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character of UTF-16, as JSON may have
        return text.encode("utf-8", "surrogatepass")


def write_atomically(path: Path, content: str | bytes | memoryview | Iterable[bytes]) -> None:
    """Put ``content``, in one piece or in several, at ``path`` whole or not at all, also across a kill or a power cut.

    Text is written as ``as_utf8`` gives it.

    Raises:
        UserError: If the disk is full.
    """
    temporary = path.with_name(fitting_name(path.name, TEMPORARY_SUFFIX))
    content = as_utf8(content) if isinstance(content, str) else content
    needed = 0
    try:
        with temporary.open("wb") as file:
            for piece in [content] if isinstance(content, (bytes, memoryview)) else content:
                needed += len(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain_full_disk(error, path.parent, needed) from error


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (renames) last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain_full_disk(error: OSError, folder: Path, needed: int) -> OSError | UserError:
    """The error itself, or a ``UserError`` if it says that the disk or the quota is full.

    Args:
        error: What the system raised.
        folder: Where it was being written.
        needed: Bytes that the file being written needs.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return UserError(
        f"no space left in {folder}: the next file needs {needed:,} bytes, {shutil.disk_usage(folder).free:,} are free;"
        " free some space and run the same command again, a training with --ckpt_path and its folder; what is already"
        " written is kept"
    )
