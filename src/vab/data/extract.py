"""Media files to shards: decode in worker processes, encode with the frozen networks, write records in order.

Ranks take files from one list, each whenever it has a worker free. What a rank finishes goes to its log
(``vab.data.results``); rank 0 puts it into shards in the order of the list. Records and shards are therefore the same,
bit for bit, whatever the ranks and workers, and whether or not the run was interrupted; a kill at any moment costs the
files in flight and nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vab.data.decoding_pool import Cutting, DecodingPool, Ended, Item, Job, LeftOut, Segment
from vab.data.format import Left, is_complete, json_lines, make_key, read_manifest, write_atomically
from vab.data.results import Place, Record, Result, ResultLog, Results, head_differences, source_hash
from vab.data.shards import ShardWriter
from vab.data.sources import Source, Sources
from vab.frozen.codec import Codec
from vab.frozen.vision import VisionEncoder
from vab.ranks import Ranks
from vab.spec import SegmentSpec, UserError

REPORT = "report.json"
_PARTIAL = "extraction.partial"
_POLL_SECONDS = 0.5
"""How often rank 0 looks for what the other ranks have finished."""
_MISSING, _UNKNOWN = -1, -2
"""Sizes of files that are not there, or whose size the system does not tell."""
LEFT_OUT_STATUS = 3
"""Exit status of an extraction that is finished but for inputs that are left out."""

Watch = Callable[[int, int, float], None]
"""Is told, now and then, how many inputs are done, how many of these by this run, and their hours of sound in s."""


@dataclass(frozen=True)
class ExtractionReport:
    """What became of every input; ``report.json`` in the folder holds the same."""

    folder: str
    """Where the shards are."""
    inputs: int
    """Files (or rows of the CSV) that were asked for."""
    kept: int
    """Inputs with at least one record. ``inputs`` is this plus the inputs left out whole."""
    records: int
    """Segments in the shards."""
    left_out: list[Left]
    """Whole inputs, and single segments of inputs that are kept otherwise."""
    already_finished: bool = False
    """True if the folder was complete before, and nothing was done."""
    hours: float = 0.0
    """Of sound in the shards."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Inputs that are kept although they have the very bytes (and the start) of another one, and that one."""

    @property
    def reasons(self) -> dict[str, int]:
        """How many inputs were left out whole, by reason."""
        return dict(Counter(entry.reason for entry in self.left_out if entry.start_seconds is None))

    @property
    def exit_status(self) -> int:
        """0 if every input is in the shards whole, else ``LEFT_OUT_STATUS``."""
        return LEFT_OUT_STATUS if self.left_out else 0

    def __str__(self) -> str:
        lost = self.inputs - self.kept
        hours = f", {self.hours:.2f} h of sound" if self.hours else ""
        lines = [
            f"{self.folder}: {self.records} records of {self.kept} inputs{hours}",
            f"{lost} of {self.inputs} inputs left out" + (":" if lost else ""),
        ]
        for reason, count in sorted(self.reasons.items()):
            names = (left.source for left in self.left_out if left.reason == reason and left.start_seconds is None)
            some = itertools.islice(names, _NAMED)
            lines.append(f"  {count} {reason}: {', '.join(some)}{', ...' if count > _NAMED else ''}")
        segments = Counter(entry.reason for entry in self.left_out if entry.start_seconds is not None)
        if segments:
            words = ", ".join(f"{count} {reason}" for reason, count in sorted(segments.items()))
            lines.append(f"{segments.total()} single segments left out: {words}")
        if self.duplicates:
            lines.append(f"{len(self.duplicates)} inputs are kept that have the very bytes of another one")
        if self.left_out or self.duplicates:
            lines.append(f"each with its reason in {Path(self.folder) / REPORT}")
        return "\n".join([*lines, "it was finished before: nothing to do"] if self.already_finished else lines)


_NAMED = 3
"""Inputs that the printed report names of each reason; the file names all."""


@dataclass(frozen=True)
class Encoders:
    """The two frozen networks of an extraction."""

    codec: Codec
    """Sound to codes."""
    vision: VisionEncoder
    """Frames to features."""
    device: torch.device
    """Where both are."""

    def spec(self, segment_seconds: float, video_fps: float) -> SegmentSpec:
        """The numbers of segments of this length."""
        return SegmentSpec(
            segment_seconds=segment_seconds,
            sample_rate=self.codec.sample_rate,
            code_rate=self.codec.code_rate,
            num_codebooks=self.codec.num_codebooks,
            codebook_size=self.codec.codebook_size,
            code_dim=self.codec.code_dim,
            num_steps=self.codec.steps_for(round(segment_seconds * self.codec.sample_rate)),
            video_fps=video_fps,
            num_frames=round(segment_seconds * video_fps),
            feature_dim=self.vision.feature_dim,
            codec=self.codec.name,
            codec_hash=self.codec.weight_hash,
            vision=self.vision.name,
            vision_hash=self.vision.weight_hash,
        )

    @torch.inference_mode()
    def encode(self, segments: Sequence[Segment], num_frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Codes (K, T) uint16 and features (V, C) float16 of each segment; all waveforms have one length.

        A segment without video has features of zeros, ``num_frames`` of them.

        Frames go segment by segment and a codec's codes do not depend on the batch, so which segments come together,
        which differs after a resume, leaves no trace.
        """
        waveform = torch.from_numpy(np.stack([segment.waveform for segment in segments]))[:, None]  # (B, 1, N)
        codes = self.codec.encode(waveform.to(self.device), self.codec.sample_rate).cpu().numpy().astype(np.uint16)
        return [(own, self._features(segment, num_frames)) for own, segment in zip(codes, segments, strict=True)]

    def _features(self, segment: Segment, num_frames: int) -> np.ndarray:
        """(V, C) float16; after the video's end those of its last picture."""
        if not segment.valid_frames:
            return np.zeros((num_frames, self.vision.feature_dim), np.float16)
        seen = self.vision.encode(torch.from_numpy(segment.pixels).to(self.device)).cpu().numpy().astype(np.float16)
        return np.concatenate([seen, np.repeat(seen[-1:], num_frames - len(seen), axis=0)])


@dataclass(frozen=True)
class Settings:
    """What of an extraction has no effect on the records, but for the last two."""

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


def extract_sources(
    sources: Sources,
    out: Path,
    encoders: Encoders,
    cutting: Cutting,
    settings: Settings,
    labels: Sequence[str] | None = None,
    ranks: Ranks | None = None,
    watch: Watch = lambda done, here, seconds: None,
) -> ExtractionReport | None:
    """What ``vab extract`` does once everything is loaded; called by all ranks with the same inputs.

    Args:
        sources: From ``find_sources``.
        out: Folder of the shards.
        encoders: The frozen networks, on this rank's device.
        cutting: How files become segments; its rate is the codec's.
        settings: How the work is done.
        labels: The vocabulary, if it is not the labels that occur.
        ranks: This process among others, if there are others.
        watch: Is told of the progress.

    Returns:
        The report; None on other ranks than 0.

    Raises:
        UserError: If the folder was begun with other settings or other inputs, the disk is full, or not one record
            could be made.
    """
    ranks = ranks or Ranks(0, 1, str(encoders.device))
    head = _head(sources, encoders, cutting, labels, settings)
    lists = ranks.gather(_list_hash(sources))
    collector: _Collector | None = None
    report: ExtractionReport | None = None
    error: UserError | None = None
    try:
        if ranks.rank == 0 and len(set(lists)) > 1:
            raise UserError("the inputs changed while the processes started: run it again")
        if ranks.rank == 0 and is_complete(out):
            report = _finished_before(out, sources, head)
        elif ranks.rank == 0:
            collector = _Collector(sources, out, head, settings, ranks, watch)
    except UserError as problem:
        error = problem
    try:
        ranks.agree(error)
        plan = ranks.broadcast(None if collector is None else collector.plan)
        if plan is None:
            return report
        count = ranks.counter()
        with ResultLog(out / _PARTIAL, plan.run, ranks.rank) as log:
            _Work(sources, plan, encoders, cutting, settings, log, collector).run(_numbers(count, plan))
        if collector is not None:
            while not collector.is_finished:
                time.sleep(_POLL_SECONDS if ranks.world_size > 1 else 0.0)
                collector.collect()
            report = collector.finish(encoders.codec.codebooks())
        ranks.gather(None)  # nobody leaves before the last shard is there
        return report
    finally:
        if collector is not None:
            collector.close()


@dataclass(frozen=True)
class _Plan:
    """What all ranks must know of a run."""

    run: int
    """Its number."""
    to_decode: np.ndarray
    """(n,) int32: numbers of the sources that are to be decoded, in order."""
    wants_digest: np.ndarray
    """(n,) bool: whether another input has the file's size, so that they may be the same."""


def _numbers(count: Callable[[], int], plan: _Plan) -> Iterator[int]:
    """This rank's share of the plan: the next entry that no rank has taken."""
    while (number := count()) < len(plan.to_decode):
        yield number


class _Open:
    """A source on its way: what is decoded of it, some of it encoded."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.items: list[Segment | LeftOut | Record] = []
        self.ended: Ended | None = None

    def result(self, sample_rate: int) -> Result | None:
        """None while something is missing."""
        if self.ended is None or any(isinstance(item, Segment) for item in self.items):
            return None
        records = [item for item in self.items if isinstance(item, Record)]
        left_out: list[dict[str, Any]] = [
            {"start_seconds": item.start, "reason": item.reason, "detail": item.detail}
            for item in self.items
            if isinstance(item, LeftOut)
        ]
        whole = [entry for entry in left_out if entry["start_seconds"] is None]
        if whole or not records:
            # A file that broke the decoder half-way is left out whole; so is one of which no segment is usable.
            first: dict[str, Any] = (whole or left_out)[0] | {"start_seconds": None}
            if len(left_out) > 1 and not whole:
                first["detail"] += f" (the first of {len(left_out)} segments, none of which is usable)"
            records, left_out = [], [first]
        seconds = sum(record.meta["samples"] for record in records) / sample_rate
        for record in records:
            del record.meta["samples"]
        return Result(records, left_out, seconds, self.ended.digest)


class _Work:
    """One rank's part: decodes, encodes in batches of whatever segments come, and logs each source once finished."""

    def __init__(
        self,
        sources: Sources,
        plan: _Plan,
        encoders: Encoders,
        cutting: Cutting,
        settings: Settings,
        log: ResultLog,
        collector: _Collector | None,
    ) -> None:
        self.sources, self.plan, self.encoders, self.cutting = sources, plan, encoders, cutting
        self.settings, self.log, self.collector = settings, log, collector
        self.num_frames = round(cutting.segment_seconds * cutting.video_fps)
        self._open: dict[int, _Open] = {}
        self._batch: list[tuple[int, int, Segment]] = []  # a source, the number among its items, and the segment

    def run(self, numbers: Iterable[int]) -> None:
        """Do all of these entries of the plan."""
        pool = DecodingPool(self.cutting, self.settings.num_workers, self.settings.file_timeout)
        items = pool.run(self._job(number) for number in numbers)
        try:
            for number, item in items:
                self._take(number, item)
            self._encode()
        finally:
            items.close()

    def _job(self, number: int) -> Job:
        source = self.sources[self.plan.to_decode[number]]
        return Job(number, source.path, source.start, bool(self.plan.wants_digest[number]))

    def _take(self, number: int, item: Item) -> None:
        work = self._open.setdefault(number, _Open(self.sources[self.plan.to_decode[number]]))
        if isinstance(item, Ended):
            work.ended = item
            self._hand_on(number)
        else:
            work.items.append(item)
            if isinstance(item, Segment):
                self._batch.append((number, len(work.items) - 1, item))
        if len(self._batch) >= self.settings.batch_size:
            self._encode()
        if self.collector is not None:
            self.collector.collect_sometimes()

    def _encode(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        encoded = self.encoders.encode([segment for _, _, segment in batch], self.num_frames)
        for (number, place, segment), (codes, features) in zip(batch, encoded, strict=True):
            work = self._open[number]
            meta = {
                "id": work.source.id,
                "source": work.source.name,
                "start_seconds": segment.start,
                "labels": list(work.source.labels),
                "steps": min(self.encoders.codec.steps_for(segment.valid_samples), codes.shape[1]),
                "frames": segment.valid_frames,
                "loudness_db": round(segment.loudness_db, 2),
                "samples": segment.valid_samples,
            }
            work.items[place] = Record(meta, codes, features)  # the decoded segment, which is large, is let go
        for number in {number for number, _, _ in batch}:
            self._hand_on(number)

    def _hand_on(self, number: int) -> None:
        work = self._open[number]
        if (result := work.result(self.cutting.sample_rate)) is not None:
            del self._open[number]
            where = self.log.add(work.source.name, result)
            if self.collector is not None:
                self.collector.add(int(self.plan.to_decode[number]), *where)


class _Collector:
    """Rank 0's part: knows what is finished by whom, and writes it into shards in the order of the sources."""

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
        self.sizes = _sizes(sources)
        if not (self.sizes != _MISSING).any():
            raise UserError(
                f"none of {len(sources)} inputs is there, such as {sources[0].path}: give --media_root, the folder that"
                " the files of a CSV are in"
            )
        self.writer = ShardWriter(out, spec, head["labels"], settings.records_per_shard, head["extraction"])
        try:
            self.results = Results(out / _PARTIAL, head)
            self._refuse_lost()
            is_open = np.fromiter((not self.writer.is_done(source.name) for source in sources), bool, len(sources))
        except BaseException:
            self.writer.close()
            raise
        self._order = np.flatnonzero(is_open).astype(np.int32)  # sources that no committed shard accounts for
        self._next = 0  # in that order
        self._logs = np.full(len(sources), -1, np.int32)  # where each source's result is
        self._offsets = np.zeros(len(sources), np.int64)
        self._uncommitted: list[Place] = []
        self._last_look = 0.0
        self._seconds, self._begun = 0.0, 0
        hashes = np.fromiter((source_hash(source.name) for source in sources), np.uint64, len(sources))
        self._by_hash = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._by_hash]
        self._look()
        waits = is_open & (self._logs < 0) & (self.sizes != _MISSING)
        to_decode = np.flatnonzero(waits).astype(np.int32)
        self.plan = _Plan(self.results.run, to_decode, self._shares_size()[to_decode])
        self._done_before, self._begun = len(sources) - len(to_decode), 0

    def _refuse_lost(self) -> None:
        """What is in shards already must still be asked for."""
        if not self.writer.num_done:
            return
        listed = sum(self.writer.is_done(source.name) for source in self.sources)
        if listed < self.writer.num_done:
            names = {source.name for source in self.sources}
            lost = sorted(name for name in self.writer.committed_sources() if name not in names)
            raise UserError(
                f"{self.out} was begun with {len(lost)} inputs that are not listed now ({lost[0]}, ...):"
                " list them again to go on, or give another folder"
            )

    def _shares_size(self) -> np.ndarray:
        """(sources,) bool: whether another file is as large, so that the two may be the same."""
        _, inverse, counts = np.unique(self.sizes, return_inverse=True, return_counts=True)
        shares: np.ndarray = (counts[inverse] > 1) & (self.sizes > 0)
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
            if self.sizes[number] == _MISSING:
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
        name = source.name
        result = self._without_duplicate(source, result)
        for record in result.records:
            key = make_key(record.meta["id"], record.meta["start_seconds"])
            self.writer.write(key, record.codes, record.features, record.meta)
        for entry in result.left_out:
            self.writer.leave_out(name, entry["reason"], entry["detail"], entry["start_seconds"])
            if not self.writer.num_records:  # else the manifest will tell
                self.left_out.append(Left(name, entry["reason"], entry["detail"], entry["start_seconds"]))
        if result.records:
            self.writer.finish_source(name)
        self._seconds += result.seconds

    def _without_duplicate(self, source: Source, result: Result) -> Result:
        """The result; or that it is left out, as the same bytes were kept before."""
        if not result.records or result.digest is None:
            return result
        own = source_hash(source.name)
        first = self.results.first_of(result.digest, source.start, own)
        if first is None or not self.settings.leaves_out_duplicates:
            self.results.keep(result.digest, source.start, own)
            return result
        other = self.sources[self._number_of(first)]
        labels = "" if other.labels == source.labels else f", whose labels are {', '.join(other.labels) or 'none'}"
        detail = f"has the very bytes of {other.name}{labels}"
        return Result([], [{"start_seconds": None, "reason": "duplicate", "detail": detail}])

    def _number_of(self, source: int) -> int:
        """Of the source of a hash; -1 if it is not listed."""
        at = int(np.searchsorted(self._hashes, np.uint64(source)))
        return int(self._by_hash[at]) if at < len(self._hashes) and int(self._hashes[at]) == source else -1

    def finish(self, codebooks: torch.Tensor) -> ExtractionReport:
        """All sources are written: index, manifest and report.

        Raises:
            UserError: If there is not one record.
        """
        total = len(self.sources)
        if not self.writer.num_records:
            self.results.delete()  # so that mended files are looked at again
            report = ExtractionReport(str(self.out), total, 0, 0, self.left_out)
            _write_report(report)
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.reasons.items()))
            raise UserError(f"not one of {total} inputs gave a record ({reasons}): see {self.out / REPORT} for each")
        pairs = self.results.duplicates.items()
        named = {self.sources[self._number_of(own)].name: self.sources[self._number_of(of)].name for own, of in pairs}
        inputs = _fingerprint(self.sources, self.sizes)
        manifest = self.writer.finish(codebooks, inputs, {"duplicates": named} if named else {})
        self.results.delete()
        report = _report(self.out, manifest)
        assert report.inputs == total, f"{report.inputs} inputs accounted for, {total} were given"
        _write_report(report)
        self.watch(total, self._begun, self._seconds)
        return report

    def close(self) -> None:
        """Let other processes write to the folder. Harmless after ``finish``."""
        self.results.close()
        self.writer.close()


def _head(
    sources: Sources,
    encoders: Encoders,
    cutting: Cutting,
    labels: Sequence[str] | None,
    settings: Settings,
) -> dict[str, Any]:
    """What must be the same for a run to go on: spec, label vocabulary and the rules that go to the manifest."""
    return {
        "spec": encoders.spec(cutting.segment_seconds, cutting.video_fps).to_dict(),
        "labels": list(labels or sorted(sources.labels)),
        "extraction": {
            "segments": cutting.segments,
            "hop_seconds": cutting.hop_seconds,
            "min_seconds": cutting.min_seconds,
            "silence_db": cutting.silence_db,
            "still_pictures": cutting.still_pictures,
            "vision_preprocessing": encoders.vision.preprocessing,
            "channels": "mean of all",
            "resampler": "soxr HQ",
            "encoder_precision": "float32",
            # Not where it is as it always was: data sets from before the choice are what they were.
            **({"without_video": "keep"} if cutting.without_video == "keep" else {}),
            **({"duplicates": "leave_out"} if settings.leaves_out_duplicates else {}),
        },
    }


def _list_hash(sources: Sources) -> str:
    """Tells one list of inputs from another."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.root}\0{source.name}\0{source.labels}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _fingerprint(sources: Sources, sizes: np.ndarray) -> str:
    """Tells one list of inputs from another: how many, and a hash of their names, starts, labels and sizes."""
    digest = hashlib.sha256(b"[")
    for number, (source, size) in enumerate(zip(sources, sizes.tolist(), strict=True)):
        row = (source.name, source.start, source.labels, size if size >= 0 else None)
        digest.update(f"{', ' if number else ''}{json.dumps(row)}".encode())
    digest.update(b"]")
    return f"{len(sources)} sha256:{digest.hexdigest()}"


def _sizes(sources: Sources) -> np.ndarray:
    """(sources,) int64: bytes of each file, or `_MISSING`; many are asked for at once, for the sake of slow disks."""

    def size(source: Source) -> int:
        try:
            return os.stat(f"{source.root}/{source.file}" if not source.file.startswith("/") else source.file).st_size
        except FileNotFoundError:
            return _MISSING
        except OSError:
            return _UNKNOWN  # decoding it will say why

    with ThreadPoolExecutor(16) as threads:
        starts = range(0, len(sources), 4096)
        parts = threads.map(lambda start: [size(source) for source in sources[start : start + 4096]], starts)
        return np.fromiter((one for part in parts for one in part), np.int64, len(sources))


def _finished_before(out: Path, sources: Sources, head: dict[str, Any]) -> ExtractionReport:
    """The report of a folder that is complete, unless it is not what was asked for now."""
    manifest, _ = read_manifest(out)
    asked = json.loads(json.dumps(head))
    asked["extraction"]["inputs"] = _fingerprint(sources, _sizes(sources))
    differences = head_differences(manifest, asked)
    if differences:
        raise UserError(
            f"{out} already holds a finished data set, made with other settings ({'; '.join(differences)}):"
            " give another folder, or delete this one"
        )
    if (out / _PARTIAL).is_dir():
        Results(out / _PARTIAL, head).delete()
    report = _report(out, manifest)
    if not (out / REPORT).exists():
        _write_report(report)
    return replace(report, already_finished=True)


def _report(out: Path, manifest: dict[str, Any]) -> ExtractionReport:
    left_out = [entry if isinstance(entry, Left) else Left.of(entry) for entry in manifest["left_out"]]
    counts = manifest["counts"]
    whole = sum(entry.start_seconds is None for entry in left_out)
    steps = np.load(out / "index.npy", mmap_mode="r", allow_pickle=False)["steps"].sum(dtype=np.int64)
    hours = round(float(steps) / manifest["spec"]["code_rate"] / 3600, 3)
    kept = counts["sources"] - whole
    return ExtractionReport(
        str(out), counts["sources"], kept, counts["records"], left_out, False, hours, manifest.get("duplicates", {})
    )


def _write_report(report: ExtractionReport) -> None:
    names = ("folder", "inputs", "kept", "records", "hours", "duplicates", "left_out")
    values = {name: getattr(report, name) for name in names}
    write_atomically(Path(report.folder) / REPORT, json_lines({"reasons": report.reasons, **values}, "left_out"))


def check_numbers(cutting: Cutting, num_workers: int, batch_size: int, file_timeout: float) -> None:
    """Refuse settings that make no sense.

    Raises:
        UserError: Saying which.
    """
    for name in ("segment_seconds", "video_fps", "hop_seconds", "min_seconds"):
        if not 0 < getattr(cutting, name) < float("inf"):
            raise UserError(f"{name} must be above 0, got {getattr(cutting, name)}")
    for name, value, least in (("num_workers", num_workers, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise UserError(f"{name} must be {least} or more, got {value}")
    if not file_timeout > 0:
        raise UserError(f"file_timeout must be above 0, got {file_timeout}")
    if cutting.min_seconds > cutting.segment_seconds:
        raise UserError(
            f"min_seconds ({cutting.min_seconds:g}) is longer than a segment ({cutting.segment_seconds:g}):"
            " nothing could have that much"
        )
    if round(cutting.segment_seconds * cutting.video_fps) < 1:
        raise UserError(
            f"a segment of {cutting.segment_seconds:g} s has no frame at {cutting.video_fps:g} frames per second"
        )
    for name, allowed in (("segments", ("all", "centre")), ("still_pictures", ("keep", "leave_out"))):
        if getattr(cutting, name) not in allowed:
            raise UserError(f"{name} must be {' or '.join(allowed)}, got {getattr(cutting, name)!r}")
