"""Video and audio files: the way into the shards, and the way out of generation.

One timeline per file, in seconds. Its zero is the earliest start of the two streams that are used (the picture's and
the sound's), never before the container's own zero: what lies before that is priming of an audio codec, or cut off by
an edit list. Picture and sound are both placed on it by their presentation times, so they stay in sync whichever
starts later, and a file whose clock begins at 10 s begins at 0 here.

Which streams are used is FFmpeg's choice (``av_find_best_stream``: default flag, number of frames, size), except that
cover art is not video. Pictures are as they are to be seen: turned by the display matrix, stretched where pixels are
not square, and tone-mapped where they are HDR. Channels are mixed as ``ffmpeg -ac 1`` does: the mean of two, the LFE
left out. Nothing that a header says about lengths is believed: ends are found by reading.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from vab.data.media.open import AudioSpan, FrameSpan, MediaError, OpenMedia
from vab.data.media.pictures import is_picture, read_picture
from vab.data.media.spans import LEAD, NotInOnePassError, take_span, take_spans
from vab.data.media.takers import (
    SAME_TIME,
    Convert,
    PictureStream,
    PictureTaker,
    PictureTrack,
    SoundTaker,
    SoundTrack,
    Taker,
    Track,
    frame_times,
)

__all__ = [
    "AudioSpan",
    "FrameSpan",
    "MediaError",
    "MediaInfo",
    "MediaSegment",
    "Scan",
    "is_picture",
    "probe",
    "read_audio",
    "read_frames",
    "read_picture",
    "read_segment",
    "read_segments",
    "scan_packets",
    "scan_streams",
    "stream_ends",
    "stream_frames",
]


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, found by reading its packets; times are on the file's timeline."""

    video_seconds: float | None
    """Where the last picture ends, s; None without video."""
    audio_seconds: float | None
    """Where the last sound ends, s; None without audio."""
    width: int | None
    """Of a picture as shown, after rotation, pixels; None without video."""
    height: int | None
    """Likewise."""

    @property
    def duration_seconds(self) -> float:
        """Where the file ends, s."""
        return max(self.video_seconds or 0.0, self.audio_seconds or 0.0)

    @property
    def has_video(self) -> bool:
        """Whether there are moving pictures; cover art does not count."""
        return self.video_seconds is not None

    @property
    def has_audio(self) -> bool:
        """Whether there is a sound track, silent or not."""
        return self.audio_seconds is not None


@dataclass(frozen=True)
class MediaSegment:
    """Sound and frames of the same seconds."""

    waveform: np.ndarray
    """As ``AudioSpan.waveform``."""
    valid_samples: int
    """As ``AudioSpan.valid_samples``."""
    frames: np.ndarray
    """As ``FrameSpan.frames``."""
    valid_frames: int
    """As ``FrameSpan.valid_frames``."""


def probe(path: str | Path) -> MediaInfo:
    """Find out what a file holds and where it really ends.

    Reads every packet but decodes one picture only, so an hour of video takes about as long as copying it.

    Raises:
        MediaError: If the file is missing or unreadable, or its first picture cannot be decoded.
    """
    ends = stream_ends(path)
    if ends[0] is None:
        return MediaInfo(None, ends[1], None, None)
    height, width = read_frames(path, fps=1000.0, count=1).frames.shape[1:3]
    return MediaInfo(ends[0], ends[1], width, height)


def stream_ends(path: str | Path) -> tuple[float | None, float | None]:
    """Where video and audio of a file end by their packets, without decoding; None for a stream that is not there.

    Returns:
        Seconds on the file's timeline. Decoding can still end earlier, where packets are damaged.

    Raises:
        MediaError: If the file is missing or unreadable.
    """
    scan = scan_packets(path)
    return scan.video_end, scan.audio_end


def read_audio(
    path: str | Path, sample_rate: int, start: float = 0.0, seconds: float | None = None, *, remove_mean: bool = False
) -> AudioSpan:
    """Sound of a file as mono at the rate wanted.

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

    Raises:
        MediaError: ``missing``, ``unreadable`` (also if decoding fails before the span is complete), ``no_audio``, or
            ``too_short`` if the sound ends before ``start``.
        ValueError: If a number is out of range.
    """
    _check_span(start, seconds)
    wanted = _Wanted(sample_rate=sample_rate, seconds=seconds, remove_mean=remove_mean)
    (sound,) = take_span(path, start, wanted.open_tracks, wanted.make_takers)
    assert isinstance(sound, SoundTaker)
    return sound.result()


def read_frames(path: str | Path, fps: float, start: float = 0.0, count: int = 1) -> FrameSpan:
    """Frames of a file at even times, whatever its own frame rate.

    Frame k is the picture shown at ``start + (k + 0.5) / fps``: the one with the largest presentation time not after
    it. Before the first picture that is the first one.

    Args:
        path: Any file with a video track that FFmpeg decodes.
        fps: Frames wanted per second.
        start: s, on the file's timeline.
        count: V, how many.

    Raises:
        MediaError: ``missing``, ``unreadable`` (also if decoding fails before the span is complete), ``no_video``, or
            ``too_short`` if the video ends before the first frame's time.
        ValueError: If a number is out of range.
    """
    _check_span(start, count / fps)
    wanted = _Wanted(fps=fps, count=count)
    (picture,) = take_span(path, start, wanted.open_tracks, wanted.make_takers)
    assert isinstance(picture, PictureTaker)
    return picture.result()


def read_segment(
    path: str | Path, sample_rate: int, video_fps: float, start: float = 0.0, seconds: float = 10.0
) -> MediaSegment:
    """Sound and frames of the same seconds, in one pass over the file.

    Args:
        path: Any file with video and sound.
        sample_rate: Hz, of the waveform wanted.
        video_fps: Frames wanted per second; V is ``round(seconds * video_fps)``.
        start: s, on the file's timeline.
        seconds: Length of the segment.

    Raises:
        MediaError: As ``read_audio`` and ``read_frames``; a missing track is reported before anything is decoded.
        ValueError: If a number is out of range.
    """
    _check_span(start, seconds)
    wanted = _Wanted(sample_rate=sample_rate, seconds=seconds, fps=video_fps, count=round(seconds * video_fps))
    return _segment(take_span(path, start, wanted.open_tracks, wanted.make_takers))


def read_segments(
    path: str | Path,
    sample_rate: int,
    video_fps: float | None,
    starts: Sequence[float],
    seconds: float,
    convert: Convert | None = None,
    scan: Scan | None = None,
) -> Iterator[MediaSegment | MediaError]:
    """Sound and frames of many spans of a file, in one pass over it where that can be.

    Each is what ``read_segment`` gives, but for its sound where timestamps jitter: in one pass all of it is placed
    from the file's beginning on.

    Args:
        path: Any file with sound, and with video unless ``video_fps`` is None.
        sample_rate: Hz, of the waveforms wanted.
        video_fps: Frames wanted per second; None for sound alone, whose segments have no frames.
        starts: s, on the file's timeline, rising.
        seconds: Length of each segment.
        convert: What is kept of a picture, (H, W, 3) uint8 RGB; ``frames`` is a stack of it. All of it if None.
        scan: Of the file, if it is known: pictures that nobody wants and no other depends on are then not decoded.

    Yields:
        For each start, in order, the segment, or why there is none.
    """
    count = 0 if video_fps is None else round(seconds * video_fps)
    wanted = _Wanted(sample_rate, seconds, video_fps, count, convert)
    if scan is not None and video_fps is not None:
        times = np.concatenate([frame_times(video_fps, start, count) for start in starts])
        wanted = replace(wanted, unwanted=scan.unwanted(times))
    given = 0
    if len(starts) > 1:
        gap = min(later - earlier for earlier, later in itertools.pairwise(starts))
        overlap = math.ceil((seconds + LEAD) / gap) if gap > 0 else len(starts)
        try:
            for takers in take_spans(path, starts, overlap, wanted.open_tracks, wanted.make_takers):
                yield _outcome(takers)
                given += 1
        except NotInOnePassError:
            pass  # the rest is had one by one
    for start in starts[given:]:
        try:
            takers = take_span(path, start, wanted.open_tracks, wanted.make_takers)
        except MediaError as error:
            yield error
        else:
            yield _outcome(takers)


def stream_frames(path: str | Path, times: np.ndarray, take: Callable[[np.ndarray], None]) -> np.ndarray:
    """The pictures shown at given times, in one pass over the file and with little memory.

    As ``read_frames`` chooses them; the last picture is repeated after the end.

    Args:
        path: Any file with a video track that FFmpeg decodes.
        times: (F,) float64 s on the file's timeline, rising.
        take: Is called with (n, H, W, 3) uint8 RGB, several times, until all F have been handed over in order.

    Returns:
        (F,) bool: whether the video had not ended by that time; the first is always True.

    Raises:
        MediaError: ``missing``, ``unreadable`` or ``no_video``.
    """

    def make_takers(tracks: Sequence[Track], _: float) -> Sequence[Taker]:
        (track,) = tracks
        assert isinstance(track, PictureTrack)
        return [PictureStream(track, times, take)]

    (taker,) = take_span(path, 0.0, lambda source: [PictureTrack(source)], make_takers)
    assert isinstance(taker, PictureStream)
    return taker.finish()


@dataclass(frozen=True)
class Scan:
    """What the packets of a file tell without being decoded; times are on the file's timeline."""

    video_end: float | None
    """s; None without video, inf where it was not looked for."""
    audio_end: float | None
    """Likewise of the sound."""
    pictures: np.ndarray | None = None
    """(F,) int64: when each picture is shown, in the stream's own units, rising; None where that cannot be told, or
    where the codec does not say on which pictures no other depends."""
    time_base: Fraction = Fraction(1)
    """s per unit."""
    zero: float = 0.0
    """s, on the stream's clock, of the beginning of the timeline."""

    def unwanted(self, times: np.ndarray) -> frozenset[int]:
        """Pictures of which none is shown at one of these times, s; empty where that cannot be told."""
        if self.pictures is None or not len(self.pictures):
            return frozenset()
        shown = self.pictures * self.time_base.numerator / self.time_base.denominator - self.zero
        chosen = np.searchsorted(shown, times + SAME_TIME, side="right") - 1
        is_wanted = np.zeros(len(shown), bool)
        is_wanted[np.maximum(chosen, 0)] = True
        is_wanted[[0, -1]] = True  # these say where the video begins and ends
        return frozenset(self.pictures[~is_wanted].tolist())


def scan_streams(path: str | Path) -> Scan:
    """Which streams a file has, found without reading it: they end nowhere (inf), and their pictures are not known.

    Raises:
        MediaError: If the file is missing or unreadable.
    """
    with OpenMedia(path) as source:
        video, audio = (None if stream is None else math.inf for stream in (source.video, source.audio))
        return Scan(video, audio, zero=source.zero)


def scan_packets(path: str | Path) -> Scan:
    """Read all packets of a file, decoding none.

    Raises:
        MediaError: If the file is missing or unreadable.
    """
    with OpenMedia(path) as source:
        # A stream that is announced and has no packets is not there, unless an index lists packets that were cut off.
        ends = {stream.index: 0 for stream in source.used if stream.frames}
        pictures: list[int] = []
        codec = None if source.video is None else source.video.codec_context
        told = codec is not None and codec.name == "h264" and source.has_pts
        for packet in source.packets():
            if packet.size == 0:
                continue  # the mark of the end
            number, time = packet.stream.index, packet.pts if packet.pts is not None else packet.dts
            ends[number] = max(
                ends.get(number, 0), ends.get(number, 0) if time is None else time + (packet.duration or 0)
            )
            if time is None:
                told = False
                continue
            if told and source.video is not None and number == source.video.index:
                pictures.append(time)
                told = packet.pts is not None and bool(packet.duration)
        video, audio = (
            None
            if stream is None or stream.index not in ends
            else _seconds(ends[stream.index], stream.time_base, source.zero)
            for stream in (source.video, source.audio)
        )
        order = np.sort(np.array(pictures, np.int64)) if told else None
        unit = source.video.time_base if source.video is not None else None
        return Scan(video, audio, order, unit or Fraction(1), source.zero)


def _seconds(units: int, base: Fraction | None, zero: float) -> float:
    return max(0.0, units * base.numerator / base.denominator - zero) if base is not None else 0.0


@dataclass(frozen=True)
class _Wanted:
    """What is gathered of each span."""

    sample_rate: int | None = None
    """Hz; None for no sound."""
    seconds: float | None = None
    """Of sound; None for all of it."""
    fps: float | None = None
    """None for no pictures."""
    count: int = 0
    """Of pictures."""
    convert: Convert | None = None
    unwanted: frozenset[int] = frozenset()
    remove_mean: bool = False
    """Of the sound, over time."""

    def open_tracks(self, source: OpenMedia) -> Sequence[Track]:
        tracks: list[Track] = []
        if self.sample_rate is not None:
            tracks.append(SoundTrack(source))
        if self.fps is not None:
            tracks.append(PictureTrack(source, self.convert, self.unwanted))
        return tracks

    def make_takers(self, tracks: Sequence[Track], start: float) -> Sequence[Taker]:
        takers: list[Taker] = []
        for track in tracks:
            if isinstance(track, SoundTrack):
                assert self.sample_rate is not None
                takers.append(SoundTaker(track, self.sample_rate, start, self.seconds, self.remove_mean))
            else:
                assert self.fps is not None
                takers.append(PictureTaker(track, frame_times(self.fps, start, self.count)))
        return takers


def _outcome(takers: Sequence[Taker]) -> MediaSegment | MediaError:
    try:
        return _segment(takers)
    except MediaError as error:
        return error


def _segment(takers: Sequence[Taker]) -> MediaSegment:
    sound, *pictures = takers
    assert isinstance(sound, SoundTaker)
    heard = sound.result()
    if not pictures:
        return MediaSegment(heard.waveform, heard.valid_samples, np.zeros((0, 0, 0, 3), np.uint8), 0)
    (picture,) = pictures
    assert isinstance(picture, PictureTaker)
    seen = picture.result()
    return MediaSegment(heard.waveform, heard.valid_samples, seen.frames, seen.valid_frames)


def _check_span(start: float, seconds: float | None) -> None:
    if not 0 <= start < math.inf or not (seconds is None or 0 < seconds < math.inf):
        raise ValueError(f"a span starts at 0 s or later and is longer than 0 s; got start {start}, length {seconds}")
