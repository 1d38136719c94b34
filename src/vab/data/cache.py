"""A local cache of data sets that lie elsewhere: each is fetched once, then read as any folder of shards."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple

from vab.data.copies import Copy, Lock, make_room
from vab.data.remote import PART_SUFFIX, FileFacts, Remote, StoppedError, UnreachableError, hash_of, is_address
from vab.data.shards.format import CODEBOOKS, INDEX, LABEL_IDS, LABEL_STARTS, MANIFEST, parse_manifest, read_manifest
from vab.files import TEMPORARY_SUFFIX, ProgressBar, explain_full_disk
from vab.spec import UserError

_THREADS = 8


@dataclass(frozen=True)
class Cache:
    """Where copies are kept, and how many.

    Raises:
        UserError: If the limit is not above 0.
    """

    folder: str | None = None
    """By default the environment's ``VAB_CACHE``, else ``~/.cache/vab``."""
    gb: float | None = None
    """Limit of all copies together, 10^9 bytes: those used longest ago make room for new ones. None: no limit, and
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


def local_copy(folder: str | Path, cache: Cache | None = None) -> LocalCopy:
    """A data set's folder; one at an address is fetched into the cache first, unless it is there.

    Of the processes of a machine (or of all that share the cache) one fetches, the others wait for it; if it dies, the
    next one goes on. A bar shows how far it is, if stderr is a terminal.

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
        read_manifest(path)  # says more of a folder that is none
        folder = f"file://{path.resolve()}"
    remote = Remote(str(folder))
    try:
        return _opened(remote, cache)
    except OSError as error:
        raise UserError(
            f"cannot keep a copy of {remote.shown} in {cache.path} ({error}): give a folder that can be written, with "
            "--data.cache DIR or the environment's VAB_CACHE"
        ) from error


def _opened(remote: Remote, cache: Cache) -> LocalCopy:
    try:
        text = remote.manifest()
    except UnreachableError as error:
        return _as_last_time(remote, cache, error)
    manifest = parse_manifest(text, remote.shown)
    files = files_of(manifest, remote.shown)
    copy = Copy(cache.path, f"{_name(remote)}-{hashlib.sha256(text).hexdigest()[:10]}")
    use = Lock(copy.lock)
    try:
        os.utime(copy.lock)
        if not copy.is_complete():
            with Lock(copy.fetching, fcntl.LOCK_EX):
                if not copy.is_complete():  # else another process has done it meanwhile
                    needed = sum(facts.size for facts in files.values()) + len(text)
                    make_room(copy, needed, cache.gb, remote.shown)
                    _fetch(remote, files, copy)
                    copy.finish(remote.shown, text, files)
    except BaseException:
        use.close()  # not left to the collector: who keeps the error would keep the lock
        raise
    return LocalCopy(copy.folder, use)


def _as_last_time(remote: Remote, cache: Cache, error: UnreachableError) -> LocalCopy:
    """The newest whole copy, for a machine that has no network."""
    from lightning.pytorch.utilities import rank_zero_warn  # a second, which commands that never warn need not wait

    copies = [Copy(cache.path, path.name) for path in cache.path.glob(f"{_name(remote)}-??????????")]
    for copy in sorted(copies, key=lambda one: one.made(), reverse=True):
        use = Lock(copy.lock)
        if copy.is_complete():
            os.utime(copy.lock)
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(copy.made()))
            rank_zero_warn(f"{error}; going on with the copy of {made}")
            return LocalCopy(copy.folder, use)
        use.close()
    raise error


def files_of(manifest: Mapping[str, Any], shown: str) -> dict[str, FileFacts]:
    """The files that a manifest lists, small ones first. Nothing else is fetched.

    Args:
        manifest: Of a data set that somebody else may have made.
        shown: Where it is from, for messages.

    Raises:
        UserError: If a name could lead out of the data set's folder or hide in it, is there twice, or is not said what
            it must be.
    """
    listed: dict[str, FileFacts] = {}
    try:
        entries = [*manifest["files"].items(), *((shard["name"], shard) for shard in manifest["shards"])]
        for name, entry in entries:
            size, sha256 = entry["bytes"], entry["sha256"]
            if not isinstance(name, str) or not re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}", name):
                raise UserError(
                    f"{shown}: its {MANIFEST} lists a file {name!r}, which is no name of a file in a folder"
                )
            if name in listed or name == MANIFEST or name.endswith((PART_SUFFIX, TEMPORARY_SUFFIX)):
                raise UserError(f"{shown}: its {MANIFEST} lists {name}, a name that is taken")
            if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise UserError(f"{shown}: its {MANIFEST} says {size!r} bytes and SHA-256 {sha256!r} of {name}")
            listed[name] = FileFacts(size, sha256)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{shown}: its {MANIFEST} does not list files with bytes and sha256: {error!r}") from error
    if missing := [name for name in (INDEX, LABEL_STARTS, LABEL_IDS, CODEBOOKS) if name not in listed]:
        raise UserError(f"{shown}: its {MANIFEST} does not list {', '.join(missing)}")
    return listed


def _fetch(remote: Remote, files: Mapping[str, FileFacts], copy: Copy) -> None:
    """Bring all files; those that are there already are kept if they are what the manifest says."""
    total, stop = sum(facts.size for facts in files.values()), Event()
    todo, done = SimpleQueue[tuple[str, FileFacts]](), SimpleQueue[BaseException | None]()
    for item in files.items():
        todo.put(item)
    with ProgressBar(f"fetching {remote.shown}", total, "bytes") as bar:

        def work() -> None:
            while not stop.is_set():
                try:
                    _bring(remote, *todo.get_nowait(), copy.folder, bar.advance, stop)
                except Empty:
                    return
                except BaseException as error:
                    done.put(error)
                else:
                    done.put(None)

        # Daemons, which nobody waits for at the end of the process: one may be listening, for a minute, to a server
        # that says nothing. What it hears after a failure or Ctrl-C it does not write.
        for _ in range(min(_THREADS, len(files))):
            Thread(target=work, daemon=True).start()
        try:
            for _ in files:
                if (error := done.get()) is not None:
                    raise error
        except OSError as error:
            raise explain_full_disk(error, copy.folder, total - copy.size()) from error
        finally:
            stop.set()


def _bring(
    remote: Remote, name: str, facts: FileFacts, folder: Path, moved: Callable[[int], None], stop: Event
) -> None:
    path = folder / name
    if path.is_file() and path.stat().st_size == facts.size:
        with path.open("rb") as file:
            if hash_of(file)[0].hexdigest() == facts.sha256:
                return moved(facts.size)
    path.unlink(missing_ok=True)
    if stop.is_set():
        raise StoppedError
    return remote.fetch(name, facts, folder, moved, stop)


def _name(remote: Remote) -> str:
    """Of all copies of what lies at an address: its end for people, and a hash of the whole of it."""
    _, _, path = remote.shown.partition("://")
    words = re.sub(r"[^A-Za-z0-9_-]+", "_", "/".join(path.split("/")[-2:])).strip("_-")[-60:]
    return f"{words or 'data'}-{hashlib.sha256(remote.shown.encode()).hexdigest()[:10]}"
