"""Ready codes and features to shards: what others have extracted, without extracting it again.

Arrays of a recording are paired by its name, brought to one layout, and cut into segments as ``vab extract`` cuts
media. No network runs, so two things differ from an extraction. Codes are cut where they are, not encoded anew from a
segment's own waveform. And steps after the end of a recording repeat its last codes, as nobody has encoded the silence
that would be there: they are padding, which a record's valid length tells.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vab.data.extract.cutting import GRACE
from vab.data.extract.parts import Watch
from vab.data.extract.report import (
    ExtractionReport,
    finished_before,
    nothing_made,
    refuse_foreign_report,
    report_of,
    write_report,
)
from vab.data.inputs.listing import Source, Sources
from vab.data.media.segments import SAME_TIME, frame_times
from vab.data.shards.arrays import ArrayError, Arrays
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import Left, is_complete, library_versions, make_key
from vab.data.shards.identity import VisionFacts
from vab.data.shards.layouts import ArrayReader, Cut
from vab.data.shards.writer import ShardWriter
from vab.spec import SegmentSpec, UserError

_THREADS = 8
"""That read ahead, for the sake of slow disks."""
_TOLD_EVERY = 50
"""Recordings from one report of the progress to the next."""


class Record(NamedTuple):
    """A segment as it goes into a shard."""

    meta: dict[str, Any]
    """As ``ShardWriter.write`` takes it."""
    codes: np.ndarray
    """(K, T) uint16."""
    features: np.ndarray
    """(V, C) float16."""


class Result(NamedTuple):
    """What a recording gives: records; or no record, and the reason."""

    records: list[Record]
    """In order of time."""
    left_out: list[dict[str, Any]]
    """``reason``, ``detail`` and ``start_seconds``, the latter None for the whole recording."""
    seconds: float = 0.0
    """Of sound in the records."""


def import_arrays(
    sources: Sources,
    reader: ArrayReader,
    out: Path,
    vision: VisionFacts,
    labels: Sequence[str] | None = None,
    records_per_shard: int = 4096,
    watch: Watch = lambda done, here, seconds: None,
) -> ExtractionReport:
    """What ``vab shards import`` does once everything is known.

    Interrupted, it goes on after the last whole shard; the shards are the same. A few recordings are in memory at a
    time, those that are read ahead.

    Args:
        sources: From ``sources_of``.
        reader: Of their arrays.
        out: Folder of the shards.
        vision: What made the features.
        labels: The vocabulary, if it is not the labels that occur.
        records_per_shard: Records per tar.
        watch: Is told of the progress.

    Returns:
        What became of every recording; ``report.json`` says the same.

    Raises:
        UserError: If a number makes no sense, the folder was begun with other settings or other recordings, the disk is
            full, or not one record could be made.
    """
    reader.cut.check()
    if reader.cut.segments == "all" and reader.cut.hop_seconds * reader.codec.code_rate < 1:
        raise UserError(
            f"--hop_seconds must be a step of the codes or more, {1 / reader.codec.code_rate:g} s, got"
            f" {reader.cut.hop_seconds:g}: two segments would start at one step"
        )
    if not is_complete(out):
        refuse_foreign_report(OutFolder(out))
    problems = reader.find_axes(source.id for source in sources)
    if reader.axes is None:
        if is_complete(out):
            raise UserError(
                f"{out} already holds a finished data set, and none of these recordings is whole ({problems[0]})"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}; give another folder") from error
        lost = zip(sources, problems, strict=True)
        raise nothing_made(
            OutFolder(out), sources, [Left(source.name, error.reason, error.detail) for source, error in lost]
        )
    spec = _spec(reader, vision)
    head = _head(sources, reader, spec, vision, labels)
    inputs = _fingerprint(sources, reader)
    if is_complete(out):
        return finished_before(OutFolder(out), head, sources, inputs)
    with ShardWriter(out, spec, head["labels"], records_per_shard, head["extraction"]) as writer:
        _refuse_lost(writer, sources)
        left_out: list[Left] = []
        seconds, before, here = 0.0, writer.num_done, 0
        waiting = (source for source in sources if not writer.is_done(source.name))
        for source, result in _ahead(lambda source: _result(source, reader, spec), waiting):
            _write_result(writer, source.name, result, left_out)
            seconds, here = seconds + result.seconds, here + 1
            if here % _TOLD_EVERY == 0:
                watch(before + here, here, seconds)
        if not writer.num_records:
            raise nothing_made(OutFolder(out), sources, left_out)
        uses_hdf5 = any(arrays.uses_hdf5 for arrays in (reader.codes, reader.features) if arrays is not None)
        versions = library_versions() | ({"h5py": version("h5py")} if uses_hdf5 else {})
        names = (source.name for source in sources)
        manifest = writer.finish(reader.codec.codebooks, inputs, {"versions": versions}, names)
    report = report_of(OutFolder(out), manifest)
    assert report.inputs == len(sources), f"{report.inputs} recordings accounted for, {len(sources)} were given"
    write_report(report)
    watch(len(sources), here, seconds)
    return report


def _write_result(writer: ShardWriter, source: str, result: Result, left_out: list[Left]) -> None:
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


def _refuse_lost(writer: ShardWriter, sources: Sources) -> None:
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


def sources_of(codes: Arrays, features: Arrays | None, listed: Sources | None) -> Sources:
    """All recordings that are there, or those of a list, sorted by id.

    Raises:
        UserError: If no recording has both codes and features, or no listed recording has codes.
    """
    if features is not None and not any(name in features for name in codes):
        first, other = next(iter(codes)), next(iter(features))
        raise UserError(
            f"no recording has both codes and features: {codes.place} has such as {first!r}, {features.place} such as "
            f"{other!r}; they are known by a file's path without the suffix, or by a dataset's path"
        )
    if listed is not None and not any(source.id in codes for source in listed):
        raise UserError(
            f"none of the {len(listed)} recordings that are listed has codes, such as {listed[0].id!r}; {codes.place}"
            f" has such as {next(iter(codes))!r}"
        )
    sources = Sources("")
    if listed is None:
        for name in sorted({*codes, *(() if features is None else features)}):
            sources.add(name, given_id=name)
    else:
        for source in sorted(listed, key=lambda source: source.id):
            sources.add(source.file, None, source.labels, source.id)
    return sources


def _result(source: Source, reader: ArrayReader, spec: SegmentSpec) -> Result:
    """The records of a recording, or why it has none."""
    try:
        codes, features = reader.read(source.id)
        records = list(_segments(source, codes, features, reader.cut, spec))
    except ArrayError as error:
        return Result([], [{"start_seconds": None, "reason": error.reason, "detail": error.detail}])
    return Result(records, [], sum(record.meta["steps"] for record in records) / spec.code_rate)


def _segments(
    source: Source, codes: np.ndarray, features: np.ndarray | None, cut: Cut, spec: SegmentSpec
) -> Iterator[Record]:
    """Cut a recording.

    Features are taken for a video of ``source_fps`` frames per second, and of this, as in extraction, what is shown in
    the middle of each frame wanted.
    """
    sound_end = codes.shape[1] / spec.code_rate
    video_end = float("inf") if features is None else len(features) / cut.source_fps
    end = min(sound_end, video_end)
    if end < cut.min_seconds - GRACE:
        raise ArrayError("too_short", f"its arrays last {end:.2f} s, at least {cut.min_seconds:g} s needed")
    for wanted in cut.starts(end):
        place = wanted * spec.code_rate
        first = min(round(place), codes.shape[1] - 1)
        if first > place and codes.shape[1] - first == spec.num_steps - 1:
            first -= 1  # rates of no whole steps in a segment: rounding up would leave the last segment a step short
        start = first / spec.code_rate  # s, where the codes really begin
        part = codes[:, first : first + spec.num_steps]
        steps, frames = part.shape[1], 0
        taken = np.zeros((spec.num_frames, spec.feature_dim), np.float16)
        if features is not None:
            times = frame_times(spec.video_fps, start, spec.num_frames)
            frames = int((times < video_end - SAME_TIME).sum())
            if not frames and wanted > 0:
                return  # a last segment that is less than half a frame long
            if not frames:
                raise ArrayError("too_short", f"its features end at {video_end:.2f} s, before the first frame wanted")
            places = np.floor(times * cut.source_fps + SAME_TIME).astype(np.int64)
            # After the end its last picture, as in extraction.
            taken = features[np.minimum(places, min(places[frames - 1], len(features) - 1))]
        meta = {
            "id": source.id,
            "source": source.name,
            "start_seconds": start,
            "labels": list(source.labels),
            "steps": steps,
            "frames": frames,
        }
        yield Record(meta, np.pad(part, ((0, 0), (0, spec.num_steps - steps)), mode="edge"), taken)


def _spec(reader: ArrayReader, vision: VisionFacts) -> SegmentSpec:
    codec, cut = reader.codec, reader.cut
    assert reader.axes is not None
    return SegmentSpec(
        segment_seconds=cut.segment_seconds,
        sample_rate=codec.sample_rate,
        code_rate=codec.code_rate,
        num_codebooks=reader.levels,
        codebook_size=reader.size,
        code_dim=codec.codebooks.shape[2],
        num_steps=codec.steps_for(cut.segment_seconds),
        video_fps=cut.video_fps,
        num_frames=round(cut.segment_seconds * cut.video_fps),
        feature_dim=reader.axes.feature_dim,
        codec=codec.name,
        codec_hash=codec.weight_hash,
        vision=vision.name,
        vision_hash=vision.weight_hash,
    )


def _head(
    sources: Sources, reader: ArrayReader, spec: SegmentSpec, vision: VisionFacts, labels: Sequence[str] | None
) -> dict[str, Any]:
    """What must be the same for an import to go on: spec, label vocabulary and the rules that go to the manifest."""
    cut, axes = reader.cut, reader.axes
    assert axes is not None
    imported = {"codes": f"{('(T, K)', '(K, T)')[axes.codes]}, {reader.codes.form}"}
    if reader.features is not None and axes.features is not None:
        imported["features"] = f"{('(V, C)', '(C, V)')[axes.features]}, {reader.features.form}"
    names = {source.id for source in sources}
    not_listed = sum(name not in names for name in reader.codes)
    return {
        "spec": spec.to_dict(),
        "labels": list(labels or sorted(sources.labels)),
        "extraction": {
            "imported": imported,
            "segments": cut.segments,
            "hop_seconds": cut.hop_seconds,
            "min_seconds": cut.min_seconds,
            "max_difference_seconds": cut.max_difference_seconds,
            "source_video_fps": cut.source_fps,
            "vision_preprocessing": vision.preprocessing,
            **({"without_video": "keep"} if cut.without_video == "keep" else {}),
            **({"not_listed": not_listed} if not_listed else {}),
        },
    }


def _fingerprint(sources: Sources, reader: ArrayReader) -> str:
    """Tells one list of inputs from another: how many, and a hash of their names, labels and sizes."""
    ids = [source.id for source in sources]
    codes = reader.codes.sizes(ids)
    features: Sequence[int | None] = [None] * len(ids) if reader.features is None else reader.features.sizes(ids)
    digest = hashlib.sha256()
    for source, *sizes in zip(sources, codes, features, strict=True):
        digest.update(f"{json.dumps((source.name, source.id, source.labels, *sizes))}\n".encode())
    return f"{len(sources)} sha256:{digest.hexdigest()}"


def _ahead(function: Callable[[Source], Result], sources: Iterable[Source]) -> Iterator[tuple[Source, Result]]:
    """Each recording with its result, in order, while threads are at work on the next few."""
    waiting: deque[tuple[Source, Future[Result]]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for source in sources:
            waiting.append((source, threads.submit(function, source)))
            if len(waiting) > 2 * _THREADS:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
