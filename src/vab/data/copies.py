"""The folders of the cache of data sets: who uses which, which are whole, and room for more.

A copy is a folder ``<name>-<hash of the address>-<hash of the manifest>`` of the cache, with two locks beside it. Who
uses the copy holds ``.lock`` together with others; who deletes it holds it alone. Who fetches it holds ``.fetching``
alone. The system gives a lock back when its process ends, however it ends, so nobody waits for the dead. Sizes against
a limit are compared under the lock of the whole cache.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from vab.data.shards.format import MANIFEST
from vab.files import write_atomically
from vab.spec import UserError

_COMPLETE, _PLAN = ".complete", ".plan"
"""Of a copy: sizes and times of its files once it is whole; bytes that it will have, from before the first."""

_GB = 1e9


class Lock:
    """The system's lock on a file, until it is closed, collected or its process has ended.

    It can be handed to another process, which then holds one of its own, together with others.

    Args:
        path: Of the file, made if absent.
        kind: ``fcntl.LOCK_SH`` to hold it together with others, ``LOCK_EX`` alone; with ``LOCK_NB`` not to wait.

    Raises:
        BlockingIOError: If another holds it and this one does not wait.
    """

    def __init__(self, path: Path, kind: int = fcntl.LOCK_SH) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.close = weakref.finalize(self, os.close, self._handle)
        try:
            fcntl.flock(self._handle, kind)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Lock], tuple[Path]]:
        return Lock, (self.path,)


class Copy:
    """One folder of the cache.

    Args:
        cache: The folder of all.
        name: Its own.
    """

    def __init__(self, cache: Path, name: str) -> None:
        self.folder = cache / name
        self.lock = cache / f"{name}.lock"
        self.fetching = cache / f"{name}.fetching"

    def is_complete(self) -> bool:
        """Whether all files are as they were when the last of them was checked."""
        try:
            noted = json.loads((self.folder / _COMPLETE).read_bytes())["files"]
            return all(_stamp(self.folder / name) == stamp for name, stamp in noted.items())
        except (FileNotFoundError, ValueError):  # a record cut short by a power cut is as good as none
            return False

    def finish(self, shown: str, manifest: bytes, files: Iterable[str]) -> None:
        """Make the folder a data set, and note that it is whole."""
        write_atomically(self.folder / MANIFEST, manifest)
        stamps = {name: _stamp(self.folder / name) for name in (MANIFEST, *files)}
        write_atomically(self.folder / _COMPLETE, json.dumps({"address": shown, "files": stamps}, indent=1).encode())
        (self.folder / _PLAN).unlink()

    def plan(self, shown: str, size: int) -> None:
        """Note how many bytes it will have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _COMPLETE).unlink(missing_ok=True)
        write_atomically(self.folder / _PLAN, json.dumps({"address": shown, "bytes": size}).encode())

    def planned(self) -> int:
        """Bytes that it has or is about to have."""
        try:
            size = int(json.loads((self.folder / _PLAN).read_bytes())["bytes"])
        except (FileNotFoundError, ValueError):
            size = 0
        return max(size, self.size())

    def size(self) -> int:
        """Bytes on the disk."""
        sizes = []
        for path in self.folder.glob("*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # another process has just renamed it
                continue
        return sum(sizes)

    def made(self) -> float:
        """When it was whole, s since 1970; 0 if it is not."""
        path = self.folder / _COMPLETE
        return path.stat().st_mtime if path.exists() else 0.0

    def used(self) -> float:
        """When it was last opened, s since 1970."""
        return self.lock.stat().st_mtime

    def is_there(self) -> bool:
        """Whether there is anything of it, and it is the cache's own."""
        return any((self.folder / name).is_file() for name in (_COMPLETE, _PLAN))

    def delete(self) -> None:
        """Delete it, what says that it is a copy last."""
        paths = sorted(self.folder.iterdir(), key=lambda path: path.name in (_COMPLETE, _PLAN))
        for path in paths:
            path.unlink()
        self.folder.rmdir()


def make_room(copy: Copy, needed: int, gb: float | None, shown: str) -> None:
    """See that a copy has room, and keep it for it.

    Without a limit nothing is deleted. With one, copies that nobody uses are, those used longest ago first, and only if
    that is enough.

    Args:
        copy: Which this process holds alone.
        needed: Bytes of all its files.
        gb: Limit of all copies of the cache together, 10^9 bytes.
        shown: Where it is from, for messages.

    Raises:
        UserError: If the limit or the disk is too small.
    """
    cache = copy.folder.parent
    with Lock(cache / ".lock", fcntl.LOCK_EX), ExitStack() as held:
        idle: list[Copy] = []
        promised = kept = 0  # bytes: about to come for others, and of others that are in use
        for other in (Copy(cache, path.stem) for path in cache.glob("*.lock")):
            if other.folder == copy.folder or not other.is_there():
                continue
            try:
                held.enter_context(Lock(other.lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
                idle.append(other)
            except BlockingIOError:
                kept += other.planned()
                promised += other.planned() - other.size()
        free = shutil.disk_usage(cache).free - promised
        missing, room, allowed = needed - copy.size() - free, 0, ""
        if gb is not None:
            room = sum(other.size() for other in idle)
            missing = max(missing, kept + room + needed - int(gb * _GB))
            allowed = f", {_in_gb(gb * _GB)} are allowed (--data.cache_gb)"
            allowed += f", of which other data sets in use take {_in_gb(kept)}" if kept else ""
        if missing > room:
            raise UserError(
                f"{shown} needs {_in_gb(needed)}; {_in_gb(max(free, 0))} are free in {cache}{allowed}: free some "
                "space, or give another folder or limit with --data.cache DIR, --data.cache_gb N"
            )
        for other in sorted(idle, key=Copy.used):
            if missing > 0:
                missing -= other.size()
                other.delete()
        copy.plan(shown, needed)


def _stamp(path: Path) -> list[int]:
    """What changes if a file does: size, and time of the last change in ns."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _in_gb(size: float) -> str:
    return f"{size / _GB:.2f} GB" if size >= 0.1 * _GB else f"{size / _GB:.2g} GB"
