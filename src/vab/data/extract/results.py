"""What an extraction has finished and not yet put into a committed shard, on disk, so that a kill does not cost it.

Each rank appends what it finishes, in whatever order, to logs of its own; rank 0 reads all of them and writes shards in
the order of the inputs. Logs whose entries are all in committed shards are deleted.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from vab.data.shards.format import Left, head_differences
from vab.files import TEMPORARY_SUFFIX, explain_full_disk, write_atomically
from vab.spec import UserError

_MAGIC = b"vab1"
_ENTRY = struct.Struct("<4sIQQ")
"""The letters above, the CRC-32 of all that follows, the length of the contents, and which source they are of."""
_PROTECTED = struct.Struct("<QQ")
"""What of the head the CRC-32 covers."""
_SEEN = struct.Struct("<16sdQ")
"""Digest of a file, start of its only segment (NaN if it was cut whole), and which source it is of."""
HEAD, _SEEN_NAME, _INPUTS = "head.json", "seen", "inputs.npy"
_OWN = re.compile(r"(?:head\.json|inputs\.npy)(?:\.tmp)?|seen|\d{5,}-\d{5,}-\d{6,}\.log")
"""Files of a folder of results; anything else there is a user's own."""
_FAILURE_BYTES = 64 << 10
"""More than the entry of a source that gives no record has."""
_LOG_BYTES = 64 << 20
"""A rank begins another log when one has this size, so that logs can be deleted on the way."""


@dataclass(frozen=True)
class Record:
    """A segment as it goes into a shard."""

    meta: dict[str, Any]
    """As ``ShardWriter.write`` takes it."""
    codes: np.ndarray
    """(K, T) uint16."""
    features: np.ndarray
    """(V, C) float16."""


@dataclass(frozen=True)
class Result:
    """What a source gives: records and left-out segments; or no record, and one reason for all of it."""

    records: list[Record]
    """In order of time."""
    left_out: list[dict[str, Any]]
    """``reason``, ``detail`` and ``start_seconds``, the latter None for the whole source."""
    seconds: float = 0.0
    """Of sound in the records."""
    digest: bytes | None = None
    """Of the file, 16 bytes, where another has its size."""


@dataclass(frozen=True)
class Place:
    """Where an entry lies."""

    log: int
    """Number of the log, among those known."""
    offset: int
    """Of the entry's head, bytes."""


def text_hash(text: str) -> int:
    """64 bits that stand for a text in logs; the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class ResultLog:
    """One rank's logs of one run, appended to.

    Args:
        folder: Of all logs.
        run: Number of the run; a later one never writes into a log of an earlier one.
        rank: Of this process.
    """

    def __init__(self, folder: Path, run: int, rank: int) -> None:
        self.folder, self.run, self.rank = folder, run, rank
        self._part = 0
        self._file: IO[bytes] | None = None

    @property
    def path(self) -> Path:
        """Of the log that is written now."""
        return self.folder / f"{self.run:05d}-{self.rank:05d}-{self._part:06d}.log"

    def add(self, source: int, name: str, result: Result) -> tuple[Path, int]:
        """Note a finished source: the log and the offset of its entry.

        Args:
            source: Stands for it and for all that is known of it: `Plan.inputs`.
            name: Its name.
            result: What it gave.

        Raises:
            UserError: If the disk is full.
        """
        payload = _pack(name, result)
        try:
            if self._file is not None and self._file.tell() > _LOG_BYTES:
                self._file.close()
                self._file = None
                self._part += 1
            if self._file is None:
                self._file = self.path.open("ab")
            offset = self._file.tell()
            self._file.write(_ENTRY.pack(_MAGIC, _crc(payload, source), len(payload), source) + payload)
            self._file.flush()
        except OSError as error:
            raise explain_full_disk(error, self.folder.parent, len(payload)) from error
        return self.path, offset

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            if error is None:  # else it only repeats why the writing failed
                raise


class Results:
    """All ranks' logs, of this run and of those before it, as rank 0 reads them.

    Args:
        folder: Of the logs; made if absent.
        head: What an interrupted run must have had to be gone on with.

    Raises:
        UserError: If an interrupted run had other settings, saying which; or what is there is none of an extraction.
    """

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.folder = folder
        if foreign := _foreign_in(folder):
            raise UserError(
                f"{foreign} is none of an extraction's, and {folder} would be written and deleted: give another folder,"
                " or take it elsewhere"
            )
        folder.mkdir(exist_ok=True)
        head = json.loads(json.dumps(head))
        path = folder / HEAD
        if path.exists():
            if differences := head_differences(json.loads(path.read_bytes()), head):
                raise UserError(
                    f"{folder.parent} was begun with other settings ({'; '.join(differences)}):"
                    " use the same ones to go on, or give another folder"
                )
        else:
            write_atomically(path, json.dumps(head).encode())
        runs = [int(path.name[:5]) for path in folder.glob("*.log")]
        self.run = max(runs, default=-1) + 1
        """Of this run."""
        self._logs: list[Path] = []
        self._numbers: dict[str, int] = {}
        self._read: list[int] = []  # bytes of each log that are known
        self._left: list[int] = []  # entries of each log that no committed shard holds
        self.duplicates: dict[int, int] = {}
        """Sources that were kept although they have the bytes of another one, and that one, by their hashes."""
        self._seen: dict[tuple[bytes, float | None], int] = {}
        self._read_seen()
        self._seen_file: IO[bytes] | None = None

    def compare_inputs(
        self, names: np.ndarray, inputs: np.ndarray, versions: np.ndarray, is_done: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which inputs an earlier run saw as others than they are now: another size, or none, other labels, another id.

        What is given is noted for the next run; of those that are done, what was noted before, as the shards hold it.

        Args:
            names: (sources,) uint64: hashes of their names.
            inputs: (sources,) uint64: hashes of all that is known of them but for the time.
            versions: (sources,) uint64: hashes of that and of the time when the file was changed last.
            is_done: (sources,) bool: whether the shards hold them.

        Returns:
            (sources,) bool, False for those that are new; and (sources,) uint64, the versions that are noted.
        """
        path = self.folder / _INPUTS
        changed = np.zeros(len(names), bool)
        if path.exists():
            before = np.load(path, allow_pickle=False)  # (3, sources then) sorted by names
            at = np.searchsorted(before[0], names).clip(max=max(0, before.shape[1] - 1))
            if before.shape[1]:
                known = before[0, at] == names
                changed = known & (before[1, at] != inputs)
                inputs = np.where(known & is_done, before[1, at], inputs)
                versions = np.where(known & is_done, before[-1, at], versions)
        order = np.argsort(names)
        stream = io.BytesIO()
        np.save(stream, np.stack([names[order], inputs[order], versions[order]]))
        write_atomically(path, stream.getvalue())
        return changed, versions

    def poll(self) -> Iterator[tuple[int, Place]]:
        """Entries that were added since this was asked last: which source, and where. Torn ones are passed over."""
        for path in sorted(self.folder.glob("*.log")):
            number = self._number(path)
            with path.open("rb") as file:
                file.seek(self._read[number])
                size = path.stat().st_size
                while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
                    magic, crc, length, source = _ENTRY.unpack(head)
                    # Not yet written, torn by a kill, or a hole that a network's disk shows for a while.
                    if magic != _MAGIC or length > size - file.tell() or _crc(file.read(length), source) != crc:
                        break
                    place = Place(number, self._read[number])
                    self._read[number] = file.tell()
                    self._left[number] += 1
                    yield source, place

    def note(self, path: Path, offset: int) -> Place:
        """Know of an entry that this process has just added itself."""
        number = self._number(path)
        self._read[number] = path.stat().st_size
        self._left[number] += 1
        return Place(number, offset)

    def take(self, place: Place, name: str) -> Result:
        """What an entry holds.

        Raises:
            RuntimeError: If it is of another source: two names of one hash.
        """
        with self._logs[place.log].open("rb") as file:
            file.seek(place.offset)
            _, _, length, _ = _ENTRY.unpack(file.read(_ENTRY.size))
            theirs, result = _unpack(file.read(length))
        if theirs != name:
            raise RuntimeError(f"{theirs!r} and {name!r} have one hash: rename one of them")
        return result

    def has_failed(self, place: Place, name: str) -> bool:
        """Whether an entry says that its source is left out for a reason that may be gone (``Left.may_pass``)."""
        with self._logs[place.log].open("rb") as file:
            file.seek(place.offset)
            _, _, length, _ = _ENTRY.unpack(file.read(_ENTRY.size))
        if length > _FAILURE_BYTES:  # records are larger, and there may be gigabytes of them
            return False
        return any(Left.of({"source": name, **entry}).may_pass for entry in self.take(place, name).left_out)

    def release(self, places: list[Place]) -> None:
        """These are in committed shards: delete the logs that hold nothing else and are not written any more."""
        for place in places:
            self._left[place.log] -= 1
        for number in {place.log for place in places}:
            path = self._logs[number]
            run, rank, part = path.stem.split("-")
            follower = path.with_name(f"{run}-{rank}-{int(part) + 1:06d}.log")
            if not self._left[number] and (int(run) < self.run or follower.exists()):
                path.unlink(missing_ok=True)

    def first_of(self, digest: bytes, start: float | None, source: int) -> int | None:
        """Which other source was kept before of the same bytes, and the same start; else None."""
        first = self._seen.get((digest, start))
        return None if first is None or first == source else first

    def forget(self, digest: bytes, start: float | None) -> None:
        """The source that was kept of these bytes is listed no more."""
        self._seen.pop((digest, start), None)

    def keep(self, digest: bytes, start: float | None, source: int) -> None:
        """Note that a source of these bytes is kept; of several, the first one counts.

        Raises:
            UserError: If the disk is full.
        """
        first = self._seen.setdefault((digest, start), source)
        if first != source:
            self.duplicates[source] = first
        try:
            self._seen_file = self._seen_file or (self.folder / _SEEN_NAME).open("ab")
            self._seen_file.write(_SEEN.pack(digest, math.nan if start is None else start, source))
            self._seen_file.flush()
        except OSError as error:
            raise explain_full_disk(error, self.folder.parent, _SEEN.size) from error

    def close(self) -> None:
        """Hold no file any more."""
        if self._seen_file is not None:
            self._seen_file.close()
            self._seen_file = None

    def delete(self) -> None:
        """The extraction is finished."""
        self.close()
        for path in list(self.folder.iterdir()):
            if _OWN.fullmatch(path.name):
                path.unlink()
        with suppress(OSError):  # something else was put there meanwhile
            self.folder.rmdir()

    def _number(self, path: Path) -> int:
        if path.name not in self._numbers:
            self._numbers[path.name] = len(self._logs)
            self._logs.append(path)
            self._read.append(0)
            self._left.append(0)
        return self._numbers[path.name]

    def _read_seen(self) -> None:
        path = self.folder / _SEEN_NAME
        content = path.read_bytes() if path.exists() else b""
        whole = len(content) // _SEEN.size * _SEEN.size
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)  # a torn last entry
        for digest, start, source in _SEEN.iter_unpack(content[:whole]):
            first = self._seen.setdefault((digest, None if math.isnan(start) else start), source)
            if first != source:
                self.duplicates[source] = first


def _foreign_in(folder: Path) -> Path | None:
    """What is where the results go and is none of an extraction's; None where there is no such thing."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return folder
    try:
        head = json.loads((folder / HEAD).read_bytes())
    except FileNotFoundError:  # none yet, of a run that was killed as it began
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        return next((folder / name for name in names if name != HEAD + TEMPORARY_SUFFIX), None)
    except (OSError, ValueError):
        return folder / HEAD
    return None if isinstance(head, dict) and {"spec", "labels", "extraction"} <= {*head} else folder / HEAD


def _crc(payload: bytes, source: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_PROTECTED.pack(len(payload), source)))


def _pack(name: str, result: Result) -> bytes:
    text = {
        "source": name,
        "metas": [record.meta for record in result.records],
        "left_out": result.left_out,
        "seconds": result.seconds,
        "digest": None if result.digest is None else result.digest.hex(),
    }
    stream = io.BytesIO()
    np.savez(
        stream,
        text=np.frombuffer(json.dumps(text).encode(), np.uint8),
        codes=np.array([record.codes for record in result.records]),
        features=np.array([record.features for record in result.records]),
    )
    return stream.getvalue()


def _unpack(payload: bytes) -> tuple[str, Result]:
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        text = json.loads(arrays["text"].tobytes())
        parts = zip(text["metas"], arrays["codes"], arrays["features"], strict=True)
        digest = None if text["digest"] is None else bytes.fromhex(text["digest"])
        return text["source"], Result([Record(*part) for part in parts], text["left_out"], text["seconds"], digest)
