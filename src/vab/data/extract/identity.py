"""What is known of inputs before they are decoded: sizes and times of their files, and hashes to compare them by."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vab.data.addresses import AddressError, Entry, Remote, RemoteFile, is_address
from vab.data.inputs.listing import Source, Sources
from vab.spec import UserError

MISSING, UNKNOWN = -1, -2
"""Sizes of files that are not there, and of files whose size the system does not tell."""

_THREADS = 16
_LISTED_FROM = 16
"""Files of one folder at an address from which on the folder is listed."""


class FileStats(NamedTuple):
    """What the system tells of the file of each source."""

    sizes: np.ndarray
    """(sources,) int64, bytes, or ``MISSING`` or ``UNKNOWN``."""
    times: np.ndarray
    """(sources,) int64, ns: when it was changed last, 0 where that is not known."""
    shares_size: np.ndarray
    """(sources,) bool: whether another file is as large, so that the two may be the same."""


def file_stats(sources: Sources) -> FileStats:
    """Ask the system for each file once; for many at once, for the sake of slow disks and servers.

    Raises:
        UserError: If an address is of an unknown kind, or needs a package that is not installed; or if most files are
            at addresses that cannot be reached.
    """
    numbers: dict[str, int] = {}  # a file may be listed often, with many starts
    which = np.fromiter((numbers.setdefault(source.file, len(numbers)) for source in sources), np.int64, len(sources))
    files, root = list(numbers), sources.root
    remote = {source.file: source for source in sources if is_address(source.location)} if sources.at_addresses else {}
    listed, silent, lost = _listings(remote.values()), Counter[str](), dict[str, str]()

    def stats(file: str) -> tuple[int, int]:
        if file in remote:
            host = remote[file].location.split("/")[2]
            if silent[host] >= _THREADS:
                lost[file] = "nor can the others of its server"
                return UNKNOWN, 0
            try:
                found_there = _stats_at(remote[file], listed)
            except AddressError as error:
                if error.reason:
                    return MISSING if error.reason == "missing" else UNKNOWN, 0  # decoding it will say why
                lost[file] = str(error)
                silent[host] += 1
                return UNKNOWN, 0
            silent.pop(host, None)
            return found_there
        try:
            found = os.stat(file if file.startswith("/") else f"{root}/{file}")
        except FileNotFoundError:
            return MISSING, 0
        except (OSError, ValueError):
            return UNKNOWN, 0  # decoding it will say why
        return found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(_THREADS) as threads:
        step = 1 if len(files) <= _THREADS else 16 if remote else 4096
        starts = range(0, len(files), step)
        parts = threads.map(lambda start: [*map(stats, files[start : start + step])], starts)
        both = np.fromiter((one for part in parts for one in part), np.dtype((np.int64, 2)), len(files))
    if 2 * len(lost) > len(files):
        file, why = next(iter(lost.items()))
        raise UserError(
            f"{len(lost)} of {len(files)} inputs cannot be reached, such as {remote[file].shown}: {why}; check the"
            " network and the addresses, then run the same command again"
        )
    sizes: np.ndarray = both[:, 0]
    _, kind, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return FileStats(sizes[which], both[which, 1], ((counts[kind] > 1) & (sizes > 0))[which])


def _listings(sources: Iterable[Source]) -> dict[str, dict[str, Entry]]:
    """What is in folders at addresses of which many files are wanted: else each file would take a request."""
    counts = Counter(source.location.rpartition("/")[0] for source in sources if source.size is None)
    listed, silent = {}, set[str]()
    for folder, count in counts.items():
        server = folder.split("/")[2]
        if count < _LISTED_FROM or server in silent or folder.startswith(("http://", "https://")):
            continue  # web servers' lists have no sizes
        try:
            listed[folder] = Remote(folder).entries(below=False)
        except UserError as error:  # such as for want of permission to list
            if isinstance(error.__cause__, AddressError) and not error.__cause__.reason:
                silent.add(server)
    return listed


def _stats_at(source: Source, listed: Mapping[str, Mapping[str, Entry]]) -> tuple[int, int]:
    """Bytes and time of a file at an address, as ``file_stats`` gives them.

    Raises:
        AddressError: If its server does not tell.
    """
    if source.size is not None:
        return source.size, source.time
    file, (folder, _, name) = source.at, source.location.rpartition("/")
    assert isinstance(file, RemoteFile)
    entry = listed[folder].get(name) if folder in listed else file.entry()
    if entry is None:
        return MISSING, 0
    return UNKNOWN if entry.size is None else entry.size, entry.time


def is_away(source: Source, was_there: bool = True) -> str:
    """What to check where a file cannot be opened and read for a reason that may pass; else nothing.

    Permission that a folder does not give is no such reason; at an address, where the file was there, it is one:
    credentials expire.
    """
    file = source.at
    try:
        if isinstance(file, RemoteFile):
            file.entry(tries=1)
        else:
            with file.open("rb") as opened:
                opened.read(1)
    except PermissionError:
        return ""
    except AddressError as error:
        if error.reason and not was_there:
            return ""
        return f"check the {'credentials' if error.reason == 'refused' else 'network'} ({error})"
    except (OSError, ValueError):
        return "check that the disk or the network folder is mounted"
    return ""


class Described(NamedTuple):
    """What tells inputs from others."""

    inputs: np.ndarray
    """(sources,) uint64: a hash of each one's name, start, labels, id and size."""
    text: str
    """Stands for all ``inputs`` and says how many there are: the same on every machine, as a time is not."""


def describe(sources: Sources, sizes: np.ndarray) -> Described:
    """What tells inputs from others; sizes as ``file_stats`` gives them."""
    digest, inputs = hashlib.sha256(b"["), np.empty(len(sources), np.uint64)
    known: dict[tuple[str, ...], str] = {}
    quoted = json.encoder.encode_basestring_ascii
    for number, (source, size) in enumerate(zip(sources, sizes.tolist(), strict=True)):
        if (labels := known.get(source.labels)) is None:
            labels = known[source.labels] = json.dumps(source.labels)
        start = "null" if source.start is None else repr(source.start)
        given_id = f", {quoted(source.given_id)}" if source.given_id else ""
        # What json.dumps gives of these in a list, in a third of the time.
        text = f"[{quoted(source.name)}, {start}, {labels}, {size if size >= 0 else 'null'}{given_id}]"
        digest.update((f", {text}" if number else text).encode())
        inputs[number] = text_hash(text)
    digest.update(b"]")
    return Described(inputs, f"{len(sources)} sha256:{digest.hexdigest()}")


def text_hash(text: str) -> int:
    """64 bits that stand for a text; the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
