"""Read parts of tars into existing memory, with one system call per record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vab.spec import UserError

Buffer = memoryview | bytearray | np.ndarray
_preadv = getattr(os, "preadv", None)  # not on Windows, and on macOS since 11
_SHARE = 8
"""A data set uses at most this fraction (1 / 8) of the files that the process may open."""


class Tars:
    """The tars of a data set, each opened when a process first reads from it.

    They are not mapped into memory. A mapped file that is truncated during a run kills the process with SIGBUS, and a
    map reads 192 KiB from a cold disk for a record of 20 KiB.

    Args:
        folder: Folder of the data set.
        shards: Entries of the manifest: name and size of each tar.
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        self._folder, self._shards = folder, shards
        self._handles: dict[int, int] = {}  # oldest first
        self._most = max(1, _allowed_files(_SHARE * len(shards)) // _SHARE)

    def read_into(self, shard: int, start: int, buffers: list[Buffer], size: int) -> None:
        """Fill buffers one after the other with consecutive bytes of a tar.

        Args:
            shard: Number of the tar.
            start: Offset of the first byte.
            buffers: Filled in place.
            size: Bytes of all buffers together.

        Raises:
            UserError: If the tar is missing, truncated or unreadable.
        """
        handle = self._handles.get(shard)
        try:
            if handle is None:
                handle = self._opened(shard)
            if _preadv is not None and _preadv(handle, buffers, start) == size:
                return
            path = self._folder / self._shards[shard]["name"]
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if not os.path.samestat(status, os.fstat(handle)):
                    problem = "was replaced by another file while it was open"
                elif read_from(file, buffers, start) == size:
                    return
                else:
                    problem = f"has {status.st_size} bytes instead of {self._shards[shard]['bytes']}"
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problem = "is missing" if missing else f"cannot be read at byte {start} ({error.strerror})"
        raise broken_file(self._folder, self._shards[shard]["name"], problem)

    def read(self, shard: int, start: int, size: int) -> bytearray:
        """``size`` bytes of a tar from offset ``start``. Raises the same errors as ``read_into``."""
        buffer = bytearray(size)
        self.read_into(shard, start, [buffer], size)
        return buffer

    def _opened(self, shard: int) -> int:
        if len(self._handles) >= self._most:
            os.close(self._handles.pop(next(iter(self._handles))))
        path = self._folder / self._shards[shard]["name"]
        handle = self._handles[shard] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return handle

    def __del__(self) -> None:
        """Close the files."""
        for handle in self.__dict__.get("_handles", {}).values():
            os.close(handle)


def broken_file(folder: Path, what: str, problem: str) -> UserError:
    """The error for a file of a data set, or for something in it, that is not as it was written."""
    return UserError(f"{folder / what} {problem}: for a full report, type: vab shards verify {folder}")


def read_from(file: BinaryIO, buffers: Sequence[Buffer], start: int) -> int:
    """Fill buffers one by one from a file: without ``preadv``, and after an incomplete read.

    Args:
        file: Opened for it, because processes that share a descriptor also share its position.
        buffers: Filled in place.
        start: Offset of the first byte.

    Returns:
        Number of bytes read; fewer than asked for at the end of the file.
    """
    file.seek(start)
    return sum(file.readinto(buffer) for buffer in buffers)  # type: ignore[attr-defined]


def _allowed_files(wanted: int) -> int:
    """Raise the limit of open files towards ``wanted`` as far as the system allows; return the limit."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError):
        return soft
    return limit
