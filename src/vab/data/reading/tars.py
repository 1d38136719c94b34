"""Reading pieces of tars into memory that is there already: one system call per record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vab.spec import UserError

Buffer = memoryview | bytearray | np.ndarray
_SHARE = 8
"""One data set keeps at most this fraction (1 / 8) of the files open that the process may have."""


class Tars:
    """The tars of a data set, each opened when a process first reads from it.

    They are read, not mapped. A mapped file that is cut off during a run kills the process with SIGBUS, and a map reads
    192 KiB from a cold disk for a record of 20 KiB.

    Args:
        folder: Of the data set.
        shards: Entries of the manifest: name and bytes of each tar.
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        self._folder, self._shards = folder, shards
        self._handles: dict[int, int] = {}  # oldest first
        self._most = max(1, _allowed_files(_SHARE * len(shards)) // _SHARE)

    def read_into(self, shard: int, start: int, buffers: list[Buffer], size: int) -> None:
        """Fill buffers one after the other with the bytes of a tar.

        Args:
            shard: Its number.
            start: Of the first byte.
            buffers: To fill.
            size: Bytes of all buffers together.

        Raises:
            UserError: If the tar has vanished, ends too early or cannot be read.
        """
        handle = self._handles.get(shard)
        try:
            if handle is None:
                handle = self._opened(shard)
            if _preadv(handle, buffers, start) == size or read_in_turn(handle, buffers, start) == size:
                return
            problem = f"has {os.fstat(handle).st_size} bytes instead of {self._shards[shard]['bytes']}"
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problem = "is missing" if missing else f"cannot be read at byte {start} ({error.strerror})"
        raise UserError(
            f"{self._folder / self._shards[shard]['name']} {problem}: for all that is wrong, type: vab shards verify "
            f"{self._folder}"
        )

    def read(self, shard: int, start: int, size: int) -> bytearray:
        """So many bytes of a tar, from ``start`` on. Raises as ``read_into``."""
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


def read_in_turn(handle: int, buffers: Sequence[Buffer], start: int) -> int:
    """Fill buffers piece by piece: where the system has no ``preadv``, or it gave less than was asked for.

    Args:
        handle: Of an open file.
        buffers: To fill.
        start: Of the first byte.

    Returns:
        How many bytes there were.
    """
    done = 0
    for buffer in buffers:
        place, view = 0, memoryview(buffer)  # type: ignore[arg-type]
        while place < len(view):
            if hasattr(os, "pread"):
                piece = os.pread(handle, len(view) - place, start + done)
            else:  # Windows, where no other process reads through this handle
                os.lseek(handle, start + done, os.SEEK_SET)
                piece = os.read(handle, len(view) - place)
            if not piece:
                return done
            view[place : place + len(piece)] = piece
            place, done = place + len(piece), done + len(piece)
    return done


_preadv = getattr(os, "preadv", read_in_turn)  # macOS has it from 11 on


def _allowed_files(wanted: int) -> int:
    """How many files this process may have open; the limit is raised towards ``wanted`` as far as the system allows."""
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
