"""Big files over HTTP: under their name whole or not at all, and gone on with after an interruption."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vab import __version__
from vab.frozen.hashes import digest_like
from vab.spec import UserError

PART = ".part"
"""What a file is called after its name while it is fetched; the next attempt goes on from there."""
_PIECE = 1 << 20
_SECONDS = 30
"""Without a word from the server, after which it is given up."""

Tell = Callable[[int, int | None], None]
"""Is told how many bytes are there, and of how many, where the server says it."""


def download(url: str, place: Path, known: str = "", tell: Tell | None = None) -> None:
    """Fetch a file, unless it is there; another process that fetches the same one is waited for.

    What an interrupted attempt left is gone on with only if a hash is known, by which the whole is checked.

    Args:
        url: Where it is.
        place: Where it goes; its folder is made.
        known: Its hash, as in `vab.frozen.hashes.Known`; empty if unknown.
        tell: Is told of the progress.

    Raises:
        UserError: If it cannot be fetched, ends early or has another hash; nothing is at ``place`` then.
        OSError: If the disk is full.
    """
    part = place.with_name(place.name + PART)
    with _alone(part, place) as file:
        if file is None:
            return
        try:
            _receive(url, file, bool(known), tell)
        except (OSError, http.client.HTTPException) as error:
            file.flush()
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = str(getattr(error, "reason", "") or error or type(error).__name__)
            raise UserError(f"{url} could not be fetched ({reason[:150]}){_left(part, known)}") from error
        file.flush()
        os.fsync(file.fileno())
        if known and (got := digest_like(known, part)) != known:
            part.unlink()
            raise UserError(f"{url} gave a file of hash {got}, expected {known}: it was deleted; fetch it again")
        part.replace(place)


@contextmanager
def _alone(part: Path, place: Path) -> Iterator[IO[bytes] | None]:
    """The unfinished file, open to be appended to by nobody else; None once the whole is at its place."""
    while not place.exists():
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            with suppress(OSError):  # some network disks cannot lock; the hash tells there what two have mixed
                fcntl.flock(file, fcntl.LOCK_EX)
            if place.exists():  # by whoever had it until now
                break
            if not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno())):
                continue  # deleted by whoever had it
            yield file
            return
    part.unlink(missing_ok=True)
    yield None


def _left(part: Path, known: str) -> str:
    """What there is of a file, in words; deleted where it is of no use."""
    size = part.stat().st_size
    if not size or not known:
        part.unlink()
        return ""
    return f"; {size:,} bytes are there, and the next attempt goes on from them"


def _receive(url: str, file: IO[bytes], may_go_on: bool, tell: Tell | None) -> None:
    """Append what the file lacks.

    Raises:
        OSError: If that is not to be had, or less than the server said.
    """
    if not may_go_on:
        file.truncate(0)
    have = os.fstat(file.fileno()).st_size
    request = urllib.request.Request(url, headers={"User-Agent": f"vab/{__version__}"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return  # all of it is there
        file.truncate(0)
        _receive(url, file, may_go_on, tell)
        return
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.truncate(0)  # this server sends files from their beginning only
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        while piece := answer.read(_PIECE):
            file.write(piece)
            have += len(piece)
            if tell is not None:
                tell(have, total)
    if total is not None and have != total:
        raise OSError(f"it ended after {have:,} of {total:,} bytes")


@contextmanager
def progress(name: str) -> Iterator[Tell | None]:
    """A bar on stderr while a file is fetched; nothing where stderr is not a terminal.

    Args:
        name: What is shown beside it.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda have, total: bar.update(task, completed=have, total=total)
