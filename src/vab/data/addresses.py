"""Files and folders at addresses (http, s3, gs, hf, ...), by fsspec: listed, fetched, written.

Decoding processes import this module: it must not import torch.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from threading import Lock as ThreadLock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from vab import UserError
from vab.extras import pip_install
from vab.files import as_utf8, explain_full_disk, own_folder

T = TypeVar("T")

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
_TRIES, _FIRST_PAUSE_SECONDS = 5, 0.25  # without a byte in between; the pause doubles
_SILENCE_SECONDS = 60  # of a web server, after which a connection counts as broken


class AddressError(UserError):
    """Something at an address that cannot be read.

    Attributes:
        reason: ``missing`` or ``refused``, which no further try would change; else nothing.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class StoppedError(Exception):
    """What was being fetched is not needed any more."""


class _ReadError(Exception):
    """Reading failed; the cause says how."""


class Entry(NamedTuple):
    """What a file system tells of a file."""

    size: int | None
    """Bytes; None where it does not tell."""
    time: int = 0
    """When it was changed last, ns; 0 where it does not tell."""
    tag: str = ""
    """What changes whenever the content does, where it tells that."""

    @classmethod
    def of(cls, found: dict[str, Any]) -> Entry:
        """From what fsspec gives; each file system calls times otherwise."""
        names = ("LastModified", "last_modified", "updated", "mtime", "created", "Last-Modified")
        when = next((found[name] for name in names if found.get(name)), 0)
        if isinstance(when, str):
            when = datetime.fromisoformat(when) if when[:1].isdigit() else parsedate_to_datetime(when)
        seconds = when.timestamp() if isinstance(when, datetime) else float(when)
        return cls(found.get("size"), int(seconds * 1e9), str(found.get("ETag") or found.get("etag") or ""))


def is_address(folder: str | Path) -> bool:
    """Whether this is an address such as ``s3://bucket/folder``, not a folder of this machine."""
    return isinstance(folder, str) and "://" in folder


def without_secrets(address: str) -> str:
    """An address for messages, without password and query."""
    shown = address.partition("?")[0] if address.startswith(("http://", "https://")) else address
    return re.sub(r"://([^/@:]*):[^/@]*@", r"://\1@", shown)


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
        self.shown = without_secrets(address)
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

            options = _web_options() if self._web else _one_try() if scheme == "s3" else {}
            self.files, self.root = fsspec.url_to_fs(address, **options)
            self._writing = self.files
            if scheme == "s3":
                self.files.retries = 1
                self._writing, _ = fsspec.url_to_fs(address)  # large files go in pieces, which s3fs tries again
        except ImportError as error:
            package = PACKAGES[scheme]
            raise UserError(f"{scheme}:// needs the package {package}: {pip_install(package)}") from error
        except Exception as error:  # each library has its own
            raise UserError(f"{self.shown} cannot be opened: {_in_words(error)}") from error

    def path(self, name: str) -> str:
        """Of a file in the folder, as the file system names it; without a name, of what the address itself names."""
        below = f"/{quote(as_utf8(name)) if self._web else name}" if name else ""
        return f"{self.root}{below}{self._query}"

    def attempt(self, action: Callable[[], T], tries: int | None = None) -> T:
        """Do something, and again where it fails for a reason that may pass.

        Raises:
            AddressError: If it fails for good; its message is the error in one line.
        """
        for number in range(tries or _TRIES):
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (number - 1) if number else 0)
            self.files.invalidate_cache()  # others write there, too
            try:
                return action()
            except Exception as error:  # each library has its own
                problem, reason, words = error, *self._why(error)
            if reason:
                break
        raise AddressError(words, reason) from problem

    def _why(self, error: BaseException) -> tuple[str, str]:
        """``missing`` or ``refused``, which no further try would change, else nothing; and the error in one line."""
        if self._web and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # fsspec calls a file missing, too, if the server does not answer
        return _status(error), _in_words(error)

    def entries(self, below: bool = True) -> dict[str, Entry]:
        """All files of the folder, by their path from it; those of its subfolders, too, or not.

        Raises:
            UserError: If the folder cannot be listed.
        """

        def listed() -> Iterator[dict[str, Any]]:
            if self._walks and below:
                return self._walk(self.root)
            if below:
                return iter(self.files.find(self.root, detail=True).values())
            return (entry for entry in self.files.ls(self.root, detail=True) if entry["type"] != "directory")

        try:
            found = self.attempt(lambda: [(str(entry["name"]), Entry.of(entry)) for entry in listed()])
        except AddressError as error:
            if error.reason == "missing":
                return {}
            raise UserError(f"{self.shown} cannot be listed ({error})") from error
        names = {name.removeprefix(self.root).lstrip("/"): entry for name, entry in found}
        if not self._web:
            return {name: entry for name, entry in names.items() if name}
        # Index pages have links to themselves in another order, "?C=N".
        return {unquote(name): entry for name, entry in names.items() if name and "?" not in name}

    def entry(self, name: str = "", tries: int | None = None) -> Entry:
        """What the file system tells of a file.

        Raises:
            AddressError: If it tells nothing.
        """
        return Entry.of(self.attempt(lambda: self.files.info(self.path(name)), tries))

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
            return bytes(self.attempt(lambda: self.files.cat_file(self.path(name))))
        except AddressError as error:
            raise UserError(f"{self.shown}/{name} cannot be read ({error})") from error

    def write(self, path: Path, name: str) -> None:
        """Write a file of this machine to the folder, whole or not at all.

        Raises:
            UserError: If it cannot be written.
        """
        try:
            self.attempt(lambda: self._writing.put_file(str(path), self.path(name)))
        except AddressError as error:
            way = "check the address and the credentials" if error.reason else "what is done is kept"
            raise UserError(
                f"{self.shown}/{name} cannot be written ({error}): {way}; then run the same command again"
            ) from error

    def remove(self, name: str) -> None:
        """Delete a file of the folder, if it is there.

        Raises:
            UserError: If it cannot be deleted.
        """
        try:
            self.attempt(lambda: self.files.rm_file(self.path(name)))
        except AddressError as error:
            if error.reason != "missing":
                raise UserError(f"{self.shown}/{name} cannot be deleted ({error})") from error

    def fetch(
        self,
        name: str,
        size: int,
        path: Path,
        moved: Callable[[int], None] = lambda count: None,
        stop: Stop | None = None,
    ) -> None:
        """Fetch a file; what an earlier try left of it at ``path`` is resumed.

        Args:
            name: Of the file.
            size: Its bytes.
            path: Where to.
            moved: Called with bytes that are done; with a negative number where they must be done again.
            stop: Once set, the rest is not fetched.

        Raises:
            AddressError: If it cannot be read.
            StoppedError: If stopped.
        """
        stop = stop or Stop()
        whole, failures = False, 0  # whole: from a server that gives no parts of files
        with path.open("ab") as file:
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
                    reason, words = self._why(cause)
                    if reason or failures == _TRIES:
                        verb = {"missing": "is missing", "refused": "may not be read", "": "broke off"}[reason]
                        raise AddressError(f"{verb} ({words})", reason) from cause
                    stop.event.wait(_FIRST_PAUSE_SECONDS * 2 ** (failures - 1))
            with stop.unless_set():
                file.flush()
                os.fsync(file.fileno())

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


def _one_try() -> dict[str, Any]:
    """Without botocore's own tries, which would multiply with those of ``Remote.attempt``; unless a user sets them."""
    from fsspec.config import conf

    tries = os.environ.get("AWS_MAX_ATTEMPTS", "")
    own = {"retries": {"total_max_attempts": int(tries) if tries.isdigit() else 1}}
    return {"config_kwargs": own | conf.get("s3", {}).get("config_kwargs", {})}


def _status(error: BaseException) -> str:
    """``missing`` or ``refused``, which no further try would change; else nothing."""
    answer = getattr(error, "response", None)  # of requests and httpx, beside aiohttp's status
    status = getattr(error, "status", None) or getattr(answer, "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing"
    refused = isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__
    return "refused" if refused else ""


def _in_words(error: BaseException) -> str:
    """An error of any library in one line, without what may be secret in an address."""
    status = getattr(error, "status", None)
    text = f"{status} {getattr(error, 'message', '')}" if status else " ".join(str(error).split())
    return re.sub(r"\?\S*", "", f"{type(error).__name__}: {text}" if text else type(error).__name__)[:300]


class Stop:
    """Ends threads, of which none writes anything once ``set`` has returned."""

    def __init__(self) -> None:
        self.event, self._lock = Event(), ThreadLock()

    @contextmanager
    def unless_set(self) -> Iterator[None]:
        """For what may only be done before ``set``."""
        with self._lock:
            if self.event.is_set():
                raise StoppedError
            yield

    def set(self) -> None:
        """End them."""
        with self._lock:
            self.event.set()


class RemoteFile(NamedTuple):
    """A file at an address."""

    folder: str
    """The address of a folder that it is below, or its own."""
    name: str = ""
    """Its path from there."""
    size: int | None = None
    """Bytes that it had when it was listed; None where that is not known."""

    def entry(self, tries: int | None = None) -> Entry:
        """What the file system tells of it now.

        Raises:
            AddressError: If it tells nothing.
        """
        return Remote(self.folder).entry(self.name, tries)


@contextmanager
def local_file(file: Path | RemoteFile, alive: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A file on this machine: itself, or a temporary copy, which has its suffix and is deleted afterwards.

    Args:
        file: The file.
        alive: Called now and then while it is fetched.

    Raises:
        AddressError: If it cannot be fetched.
        UserError: If the disk of temporary files is full or cannot be written.
    """
    if not isinstance(file, RemoteFile):
        yield file
        return
    remote, place = Remote(file.folder), Path(tempfile.gettempdir())
    size, _, _ = remote.entry(file.name)
    if size is None:
        raise AddressError("its server does not tell its size, so that nobody knows whether all of it came")
    if file.size not in (None, size):
        raise AddressError(f"has {size} bytes now, and had {file.size} when it was listed")
    try:
        folder = own_folder(place)
    except OSError as error:
        raise UserError(
            f"cannot write to {place}: {error.strerror}; set TMPDIR to a folder for temporary files"
        ) from error
    try:
        # FFmpeg goes by the suffix where the content does not tell the format.
        suffix = os.path.splitext(file.name or remote.root)[1]
        path = folder / f"media{re.sub(r'[^A-Za-z0-9.]', '', suffix)[:16]}"
        try:
            remote.fetch(file.name, size, path, lambda count: alive())
        except OSError as error:
            raise explain_full_disk(error, place, size) from error
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)
