"""Extraction by parts: a part is a contiguous run of the list of inputs, and becomes one tar and its index.

``parts/000000.json`` marks a part done; nothing else is state. A part depends on its inputs alone, so the data set is
the same, byte for byte, whoever does which part, and whether or not it was interrupted; a kill costs the parts in the
making. Devices of one kind are assumed: another GPU or processor may round otherwise, and so may another version of a
library, which the manifest states.

Inputs that cannot be read for a reason that may pass (``Left.may_pass``) are tried a second time at the end of their
part, and again by the next run, in a finished folder too. Then the part is written again beside the old one, which
stays until the new manifest is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from vab.data.addresses import RemoteFile, is_address
from vab.data.extract.cutting import Cutting, LeftOut, Segment
from vab.data.extract.decoders import Again, DecodingPool, Ended, Item, Job
from vab.data.extract.encode import Encoders
from vab.data.extract.identity import MISSING, UNKNOWN, is_away
from vab.data.inputs.listing import Source
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import Left, make_key
from vab.data.shards.part_files import PartWriter, read_part, read_records, read_rows
from vab.data.shards.records import Packed, RecordPacker
from vab.files import explain_full_disk
from vab.spec import SegmentSpec, UserError

_THREADS = 16
Watch = Callable[[int, int, float], None]
"""Called now and then: how many inputs are done, how many of these by this run, and the sound that this is, s."""


@dataclass(frozen=True)
class Settings:
    """How an extraction is done; the last two show in the shards."""

    num_workers: int = 0
    """Processes that decode for each device; 0 decodes in the process that encodes."""
    batch_size: int = 16
    """Segments that are encoded at once."""
    file_timeout: float = 300.0
    """s without a segment after which a file is given up."""
    inputs_per_part: int = 256
    """Inputs per part, and so per tar."""
    leaves_out_duplicates: bool = False
    """Whether an input that has the very bytes, and the start, of one before it in the list is left out."""
    retries: bool = True
    """Whether inputs that an earlier run could not read are tried again."""


class Part(NamedTuple):
    """A part to do, with all that must be known for it."""

    number: int
    """From 0."""
    sources: list[Source]
    """Its inputs."""
    sizes: list[int]
    """Bytes of each."""
    times: list[int]
    """When each was changed last, ns; 0 where that is not known."""
    hashes: list[str]
    """Of what is known of each: ``Described.inputs``."""
    wants_digest: list[bool]
    """Whether another file has the size of this one, so that they may be the same."""
    again: frozenset[int] | None = None
    """Places of the inputs to try again, where the part is done already; the others stay as they are."""


class Done(NamedTuple):
    """A part that is done."""

    number: int
    inputs: int
    """Inputs that were tried."""
    seconds: float
    """Of sound in new records."""


class PartsWorker:
    """Does parts, with one set of networks and one pool of decoders.

    Files of the next part are decoded while the last ones of the part before it are encoded.

    Args:
        encoders: The frozen networks.
        cutting: How files become segments; its rate is the codec's.
        settings: How the work is done.
        out: The data set's folder.
        head: ``spec``, ``labels`` and ``extraction`` of the data set.
    """

    def __init__(
        self, encoders: Encoders, cutting: Cutting, settings: Settings, out: OutFolder, head: Mapping[str, Any]
    ) -> None:
        self.encoders, self.cutting, self.settings, self.out, self.head = encoders, cutting, settings, out, head
        self.spec = SegmentSpec.from_dict(head["spec"])
        self._packer = RecordPacker(self.spec, head["labels"])
        self._at: dict[int, tuple[_OpenPart, int]] = {}  # what is being decoded: job to input
        self._batch: list[tuple[int, int, Segment]] = []  # a job, the number among its items, and the segment
        self._again: deque[tuple[_OpenPart, int]] = deque()
        self._done: deque[Done] = deque()
        self._count = 0

    def run(self, parts: Iterable[Part]) -> Iterator[Done]:
        """Do parts; yields each when it is written.

        Raises:
            UserError: If the disk is full, or most inputs of a part cannot be reached any more.
        """
        pool = DecodingPool(self.cutting, self.settings.num_workers, self.settings.file_timeout)
        waiting = iter(parts)
        while True:
            items = pool.run(self._jobs(waiting))
            try:
                for number, item in items:
                    self._take(number, item)
                    while self._done:
                        yield self._done.popleft()
                self._encode()
            finally:
                items.close()
            while self._done:
                yield self._done.popleft()
            if not self._again:  # the last part's second tries come after all jobs
                return

    def _jobs(self, parts: Iterator[Part]) -> Iterator[Job]:
        """Files to decode: those to be tried a second time first. Called by the pool whenever a decoder is free."""
        while True:
            while self._again:
                yield self._job(*self._again.popleft())
            if (part := next(parts, None)) is None:
                return
            opened = _OpenPart(part, self.out)
            places = opened.to_decode()
            if not places:
                self._finish(opened)
            for place in places:
                while self._again:
                    yield self._job(*self._again.popleft())
                yield self._job(opened, place)

    def _job(self, opened: _OpenPart, place: int) -> Job:
        self._count += 1
        self._at[self._count] = opened, place
        source = opened.part.sources[place]
        opened.inputs[place] = _Input(source)
        file, size = source.at, opened.part.sizes[place]
        if isinstance(file, RemoteFile) and size >= 0:
            file = file._replace(size=size)
        return Job(self._count, file, source.start, opened.part.wants_digest[place])

    def _take(self, number: int, item: Item) -> None:
        opened, place = self._at[number]
        work = opened.inputs[place]
        if isinstance(item, Again):
            opened.inputs[place] = _Input(work.source)
            self._batch = [entry for entry in self._batch if entry[0] != number]
        elif isinstance(item, Ended):
            work.ended = item
            self._hand_on(number)
        else:
            work.items.append(item)
            if isinstance(item, Segment):
                self._batch.append((number, len(work.items) - 1, item))
        if len(self._batch) >= self.settings.batch_size:
            self._encode()

    def _encode(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        encoded = self.encoders.encode([segment for _, _, segment in batch], self.spec.num_frames)
        for (number, item, segment), (codes, features) in zip(batch, encoded, strict=True):
            opened, place = self._at[number]
            source = opened.part.sources[place]
            meta = {
                "id": source.id,
                "source": source.name,
                "start_seconds": segment.start,
                "labels": list(source.labels),
                "steps": min(self.encoders.codec.steps_for(segment.valid_samples), codes.shape[1]),
                "frames": segment.valid_frames,
                "loudness_db": round(segment.loudness_db, 2),
            }
            # The decoded segment, which is large, is let go.
            try:
                packed = self._packer.pack(make_key(source.id, segment.start), codes, features, meta)
            except UserError as error:  # such as features beyond float16: of this segment alone
                opened.inputs[place].items[item] = LeftOut(segment.start, "error", str(error))
            else:
                kept = opened.keep(packed, segment.valid_samples / self.spec.sample_rate)
                opened.inputs[place].items[item] = kept
        for number in dict.fromkeys(number for number, _, _ in batch):
            self._hand_on(number)

    def _hand_on(self, number: int) -> None:
        """If all of an input is there, note its result; if that was the part's last one, write the part."""
        opened, place = self._at[number]
        if (result := opened.inputs[place].result()) is None:
            return
        del self._at[number], opened.inputs[place]
        if result.records and opened.part.sizes[place] < 0:  # its records would be of an input that nobody listed
            late = "could not be found when this run began, and is there now: run the same command again"
            result = Result([], [Left(opened.part.sources[place].name, "unreadable", late)])
        opened.results[place] = result
        if opened.to_do or len(opened.results) < opened.expected:
            return
        sizes = opened.part.sizes
        failed = [place for place, result in sorted(opened.results.items()) if result.may_pass and sizes[place] >= 0]
        if failed and not opened.is_second_try:
            opened.is_second_try = True
            for place in failed:
                del opened.results[place]
            self._again.extend((opened, place) for place in failed)
        else:
            self._finish(opened)

    def _finish(self, opened: _OpenPart) -> None:
        part = opened.part
        _refuse_unreachable(part, opened.results)
        is_new = write_part(self.out, part, self.head, opened.results, opened.records)
        seconds = sum(result.seconds for result in opened.results.values()) if is_new else 0.0
        self._done.append(Done(part.number, len(part.again or part.sources), seconds))
        opened.close()


class Result(NamedTuple):
    """What an input gives: records and left-out segments; or no record, and one reason for all of it."""

    records: list[Kept]
    """In order of time."""
    left_out: list[Left]
    """Of it."""
    digest: bytes | None = None
    """Of the file, where another has its size."""

    @property
    def may_pass(self) -> bool:
        """Whether all of it is left out for a reason that may be gone later."""
        return any(entry.may_pass for entry in self.left_out)

    @property
    def seconds(self) -> float:
        """Of sound in the records."""
        return sum(kept.seconds for kept in self.records)


class Kept(NamedTuple):
    """Where a packed record waits for the part to be whole."""

    offset: int
    size: int
    seconds: float


@dataclass
class _Input:
    """An input on its way: what is decoded of it, some of it encoded."""

    source: Source
    items: list[Segment | LeftOut | Kept] = field(default_factory=list)
    ended: Ended | None = None

    def result(self) -> Result | None:
        """None while something is missing."""
        if self.ended is None or any(isinstance(item, Segment) for item in self.items):
            return None
        records = [item for item in self.items if isinstance(item, Kept)]
        left_out = [_left(self.source, item) for item in self.items if isinstance(item, LeftOut)]
        whole = [entry for entry in left_out if entry.start_seconds is None]
        if whole or not records:
            # A file that broke the decoder half-way is left out whole; so is one of which no segment is usable.
            first = (whole or left_out)[0]._replace(start_seconds=None)
            if len(left_out) > 1 and not whole:
                detail = f"{first.detail} (the first of {len(left_out)} segments, none of which is usable)"
                first = first._replace(detail=detail)
            records, left_out = [], [first]
        return Result(records, left_out, self.ended.digest)


def _left(source: Source, item: LeftOut) -> Left:
    """An exception's detail has its traceback below the first line."""
    detail, _, traceback = item.detail.partition("\n")
    return Left(source.name, item.reason, detail, item.start, traceback)


class _OpenPart:
    """A part in the making: records wait on disk, as those of 256 long videos may need gigabytes."""

    def __init__(self, part: Part, out: OutFolder) -> None:
        self.part, self.out = part, out
        self.inputs: dict[int, _Input] = {}
        self.results: dict[int, Result] = {}
        self.is_second_try = False
        self.expected = 0
        self.to_do = True  # while not all of its jobs are listed
        self._file: IO[bytes] | None = None

    def to_decode(self) -> list[int]:
        """Places of the inputs to decode; those that are not there have their result at once."""
        places = range(len(self.part.sources)) if self.part.again is None else sorted(self.part.again)
        for place in places:
            if self.part.sizes[place] == MISSING:
                absent = Left(self.part.sources[place].name, "missing", "there is no such file")
                self.results[place] = Result([], [absent])
        self.expected, self.to_do = len(places), False
        return [place for place in places if place not in self.results]

    def keep(self, record: Packed, seconds: float) -> Kept:
        """Put a record aside."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.out.scratch())  # noqa: SIM115 - closed with the part
        content = pickle.dumps(tuple(record))
        try:
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(content)
        except OSError as error:
            raise explain_full_disk(error, self.out.scratch(), len(content)) from error
        return Kept(offset, len(content), seconds)

    def records(self, result: Result) -> Iterator[Packed]:
        """The records of a result."""
        for kept in result.records:
            assert self._file is not None
            self._file.seek(kept.offset)
            yield Packed(*pickle.loads(self._file.read(kept.size)))  # this process has written it

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _refuse_unreachable(part: Part, results: Mapping[int, Result]) -> None:
    """Stop where most files that were there when the run began cannot be opened: their disk went away.

    Not where inputs are tried again: what is tried in vain stays as it is.

    Raises:
        UserError: If so.
    """
    if part.again is not None:
        return
    sizes = part.sizes
    unknown = [place for place in results if sizes[place] == UNKNOWN and is_address(part.sources[place].location)]
    there = [place for place in results if sizes[place] >= 0] + unknown
    failed = [place for place in there if results[place].may_pass]
    with ThreadPoolExecutor(_THREADS) as threads:
        away = threads.map(lambda place: is_away(part.sources[place], sizes[place] >= 0), failed)
        lost = {place: why for place, why in zip(failed, away, strict=True) if why}
    if 2 * len(lost) > len(there):
        place, why = next(iter(lost.items()))
        then = "were there when this run began and " if sizes[place] >= 0 else ""
        raise UserError(
            f"{len(lost)} of {len(there)} inputs of part {part.number} {then}cannot be opened now, such as"
            f" {part.sources[place].shown}: {why}, then run the same command again; what is done is"
            " kept"
        )


def write_part(
    out: OutFolder,
    part: Part,
    head: Mapping[str, Any],
    results: Mapping[int, Result],
    records: Callable[[Result], Iterator[Packed]] = lambda result: iter(()),
) -> bool:
    """Write a part; of one that is there already, inputs without a result stay as they are.

    Args:
        out: The data set's folder.
        part: What it is.
        head: Of the data set.
        results: By place.
        records: Those of a result.

    Returns:
        Whether anything has changed.

    Raises:
        UserError: If the disk is full.
    """
    before, version = _Before(out, part, head) if part.again is not None else None, 0
    if before is not None:
        if all(same_reasons(result.left_out, before.left_out(place)) for place, result in results.items()):
            return False
        version = before.version + 1
    left_out, digests, seen_by = list[Left](), dict[str, str](), list[str](part.hashes)
    with out.work() as work:
        writer = PartWriter(out, work, part.number, version)
        try:
            for place in range(len(part.sources)):
                if (result := results.get(place)) is not None:
                    for record in records(result):
                        writer.add(record)
                    left_out += result.left_out
                    digest = None if result.digest is None else result.digest.hex()
                else:
                    assert before is not None
                    for record in before.records(place):
                        writer.add(record)
                    left_out += before.left_out(place)
                    digest, seen_by[place] = before.part["digests"].get(str(place)), before.part["inputs"][place]
                if digest is not None:
                    digests[str(place)] = digest
            further = {"head": head_hash(head), "inputs": seen_by, "digests": digests, "future": _future(part)}
            writer.publish([source.name for source in part.sources], left_out, further)
        finally:
            writer.discard()
    return True


class _Before:
    """A part as it is, of which some is taken over."""

    def __init__(self, out: OutFolder, part: Part, head: Mapping[str, Any]) -> None:
        self.out, self._spec = out, SegmentSpec.from_dict(head["spec"])
        self.part = read_part(out, part.number)
        self._packer, self.version = RecordPacker(self._spec, head["labels"]), self.part["version"]
        self._places = {source.name: place for place, source in enumerate(part.sources)}
        self._rows: dict[int, list[int]] = {}
        if self.part["tar"] is not None:
            self._index = read_rows(out, part.number, self.part)
            self._tar = out.path(self.part["tar"]["name"])
            for row, (*_, meta) in enumerate(read_records(self._tar, self._index, self._spec)):
                self._rows.setdefault(self._places[meta["source"]], []).append(row)

    def left_out(self, place: int) -> list[Left]:
        """What was left out of an input."""
        return [entry for entry in self.part["left_out"] if self._places[entry.source] == place]

    def records(self, place: int) -> Iterator[Packed]:
        """The records of an input."""
        if rows := self._rows.get(place):
            for record in read_records(self._tar, self._index[rows], self._spec):
                yield self._packer.pack(*record)


def same_reasons(some: Iterable[Left], others: Iterable[Left]) -> bool:
    """Whether the same is left out, for the same reasons; in whatever words, but those that name another input."""

    def compared(entries: Iterable[Left]) -> set[tuple[Any, ...]]:
        return {(*entry[:2], entry.detail if entry.reason == "duplicate" else "", entry[3]) for entry in entries}

    return compared(some) == compared(others)


def _future(part: Part) -> dict[str, int]:
    """Times of files that are dated after now, ns, by place: only another time tells that such a file has changed."""
    now = time.time_ns()
    return {str(place): when for place, when in enumerate(part.times) if when > now}


def head_hash(head: Mapping[str, Any]) -> str:
    """Stands for what the parts of a data set share."""
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
