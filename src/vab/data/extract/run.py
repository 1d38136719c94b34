"""Media files to shards: decode in worker processes, encode with the frozen networks, write records in order.

Ranks take files from one list, each whenever it has a worker free. What a rank finishes goes to its log
(``vab.data.extract.results``); rank 0 puts it into shards in the order of the list. Records and shards are therefore
the same, bit for bit, whatever the ranks and workers, and whether or not the run was interrupted; a kill at any moment
costs the files in flight and nothing else. Devices of one kind are meant: another GPU or processor may round otherwise,
and so may another version of a library, which the manifest tells.

A run tries again what an earlier one could not read (``Left.may_pass``), also in a finished folder. Records of such
inputs come into further shards, behind those that were there, in the order of the list; the earlier shards do not
change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vab.data.extract.collector import (
    MISSING,
    PARTIAL,
    Collector,
    Plan,
    Settings,
    Watch,
    describe,
    file_facts,
    fingerprint,
)
from vab.data.extract.cutting import Cutting, LeftOut, Segment, check_segments
from vab.data.extract.decoders import Again, DecodingPool, Ended, Item, Job
from vab.data.extract.encode import Encoders
from vab.data.extract.report import ExtractionReport, finished_before
from vab.data.extract.results import HEAD, Record, Result, ResultLog, Results
from vab.data.inputs.listing import Source, Sources
from vab.data.shards.format import MANIFEST, Left, is_complete, read_manifest
from vab.ranks import Ranks
from vab.spec import UserError


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
    collector: Collector | None = None
    report: ExtractionReport | None = None
    error: UserError | None = None
    again, touched = True, []
    try:
        if ranks.rank == 0 and len(set(lists)) > 1:
            raise UserError("the inputs changed while the processes started: run it again")
        if ranks.rank == 0 and is_complete(out):
            report, again = _finished_before(out, sources, head)
            touched = report.touched
        if ranks.rank == 0 and again:
            collector = Collector(sources, out, head, settings, ranks, watch)
    except UserError as problem:
        error = problem
    try:
        ranks.agree(error)
        plan = ranks.broadcast(None if collector is None else collector.plan)
        if plan is None:
            return report
        count = ranks.counter()
        with ResultLog(out / PARTIAL, plan.run, ranks.rank) as log:
            _Work(sources, plan, encoders, cutting, settings, log, collector).run(_numbers(count, plan))
        if collector is not None:
            while not collector.is_finished:
                collector.wait_for_others()
            packages = dict.fromkeys((*encoders.codec.packages, *encoders.vision.packages))
            report = collector.finish(encoders.codec.codebooks(), packages)
            report = replace(report, touched=report.touched or touched)
        ranks.gather(None)  # nobody leaves before the last shard is there
        return report
    finally:
        if collector is not None:
            collector.close()


def _numbers(count: Callable[[], int], plan: Plan) -> Iterator[int]:
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
        plan: Plan,
        encoders: Encoders,
        cutting: Cutting,
        settings: Settings,
        log: ResultLog,
        collector: Collector | None,
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
        if isinstance(item, Again):
            del self._open[number]
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
            where = self.log.add(int(self.plan.inputs[number]), work.source.name, result)
            if self.collector is not None:
                self.collector.add(int(self.plan.to_decode[number]), *where)


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
            "encoder_precision": _precision(encoders),
            # Not where it is as it always was: data sets from before the choice are what they were.
            **({"without_video": "keep"} if cutting.without_video == "keep" else {}),
            **({"duplicates": "leave_out"} if settings.leaves_out_duplicates else {}),
        },
    }


def _precision(encoders: Encoders) -> str:
    """Codecs always compute in float32, as codes are an argmin."""
    vision = encoders.vision.precision
    return vision if vision == "float32" else f"codec float32, vision {vision}"


def _list_hash(sources: Sources) -> str:
    """Tells one list of inputs from another."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.root}\0{source.name}\0{source.labels}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _finished_before(out: Path, sources: Sources, head: dict[str, Any]) -> tuple[ExtractionReport, bool]:
    """The report of a complete folder, unless it is not what was asked for now; and whether to try inputs again.

    They are tried again where some could not be read then and are there now, or where a run that tried them was killed.
    """
    sizes, times = file_facts(sources)
    manifest, _ = read_manifest(out)
    unread = {left.source for left in map(Left.of, manifest["left_out"]) if left.may_pass}
    # Data sets of earlier versions have the sizes of all files in their fingerprint.
    is_unread = np.fromiter((source.name in unread for source in sources), bool, len(sources))
    inputs = (fingerprint(sources, sizes, times, is_unread), describe(sources, sizes, times).text)
    report = finished_before(out, head, sources, *inputs)
    begun = (out / PARTIAL / HEAD).is_file()
    again = bool(unread) and (begun or bool((is_unread & (sizes != MISSING)).any()))
    if begun and not again:
        Results(out / PARTIAL, head).delete()
    newer = np.flatnonzero((times > (out / MANIFEST).stat().st_mtime_ns) & ~is_unread)
    return replace(report, touched=[sources[number].name for number in newer.tolist()]), again


def check_numbers(cutting: Cutting, num_workers: int, batch_size: int, file_timeout: float) -> None:
    """Refuse settings that make no sense.

    Raises:
        UserError: Saying which.
    """
    check_segments(
        cutting.segments, cutting.segment_seconds, cutting.video_fps, cutting.hop_seconds, cutting.min_seconds
    )
    for name, value, least in (("num_workers", num_workers, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise UserError(f"{name} must be {least} or more, got {value}")
    if not file_timeout > 0:
        raise UserError(f"file_timeout must be above 0, got {file_timeout}")
    if not float("-inf") < cutting.silence_db <= 0:
        raise UserError(
            f"silence_db must be a finite number of dBFS, 0 or less (-200 leaves out digital silence alone), got"
            f" {cutting.silence_db}"
        )
    if cutting.still_pictures not in ("keep", "leave_out"):
        raise UserError(f"still_pictures must be keep or leave_out, got {cutting.still_pictures!r}")
