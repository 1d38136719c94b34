"""Rank 0's part of an extraction: what is to be done, what is finished, and its way into the shards in order."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vab.data.extract.decoders import digest_of
from vab.data.extract.report import (
    REPORT,
    ExtractionReport,
    nothing_made,
    refuse_foreign_report,
    report_of,
    write_report,
)
from vab.data.extract.results import Place, Result, Results, text_hash
from vab.data.inputs.listing import Source, Sources
from vab.data.shards.format import Left, is_complete, library_versions, make_key
from vab.data.shards.writer import ShardWriter
from vab.ranks import Ranks
from vab.spec import SegmentSpec, UserError

PARTIAL = "extraction.partial"
"""Folder of what is finished and in no committed shard."""
_POLL_SECONDS = 0.5
"""How often rank 0 looks for what the other ranks have finished."""
MISSING, _UNKNOWN = -1, -2
"""Sizes of files that are not there, or whose size the system does not tell."""

Watch = Callable[[int, int, float], None]
"""Is told, now and then, how many inputs are done, how many of these by this run, and the sound that this is, s."""


@dataclass(frozen=True)
class Settings:
    """How an extraction is done; of these, the last two show in the shards."""

    num_workers: int = 0
    """Processes that decode for each rank; 0 decodes in the rank itself."""
    batch_size: int = 16
    """Segments that are encoded at once."""
    file_timeout: float = 300.0
    """s without a segment after which a file is given up."""
    records_per_shard: int = 4096
    """Records per tar."""
    leaves_out_duplicates: bool = False
    """Whether an input that has the very bytes, and the start, of one before it in the list is left out."""


@dataclass(frozen=True)
class Plan:
    """What all ranks must know of a run."""

    run: int
    """Its number."""
    to_decode: np.ndarray
    """(n,) int32: numbers of the sources that are to be decoded, in order."""
    wants_digest: np.ndarray
    """(n,) bool: whether another file has the size of this one, so that they may be the same."""
    inputs: np.ndarray
    """(n,) uint64: stand for what is known of them: name, labels, id, size, time."""


class Collector:
    """Rank 0's part: knows what is finished by whom, and writes it into shards in the order of the sources.

    Sources that an earlier run left out for a reason that may be gone (``Left.may_pass``) are tried again, those of a
    finished data set too, and come into shards behind those that are there.
    """

    def __init__(
        self,
        sources: Sources,
        out: Path,
        head: dict[str, Any],
        settings: Settings,
        ranks: Ranks,
        watch: Watch,
    ) -> None:
        self.sources, self.out, self.settings, self.ranks, self.watch = sources, out, settings, ranks, watch
        self.left_out: list[Left] = []
        spec = SegmentSpec.from_dict(head["spec"])
        self.sizes, self._times = file_facts(sources)
        self._appends = is_complete(out)
        if not (self._appends or (self.sizes != MISSING).any()):
            raise UserError(
                f"none of {len(sources)} inputs is there, such as {sources[0].path}: give --media_root, the folder that"
                " the files of a CSV are in"
            )
        refuse_foreign_report(out)
        self.writer = ShardWriter(
            out, spec, head["labels"], settings.records_per_shard, head["extraction"], append=self._appends
        )
        try:
            self.results = Results(out / PARTIAL, head)
            if not self._appends:
                (out / REPORT).unlink(missing_ok=True)  # of a run that gave no record
            refuse_lost(self.writer, sources)
            self.plan = self._make_plan()
        except BaseException:
            self.writer.close()
            raise

    def _make_plan(self) -> Plan:
        """Find out what is done already, and so what is to be decoded."""
        sources = self.sources
        is_open = np.fromiter((not self.writer.is_done(source.name) for source in sources), bool, len(sources))
        known = describe(sources, self.sizes, self._times)
        self._fingerprint = known.text
        self._inputs, self._touched = self._compare(known, ~is_open)
        self._order = np.flatnonzero(is_open).astype(np.int32)  # sources that no committed shard accounts for
        self._next = 0  # in that order
        self._logs = np.full(len(sources), -1, np.int32)  # where each source's result is
        self._offsets = np.zeros(len(sources), np.int64)
        self._uncommitted: list[Place] = []
        self._last_look = 0.0
        self._seconds, self._begun = 0.0, 0
        self._by_hash = np.argsort(self._inputs, kind="stable").astype(np.int32)
        self._hashes = self._inputs[self._by_hash]
        self._look()
        for number in np.flatnonzero(is_open & (self._logs >= 0)).tolist():  # of earlier runs, as this has not begun
            place = Place(int(self._logs[number]), int(self._offsets[number]))
            if self.results.has_failed(place, sources[number].name):
                self._logs[number] = -1
                self.results.release([place])
        if self._appends:
            self._know_kept(is_open)
        waits = is_open & (self._logs < 0) & (self.sizes != MISSING)
        to_decode = np.flatnonzero(waits).astype(np.int32)
        self._done_before, self._begun = len(sources) - len(to_decode), 0
        return Plan(self.results.run, to_decode, self._shares_size()[to_decode], self._inputs[to_decode])

    def _know_kept(self, is_open: np.ndarray) -> None:
        """Note the bytes of files in the finished shards that are as large as one that is tried again."""
        assert self.writer.finished is not None
        lacking = {entry.source for entry in self.writer.finished.left_out if entry.start_seconds is None}
        sizes = self.sizes[is_open & (self.sizes > 0)]
        for number in np.flatnonzero(~is_open & np.isin(self.sizes, sizes)).tolist():
            source = self.sources[number]
            if source.name not in lacking and (digest := digest_of(source.path)) is not None:
                self.results.keep(digest, source.start, int(self._inputs[number]))

    def _compare(self, known: Described, is_done: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """What is in shards already must still be what it was; what is not is done again, and needs no word.

        Another time alone is no reason to refuse, as a copy of a folder has others: it is told.

        Returns:
            (sources,) uint64, a hash of each version, those in shards as they were then; and names of inputs that are
            in shards, and whose files are of another time now.

        Raises:
            UserError: If some of it is not.
        """
        names = np.fromiter((text_hash(source.name) for source in self.sources), np.uint64, len(self.sources))
        found, versions = self.results.compare_inputs(names, known.inputs, known.versions, is_done)
        changed = np.flatnonzero(found & is_done)
        if len(changed):
            raise UserError(
                f"{self.out} holds what {self.sources[int(changed[0])].name} was before ({len(changed)} such): its"
                " size, labels or id are others now, or it was not there; give another folder, or delete this one"
            )
        return versions, [self.sources[number].name for number in np.flatnonzero(versions != known.versions).tolist()]

    def _shares_size(self) -> np.ndarray:
        """(sources,) bool: whether another file is as large, so that the two may be the same."""
        files = np.fromiter((text_hash(source.file) for source in self.sources), np.uint64, len(self.sources))
        _, first = np.unique(files, return_index=True)  # a file may be listed often, with many starts
        sizes, counts = np.unique(self.sizes[first], return_counts=True)
        shares: np.ndarray = (counts[np.searchsorted(sizes, self.sizes)] > 1) & (self.sizes > 0)
        return shares

    @property
    def is_finished(self) -> bool:
        """Whether every source is handed over to the writer."""
        return self._next == len(self._order)

    def add(self, number: int, path: Path, offset: int) -> None:
        """A source that this rank has finished."""
        self._found(number, self.results.note(path, offset))
        self._advance()

    def collect_sometimes(self) -> None:
        """``collect``, if it was not done lately."""
        if time.monotonic() - self._last_look > _POLL_SECONDS:
            self.collect()

    def wait_for_others(self) -> None:
        """Let other ranks do some more, then ``collect``."""
        time.sleep(_POLL_SECONDS)
        self.collect()

    def collect(self) -> None:
        """See what other ranks have finished, and write what has its turn.

        Raises:
            UserError: If another rank has failed, or the disk is full.
        """
        self.ranks.require_others()
        self._look()
        self._advance()
        done = self._done_before + self._begun
        self.watch(done, self._begun, self._seconds)

    def _look(self) -> None:
        for source, place in self.results.poll():
            if (number := self._number_of(source)) >= 0:
                self._found(number, place)
        self._last_look = time.monotonic()

    def _found(self, number: int, place: Place) -> None:
        if self._logs[number] < 0:
            self._begun += 1
        self._logs[number], self._offsets[number] = place.log, place.offset

    def _advance(self) -> None:
        """Write what is finished, up to the first source that is not."""
        while self._next < len(self._order):
            number = int(self._order[self._next])
            if self.sizes[number] == MISSING:
                absent = {"start_seconds": None, "reason": "missing", "detail": "there is no such file"}
                self._write(number, Result([], [absent]))
            elif self._logs[number] >= 0:
                place = Place(int(self._logs[number]), int(self._offsets[number]))
                self._uncommitted.append(place)
                self._write(number, self.results.take(place, self.sources[number].name))
            else:
                return
            self._next += 1
            if not self.writer.num_uncommitted:
                self.results.release(self._uncommitted)
                self._uncommitted = []

    def _write(self, number: int, result: Result) -> None:
        source = self.sources[number]
        result = self._without_duplicate(source, int(self._inputs[number]), result)
        write_result(self.writer, source.name, result, self.left_out)
        self._seconds += result.seconds

    def _without_duplicate(self, source: Source, own: int, result: Result) -> Result:
        """The result; or that it is left out, as the same bytes were kept before."""
        if not result.records or result.digest is None:
            return result
        first = self.results.first_of(result.digest, source.start, own)
        if first is not None and self._number_of(first) < 0:
            self.results.forget(result.digest, source.start)
            first = None
        if first is None or not self.settings.leaves_out_duplicates:
            self.results.keep(result.digest, source.start, own)
            return result
        other = self.sources[self._number_of(first)]
        labels = "" if other.labels == source.labels else f", whose labels are {', '.join(other.labels) or 'none'}"
        detail = f"has the very bytes of {other.name}{labels}"
        return Result([], [{"start_seconds": None, "reason": "duplicate", "detail": detail}])

    def _number_of(self, source: int) -> int:
        """Of the input of a hash; -1 if it is not listed, or was another then."""
        at = int(np.searchsorted(self._hashes, np.uint64(source)))
        return int(self._by_hash[at]) if at < len(self._hashes) and int(self._hashes[at]) == source else -1

    def finish(self, codebooks: torch.Tensor, packages: Iterable[str] = ()) -> ExtractionReport:
        """All sources are written: index, manifest and report.

        Args:
            codebooks: (K, S, code_dim) of the codec.
            packages: Distributions that the frozen networks come from.

        Raises:
            UserError: If there is not one record.
        """
        total, finished = len(self.sources), self.writer.finished
        if not self.writer.num_records:
            self.results.delete()  # so that mended files are looked at again
            raise nothing_made(self.out, self.sources, self.left_out)
        pairs = [(self._number_of(own), self._number_of(of)) for own, of in self.results.duplicates.items()]
        named = {self.sources[own].name: self.sources[of].name for own, of in pairs if min(own, of) >= 0}
        if finished is not None:
            named = finished.manifest.get("duplicates", {}) | named
        further = {"versions": library_versions(packages)} | ({"duplicates": named} if named else {})
        unread = self.writer.are_unread(source.name for source in self.sources)
        inputs = fingerprint(self.sources, self.sizes, self._times, unread) if unread.any() else self._fingerprint
        manifest = self.writer.finish(codebooks, inputs, further, (source.name for source in self.sources))
        self.results.delete()
        report = replace(report_of(self.out, manifest), ignored=self.sources.ignored, touched=self._touched)
        assert report.inputs == total, f"{report.inputs} inputs accounted for, {total} were given"
        if finished is not None:
            report = replace(report, tried_again=sum(entry.may_pass for entry in finished.left_out))
        if finished is None or manifest is not finished.manifest:
            write_report(report)
        else:
            report = replace(report, already_finished=True)
        self.watch(total, self._begun, self._seconds)
        return report

    def close(self) -> None:
        """Let other processes write to the folder. Harmless after ``finish``."""
        self.results.close()
        self.writer.close()


def write_result(writer: ShardWriter, source: str, result: Result, left_out: list[Left]) -> None:
    """Put what a source gave into the shards.

    Args:
        writer: Of the shards.
        source: Its name.
        result: What it gave.
        left_out: Grows by what is left out while there is no record; then the manifest will tell.
    """
    for record in result.records:
        key = make_key(record.meta["id"], record.meta["start_seconds"])
        writer.write(key, record.codes, record.features, record.meta)
    for entry in result.left_out:
        writer.leave_out(source, entry["reason"], entry["detail"], entry["start_seconds"])
        if not writer.num_records:
            left_out.append(Left(source, entry["reason"], entry["detail"], entry["start_seconds"]))
    if result.records:
        writer.finish_source(source)


def refuse_lost(writer: ShardWriter, sources: Sources) -> None:
    """What is in shards already must still be asked for.

    Raises:
        UserError: If some of it is not.
    """
    if not writer.num_done:
        return
    listed = sum(writer.is_done(source.name) for source in sources)
    if listed < writer.num_done:
        names = {source.name for source in sources}
        lost = sorted(name for name in writer.committed_sources() if name not in names)
        raise UserError(
            f"{writer.folder} was begun with {len(lost)} inputs that are not listed now ({lost[0]}, ...):"
            " list them again to go on, or give another folder"
        )


class Described(NamedTuple):
    """What tells inputs from others."""

    inputs: np.ndarray
    """(sources,) uint64: a hash of each one's name, start, labels, id and size."""
    versions: np.ndarray
    """(sources,) uint64: a hash of that and of the time when the file was changed last."""
    text: str
    """Stands for all ``inputs`` and says how many there are: the same on every machine, as a time is not."""


def describe(sources: Sources, sizes: np.ndarray, times: np.ndarray) -> Described:
    """What tells inputs from others; sizes and times as ``file_facts`` gives them."""
    digest, inputs, versions = (
        hashlib.sha256(b"["),
        np.empty(len(sources), np.uint64),
        np.empty(len(sources), np.uint64),
    )
    for number, (source, size, time_ns) in enumerate(zip(sources, sizes.tolist(), times.tolist(), strict=True)):
        row = [source.name, source.start, source.labels, size if size >= 0 else None]
        text = json.dumps([*row, source.given_id] if source.given_id else row)
        digest.update(f"{', ' if number else ''}{text}".encode())
        inputs[number], versions[number] = text_hash(text), text_hash(f"{text} {time_ns}")
    digest.update(b"]")
    return Described(inputs, versions, f"{len(sources)} sha256:{digest.hexdigest()}")


def fingerprint(sources: Sources, sizes: np.ndarray, times: np.ndarray, unread: np.ndarray) -> str:
    """What stands for all inputs, whatever the sizes are of those that could not be read, which may change.

    Args:
        sources: The inputs.
        sizes: As ``file_facts`` gives them.
        times: Likewise.
        unread: (sources,) bool, which are left out for a reason that may be gone.
    """
    return describe(sources, np.where(unread, MISSING, sizes), times).text


def file_facts(sources: Sources) -> tuple[np.ndarray, np.ndarray]:
    """(sources,) int64: bytes of each file, or `MISSING`; and when it was changed last, ns, 0 where that is not known.

    Many are asked for at once, for the sake of slow disks.
    """

    def facts(source: Source) -> tuple[int, int]:
        try:
            found = os.stat(f"{source.root}/{source.file}" if not source.file.startswith("/") else source.file)
        except FileNotFoundError:
            return MISSING, 0
        except OSError:
            return _UNKNOWN, 0  # decoding it will say why
        return found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(16) as threads:
        starts = range(0, len(sources), 4096)
        parts = threads.map(lambda start: [facts(source) for source in sources[start : start + 4096]], starts)
        both = np.fromiter((one for part in parts for one in part), np.dtype((np.int64, 2)), len(sources))
        return both[:, 0], both[:, 1]
