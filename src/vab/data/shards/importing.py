"""Codes and features that others have extracted, imported into shards.

Arrays of a recording are paired by its name, brought to one layout, and cut into segments as ``vab extract`` cuts
media. No network runs, so two things differ from an extraction. Codes are cut as they are, not encoded again from the
waveform of the segment. Steps after the end of a recording repeat its last codes, as there is no code of silence to
use: they are padding, and the record's valid length excludes them.

An array does not say which weights made it. The manifest states the hash that the user gives, or ``NOT_STATED``, which
equals no network's hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from vab.data.media.frames import frame_times
from vab.data.media.tracks import SAME_TIME
from vab.data.shards.arrays import ArrayError, ArrayReader, Arrays, CodecInfo, Cut
from vab.data.shards.folder import OutFolder
from vab.data.shards.format import (
    CODEBOOKS,
    Left,
    is_complete,
    library_versions,
    make_key,
    read_codebooks,
    read_manifest,
)
from vab.data.shards.records import Record
from vab.data.shards.writer import ShardWriter
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.frozen.weight_files.catalogue import CODEC_NUMBERS, CODECS
from vab.spec import NOT_STATED, SegmentSpec, UserError

_THREADS = 8
"""Threads that read ahead, for the sake of slow disks."""
_PROGRESS_EVERY = 50
"""Recordings from one call of ``watch`` to the next."""

_T = TypeVar("_T")


def import_arrays(
    sources: Sources,
    reader: ArrayReader,
    out: Path,
    vision: VisionInfo,
    labels: Sequence[str] | None = None,
    records_per_shard: int = 4096,
    watch: Watch = lambda done, here, seconds: None,
) -> ExtractionReport:
    """Write the records of all recordings to shards.

    If interrupted, the next call resumes after the last finished tar; the shards are the same. A few recordings are in
    memory at a time: those that are read ahead.

    Args:
        sources: From ``sources_of``.
        reader: Of their arrays.
        out: Folder of the shards.
        vision: What made the features.
        labels: The vocabulary, if it is not the labels that occur.
        records_per_shard: Records per tar.
        watch: Called with the progress.

    Returns:
        What became of every recording; ``report.json`` says the same.

    Raises:
        UserError: If a number makes no sense, the folder was begun with other settings or other recordings, the disk is
            full, or not one record could be made.
    """
    reader.cut.check(reader.codec.code_rate)
    is_finished, folder = is_complete(out), OutFolder(out)
    if not is_finished:
        refuse_foreign_report(folder)
    problems = reader.find_axes(source.id for source in sources)
    if not reader.is_ready:
        if is_finished:
            raise UserError(
                f"{out} already holds a finished data set, and none of these recordings can be used ({problems[0]})"
            )
        raise nothing_made(folder, sources, [_left(*pair) for pair in zip(sources, problems, strict=True)])
    spec = _spec(reader, vision)
    head = _head(sources, reader, spec, vision, labels)
    inputs = _fingerprint(sources, reader)
    if is_finished:
        return finished_before(folder, head, sources, inputs)
    with ShardWriter(out, spec, head["labels"], records_per_shard, head["extraction"]) as writer:
        if lost := sorted(writer.done - {source.name for source in sources}):
            raise UserError(
                f"{out} was begun with {len(lost)} inputs that are not listed now ({lost[0]}, ...):"
                " list them again to resume, or give another folder"
            )
        seconds, before, here = 0.0, len(writer.done), 0
        to_do = (source for source in sources if source.name not in writer.done)
        for source, records in _ahead(lambda source: _records(source, reader, spec), to_do):
            if isinstance(records, ArrayError):
                writer.add(source.name, [], [_left(source, records)])
            else:
                writer.add(source.name, records)
                seconds += sum(meta["steps"] for *_, meta in records) / spec.code_rate
            here += 1
            if here % _PROGRESS_EVERY == 0:
                watch(before + here, here, seconds)
        if not writer.num_records:
            raise nothing_made(folder, sources, writer.left_out)
        uses_hdf5 = any(arrays.uses_hdf5 for arrays in (reader.codes, reader.features) if arrays is not None)
        versions = library_versions(("h5py",) if uses_hdf5 else ())
        names = (source.name for source in sources)
        manifest = writer.finish(reader.codec.codebooks, inputs, {"versions": versions}, names)
    report = report_of(folder, manifest)
    assert report.inputs == len(sources), f"{report.inputs} recordings accounted for, {len(sources)} were given"
    write_report(report)
    watch(len(sources), here, seconds)
    return report


def _left(source: Source, error: ArrayError) -> Left:
    return Left(source.name, error.reason, error.detail)


def sources_of(codes: Arrays, features: Arrays | None, listed: Sources | None) -> Sources:
    """All recordings that are there, or those of a list, sorted by id.

    Raises:
        UserError: If no recording has both codes and features, or no listed recording has codes.
    """
    names = codes.suffixes.keys() | ({} if features is None else features.suffixes).keys()
    first = next(iter(codes.suffixes))
    if features is not None and len(names) == len(codes.suffixes) + len(features.suffixes):
        other = next(iter(features.suffixes))
        raise UserError(
            f"no recording has both codes and features: {codes.place} has such as {first!r}, {features.place} such as "
            f"{other!r}; they are known by a file's path without the suffix, or by a dataset's path"
        )
    if listed is not None and not any(source.id in codes.suffixes for source in listed):
        raise UserError(
            f"none of the {len(listed)} recordings that are listed has codes, such as {listed[0].id!r}; {codes.place}"
            f" has such as {first!r}"
        )
    sources = Sources("")
    if listed is None:
        for name in sorted(names):
            sources.add(name, given_id=name)
    else:
        for source in sorted(listed, key=lambda source: source.id):
            sources.add(source.file, None, source.labels, source.id)
    return sources


def _records(source: Source, reader: ArrayReader, spec: SegmentSpec) -> list[Record] | ArrayError:
    """The records of a recording, or why it has none."""
    try:
        return list(_segments(source, *reader.read(source.id), reader.cut, spec))
    except ArrayError as error:
        return error


def _segments(
    source: Source, codes: np.ndarray, features: np.ndarray | None, cut: Cut, spec: SegmentSpec
) -> Iterator[Record]:
    """Cut a recording.

    Features are read as a video of ``source_fps`` frames per second. As in extraction, a frame is the picture that is
    shown in its middle.
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
            # After the end the last picture is repeated, as in extraction.
            taken = features[np.minimum(places, min(places[frames - 1], len(features) - 1))]
        meta = {
            "id": source.id,
            "source": source.name,
            "start_seconds": start,
            "labels": list(source.labels),
            "steps": steps,
            "frames": frames,
        }
        padded = np.pad(part, ((0, 0), (0, spec.num_steps - steps)), mode="edge")
        yield make_key(source.id, start), padded, taken, meta


def _spec(reader: ArrayReader, vision: VisionInfo) -> SegmentSpec:
    codec, cut = reader.codec, reader.cut
    num_codebooks, codebook_size, code_dim = codec.codebooks.shape
    assert reader.feature_dim is not None
    return SegmentSpec(
        segment_seconds=cut.segment_seconds,
        sample_rate=codec.sample_rate,
        code_rate=codec.code_rate,
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
        code_dim=code_dim,
        num_steps=codec.steps_for(cut.segment_seconds),
        video_fps=cut.video_fps,
        num_frames=round(cut.segment_seconds * cut.video_fps),
        feature_dim=reader.feature_dim,
        codec=codec.name,
        codec_hash=codec.weight_hash,
        vision=vision.name,
        vision_hash=vision.weight_hash,
    )


def _head(
    sources: Sources, reader: ArrayReader, spec: SegmentSpec, vision: VisionInfo, labels: Sequence[str] | None
) -> dict[str, Any]:
    """What must be the same for an import to resume: spec, label vocabulary and the rules that go to the manifest."""
    cut = reader.cut
    imported = {"codes": f"{'(K, T)' if reader.codes_axis else '(T, K)'}, {reader.codes.form}"}
    if reader.features is not None:
        imported["features"] = f"{'(C, V)' if reader.features_axis else '(V, C)'}, {reader.features.form}"
    not_listed = len(reader.codes.suffixes.keys() - {source.id for source in sources})
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
    """Fingerprint of a list of inputs: how many, and a hash of their names, labels and sizes."""
    ids = [source.id for source in sources]
    codes = reader.codes.sizes(ids)
    features: Sequence[int | None] = [None] * len(ids) if reader.features is None else reader.features.sizes(ids)
    digest = hashlib.sha256()
    for source, *sizes in zip(sources, codes, features, strict=True):
        digest.update(f"{json.dumps((source.name, source.id, source.labels, *sizes))}\n".encode())
    return f"{len(sources)} sha256:{digest.hexdigest()}"


def _ahead(function: Callable[[Source], _T], sources: Iterable[Source]) -> Iterator[tuple[Source, _T]]:
    """Each recording with its result, in order; threads work on the next few meanwhile."""
    waiting: deque[tuple[Source, Future[_T]]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for source in sources:
            waiting.append((source, threads.submit(function, source)))
            if len(waiting) > 2 * _THREADS:
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()


@dataclass(frozen=True)
class VisionInfo:
    """What shards need of the vision encoder that made their features."""

    name: str
    """As the user calls it. To encode media later, it must be a name that ``load_vision`` takes."""
    weight_hash: str
    """SHA-256 of its weights, or ``NOT_STATED``."""
    feature_dim: int | None
    """C, where it is known before an array is read."""
    preprocessing: str
    """In words; ``NOT_STATED`` where the encoder was not loaded."""


def codec_info(
    name: str, weights: str | None = None, codebooks: str | None = None, weight_hash: str | None = None
) -> CodecInfo:
    """Describe a codec from its weights or, without them, from its codebooks.

    Args:
        name: As ``load_codec`` takes it.
        weights: Its file or folder, as ``load_codec`` takes it.
        codebooks: Instead of the weights: ``codebooks.safetensors`` of another data set, whose manifest states the
            other numbers, or any .npy or .safetensors with (K, S, code_dim).
        weight_hash: SHA-256 of the weights, where their file is not on this machine.

    Raises:
        UserError: If the codec is unknown, or what is given is absent, damaged or contradictory.
    """
    _check_hash("codec", weight_hash)
    if name not in CODECS:
        raise UserError(f"unknown codec {name!r}: codes can be imported of {', '.join(CODECS)}")
    if codebooks is None:
        try:
            codec = load_codec(name, "cpu", weights)
        except UserError as error:
            hint = (
                "; or give its codebooks alone: --codebooks FILE" if name in CODEC_NUMBERS and weights is None else ""
            )
            raise UserError(f"{error}{hint}") from error
        _require_same("codec", codec.weight_hash, weight_hash)
        return CodecInfo(name, codec.weight_hash, codec.sample_rate, codec.code_rate, codec.codebooks().cpu())
    if weights is not None:
        raise UserError("--codec_weights and --codebooks both give the codebooks: leave one out")
    if name not in CODEC_NUMBERS:
        raise UserError(f"codec {name} ships with its weights: leave out --codebooks {codebooks}")
    path = Path(codebooks)
    if path.is_dir():
        path /= CODEBOOKS
    table = read_codebooks(path)
    numbers = CODEC_NUMBERS[name]
    if path.name == CODEBOOKS and is_complete(path.parent):
        spec = SegmentSpec.from_dict(read_manifest(path.parent)[0]["spec"])
        if spec.codec != name:
            raise UserError(f"--codebooks {path} are those of codec {spec.codec}, not of --codec {name}")
        if spec.codec_hash != NOT_STATED:
            _require_same("codec", spec.codec_hash, weight_hash)
            weight_hash = spec.codec_hash
        numbers = (spec.sample_rate, spec.code_rate, spec.num_codebooks, spec.codebook_size)
    if tuple(table.shape[:2]) != numbers[2:]:
        raise UserError(
            f"--codebooks {path} must be (K, S, code_dim) with K, S = {numbers[2:]} for codec {name}, "
            f"got {tuple(table.shape)}"
        )
    return CodecInfo(name, weight_hash or NOT_STATED, numbers[0], numbers[1], table)


def vision_info(
    name: str, weights: str | None = None, weight_hash: str | None = None, feature_dim: int | None = None
) -> VisionInfo:
    """Describe a vision encoder. It is loaded if it ships with the package or its weights are given.

    Args:
        name: What made the features, in the user's words or as ``load_vision`` takes it.
        weights: Its file or folder, as ``load_vision`` takes it.
        weight_hash: SHA-256 of the weights, where their file is not on this machine.
        feature_dim: C.

    Raises:
        UserError: If what is given is absent, damaged or contradictory.
    """
    _check_hash("vision", weight_hash)
    if not name.strip():
        raise UserError("--vision must name what made the features")
    if feature_dim is not None and feature_dim < 1:
        raise UserError(f"--feature_dim must be 1 or more, got {feature_dim}")
    if weights is None and name != "tiny" and not name.startswith("local-dir:"):
        return VisionInfo(name, weight_hash or NOT_STATED, feature_dim, NOT_STATED)
    vision = load_vision(name, "cpu", weights)
    _require_same("vision", vision.weight_hash, weight_hash)
    if feature_dim not in (None, vision.feature_dim):
        raise UserError(f"vision encoder {name} has features of {vision.feature_dim} channels, got {feature_dim}")
    return VisionInfo(name, vision.weight_hash, vision.feature_dim, vision.preprocessing)


def _check_hash(kind: str, weight_hash: str | None) -> None:
    if weight_hash is not None and not re.fullmatch("[0-9a-f]{64}", weight_hash):
        raise UserError(
            f"--{kind}_hash must be a SHA-256, 64 of 0-9 a-f as sha256sum prints it, got {weight_hash!r}; leave it out "
            "where it is not known"
        )


def _require_same(kind: str, found: str, weight_hash: str | None) -> None:
    if weight_hash not in (None, found):
        raise UserError(f"--{kind}_hash is {weight_hash}, but the weights have {found}")
