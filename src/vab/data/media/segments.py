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

import functools
import itertools
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av import AudioFrame, AudioStream, Packet, VideoFrame, VideoStream
from av.error import FFmpegError
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from vab.audio import resample
from vab.data.media.open import AudioSpan, FrameSpan, MediaError, OpenMedia
from vab.data.media.pictures import display_size, is_picture, read_picture, to_rgb

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


_SEEK_BEYOND = 5.0
"""s. A span that starts later than this is reached by seeking; before it, decoding from the start costs less."""
_PREROLL = 1.0
"""s. How far before the wanted time a seek aims: decoders need some packets to settle (AAC overlap, MP3 reservoir)."""
_LEAD = 1.5
"""s. Spans are made ready this much before they start: more than any context that is gathered before a span."""
_MOST_WAITING = 4
"""Spans that may wait for one of their two streams, beyond those that overlap, before a file counts as interleaved so
badly that its pictures would fill the memory."""
_JITTER = 0.02
"""s. Timestamps this near to the end of the sound so far continue it: coarse clocks (1 ms in MKV, FLV) are not gaps."""
_OVERLAP = 0.1
"""s. Sound that would replace more than this of sound whose packets had no times is put behind it."""
_CONTEXT = 0.05
"""s. Sound decoded on both sides of a span, so that the resampler's filter sees what is really there."""
_LONGEST_GAP = 600.0
"""s. A longer jump between timestamps is taken for damage, not for silence."""
_CHUNK_FRAMES, _CHUNK_BYTES = 64, 64 << 20
"""Pictures handed on at once: as many as this, or as fill this much memory."""
_SETTLED_SECONDS = 1.0
"""Timestamps can be out of order by so much at most; older pictures are final."""
SAME_TIME = 1e-6
"""s. Times nearer than this are equal: they are sums of rounded fractions."""
_LONGEST_PADDING = 0.2
"""s. Codecs fill their last packet up; decoded sound may outlast the packets' durations by this much, and is cut."""

Convert = Callable[[np.ndarray], np.ndarray]
"""What is kept of a picture, (H, W, 3) uint8 RGB."""


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
    (sound,) = _take_span(path, start, wanted)
    assert isinstance(sound, _SoundTaker)
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
    (picture,) = _take_span(path, start, wanted)
    assert isinstance(picture, _PictureTaker)
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
    return _segment(_take_span(path, start, wanted))


def read_segments(
    path: str | Path,
    sample_rate: int | None,
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
        path: Any file with the streams wanted.
        sample_rate: Hz, of the waveforms wanted; None for pictures alone, whose waveforms are empty.
        video_fps: Frames wanted per second; None for sound alone, whose segments have no frames.
        starts: s, on the file's timeline, rising.
        seconds: Length of each segment.
        convert: What is kept of a picture, (H, W, 3) uint8 RGB; ``frames`` is a stack of it. All of it if None.
        scan: Of the file, if it is known: it is then not read again to know whether it can be sought in, and pictures
            that nobody wants and no other depends on are not decoded.

    Yields:
        For each start, in order, the segment, or why there is none.
    """
    count = 0 if video_fps is None else round(seconds * video_fps)
    wanted = _Wanted(sample_rate, seconds, video_fps, count, convert)
    if scan is not None and video_fps is not None:
        times = np.concatenate([frame_times(video_fps, start, count) for start in starts])
        wanted = replace(wanted, unwanted=scan.unwanted(times))
    if scan is not None:
        wanted = replace(wanted, restarts=scan.restarts)
    given = 0
    if len(starts) > 1:
        gap = min(later - earlier for earlier, later in itertools.pairwise(starts))
        overlap = math.ceil((seconds + _LEAD) / gap) if gap > 0 else len(starts)
        try:
            for takers in _gather(path, starts, overlap, wanted):
                yield _outcome(takers)
                given += 1
        except _NotInOnePassError:
            pass  # the rest is had one by one
    for start in starts[given:]:
        try:
            takers = _take_span(path, start, wanted)
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
    (taker,) = _take_span(path, 0.0, _Wanted(fps=1.0, times=times, take=take))
    assert isinstance(taker, _PictureStream)
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
    restarts: bool | None = None
    """Whether the clock starts again; None where it was not looked for."""

    def unwanted(self, times: np.ndarray) -> frozenset[int]:
        """Pictures of which none is shown at one of these times, s; empty where that cannot be told."""
        if self.pictures is None or not len(self.pictures):
            return frozenset()
        shown = self.pictures * self.time_base.numerator / self.time_base.denominator - self.zero
        chosen = np.searchsorted(shown, times + SAME_TIME, side="right") - 1
        is_wanted = np.zeros(len(shown), bool)
        is_wanted[np.maximum(chosen, 0)] = True
        is_wanted[[0, -1]] = True  # these say where the video begins and ends
        return frozenset(self.pictures[~is_wanted].tolist()) - frozenset(self.pictures[is_wanted].tolist())


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
            if packet.size == 0 or packet.is_discard:
                continue  # the mark of the end; what is not shown of MP4, whose times are those of shown pictures
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
        return Scan(video, audio, order, unit or Fraction(1), source.zero, source.restarts)


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
    restarts: bool | None = None
    """As in ``Scan``."""
    remove_mean: bool = False
    """Of the sound, over time."""
    times: np.ndarray | None = None
    """(F,) s, of pictures that ``take`` is given, whatever ``fps``."""
    take: Callable[[np.ndarray], None] | None = None

    def open_tracks(self, source: OpenMedia) -> Sequence[_Track]:
        tracks: list[_Track] = []
        if self.sample_rate is not None:
            tracks.append(_SoundTrack(source))
        if self.fps is not None:
            tracks.append(_PictureTrack(source, self.convert, self.unwanted))
        for track in tracks:
            track.prepare()
        return tracks

    def make_takers(self, tracks: Sequence[_Track], start: float) -> Sequence[_Taker]:
        takers: list[_Taker] = []
        for track in tracks:
            if isinstance(track, _SoundTrack):
                assert self.sample_rate is not None
                takers.append(_SoundTaker(track, self.sample_rate, start, self.seconds, self.remove_mean))
            elif isinstance(track, _PictureTrack):
                takers.append(self.make_picture_taker(track, start))
        return takers

    def make_picture_taker(self, track: _PictureTrack, start: float) -> _PictureTaker:
        assert self.fps is not None
        if self.take is not None:
            assert self.times is not None
            return _PictureStream(track, self.times, self.take)
        return _PictureTaker(track, frame_times(self.fps, start, self.count))


class _NotInOnePassError(Exception):
    """The spans cannot be had in one pass, or not in bounded memory; they may be had one by one."""


def _take_span(path: str | Path, start: float, wanted: _Wanted) -> Sequence[_Taker]:
    """Gather one span: a pass over the file, from near the start on, until there is enough.

    Raises:
        MediaError: If the file, or a stream before its span was complete, cannot be decoded.
    """
    if start > _SEEK_BEYOND:
        try:
            takers = next(_gather(path, [start], 1, wanted, seek=start - _PREROLL))
        except MediaError as error:
            if error.reason in ("missing", "no_audio", "no_video"):
                raise
        else:
            if not any(taker.landed_late for taker in takers):
                return takers
        # Seeking went wrong (no index, a false keyframe, timestamps guessed): what is read from the start is right.
    return next(_gather(path, [start], 1, wanted))


def _gather(
    path: str | Path, starts: Sequence[float], overlap: int, wanted: _Wanted, seek: float | None = None
) -> Iterator[Sequence[_Taker]]:
    """Gather spans in one pass over the file.

    Args:
        path: The file.
        starts: s, rising. With several, nothing but a whole pass will do; one alone can do with damage around it.
        overlap: How many spans share a moment, those counted that start less than `_LEAD` later.
        wanted: What is gathered.
        seek: s, where the pass begins; None for the beginning of the file.

    Yields:
        The takers of each span, in order, as soon as they have enough or the file ends.

    Raises:
        MediaError: If something cannot be opened or decoded.
        _NotInOnePassError: If the same happens with several spans, or the streams are so far apart in the file that too
            many spans wait for one of them. Those that were given before are right.
    """
    alone = len(starts) == 1
    to_come, live = deque(starts), deque[Sequence[_Taker]]()
    try:
        with OpenMedia(path) as source:
            tracks = wanted.open_tracks(source)
            if seek is not None:
                try:
                    # A seek is of no use where the same time is there more than once.
                    if source.has_one_clock or not (_restarts(path) if wanted.restarts is None else wanted.restarts):
                        source.container.seek(int((source.zero + seek) * av.time_base))
                except (FFmpegError, OverflowError, OSError) as error:
                    raise source.unreadable(error) from error
            by_stream = {track.stream.index: (number, track) for number, track in enumerate(tracks)}
            for packet in source.packets():
                if packet.stream.index not in by_stream:
                    continue  # only its times matter: all readings of a file have one clock
                number, track = by_stream[packet.stream.index]
                if not to_come and all(takers[number].done for takers in live):
                    continue
                track.see_packet(packet)
                try:
                    for frame in packet.decode():
                        time = track.time_of(frame)
                        while to_come and (alone or time is None or to_come[0] <= time + _LEAD):
                            live.append(wanted.make_takers(tracks, to_come.popleft()))
                            if len(live) > overlap + _MOST_WAITING:
                                raise _NotInOnePassError
                        track.add(frame)
                except FFmpegError as error:
                    if alone and _is_before(packet, starts[0] - _LEAD, track):
                        continue  # sound does not depend on what went before; pictures do
                    if not (alone and live and live[0][number].complete):
                        raise source.unreadable(error) from error
                    del by_stream[packet.stream.index]
                while live and all(taker.done for taker in live[0]):
                    yield _let_go(live.popleft())
                if not live and not to_come:
                    return
            while live or to_come:
                yield _let_go(live.popleft() if live else wanted.make_takers(tracks, to_come.popleft()))
    except MediaError as error:
        if not alone:
            raise _NotInOnePassError from error
        if not (live and all(taker.complete for taker in live[0])):
            raise
        yield _let_go(live.popleft())


def _let_go(takers: Sequence[_Taker]) -> Sequence[_Taker]:
    """These need no more frames."""
    for taker in takers:
        cast(list[Any], taker.track.takers).remove(taker)
    return takers


def _restarts(path: str | Path) -> bool:
    """Whether a file's clock starts again, found by reading all packets, once."""
    status = Path(path).stat()
    return _find_restarts(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _find_restarts(path: str | Path, size: int, mtime_ns: int) -> bool:
    with OpenMedia(path) as source:
        deque(source.packets(), maxlen=0)
        return source.restarts


def _is_before(packet: Packet[Any], time: float, track: _Track) -> bool:
    """Whether a packet of sound lies before a time, s."""
    return track.kind == "sound" and packet.pts is not None and track.seconds(packet.pts) < time


class _Track:
    """Follows one stream of a file: when its frames are on the timeline. Gives them to those who gather them."""

    def __init__(self, source: OpenMedia, stream: AudioStream | VideoStream | None, kind: str) -> None:
        if stream is None:
            reason = "no_audio" if kind == "sound" else "no_video"
            raise MediaError(reason, source.path, f"has no {kind} track")
        self.source, self.stream, self.kind = source, stream, kind
        self.has_packets = stream.frames > 0  # by the container's index
        base = stream.time_base or Fraction(1)
        self._numerator, self._denominator = base.numerator, base.denominator  # PyAV makes a Fraction for each frame

    def prepare(self) -> None:
        """Refuse a stream without a decoder."""
        if self.stream.codec_context is None:
            raise self.source.unreadable(f"there is no decoder for its {self.stream.type} track")
        # One thread: extraction runs one process per core, and frame threads decode more than is wanted.
        self.stream.codec_context.thread_count = 1

    def see_packet(self, packet: Packet[Any]) -> None:
        """Take note of a packet before it is decoded."""
        self.has_packets = self.has_packets or packet.size > 0

    def length(self, units: int) -> float:
        """Of a duration, s."""
        return units * self._numerator / self._denominator

    def seconds(self, units: int) -> float:
        """On the timeline."""
        return self.length(units) - self.source.zero

    def time_of(self, frame: AudioFrame | VideoFrame) -> float | None:
        """s; None if the frame does not say."""
        return None if frame.pts is None else self.seconds(frame.pts)

    def add(self, frame: Any) -> None:
        """Put a decoded frame in its place, and give it to the takers."""
        raise NotImplementedError

    def nothing(self) -> MediaError:
        """Why nothing was decoded."""
        if self.has_packets:
            return self.source.unreadable(f"its {self.kind} track holds nothing that can be decoded")
        reason = "no_audio" if self.kind == "sound" else "no_video"
        return MediaError(reason, self.source.path, f"announces a {self.kind} track and has no packet of it")


class _SoundTrack(_Track):
    """At which sample of the file's own rate each decoded frame of sound begins."""

    def __init__(self, source: OpenMedia) -> None:
        super().__init__(source, source.audio, "sound")
        self.rate = 0  # of the file, Hz; known once something is decoded
        self.landed: int | None = None  # the first sample decoded
        self.position: int | None = None  # one past the last sample decoded
        self.last_packet = -math.inf  # s, where the packets so far end
        self.takers: list[_SoundTaker] = []
        self.shift = 0.0  # s, added to all times: packets without a time came before, whose length nobody knew
        self._untimed = False  # whether such came since the shift was set
        self._mixer: tuple[tuple[str, str, int], Graph] | None = None  # for frames of one kind

    def see_packet(self, packet: Packet[Any]) -> None:
        """Note where the packet ends: the last one's padding is decoded too, but its duration does not count it."""
        super().see_packet(packet)
        if packet.pts is not None and packet.duration and not packet.is_discard:
            self.last_packet = max(self.last_packet, self.seconds(packet.pts + packet.duration))

    def add(self, frame: AudioFrame) -> None:
        """Put a decoded frame in its place, and give it to the takers."""
        self.rate = self.rate or frame.sample_rate
        position = self.position or 0
        time = self.time_of(frame)
        if time is None:
            self._untimed = True
        else:
            time += self.shift
            if self.position is None:
                position = round(time * self.rate)
            elif self._untimed and position / self.rate - time > _OVERLAP:
                self.shift += position / self.rate - time
                self._untimed = False
            elif abs(time - position / self.rate) > _JITTER:
                if time - position / self.rate > _LONGEST_GAP:
                    raise self.source.unreadable(f"its sound has a gap of {time - position / self.rate:.0f} s")
                position = round(time * self.rate)
        if self.landed is None:
            self.landed = position
        wanting = [taker for taker in self.takers if taker.wants(position, position + frame.samples)]
        self.position = position + frame.samples
        if wanting or frame.sample_rate != self.rate:
            mono = self._mix(frame)
            self.position = position + len(mono)
            for taker in wanting:
                taker.pieces.append((position, mono))

    def _mix(self, frame: AudioFrame) -> np.ndarray:
        """(N,) float32: one channel at ``rate``, as ``ffmpeg -ac 1`` mixes; where the rate changes, N is another."""
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if self._mixer is None or self._mixer[0] != kind:
            channels = len(frame.layout.channels)
            mean = "mono|c0=" + "+".join(f"{1 / channels}*c{number}" for number in range(channels))
            resampling = ("aresample", f"osf=flt:osr={self.rate}:ochl=mono:rematrix_maxval=1")
            try:
                graph = self._make_mixer(frame, resampling)
            except FFmpegError:  # no layout has so many channels
                graph = self._make_mixer(frame, ("pan", mean), resampling)
            self._mixer = kind, graph
        graph = self._mixer[1]
        graph.push(frame)
        if frame.sample_rate == self.rate:
            mono = cast(AudioFrame, graph.pull())
            return np.frombuffer(cast(Any, mono.planes[0]), np.float32, mono.samples)
        mixed: list[np.ndarray] = []
        while True:
            try:
                mixed.append(cast(AudioFrame, graph.pull()).to_ndarray()[0])
            except (BlockingIOError, EOFError):
                return np.concatenate(mixed) if mixed else np.zeros(0, np.float32)

    @staticmethod
    def _make_mixer(frame: AudioFrame, *filters: tuple[str, str]) -> Graph:
        graph = Graph()
        channels, layout = len(frame.layout.channels), frame.layout.name
        last = graph.add_abuffer(None, frame.sample_rate, frame.format.name, layout, channels, "", frame.time_base)
        for name, options in (*filters, ("abuffersink", "")):
            following = graph.add(name, options)
            last.link_to(following)
            last = following
        graph.configure()
        return graph


class _SoundTaker:
    """Gathers the sound of a span, sample by sample of the file's own rate."""

    def __init__(
        self, track: _SoundTrack, sample_rate: int, start: float, seconds: float | None, remove_mean: bool = False
    ) -> None:
        if sample_rate < 1:
            raise ValueError(f"sample rate must be at least 1 Hz, got {sample_rate}")
        self.remove_mean = remove_mean  # over all that follows the start, so all of it is gathered
        self.track, self.sample_rate, self.start, self.seconds = track, sample_rate, start, seconds
        self.pieces: list[tuple[int, np.ndarray]] = []
        self._bounds: tuple[int, int | None] | None = None
        track.takers.append(self)

    @property
    def bounds(self) -> tuple[int, int | None]:
        """The first sample gathered and one past the last one, on the file's timeline."""
        if self._bounds is None:
            # The context is a whole number of samples at both rates, so that the result is on the span's own grid.
            rate = self.track.rate
            step = rate // math.gcd(rate, self.sample_rate)
            context = 0 if rate == self.sample_rate else math.ceil(_CONTEXT * rate / step) * step
            to_end = self.seconds is None or self.remove_mean
            stop = None if to_end else round((self.start + (self.seconds or 0)) * rate) + context
            self._bounds = round(self.start * rate) - context, stop
        return self._bounds

    @property
    def complete(self) -> bool:
        """Whether all that was asked for has been decoded."""
        if self.track.position is None or self.seconds is None or self.remove_mean:
            return False
        return self.track.position >= round((self.start + self.seconds) * self.track.rate)

    @property
    def done(self) -> bool:
        """Whether decoding more would change nothing."""
        if self.track.position is None:
            return False
        stop = self.bounds[1]
        return stop is not None and self.track.position >= stop

    @property
    def landed_late(self) -> bool:
        """Whether decoding began, after a seek, behind the first sample wanted."""
        return self.track.landed is None or self.track.landed > max(self.bounds[0], 0)

    def wants(self, begin: int, end: int) -> bool:
        """Whether samples from ``begin`` to before ``end`` are of use."""
        first, stop = self.bounds
        return end > first and (stop is None or begin < stop)

    def result(self) -> AudioSpan:
        """The span at the rate wanted.

        Raises:
            MediaError: If nothing was decoded, or nothing after the start.
        """
        track, path = self.track, self.track.source.path
        if track.position is None:
            raise track.nothing()
        (first, stop), end, rate = self.bounds, track.position, track.rate
        last_packet = track.last_packet + track.shift
        if not self.done and 0 < end / rate - last_packet < _LONGEST_PADDING:
            end = round(last_packet * rate)
        wanted = end / rate - self.start if self.seconds is None else self.seconds
        samples = max(0, round(wanted * self.sample_rate))
        valid = min(samples, round((end / rate - self.start) * self.sample_rate))
        if valid < 1:
            raise MediaError("too_short", path, f"its sound ends at {end / rate:.2f} s, before {self.start:g} s")
        stop = end if stop is None else stop
        gathered = np.zeros(stop - first, np.float32)
        for position, piece in self.pieces:
            begin, finish = max(position, first), min(position + len(piece), stop, end)
            if begin < finish:
                gathered[begin - first : finish - first] = piece[begin - position : finish - position]
        if not np.isfinite(gathered).all():
            raise track.source.unreadable("its sound holds values that are not numbers")
        if self.remove_mean:
            own = gathered[max(0, -first) :]  # before 0 there is no sound
            own -= own.mean(dtype=np.float64).astype(np.float32)
        skip = (round(self.start * rate) - first) * self.sample_rate // rate
        waveform = np.zeros(samples, np.float32)
        heard = resample(gathered, rate, self.sample_rate)[skip : skip + valid]
        waveform[: len(heard)] = heard
        return AudioSpan(waveform, valid)


class _PictureTrack(_Track):
    """From when until when each picture is shown.

    Args:
        source: The file.
        convert: What is kept of a picture that is wanted; the picture itself if None.
        unwanted: Presentation times, in the stream's units, of packets that need not be decoded if no other depends on
            them.
    """

    def __init__(self, source: OpenMedia, convert: Convert | None, unwanted: frozenset[int]) -> None:
        super().__init__(source, source.video, "video")
        assert source.video is not None
        self.convert, self.unwanted = convert, unwanted
        self.latest: tuple[float, VideoFrame] | None = None  # not yet given out: the next frame's time decides
        self.end = -math.inf  # s, where the pictures so far end
        self.interval = float(1 / source.video.average_rate) if source.video.average_rate else 0.0
        self.landed_on: tuple[float, bool] | None = None  # time of the first frame, and whether it is whole
        self.takers: list[_PictureTaker] = []
        self._size: tuple[int, int] | None = None
        self._pixel = source.video.sample_aspect_ratio  # read here: results are made when the file is closed
        self._reformatter = VideoReformatter()
        self._kept: tuple[VideoFrame, np.ndarray] | None = None
        self._skips = False
        self._order = _Order(source.has_pts)

    def see_packet(self, packet: Packet[Any]) -> None:
        """Let the decoder leave out a picture that nobody wants and no other picture is built on."""
        super().see_packet(packet)
        skips = packet.pts in self.unwanted
        if skips != self._skips and self.stream.codec_context is not None:
            self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            self._skips = skips

    def add(self, frame: VideoFrame) -> None:
        """Take note of a decoded frame; the one before it is now known to be shown until then."""
        frame.pts = self._order.time(frame)
        given = self.time_of(frame)
        time = given if given is not None else 0.0 if self.latest is None else self.latest[0] + self.interval
        if self.latest is None:
            self.landed_on = time, frame.key_frame and not frame.is_corrupt
            self.latest = (time, frame)
            self._give(-math.inf, frame, until=time)
        elif time < self.latest[0]:
            self._give(time, frame, until=self.latest[0])  # timestamps out of order
        else:
            self._give(*self.latest, until=time)
            self.interval = time - self.latest[0] or self.interval
            self.latest = (time, frame)
        duration = self.length(frame.duration) if frame.duration and given is not None else self.interval
        self.end = max(self.end, time + duration)

    def keep(self, frame: VideoFrame) -> np.ndarray:
        """What is kept of a frame: (H, W, 3) uint8, upright, of the first one's size; or what ``convert`` makes."""
        if self._kept is None or self._kept[0] is not frame:
            self._size = self._size or display_size(frame.width, frame.height, self._pixel)
            pixels = to_rgb(frame, self._size, self._reformatter)
            self._kept = frame, pixels if self.convert is None else self.convert(pixels)
        return self._kept[1]

    def _give(self, time: float, frame: VideoFrame, until: float) -> None:
        for taker in self.takers:
            taker.choose(time, frame, until)


class _Order:
    """Presentation time or decoding time of a picture, whichever contradicts the decoder's order less often.

    Source: ``guess_correct_pts`` of FFmpeg's libavcodec/decode.c, which makes ``best_effort_timestamp``.
    """

    def __init__(self, has_pts: bool) -> None:
        self.has_pts = has_pts
        self._last_pts = self._last_dts = -(1 << 63)
        self._faulty_pts = self._faulty_dts = 0

    def time(self, frame: VideoFrame) -> int | None:
        """In the stream's units; pictures come from the decoder in the order in which they are shown."""
        pts, dts = frame.pts, frame.dts
        if not self.has_pts:
            return dts
        if dts is not None:
            self._faulty_dts += dts <= self._last_dts
            self._last_dts = dts
        if pts is not None:
            self._faulty_pts += pts <= self._last_pts
            self._last_pts = pts
        return pts if pts is not None and (dts is None or self._faulty_pts <= self._faulty_dts) else dts


class _PictureTaker:
    """Gathers the pictures that are shown at given times, and turns only these into RGB."""

    def __init__(self, track: _PictureTrack, times: np.ndarray) -> None:
        self.track, self.times = track, times  # (V,) s, rising
        self.chosen: list[np.ndarray | None] = [None] * len(times)
        self._times = times.tolist()  # in Python's numbers, as every frame is compared with them
        self._shown_since = [-math.inf] * len(times)  # s, presentation time of the frame chosen so far
        track.takers.append(self)

    @property
    def complete(self) -> bool:
        """Whether the frame after the last one wanted has been seen."""
        return self.track.latest is not None and self.track.latest[0] > self._times[-1] + SAME_TIME

    @property
    def done(self) -> bool:
        """Whether decoding more would change nothing."""
        return self.complete

    @property
    def landed_late(self) -> bool:
        """Whether decoding began behind the first time wanted, or on what only the file calls a keyframe."""
        landed = self.track.landed_on
        return landed is None or landed[0] > self.times[0] + SAME_TIME or not landed[1]

    def choose(self, time: float, frame: VideoFrame, until: float) -> None:
        """Let ``frame``, shown from ``time`` on, be the picture of all times up to ``until`` that have no later one."""
        first, stop = bisect_left(self._times, time - SAME_TIME), bisect_left(self._times, until - SAME_TIME)
        for number in range(first, stop):
            if self._shown_since[number] <= time:
                if frame.is_corrupt:
                    raise self.track.source.unreadable(f"its picture at {time:.2f} s is damaged")
                self.chosen[number] = self.track.keep(frame)
                self._shown_since[number] = time

    def result(self) -> FrameSpan:
        """The frames at the times wanted.

        Raises:
            MediaError: If nothing was decoded, or the video ends before the first time.
        """
        track = self.track
        if track.latest is None:
            raise track.nothing()
        self.choose(*track.latest, until=math.inf)
        end = math.inf if self.complete else track.end
        valid = int((self.times < end - SAME_TIME).sum())
        if not valid:
            raise MediaError(
                "too_short", track.source.path, f"its video ends at {end:.2f} s, before {self.times[0]:g} s"
            )
        frames = [frame for frame in self.chosen if frame is not None]
        assert len(frames) == len(self.times)
        return FrameSpan(np.stack(frames), valid)


class _PictureStream(_PictureTaker):
    """Hands pictures on as soon as they are final."""

    def __init__(self, track: _PictureTrack, times: np.ndarray, take: Callable[[np.ndarray], None]) -> None:
        super().__init__(track, times)
        self.take = take
        self.given = 0

    def choose(self, time: float, frame: VideoFrame, until: float) -> None:
        """Take note of a picture, and hand on what no later one can change."""
        super().choose(time, frame, until)
        if not np.isfinite(until):
            return
        settled = int(np.searchsorted(self.times, until - _SETTLED_SECONDS))
        waiting = settled - self.given
        first = self.chosen[self.given] if waiting > 0 else None
        if first is not None and (waiting >= _CHUNK_FRAMES or waiting * first.nbytes >= _CHUNK_BYTES):
            self._hand_on(settled)

    def finish(self) -> np.ndarray:
        """Hand on the rest; whether the video was still running at each time."""
        track = self.track
        if track.latest is None:
            raise track.nothing()
        self.choose(*track.latest, until=math.inf)
        end = math.inf if self.complete else track.end
        running = self.times < end - SAME_TIME
        running[0] = True  # of a video that ends before the first time, its last picture is still what there is
        while self.given < len(self.times):
            self._hand_on(min(self.given + _CHUNK_FRAMES, len(self.times)))
        return running

    def _hand_on(self, stop: int) -> None:
        frames = [frame for frame in self.chosen[self.given : stop] if frame is not None]
        assert len(frames) == stop - self.given
        self.take(np.stack(frames))
        self.chosen[self.given : stop] = [None] * len(frames)
        self.given = stop


def frame_times(fps: float, start: float, count: int) -> np.ndarray:
    """(V,) s: the middles of frames at an even rate."""
    return start + (np.arange(count) + 0.5) / fps


_Taker = _SoundTaker | _PictureTaker


def _outcome(takers: Sequence[_Taker]) -> MediaSegment | MediaError:
    try:
        return _segment(takers)
    except MediaError as error:
        return error


def _segment(takers: Sequence[_Taker]) -> MediaSegment:
    heard, seen = AudioSpan(np.zeros(0, np.float32), 0), FrameSpan(np.zeros((0, 0, 0, 3), np.uint8), 0)
    for taker in takers:
        if isinstance(taker, _SoundTaker):
            heard = taker.result()
        else:
            seen = taker.result()
    return MediaSegment(heard.waveform, heard.valid_samples, seen.frames, seen.valid_frames)


def _check_span(start: float, seconds: float | None) -> None:
    if not 0 <= start < math.inf or not (seconds is None or 0 < seconds < math.inf):
        raise ValueError(f"a span starts at 0 s or later and is longer than 0 s; got start {start}, length {seconds}")
