"""Data sets at addresses (http, s3, gs, hf, ...): fetched once into a cache of this machine, then read from there.

fsspec reads the files, in pieces, so that a broken connection is resumed; each file is checked against its hash in the
manifest.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from threading import Lock as ThreadLock
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from vab.data.shards.format import MANIFEST, SIDE_FILES, parse_manifest, read_manifest
from vab.extras import pip_install
from vab.files import (
    TEMPORARY_SUFFIX,
    Lock,
    ProgressBar,
    as_utf8,
    explain_full_disk,
    sha256_of,
    sync_folder,
    write_atomically,
)
from vab.spec import UserError

PACKAGES = {
    **dict.fromkeys(("http", "https"), "aiohttp"),
    "s3": "s3fs",
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs"), "adlfs"),
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    **dict.fromkeys(("file", "memory"), "fsspec"),
}
"""Schemes of addresses, and the package that each needs. No others: fsspec has schemes that run code, and schemes that
wrap others."""

PIECE_BYTES = 8 * 2**20
"""Read at a time: a broken connection loses this much at most."""

_PART_SUFFIX = ".part"
_STATE = ".copy.json"
"""In a copy: its address, its size in bytes, and once it is complete, size and time of each file."""
_TRIES, _FIRST_PAUSE_SECONDS = 5, 0.25  # without a byte in between; the pause doubles
_HASH_TRIES = 3
_SILENCE_SECONDS = 60  # of a web server, after which a connection counts as broken
_THREADS = 8
_GB = 1e9


class _UnreachableError(UserError):
    """Nothing answers at an address, which may pass."""


class _StoppedError(Exception):
    """Another file could not be fetched, so this one is not needed any more."""


class _ReadError(Exception):
    """Reading failed; the cause says how."""


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


class FileFacts(NamedTuple):
    """What a manifest says of a file."""

    size: int
    """Bytes."""
    sha256: str
    """In hexadecimal digits."""


def is_address(folder: str | Path) -> bool:
    """Whether this is an address such as ``s3://bucket/folder``, not a folder of this machine."""
    return isinstance(folder, str) and "://" in folder


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
            text = remote.manifest()
        except _UnreachableError as error:
            return _last_copy(remote, cache, error)
        return _copy_of(remote, text, cache)
    except OSError as error:
        raise UserError(
            f"cannot keep a copy of {remote.shown} in {cache.path} ({error}): give a folder that can be written, with "
            "--data.cache DIR or the environment's VAB_CACHE"
        ) from error


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
                    needed = sum(facts.size for facts in files.values()) + len(text)
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


def files_of(manifest: Mapping[str, Any], shown: str) -> dict[str, FileFacts]:
    """The files that a manifest lists, small ones first. Nothing else is fetched.

    Args:
        manifest: Of a data set that somebody else may have made.
        shown: Where it is from, for messages.

    Raises:
        UserError: If a name could lead out of the data set's folder or hide in it, or is there twice, or if size or
            hash of a file is missing.
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
            if name in listed or name == MANIFEST or name.endswith((_PART_SUFFIX, TEMPORARY_SUFFIX)):
                raise UserError(f"{shown}: its {MANIFEST} lists {name}, a name that is taken")
            if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise UserError(f"{shown}: its {MANIFEST} says {size!r} bytes and SHA-256 {sha256!r} of {name}")
            listed[name] = FileFacts(size, sha256)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{shown}: its {MANIFEST} does not list files with bytes and sha256: {error!r}") from error
    if missing := [name for name in SIDE_FILES if name not in listed]:
        raise UserError(f"{shown}: its {MANIFEST} does not list {', '.join(missing)}")
    return listed


class Remote:
    """A folder at an address.

    Credentials and settings are the libraries' own: ``AWS_*``, ``HF_TOKEN``, ``FSSPEC_S3_ENDPOINT_URL``, ... A query
    behind a web address (``?sig=...``) is appended to the address of every file.

    Args:
        address: ``https://host/folder``, ``s3://bucket/folder``, ``gs://``, ``hf://datasets/owner/name``, ...

    Attributes:
        shown: The address for messages, without password and query.
        files: The fsspec file system.
        root: The folder, as the file system names it.

    Raises:
        UserError: If the scheme is not known, or the package that reads it is not installed.
    """

    def __init__(self, address: str) -> None:
        scheme, _, rest = address.partition("://")
        self._web = scheme in ("http", "https")
        self._walks = self._web or scheme == "sftp"  # from folder to folder
        path, mark, query = rest.partition("?") if self._web else (rest, "", "")
        address = f"{scheme}://{path.rstrip('/')}"
        self._query = mark + query
        self.shown = re.sub(r"://([^/@:]*):[^/@]*@", r"://\1@", address)
        if scheme not in PACKAGES:
            raise UserError(
                f"{self.shown}: cannot read {scheme}:// addresses; the kinds are {', '.join(PACKAGES)}, or a folder"
            )
        if "::" in address:
            raise UserError(f"{self.shown}: addresses within addresses (::) are not read")
        if not path.strip("/"):
            raise UserError(f"{self.shown} names no folder: give {scheme}://.../FOLDER")
        try:
            import fsspec

            self.files, self.root = fsspec.url_to_fs(address, **(_web_options() if self._web else {}))
        except ImportError as error:
            package = PACKAGES[scheme]
            raise UserError(f"{scheme}:// needs the package {package}: {pip_install(package)}") from error
        except Exception as error:  # each library has its own
            raise UserError(f"{self.shown} cannot be opened: {_in_words(error)}") from error

    def path(self, name: str) -> str:
        """Of a file in the folder, as the file system names it."""
        return f"{self.root}/{quote(as_utf8(name)) if self._web else name}{self._query}"

    def find(self) -> dict[str, int | None]:
        """All files below the folder, by their path from it, with their bytes where the file system tells.

        Raises:
            UserError: If the folder cannot be listed.
        """
        try:
            found = list(self._walk(self.root) if self._walks else self.files.find(self.root, detail=True).values())
        except FileNotFoundError:
            return {}
        except Exception as error:  # each library has its own
            raise UserError(f"{self.shown} cannot be listed ({_in_words(error)})") from error
        sizes = {entry["name"].removeprefix(self.root).lstrip("/"): entry.get("size") for entry in found}
        # Index pages have links to themselves in another order, "?C=N".
        return {unquote(name) if self._web else name: size for name, size in sizes.items() if name and "?" not in name}

    def _walk(self, folder: str) -> Iterator[dict[str, Any]]:
        """All files below a folder. Unlike fsspec's own walk it fails on a folder that it cannot read."""
        for entry in self.files.ls(folder, detail=True):
            if entry["type"] == "directory":
                yield from self._walk(entry["name"])
            else:
                yield entry

    def read(self, name: str) -> bytes:
        """The content of a file of the folder.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            return bytes(self.files.cat_file(self.path(name)))
        except Exception as error:  # each library has its own
            raise UserError(f"{self.shown}/{name} cannot be read ({_in_words(error)})") from error

    def manifest(self) -> bytes:
        """The text of the manifest, as it is now.

        Raises:
            UserError: If there is none, or it may not be read.
            _UnreachableError: If nothing answers.
        """
        self.files.invalidate_cache()
        for number in range(_TRIES):
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (number - 1) if number else 0)
            try:
                return bytes(self.files.cat_file(self.path(MANIFEST)))
            except Exception as error:  # each library has its own
                problem, status, words = error, _status(error), _in_words(error)
            if status == "missing":
                advice = "give the address of a folder that vab extract wrote"
                raise UserError(f"no data set at {self.shown}: it has no {MANIFEST}; {advice}") from problem
            if status == "refused":
                advice = "check the credentials"
                raise UserError(f"{self.shown}/{MANIFEST} may not be read ({words}): {advice}") from problem
        raise _UnreachableError(f"cannot reach {self.shown}: {words}") from problem

    def fetch(self, name: str, facts: FileFacts, folder: Path, moved: Callable[[int], None], stop: _Stop) -> None:
        """Fetch a file into a folder; it gets its name once it is complete and has the hash of the manifest.

        What an earlier try left of it is resumed.

        Args:
            name: Of the file, checked by the caller.
            facts: What it must be.
            folder: Where to.
            moved: Called with bytes that are done; with a negative number where they must be done again.
            stop: Once set, the rest is not fetched.

        Raises:
            UserError: If it cannot be read, or is another than the manifest says.
            _StoppedError: If stopped.
        """
        part = folder / (name + _PART_SUFFIX)
        for _ in range(_HASH_TRIES):
            found = self._fill(name, facts.size, part, moved, stop)
            with stop.unless_set():
                if found == facts.sha256:
                    part.replace(folder / name)
                    return sync_folder(folder)
                part.unlink()
            moved(-facts.size)
        raise UserError(
            f"{self.shown}/{name} has SHA-256 {found}, its manifest says {facts.sha256} ({_HASH_TRIES} tries): "
            "the file there is damaged or another one; upload the data set again"
        )

    def _fill(self, name: str, size: int, part: Path, moved: Callable[[int], None], stop: _Stop) -> str:
        """Fill a file up to its size; return its SHA-256."""
        whole, failures = False, 0  # whole: from a server that gives no parts of files
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            moved(done := file.tell())
            while done < size:
                if whole:
                    with stop.unless_set():
                        file.truncate(0)
                    moved(-done)
                    done = 0
                try:
                    for piece in self._pieces(name, done, size, whole):
                        with stop.unless_set():
                            file.write(piece)
                        moved(len(piece))
                        done, failures = done + len(piece), failures if whole else 0
                except _ReadError as error:
                    cause, failures = error.__cause__ or error, failures + 1
                    whole = whole or (self._web and isinstance(cause, ValueError))
                    if (status := _status(cause)) or failures == _TRIES:
                        words, advice = {
                            "missing": ("is missing", "upload the data set again"),
                            "refused": ("may not be read", "check the credentials"),
                            "": ("broke off", "run it again, it goes on from there"),
                        }[status]
                        raise UserError(f"{self.shown}/{name} {words} ({_in_words(cause)}): {advice}") from cause
                    stop.event.wait(_FIRST_PAUSE_SECONDS * 2 ** (failures - 1))
            with stop.unless_set():
                file.flush()
                os.fsync(file.fileno())
        return sha256_of(part)

    def _pieces(self, name: str, start: int, size: int, whole: bool) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on; whatever goes wrong there is a ``_ReadError``."""
        options: dict[str, Any] = {"cache_type": "none"}  # pieces are read one after the other, once
        if self._web:
            options |= {"size": size} | ({"block_size": 0} if whole else {})  # the size saves a request
        try:
            with self.files.open(self.path(name), "rb", **options) as source:
                if start:
                    source.seek(start)
                while start < size:
                    piece = source.read(min(PIECE_BYTES, size - start))[: size - start]
                    if not piece:
                        raise EOFError(f"ends after {start} of {size} bytes")
                    start += len(piece)
                    yield piece
        except Exception as error:  # each library has its own
            raise _ReadError from error


def _web_options() -> dict[str, Any]:
    import aiohttp

    # By default five minutes for a whole file, and text that the server packs, whose size is not the file's.
    patience = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": patience, "trust_env": True}, "headers": {"Accept-Encoding": "identity"}}


def _status(error: BaseException) -> str:
    """``missing`` or ``refused``, which no further try would change; else nothing."""
    answer = getattr(error, "response", None)  # of requests and httpx, beside aiohttp's status
    status = getattr(error, "status", None) or getattr(answer, "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing"
    return "refused" if isinstance(error, PermissionError) or status in (401, 403) else ""


def _in_words(error: BaseException) -> str:
    """An error of any library in one line, without what may be secret in an address."""
    status = getattr(error, "status", None)
    text = f"{status} {getattr(error, 'message', '')}" if status else " ".join(str(error).split())
    return re.sub(r"\?\S*", "", f"{type(error).__name__}: {text}" if text else type(error).__name__)[:300]


class _Stop:
    """Ends threads, of which none writes anything once ``set`` has returned."""

    def __init__(self) -> None:
        self.event, self._lock = Event(), ThreadLock()

    @contextmanager
    def unless_set(self) -> Iterator[None]:
        with self._lock:
            if self.event.is_set():
                raise _StoppedError
            yield

    def set(self) -> None:
        with self._lock:
            self.event.set()


def _fetch_all(remote: Remote, files: Mapping[str, FileFacts], copy: _Copy) -> None:
    """Fetch all files; those that are there are kept if they are what the manifest says."""
    total, stop = sum(facts.size for facts in files.values()), _Stop()
    todo, done = deque(files.items()), SimpleQueue[BaseException | None]()
    with ProgressBar(f"fetching {remote.shown}", total, "bytes") as bar:

        def work() -> None:
            while todo:
                try:
                    name, facts = todo.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    path = copy.folder / name
                    if path.is_file() and path.stat().st_size == facts.size and sha256_of(path) == facts.sha256:
                        bar.advance(facts.size)
                    else:
                        with stop.unless_set():
                            path.unlink(missing_ok=True)
                        remote.fetch(name, facts, copy.folder, bar.advance, stop)
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
