"""Media files to shards: decode in worker processes, encode with the frozen networks, write records in order.

A kill at any moment costs the segments in flight and nothing else: what is finished but not yet in a committed shard
waits in ``extraction.partial``, and the same command takes it from there. Records and shards end up equal, bit for bit,
to those of a run that was never interrupted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vab.data.decoding_pool import Cutting, DecodingPool, LeftOut, Segment
from vab.data.format import explain_full_disk, is_complete, make_key, read_manifest, write_atomically
from vab.data.labels import read_vocabulary
from vab.data.shards import ShardWriter
from vab.data.sources import Source, find_sources
from vab.frozen import device_named
from vab.frozen.codec import Codec, load_codec
from vab.frozen.vision import VisionEncoder, load_vision
from vab.spec import SegmentSpec, UserError

REPORT = "report.json"
_PARTIAL = "extraction.partial"


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
    left_out: list[dict[str, Any]]
    """``source``, ``reason``, ``detail``, and ``start_seconds`` where only a segment of the source is left out."""
    already_finished: bool = False
    """True if the folder was complete before, and nothing was done."""

    @property
    def reasons(self) -> dict[str, int]:
        """How many inputs were left out whole, by reason."""
        return dict(Counter(entry["reason"] for entry in self.left_out if "start_seconds" not in entry))

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        segments = sum("start_seconds" in entry for entry in self.left_out)
        lines = [
            f"{self.folder}: {self.records} records of {self.kept} inputs",
            f"{self.inputs - self.kept} of {self.inputs} inputs left out{': ' + reasons if reasons else ''}",
        ]
        if segments:
            lines.append(f"{segments} single segments left out")
        if self.left_out:
            lines.append(f"each with its reason in {Path(self.folder) / REPORT}")
        return "\n".join([*lines, "it was finished before: nothing to do"] if self.already_finished else lines)


def extract(
    media: str,
    out: str,
    codec: str = "tiny",
    vision: str = "tiny",
    segment_seconds: float = 10.0,
    video_fps: float = 4.0,
    segments: Literal["all", "centre"] = "all",
    hop_seconds: float | None = None,
    min_seconds: float = 1.0,
    silence_db: float = -60.0,
    still_pictures: Literal["keep", "leave_out"] = "keep",
    without_video: Literal["keep", "leave_out"] = "leave_out",
    labels_from: Literal["auto", "csv", "folder", "none"] = "auto",
    vocabulary: str | None = None,
    media_root: str | None = None,
    num_workers: int | None = None,
    batch_size: int = 16,
    records_per_shard: int = 4096,
    file_timeout: float = 300.0,
    device: str = "auto",
) -> ExtractionReport:
    """Turn media files into shards of codec tokens and frame features.

    Every input ends in the shards or, with its reason, in DIR/report.json. Interrupted, the same command goes on.

    Args:
        media: Folder of media files, or a CSV with a column file (relative to the CSV) and, if wanted, labels (joined
            by ;), start (s) and id; or a list as VGGSound has them, without a first line of names: file and one label.
        out: Folder to write; made if absent.
        codec: Name of the codec.
        vision: Name of the vision encoder.
        segment_seconds: Length of a segment.
        video_fps: Frames per second that are encoded.
        segments: all: each file is cut from its start to its end; centre: one segment from the middle. A row of a CSV
            that has a start gives the one segment there.
        hop_seconds: From one segment's start to the next; segment_seconds if not given, so that they do not overlap.
        min_seconds: A file with less of sound or picture is left out as too_short, a shorter last segment is not
            taken. Between this and segment_seconds, silence and the last picture fill up, and the valid lengths are
            recorded.
        silence_db: Segments less loud than this are left out as silent, dBFS.
        still_pictures: leave_out drops segments whose picture does not change.
        without_video: keep takes files of sound alone, too: their records have no frame, and features of zeros.
        labels_from: csv; folder: the name of the folder a file is in; none; auto: csv if it has such a column.
        vocabulary: File with the names of all classes in their order, such as AudioSet's or VGGSound's
            class_labels_indices.csv; by default the labels that occur, sorted. Labels may be given by name or by id.
        media_root: Folder that the files of a CSV are in, if it is not the CSV's own.
        num_workers: Processes that decode; one per core if not given, 0 to decode in the main process.
        batch_size: Segments that the codec encodes at once; has no effect on the result.
        records_per_shard: Records per tar.
        file_timeout: s without a segment after which a file is given up as unreadable.
        device: Where the frozen networks run: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.

    Raises:
        UserError: If there is no input, a number is out of range, the folder was begun with other settings, the disk
            is full, or not one record could be made.
    """
    where = device_named(device)
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    sources = find_sources(media, labels_from, root=media_root)
    names = None if vocabulary is None else read_vocabulary(vocabulary)
    if names is not None:
        sources = [
            replace(source, labels=tuple(names.names[names.number(label)] for label in source.labels))
            for source in sources
        ]
    encoders = Encoders(load_codec(codec, where), load_vision(vision, where), where)
    cutting = Cutting(
        segment_seconds=segment_seconds,
        sample_rate=encoders.codec.sample_rate,
        video_fps=video_fps,
        segments=segments,
        hop_seconds=segment_seconds if hop_seconds is None else hop_seconds,
        min_seconds=min_seconds,
        silence_db=silence_db,
        still_pictures=still_pictures,
        without_video=without_video,
        preprocess=encoders.vision.preprocessor(),
    )
    _check_numbers(cutting, workers, batch_size, file_timeout)
    threads = torch.get_num_threads()
    # Threads beyond the cores that the decoders leave would wait for each other: three times slower on two cores.
    torch.set_num_threads(max(1, threads - workers))
    try:
        report = extract_sources(
            sources,
            Path(out),
            encoders,
            cutting,
            workers,
            batch_size,
            records_per_shard,
            file_timeout,
            None if names is None else names.names,
        )
    finally:
        torch.set_num_threads(threads)
    print(report)
    return report


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
        features = [
            self.vision.encode(torch.from_numpy(segment.pixels).to(self.device)).cpu().numpy().astype(np.float16)
            if segment.valid_frames
            else np.zeros((num_frames, self.vision.feature_dim), np.float16)
            for segment in segments
        ]
        return list(zip(codes, features, strict=True))


def extract_sources(
    sources: Sequence[Source],
    out: Path,
    encoders: Encoders,
    cutting: Cutting,
    num_workers: int,
    batch_size: int,
    records_per_shard: int,
    file_timeout: float,
    labels: Sequence[str] | None = None,
) -> ExtractionReport:
    """What ``extract`` does once everything is loaded.

    Args:
        sources: From ``find_sources``.
        out: Folder of the shards.
        encoders: The frozen networks.
        cutting: How files become segments; its rate is the codec's.
        num_workers: As in ``extract``.
        batch_size: As in ``extract``.
        records_per_shard: As in ``extract``.
        file_timeout: As in ``extract``.
        labels: The vocabulary, if it is not the labels that occur.

    Raises:
        UserError: As ``extract``.
    """
    head = _head(sources, encoders, cutting, labels)
    if is_complete(out):
        return _finished_before(out, sources, head)
    spec = SegmentSpec.from_dict(head["spec"])
    with ShardWriter(out, spec, head["labels"], records_per_shard, head["extraction"]) as writer:
        if lost := sorted(writer.done_sources - {source.name for source in sources}):
            raise UserError(
                f"{out} was begun with {len(lost)} inputs that are not listed now ({lost[0]}, ...):"
                " list them again to go on, or give another folder"
            )
        to_do = [source for source in sources if source.name not in writer.done_sources]
        with _Partial(out / _PARTIAL, head) as partial:
            run = _Run(writer, partial, encoders, batch_size)
            to_decode = [source for source in to_do if source.name not in partial.finished]
            pool = DecodingPool(cutting, num_workers, ahead=2 * batch_size, timeout=file_timeout)
            with (
                closing(pool.run([(source.path, source.start) for source in to_decode])) as items,
                _progress(len(sources), len(sources) - len(to_decode)) as advance,
            ):
                for source in to_do:
                    if source.name in partial.finished:
                        run.replay(source)
                        continue
                    run.begin(source)
                    for _, item in items:
                        if item is None:
                            break
                        run.take(item)
                    run.end()
                    advance()
                run.flush()
            if not writer.num_records:
                partial.delete()  # so that mended files are looked at again
                report = ExtractionReport(str(out), len(sources), 0, 0, run.left_out)
                _write_report(report)
                reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.reasons.items()))
                raise UserError(
                    f"not one of {len(sources)} inputs gave a record ({reasons}): see {out / REPORT} for each"
                )
            manifest = writer.finish(encoders.codec.codebooks(), _fingerprint(sources))
            partial.delete()
    report = _report(out, manifest)
    assert report.inputs == len(sources), f"{report.inputs} inputs accounted for, {len(sources)} were given"
    _write_report(report)
    return report


@dataclass(frozen=True)
class _Record:
    """A segment as it goes into a shard."""

    meta: dict[str, Any]
    codes: np.ndarray  # (K, T) uint16
    features: np.ndarray  # (V, C) float16


@dataclass(frozen=True)
class _Result:
    """What a source gives: records and left-out segments; or no record, and one reason for all of it."""

    records: list[_Record]
    left_out: list[dict[str, Any]]


class _Work:
    """A source on its way: what is decoded of it, some of it encoded."""

    def __init__(self, source: Source, result: _Result | None = None) -> None:
        self.source = source
        self.replayed = result is not None
        self.items: list[Segment | LeftOut | _Record] = []
        self.decoded = False
        self._result = result

    def result(self) -> _Result | None:
        """None while something is missing."""
        if self._result is None and self.decoded and not any(isinstance(item, Segment) for item in self.items):
            records = [item for item in self.items if isinstance(item, _Record)]
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
            self._result = _Result(records, left_out)
        return self._result


class _Run:
    """Batches segments of consecutive sources for the encoders, and hands finished sources on in order."""

    def __init__(self, writer: ShardWriter, partial: _Partial, encoders: Encoders, batch_size: int) -> None:
        self.writer, self.partial, self.encoders, self.batch_size = writer, partial, encoders, batch_size
        self.left_out: list[dict[str, Any]] = []
        self._open: deque[_Work] = deque()
        self._batch: list[tuple[_Work, int]] = []  # a source and the number of a segment among its items

    def begin(self, source: Source) -> None:
        """The items to come are of this source."""
        self._open.append(_Work(source))

    def take(self, item: Segment | LeftOut) -> None:
        """The next item of the source begun last."""
        work = self._open[-1]
        work.items.append(item)
        if isinstance(item, Segment):
            self._batch.append((work, len(work.items) - 1))
            if len(self._batch) == self.batch_size:
                self._encode()

    def end(self) -> None:
        """The source begun last has no more items."""
        self._open[-1].decoded = True
        self._hand_on()

    def replay(self, source: Source) -> None:
        """Take over what an interrupted run made of the source."""
        self._open.append(_Work(source, self.partial.finished[source.name]))
        self._hand_on()

    def flush(self) -> None:
        """Encode what waits for a full batch; all sources are then handed on."""
        self._encode()
        self._hand_on()
        assert not self._open

    def _encode(self) -> None:
        waiting = [
            (work, number, item) for work, number in self._batch if isinstance(item := work.items[number], Segment)
        ]
        if not waiting:
            return
        encoded = self.encoders.encode([segment for _, _, segment in waiting], self.writer.spec.num_frames)
        for (work, number, segment), (codes, features) in zip(waiting, encoded, strict=True):
            meta = {
                "id": work.source.id,
                "source": work.source.name,
                "start_seconds": segment.start,
                "labels": list(work.source.labels),
                "steps": min(self.encoders.codec.steps_for(segment.valid_samples), codes.shape[1]),
                "frames": segment.valid_frames,
                "loudness_db": round(segment.loudness_db, 2),
            }
            work.items[number] = _Record(meta, codes, features)  # the decoded segment, which is large, is let go
        self._batch = []
        self._hand_on()

    def _hand_on(self) -> None:
        while self._open and (result := self._open[0].result()) is not None:
            work = self._open.popleft()
            name = work.source.name
            if not work.replayed:
                self.partial.add(name, result)
            for record in result.records:
                key = make_key(record.meta["id"], record.meta["start_seconds"])
                self.writer.write(key, record.codes, record.features, record.meta)
            for entry in result.left_out:
                self.writer.leave_out(name, f"{entry['reason']}: {entry['detail']}", entry["start_seconds"])
                self.left_out.append(_entry(name, entry["reason"], entry["detail"], entry["start_seconds"]))
            if result.records:
                self.writer.finish_source(name)
            if not self.writer.uncommitted_sources:
                self.partial.clear()


class _Partial:
    """The file of what is finished but not in a committed shard: a header, then one entry per source.

    Each is a length, a CRC-32 and that many bytes, appended and flushed; a torn last entry is cut off on opening.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, json.loads(json.dumps(head))
        self.finished: dict[str, _Result] = {}
        """What an interrupted run left, by source."""
        entries = list(self._read()) if path.exists() else []
        if entries:
            theirs = json.loads(entries[0])
            if differences := _differences(theirs, self.head):
                raise UserError(
                    f"{path.parent} was begun with other settings ({'; '.join(differences)}):"
                    " use the same ones to go on, or give another folder"
                )
            self.finished = dict(_unpack(entry) for entry in entries[1:])
        self._file: IO[bytes] = path.open("r+b" if entries else "w+b")
        if entries:
            self._file.truncate(sum(_ENTRY.size + len(entry) for entry in entries))
            self._file.seek(0, os.SEEK_END)
        else:
            self.clear()

    def __enter__(self) -> _Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:  # else it only repeats why the writing failed
                raise

    def add(self, source: str, result: _Result) -> None:
        """Note a finished source.

        Raises:
            UserError: If the disk is full.
        """
        self._append(_pack(source, result))

    def clear(self) -> None:
        """All that was noted is in a committed shard now."""
        self._file.seek(0)
        self._file.truncate()
        self._append(json.dumps(self.head).encode())

    def delete(self) -> None:
        """The extraction is finished."""
        self.path.unlink()

    def _append(self, entry: bytes) -> None:
        try:
            self._file.write(_ENTRY.pack(len(entry), zlib.crc32(entry)) + entry)
            self._file.flush()
        except OSError as error:
            raise explain_full_disk(error, self.path.parent, len(entry)) from error

    def _read(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while len(start := file.read(_ENTRY.size)) == _ENTRY.size:
                length, crc = _ENTRY.unpack(start)
                entry = file.read(length)
                if len(entry) < length or zlib.crc32(entry) != crc:
                    return
                yield entry


_ENTRY = struct.Struct("<QI")


def _pack(source: str, result: _Result) -> bytes:
    text = {"source": source, "metas": [record.meta for record in result.records], "left_out": result.left_out}
    stream = io.BytesIO()
    np.savez(
        stream,
        text=np.frombuffer(json.dumps(text).encode(), np.uint8),
        codes=np.array([record.codes for record in result.records]),
        features=np.array([record.features for record in result.records]),
    )
    return stream.getvalue()


def _unpack(entry: bytes) -> tuple[str, _Result]:
    with np.load(io.BytesIO(entry), allow_pickle=False) as arrays:
        text = json.loads(arrays["text"].tobytes())
        parts = zip(text["metas"], arrays["codes"], arrays["features"], strict=True)
        return text["source"], _Result([_Record(*part) for part in parts], text["left_out"])


def _head(
    sources: Sequence[Source], encoders: Encoders, cutting: Cutting, labels: Sequence[str] | None
) -> dict[str, Any]:
    """What must be the same for a run to go on: spec, label vocabulary and the rules that go to the manifest."""
    return {
        "spec": encoders.spec(cutting.segment_seconds, cutting.video_fps).to_dict(),
        "labels": list(labels or sorted({label for source in sources for label in source.labels})),
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
        },
    }


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    found = SegmentSpec.from_dict(theirs["spec"]).differences(SegmentSpec.from_dict(mine["spec"]))
    rules = sorted({*theirs["extraction"], *mine["extraction"]})
    pairs = [(name, theirs["extraction"].get(name), mine["extraction"].get(name)) for name in rules]
    pairs.append(("labels", theirs["labels"], mine["labels"]))
    return found + [f"{name}: {their} != {my}" for name, their, my in pairs if their != my]


def _fingerprint(sources: Sequence[Source]) -> str:
    """Tells one list of inputs from another: how many, and a hash of their names, starts, labels and sizes."""
    rows = [(source.name, source.start, source.labels, _size(source.path)) for source in sources]
    return f"{len(sources)} sha256:{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


def _size(path: Path) -> int | None:
    """In bytes; None for a file that is not there, which is reported as such elsewhere."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _finished_before(out: Path, sources: Sequence[Source], head: dict[str, Any]) -> ExtractionReport:
    """The report of a folder that is complete, unless it is not what was asked for now."""
    manifest, _ = read_manifest(out)
    asked = json.loads(json.dumps(head))
    asked["extraction"]["inputs"] = _fingerprint(sources)
    differences = _differences(manifest, asked)
    if differences:
        raise UserError(
            f"{out} already holds a finished data set, made with other settings ({'; '.join(differences)}):"
            " give another folder, or delete this one"
        )
    (out / _PARTIAL).unlink(missing_ok=True)
    report = _report(out, manifest)
    if not (out / REPORT).exists():
        _write_report(report)
    return replace(report, already_finished=True)


def _report(out: Path, manifest: dict[str, Any]) -> ExtractionReport:
    left_out = []
    for entry in manifest["left_out"]:
        reason, _, detail = entry["reason"].partition(": ")
        left_out.append(_entry(entry["source"], reason, detail, entry.get("start_seconds")))
    counts = manifest["counts"]
    whole = sum("start_seconds" not in entry for entry in left_out)
    return ExtractionReport(str(out), counts["sources"], counts["sources"] - whole, counts["records"], left_out)


def _entry(source: str, reason: str, detail: str, start: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"source": source, "reason": reason, "detail": detail}
    return entry if start is None else entry | {"start_seconds": start}


def _write_report(report: ExtractionReport) -> None:
    values = asdict(report)
    del values["already_finished"]
    text = json.dumps({"reasons": report.reasons, **values}, indent=1) + "\n"
    write_atomically(Path(report.folder) / REPORT, text.encode())


def _check_numbers(cutting: Cutting, num_workers: int, batch_size: int, file_timeout: float) -> None:
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


class _Rate(ProgressColumn):
    """Files per second."""

    def render(self, task: Task) -> Text:
        """As the column shows it."""
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar with rate and time left, on stderr if that is a terminal; gives what to call after each file."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("extracting", total=total, completed=done)
        yield lambda: bar.advance(task)
