"""Reading a data set's files at a remote address with fsspec: in pieces, on from where a try ended, against a hash."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import IO, Any, NamedTuple
from urllib.parse import quote

from vab.data.shards.format import MANIFEST
from vab.extras import pip_install
from vab.files import as_utf8, sync_folder
from vab.spec import UserError

PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "file": "fsspec",
    "memory": "fsspec",
}
"""Kinds of addresses, and what each needs. No others: fsspec has kinds that run code, and kinds that wrap others."""

PART_SUFFIX = ".part"
PIECE_BYTES = 8 * 2**20
"""Asked for at a time: what a broken connection loses at most."""

_TRIES, _FIRST_PAUSE_SECONDS = 5, 0.25  # without a byte in between; the pause doubles
_HASH_TRIES = 3
_SILENCE_SECONDS = 60  # of a web server, after which a connection is taken for broken


class FileFacts(NamedTuple):
    """What a manifest says of a file."""

    size: int
    """Bytes."""
    sha256: str
    """In hexadecimal digits."""


class UnreachableError(UserError):
    """Nothing answers at an address, which may pass."""


class StoppedError(Exception):
    """Another file could not be fetched, so this one is not wanted any more."""


class _BrokenError(Exception):
    """Reading failed; the cause says how."""


def is_address(folder: str | Path) -> bool:
    """Whether this is an address such as ``s3://bucket/folder``, not a folder of this machine."""
    return isinstance(folder, str) and "://" in folder


class Remote:
    """A data set's folder at an address.

    Credentials and settings are the libraries' own: ``AWS_*``, ``HF_TOKEN``, ``FSSPEC_S3_ENDPOINT_URL``, ... A query
    behind a web address (``?sig=...``) goes with every file's.

    Args:
        address: ``https://host/folder``, ``s3://bucket/folder``, ``gs://``, ``hf://datasets/owner/name``, ...

    Attributes:
        shown: The address for people, without password and query, which are not part of what it names.

    Raises:
        UserError: If the kind of address is not known, or the package that reads it is not installed.
    """

    def __init__(self, address: str) -> None:
        scheme, _, rest = address.partition("://")
        self._web = scheme in ("http", "https")
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
        self._options: dict[str, Any] = {"cache_type": "none"}  # pieces are read one after the other, once
        try:
            import fsspec

            self._files, self._root = fsspec.url_to_fs(address, **(_web_options() if self._web else {}))
        except ImportError as error:
            package = PACKAGES[scheme]
            raise UserError(f"{scheme}:// needs the package {package}: {pip_install(package)}") from error
        except Exception as error:  # each library has its own
            raise UserError(f"{self.shown} cannot be opened: {_in_words(error)}") from error

    def manifest(self) -> bytes:
        """The text of the manifest, as it is now.

        Raises:
            UserError: If there is none, or it may not be read.
            UnreachableError: If nothing answers.
        """
        self._files.invalidate_cache()
        for number in range(_TRIES):
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (number - 1) if number else 0)
            try:
                text: bytes = self._files.cat_file(self._path(MANIFEST))
            except Exception as error:  # each library has its own
                if _status(error) == "missing":
                    raise UserError(
                        f"no data set at {self.shown}: it has no {MANIFEST}; give the address of a folder that "
                        "vab extract wrote"
                    ) from error
                if _status(error) == "refused":
                    raise UserError(
                        f"{self.shown}/{MANIFEST} may not be read ({_in_words(error)}): check the credentials"
                    ) from error
                problem = error
            else:
                return text
        raise UnreachableError(f"cannot reach {self.shown}: {_in_words(problem)}") from problem

    def fetch(self, name: str, facts: FileFacts, folder: Path, moved: Callable[[int], None], stop: Event) -> None:
        """Bring a file to a folder, whole and as the manifest says, or not at all under its name.

        What an earlier try left of it is gone on with.

        Args:
            name: Of the file, checked by the caller.
            facts: What it must be.
            folder: Where to.
            moved: Called with bytes that are done; with a negative number where they must be done again.
            stop: Once set, the rest is not fetched.

        Raises:
            UserError: If it cannot be read, or is another than the manifest says.
            StoppedError: If stopped.
        """
        part = folder / (name + PART_SUFFIX)
        for _ in range(_HASH_TRIES):
            with _alone(part) as file:
                found = self._fill(name, facts.size, file, moved, stop)
                if found == facts.sha256:
                    part.replace(folder / name)
                    sync_folder(folder)
                    return
                part.unlink()
            moved(-facts.size)
        raise UserError(
            f"{self.shown}/{name} has SHA-256 {found}, its manifest says {facts.sha256} ({_HASH_TRIES} tries): "
            "the file there is damaged or another one; upload the data set again"
        )

    def _fill(self, name: str, size: int, file: IO[bytes], moved: Callable[[int], None], stop: Event) -> str:
        """Fill a file up to its size; answer its SHA-256."""
        whole, failures = False, 0  # whole: from a server that gives no parts of files
        if file.seek(0, os.SEEK_END) > size:
            file.truncate(0)
        digest, done = hash_of(file)
        moved(done)
        while done < size:
            if stop.is_set():
                raise StoppedError
            if whole and done:
                file.truncate(0)
                moved(-done)
                digest, done = hashlib.sha256(), 0
            try:
                for piece in self._pieces(name, done, size, whole):
                    if stop.is_set():
                        raise StoppedError
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    moved(len(piece))
                    failures = 0 if not whole else failures
            except _BrokenError as error:
                cause = error.__cause__ or error
                whole = whole or (self._web and isinstance(cause, ValueError))
                failures += 1
                if _status(cause) or failures == _TRIES:
                    words, advice = {
                        "missing": ("is missing", "upload the data set again"),
                        "refused": ("may not be read", "check the credentials"),
                    }.get(_status(cause), ("broke off", "run it again, it goes on from there"))
                    raise UserError(f"{self.shown}/{name} {words} ({_in_words(cause)}): {advice}") from cause
                stop.wait(_FIRST_PAUSE_SECONDS * 2 ** (failures - 1))
        file.flush()
        os.fsync(file.fileno())
        return digest.hexdigest()

    def _pieces(self, name: str, start: int, size: int, whole: bool) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on.

        Raises:
            _BrokenError: For whatever goes wrong there.
        """
        options = dict(self._options)
        if self._web:
            options |= {"size": size} | ({"block_size": 0} if whole else {})  # the size spares a question
        try:
            with self._files.open(self._path(name), "rb", **options) as source:
                if start:
                    source.seek(start)
                while start < size:
                    piece = source.read(min(PIECE_BYTES, size - start))[: size - start]
                    if not piece:
                        raise EOFError(f"ends after {start} of {size} bytes")
                    start += len(piece)
                    yield piece
        except Exception as error:  # each library has its own
            raise _BrokenError from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{quote(as_utf8(name)) if self._web else name}{self._query}"


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """An unfinished file, to be appended to by nobody else.

    A thread of an attempt that was given up may still be about to put down what it has heard.
    """
    while True:
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):  # not finished by that thread
                yield file
                return


def hash_of(file: Any) -> tuple[Any, int]:
    """SHA-256 object of an open file from its beginning, and its size in bytes; the file then stands at its end."""
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while piece := file.read(2**20):
        digest.update(piece)
        size += len(piece)
    return digest, size


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
