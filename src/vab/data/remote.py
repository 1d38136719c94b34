"""Data sets at addresses (http, s3, gs, hf, ...): fetched once into a cache of this machine, then read from there.

A broken connection is resumed; each file is checked against its hash in the manifest.

A copy is a folder ``<name>-<hash of the address>-<hash of the manifest>`` of the cache, with two lock files beside it.
Each process that reads the copy holds ``.lock``, shared; who deletes the copy holds it exclusively. The process that
fetches holds ``.fetching``. The system releases the locks of a process that ends, however it ends. The room of the
whole cache is divided under the lock of the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from vab.console import ProgressBar
from vab.data.addresses import AddressError, Remote, Stop, is_address
from vab.data.shards.format import MANIFEST, SIDE_FILES, parse_manifest, read_manifest
from vab.files import TEMPORARY_SUFFIX, Lock, explain_full_disk, sha256_of, sync_folder, write_atomically
from vab.spec import UserError

_PART_SUFFIX = ".part"
_STATE = ".copy.json"
"""In a copy: its address, its size in bytes, and once it is complete, size and time of each file."""
_HASH_TRIES = 3
_THREADS = 8
_GB = 1e9


class _UnreachableError(UserError):
    """Nothing answers at an address, which may pass."""


@dataclass(frozen=True)
class Cache:
    """Where copies are kept, and how many.

    Raises:
        UserError: If the limit is not above 0.
    """

    folder: str | None = None
    """By default the environment's ``VAB_CACHE``, else ``~/.cache/vab``."""
    gb: float | None = None
    """Limit of all copies together, 10^9 bytes: the least recently used are deleted for new ones. None: no limit, and
    nothing is deleted."""
    local: bool = False
    """Copy local folders, too: from a slow disk to a fast one, or into memory (``/dev/shm``)."""

    def __post_init__(self) -> None:
        """Refuse a limit that nothing fits into."""
        if self.gb is not None and not 0 < self.gb < inf:
            raise UserError(f"data.cache_gb must be above 0 and finite (null: no limit), got {self.gb}")

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder or os.environ.get("VAB_CACHE") or "~/.cache/vab").expanduser().absolute()


class LocalCopy(NamedTuple):
    """A data set on this machine."""

    folder: Path
    """Where it is."""
    use: Lock | None = None
    """Keeps it from being deleted while this exists; None for a folder that is the user's own."""


class ListedFile(NamedTuple):
    """What a manifest says of a file."""

    size: int
    """Bytes."""
    sha256: str
    """In hexadecimal digits."""


def local_copy(folder: str | Path, cache: Cache | None = None) -> LocalCopy:
    """A data set's folder; one at an address is fetched into the cache first, unless it is there.

    Of the processes of a machine (or of all that share the cache) one fetches, the others wait for it; if it dies, the
    next one resumes. Without a network, the copy of the last time is used. A progress bar is shown on a terminal.

    Args:
        folder: Folder or address.
        cache: Where to keep the copy; the default one where not given.

    Raises:
        UserError: If there is no data set, it cannot be read, is not what its manifest says, or there is no room.
    """
    cache = cache or Cache()
    if not is_address(folder):
        path = Path(folder)
        if not cache.local:
            return LocalCopy(path)
        read_manifest(path)  # its messages say more about a folder without a data set
        folder = f"file://{path.resolve()}"
    remote = Remote(str(folder))
    try:
        try:
            text = _read_manifest(remote)
        except _UnreachableError as error:
            return _last_copy(remote, cache, error)
        return _copy_of(remote, text, cache)
    except OSError as error:
        raise UserError(
            f"cannot keep a copy of {remote.shown} in {cache.path} ({error}): give a folder that can be written, with "
            "--data.cache DIR or the environment's VAB_CACHE"
        ) from error


def _read_manifest(remote: Remote) -> bytes:
    """The text of the manifest, as it is now.

    Raises:
        UserError: If there is none, or it may not be read.
        _UnreachableError: If nothing answers.
    """
    try:
        return remote.attempt(lambda: bytes(remote.files.cat_file(remote.path(MANIFEST))))
    except AddressError as error:
        if error.reason == "missing":
            advice = "give the address of a folder that vab extract wrote"
            raise UserError(f"no data set at {remote.shown}: it has no {MANIFEST}; {advice}") from error
        if error.reason == "refused":
            raise UserError(f"{remote.shown}/{MANIFEST} may not be read ({error}): check the credentials") from error
        raise _UnreachableError(f"cannot reach {remote.shown}: {error}") from error


def _copy_of(remote: Remote, text: bytes, cache: Cache) -> LocalCopy:
    """The copy of the data set that has this manifest, fetched if it is not there."""
    files = files_of(parse_manifest(text, remote.shown), remote.shown)
    copy = _Copy(cache.path / f"{_name(remote)}-{hashlib.sha256(text).hexdigest()[:10]}")
    cache.path.mkdir(parents=True, exist_ok=True)
    use = Lock(copy.lock, shared=True)
    try:
        os.utime(copy.lock)
        if not copy.is_complete():
            with Lock(copy.folder.with_name(f"{copy.folder.name}.fetching")):
                if not copy.is_complete():  # else another process has fetched it meanwhile
                    needed = sum(listed.size for listed in files.values()) + len(text)
                    _make_room(copy, needed, cache.gb, remote.shown)
                    _fetch_all(remote, files, copy)
                    write_atomically(copy.folder / MANIFEST, text)
                    copy.note(remote.shown, needed, (MANIFEST, *files))
    except BaseException:
        use.close()  # not left to the collector: who keeps the error would keep the lock
        raise
    return LocalCopy(copy.folder, use)


def _last_copy(remote: Remote, cache: Cache, error: _UnreachableError) -> LocalCopy:
    """The newest complete copy, for a machine that has no network."""
    from lightning.pytorch.utilities import rank_zero_warn  # a second, which commands that never warn need not wait

    copies = [_Copy(path) for path in cache.path.glob(f"{_name(remote)}-??????????")]
    for copy in sorted(copies, key=lambda copy: copy.state().get("made", 0.0), reverse=True):
        use = Lock(copy.lock, shared=True)
        if copy.is_complete():
            os.utime(copy.lock)
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(copy.state()["made"]))
            rank_zero_warn(f"{error}; going on with the copy of {made}")
            return LocalCopy(copy.folder, use)
        use.close()
    raise error


def _name(remote: Remote) -> str:
    """Of all copies of what lies at an address: its end for people, and a hash of the whole of it."""
    _, _, path = remote.shown.partition("://")
    words = re.sub(r"[^A-Za-z0-9_-]+", "_", "/".join(path.split("/")[-2:])).strip("_-")[-60:]
    return f"{words or 'data'}-{hashlib.sha256(remote.shown.encode()).hexdigest()[:10]}"


def files_of(manifest: Mapping[str, Any], shown: str) -> dict[str, ListedFile]:
    """The files that a manifest lists, small ones first. Nothing else is fetched.

    Args:
        manifest: Of a data set that somebody else may have made.
        shown: Where it is from, for messages.

    Raises:
        UserError: If a name could lead out of the data set's folder or hide in it, or is there twice, or if size or
            hash of a file is missing.
    """
    listed: dict[str, ListedFile] = {}
    try:
        entries = [*manifest["files"].items(), *((shard["name"], shard) for shard in manifest["shards"])]
        for name, entry in entries:
            size, sha256 = entry["bytes"], entry["sha256"]
            if not isinstance(name, str) or not re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}", name):
                raise UserError(
                    f"{shown}: its {MANIFEST} lists a file {name!r}, which is no name of a file in a folder"
                )
            if name in listed or name == MANIFEST or name.endswith((_PART_SUFFIX, TEMPORARY_SUFFIX)):
                raise UserError(f"{shown}: its {MANIFEST} lists {name}, a name that is taken")
            if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise UserError(f"{shown}: its {MANIFEST} says {size!r} bytes and SHA-256 {sha256!r} of {name}")
            listed[name] = ListedFile(size, sha256)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{shown}: its {MANIFEST} does not list files with bytes and sha256: {error!r}") from error
    if missing := [name for name in SIDE_FILES if name not in listed]:
        raise UserError(f"{shown}: its {MANIFEST} does not list {', '.join(missing)}")
    return listed


_ADVICE = {
    "missing": "upload the data set again",
    "refused": "check the credentials",
    "": "run it again, it goes on from there",
}


def _fetch(
    remote: Remote, name: str, listed: ListedFile, folder: Path, moved: Callable[[int], None], stop: Stop
) -> None:
    """Fetch a file into a folder; it gets its name once it is complete and has the hash of the manifest.

    What an earlier try left of it is resumed.

    Args:
        remote: The data set.
        name: Of the file, checked by the caller.
        listed: What it must be.
        folder: Where to.
        moved: Called with bytes that are done; with a negative number where they must be done again.
        stop: Once set, the rest is not fetched.

    Raises:
        UserError: If it cannot be read, or is another than the manifest says.
        StoppedError: If stopped.
    """
    part = folder / (name + _PART_SUFFIX)
    for _ in range(_HASH_TRIES):
        try:
            remote.fetch(name, listed.size, part, moved, stop)
        except AddressError as error:
            raise UserError(f"{remote.shown}/{name} {error}: {_ADVICE[error.reason]}") from error
        found = sha256_of(part)
        with stop.unless_set():
            if found == listed.sha256:
                part.replace(folder / name)
                return sync_folder(folder)
            part.unlink()
        moved(-listed.size)
    raise UserError(
        f"{remote.shown}/{name} has SHA-256 {found}, its manifest says {listed.sha256} ({_HASH_TRIES} tries): "
        "the file there is damaged or another one; upload the data set again"
    )


def _fetch_all(remote: Remote, files: Mapping[str, ListedFile], copy: _Copy) -> None:
    """Fetch all files; those that are there are kept if they are what the manifest says."""
    total, stop = sum(listed.size for listed in files.values()), Stop()
    todo, done = deque(files.items()), SimpleQueue[BaseException | None]()
    with ProgressBar(f"fetching {remote.shown}", total, "bytes") as bar:

        def work() -> None:
            while todo:
                try:
                    name, listed = todo.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    path = copy.folder / name
                    if path.is_file() and path.stat().st_size == listed.size and sha256_of(path) == listed.sha256:
                        bar.advance(listed.size)
                    else:
                        with stop.unless_set():
                            path.unlink(missing_ok=True)
                        _fetch(remote, name, listed, copy.folder, bar.advance, stop)
                    done.put(None)
                except BaseException as error:
                    done.put(error)

        # Daemons, which nobody waits for at the end of the process: one may be waiting for a minute for a server that
        # says nothing.
        for _ in range(min(_THREADS, len(files))):
            Thread(target=work, daemon=True).start()
        try:
            for _ in files:
                if (error := done.get()) is not None:
                    raise error
        except OSError as error:
            raise explain_full_disk(error, copy.folder, total - copy.size()) from error
        finally:
            todo.clear()
            stop.set()


class _Copy:
    """One folder of the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, folder.with_name(f"{folder.name}.lock")

    def note(self, shown: str, size: int, files: Iterable[str] = ()) -> None:
        """Write down how many bytes the copy needs and, once it is complete, size and time of each file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"address": shown, "bytes": size, "files": {name: _stamp(self.folder / name) for name in files}}
        write_atomically(self.folder / _STATE, json.dumps(state, indent=1))

    def state(self) -> dict[str, Any]:
        """What ``note`` wrote, and ``made``, when, in s since 1970; empty if the folder is not a copy."""
        try:
            return {**json.loads((self.folder / _STATE).read_bytes()), "made": (self.folder / _STATE).stat().st_mtime}
        except (OSError, ValueError):
            return {}

    def is_complete(self) -> bool:
        """Whether all files are as they were when the last of them was checked."""
        stamps = self.state().get("files", {})
        try:
            return bool(stamps) and all(_stamp(self.folder / name) == stamp for name, stamp in stamps.items())
        except FileNotFoundError:
            return False

    def size(self) -> int:
        """Bytes on the disk."""
        total = 0
        for path in self.folder.glob("*"):
            with suppress(FileNotFoundError):  # another process has just renamed it
                total += path.stat().st_size
        return total

    def delete(self) -> None:
        """Delete it, the file that says that it is a copy last."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _STATE):
            path.unlink()
        self.folder.rmdir()


def _make_room(copy: _Copy, needed: int, gb: float | None, shown: str) -> None:
    """Reserve room for a copy that is about to be fetched.

    Without a limit nothing is deleted. With one, copies that nobody uses are, the least recently used first, and only
    if that is enough.

    Args:
        copy: That this process fetches.
        needed: Bytes of all its files.
        gb: Limit of all copies of the cache together, 10^9 bytes.
        shown: Where it is from, for messages.

    Raises:
        UserError: If the limit or the disk is too small.
    """
    cache = copy.folder.parent
    with Lock(cache / ".lock"), ExitStack() as held:
        idle: list[_Copy] = []
        promised = kept = 0  # bytes: still to come for others, and of others that are in use
        for other in (_Copy(path.with_suffix("")) for path in cache.glob("*.lock")):
            if other.folder == copy.folder or not (state := other.state()):
                continue
            try:
                held.enter_context(Lock(other.lock, wait=False))
                idle.append(other)
            except BlockingIOError:
                size = other.size()
                kept += max(size, state["bytes"])
                promised += max(0, state["bytes"] - size)
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
        for other in sorted(idle, key=lambda one: one.lock.stat().st_mtime):
            if missing > 0:
                missing -= other.size()
                other.delete()
        copy.note(shown, needed)


def _stamp(path: Path) -> list[int]:
    """What changes if a file does: size, and time of the last change in ns."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _in_gb(size: float) -> str:
    return f"{size / _GB:.2f} GB" if size >= 0.1 * _GB else f"{size / _GB:.2g} GB"
