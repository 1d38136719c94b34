"""Read the sound and the frames of the same seconds from video and audio files.

One timeline per file, in seconds. Its zero is the earliest start of the two streams that are used (the picture's and
the sound's), never before the container's own zero: what lies before that is priming of an audio codec, or cut off by
an edit list. Picture and sound are both placed on it by their presentation times, so they stay in sync whichever
starts later, and a file whose clock begins at 10 s begins at 0 here.

Which streams are used is FFmpeg's choice (``av_find_best_stream``: default flag, number of frames, size), except that
cover art is not video. Pictures are returned as a player shows them: turned by the display matrix, stretched where
pixels are not square, and tone-mapped where they are HDR. Channels are mixed as ``ffmpeg -ac 1`` does: the mean of
two, the LFE left out. Lengths in headers are not trusted: ends are found by reading.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from vab.data.media.frames import Convert, PictureTrack, frame_times
from vab.data.media.open import MediaError, OpenMedia
from vab.data.media.pictures import is_picture, read_picture
from vab.data.media.scan import Scan, scan_packets
from vab.data.media.sound import SoundTrack
from vab.data.media.tracks import MediaSegment

__all__ = [
    "MediaError",
    "MediaSegment",
    "is_picture",
    "read_audio",
    "read_frames",
    "read_picture",
    "read_segments",
    "scan_packets",
    "stream_frames",
]

_SEEK_BEYOND = 5.0
"""s. A span that starts later than this is reached by seeking; before it, decoding from the start costs less."""
_PREROLL = 1.0
"""s. How far before the wanted time a seek aims: decoders need some packets to settle (AAC overlap, MP3 reservoir)."""
_MOST_WAITING = 4
"""Spans, beyond those that overlap, that may wait for one of their two streams. If more wait, sound and picture are so
far apart in the file that the waiting pictures would fill the memory."""
_CHUNK_FRAMES, _CHUNK_BYTES = 64, 64 << 20
"""Pictures that ``stream_frames`` yields at once: as many as this, or as fill this much memory."""

_Track = SoundTrack | PictureTrack
_OpenTracks = Callable[[OpenMedia], Sequence[_Track]]


def read_audio(
    path: str | Path, sample_rate: int, start: float = 0.0, seconds: float | None = None, *, remove_mean: bool = False
) -> MediaSegment:
    """Read the sound of a file as mono at the rate wanted.

    Samples are placed by presentation time: gaps are silence, codec priming is dropped, a track that starts late
    starts late. Sample n of the result is the sound at ``start + n / sample_rate``.

    Args:
        path: Any file with a sound track that FFmpeg decodes.
        sample_rate: Hz.
        start: s, on the file's timeline.
        seconds: How much, or None for all up to the end. Exactly ``round(seconds * sample_rate)`` samples are
            returned; what the file does not have is zero and not counted in ``valid_samples``.
        remove_mean: Subtract the mean over time of all sound from ``start`` to the end of the file, before resampling
            and cutting. The file is then decoded to its end.

    Returns:
        A segment without frames.

    Raises:
        MediaError: ``missing``, ``unreadable`` (also if decoding fails before the span is complete), ``no_audio``, or
            ``too_short`` if the sound ends before ``start``.
        ValueError: If a number is out of range.
    """
    _check_span(start, seconds)
    return _read_span(path, start, lambda source: [SoundTrack(source, sample_rate, [start], seconds, remove_mean)])


def read_frames(path: str | Path, fps: float, start: float = 0.0, count: int = 1) -> MediaSegment:
    """Read frames of a file at even times, whatever its own frame rate.

    Frame k is the picture shown at ``start + (k + 0.5) / fps``: the one with the largest presentation time not after
    it. Before the first picture that is the first one.

    Args:
        path: Any file with a video track that FFmpeg decodes.
        fps: Frames wanted per second.
        start: s, on the file's timeline.
        count: V, how many.

    Returns:
        A segment without sound.

    Raises:
        MediaError: ``missing``, ``unreadable`` (also if decoding fails before the span is complete), ``no_video``, or
            ``too_short`` if the video ends before the first frame's time.
        ValueError: If a number is out of range.
    """
    _check_span(start, count / fps)
    return _read_span(path, start, lambda source: [PictureTrack(source, [frame_times(fps, start, count)])])


def read_segments(
    path: str | Path,
    sample_rate: int | None,
    video_fps: float | None,
    starts: Sequence[float],
    seconds: float,
    convert: Convert | None = None,
    scan: Scan | None = None,
) -> Iterator[MediaSegment | MediaError]:
    """Read sound and frames of many spans of a file, in one pass over it if possible.

    If the pass fails, because of damage or because sound and picture are far apart in the file, the remaining spans
    are read one by one. The result is the same, except for sound whose timestamps jitter: one pass places all of it
    from the beginning of the file on.

    Args:
        path: Any file with the streams wanted.
        sample_rate: Hz, of the waveforms wanted; None for pictures alone, whose waveforms are empty.
        video_fps: Frames wanted per second; None for sound alone, whose segments have no frames.
        starts: s, on the file's timeline, rising.
        seconds: Length of each segment; V is ``round(seconds * video_fps)``.
        convert: Applied to each picture, (H, W, 3) uint8 RGB; ``frames`` is a stack of the results. None keeps it.
        scan: Of the file, if there is one. Then pictures that are not asked for and that no other depends on are not
            decoded, and the file is not read again to find out whether seeking works in it.

    Yields:
        For each start, in order, the segment, or why there is none.
    """
    times = [frame_times(video_fps, start, round(seconds * video_fps)) for start in starts] if video_fps else []
    unwanted = scan.unwanted(np.concatenate(times)) if scan is not None and times else frozenset[int]()

    def open_tracks(source: OpenMedia, chosen: slice) -> Sequence[_Track]:
        tracks: list[_Track] = []
        if sample_rate is not None:
            tracks.append(SoundTrack(source, sample_rate, starts[chosen], seconds))
        if video_fps is not None:
            tracks.append(PictureTrack(source, times[chosen], convert, unwanted))
        return tracks

    given = 0
    if len(starts) > 1:
        gap = min(later - earlier for earlier, later in itertools.pairwise(starts))
        overlap = math.ceil(seconds / gap) if gap > 0 else len(starts)
        whole = functools.partial(open_tracks, chosen=slice(None))
        try:
            for segment in _read_pass(path, whole, most_waiting=overlap + _MOST_WAITING):
                yield segment
                given += 1
        except MediaError:
            pass  # the other spans are read one by one
    for number in range(given, len(starts)):
        alone = functools.partial(open_tracks, chosen=slice(number, number + 1))
        try:
            yield _read_span(path, starts[number], alone, None if scan is None else scan.restarts)
        except MediaError as error:
            yield error


def stream_frames(path: str | Path, times: np.ndarray) -> Iterator[MediaSegment]:
    """Read the pictures shown at given times, in one pass over the file and with little memory.

    They are chosen as in ``read_frames``; the last picture is repeated after the end.

    Args:
        path: Any file with a video track that FFmpeg decodes.
        times: (F,) float64 s on the file's timeline, rising.

    Yields:
        Segments of some frames each, without sound, until all F have been given in order. Their ``valid_frames`` are
        those before the video's end, none after it.

    Raises:
        MediaError: ``missing``, ``unreadable`` or ``no_video``.
    """

    def open_tracks(source: OpenMedia) -> Sequence[_Track]:
        area = 0 if source.video is None else source.video.width * source.video.height
        step = min(max(1, _CHUNK_BYTES // max(1, 3 * area)), _CHUNK_FRAMES)
        chunks = [times[first : first + step] for first in range(0, len(times), step)]
        return [PictureTrack(source, chunks, repeat_last=True)]

    for segment in _read_pass(path, open_tracks):
        if isinstance(segment, MediaError):
            raise segment
        yield segment


def _read_span(path: str | Path, start: float, open_tracks: _OpenTracks, restarts: bool | None = None) -> MediaSegment:
    """Read a single span: from shortly before its start, if seeking works in the file, until it is complete.

    Raises:
        MediaError: If the file cannot be decoded up to the end of the span, or ends before the span.
    """
    segment: MediaSegment | MediaError | None = None
    if start > _SEEK_BEYOND:
        try:
            segment = next(_read_pass(path, open_tracks, seek=start - _PREROLL, restarts=restarts))
        except MediaError as error:
            # Otherwise the seek failed (no index, a false keyframe, guessed timestamps): read from the beginning.
            if error.reason in ("missing", "no_audio", "no_video"):
                raise
    segment = segment or next(_read_pass(path, open_tracks))
    if isinstance(segment, MediaError):
        raise segment
    return segment


def _read_pass(
    path: str | Path,
    open_tracks: _OpenTracks,
    *,
    most_waiting: float = math.inf,
    seek: float | None = None,
    restarts: bool | None = None,
) -> Iterator[MediaSegment | MediaError]:
    """Read all spans of some tracks in one pass over the file. If there is one span, damage around it is harmless.

    Args:
        path: The file.
        open_tracks: Makes the tracks, which have equally many spans.
        most_waiting: How many spans may be begun and not complete.
        seek: s, where the pass begins; None for the beginning of the file.
        restarts: Whether the file's clock starts again, if that is known.

    Yields:
        For each span, in order, the segment, or why there is none; as soon as it is complete or the file ends.

    Raises:
        MediaError: If something cannot be opened or decoded, if a seek missed the span, or if too many spans wait.
            What was yielded before is right.
    """
    tracks: Sequence[_Track] = []

    def segment_of(span: int) -> MediaSegment | MediaError:
        if seek is not None and any(track.landed_late for track in tracks):
            raise MediaError("unreadable", Path(path), f"a seek to {seek:g} s landed behind it")
        segment, problems = MediaSegment(), []
        for track in tracks:  # all of them, as each forgets the span
            try:
                track.fill(span, segment)
            except MediaError as error:
                problems.append(error)
        return problems[0] if problems else segment

    try:
        with OpenMedia(path) as source:
            tracks = open_tracks(source)
            for track in tracks:
                track.prepare()
            if seek is not None:
                _seek(source, seek, restarts)
            by_stream = {track.stream.index: track for track in tracks}
            span, num_spans = 0, tracks[0].num_spans
            for packet in source.packets():
                # The other streams' packets are read, too, for their times: all readings of a file have one clock.
                if packet.stream.index not in by_stream:
                    continue
                track = by_stream[packet.stream.index]
                if track.is_done(num_spans - 1):
                    continue
                track.see_packet(packet)
                try:
                    for frame in packet.decode():
                        track.add(frame)
                except FFmpegError as error:
                    if num_spans == 1 and track.is_harmless(packet):
                        continue
                    if not (num_spans == 1 and track.is_complete(0)):
                        raise source.unreadable(error) from error
                    del by_stream[packet.stream.index]
                while all(track.is_done(span) for track in tracks):
                    yield segment_of(span)
                    span += 1
                    if span == num_spans:
                        return
                if track.begun - span > most_waiting:
                    raise source.unreadable("its sound and its picture are too far apart in the file")
            for waiting in range(span, num_spans):
                yield segment_of(waiting)
    except MediaError:
        if not (tracks and tracks[0].num_spans == 1 and all(track.is_complete(0) for track in tracks)):
            raise
        yield segment_of(0)


def _seek(source: OpenMedia, time: float, restarts: bool | None) -> None:
    """Continue reading near a time, s; from the beginning if the same time may be there more than once.

    Raises:
        MediaError: If the file has no index.
    """
    if restarts is None and not source.has_one_clock:
        status = source.path.stat()
        restarts = _restarts(source.path, status.st_size, status.st_mtime_ns)
    if not restarts:
        try:
            source.container.seek(int((source.zero + time) * av.time_base))
        except (FFmpegError, OverflowError, OSError) as error:
            raise source.unreadable(error) from error


@functools.lru_cache(maxsize=256)
def _restarts(path: Path, size: int, mtime_ns: int) -> bool:
    """Whether a file's clock starts again, found by reading all packets, once for each version of the file."""
    return bool(scan_packets(path).restarts)


def _check_span(start: float, seconds: float | None) -> None:
    if not 0 <= start < math.inf or not (seconds is None or 0 < seconds < math.inf):
        raise ValueError(f"a span starts at 0 s or later and is longer than 0 s; got start {start}, length {seconds}")
