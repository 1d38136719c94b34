"""Decoding a span of a media file: streams chosen, frames placed on the file's timeline, sound and pictures gathered.

The machinery behind ``vab.data.media``, which says what the timeline is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, cast

import av
import av.logging
import numpy as np
from av import AudioFrame, AudioStream, Packet, VideoFrame, VideoStream
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from vab.audio import resample, to_mono
from vab.spec import UserError

# What FFmpeg has to say reaches the user as one MediaError, not as lines across a progress bar.
av.logging.set_level(None)

_SEEK_BEYOND = 5.0
"""s. A span that starts later than this is reached by seeking; before it, decoding from the start costs less."""
_PREROLL = 1.0
"""s. How far before the wanted time a seek aims: decoders need some packets to settle (AAC overlap, MP3 reservoir)."""
_JITTER = 0.02
"""s. Timestamps this near to the end of the sound so far continue it: coarse clocks (1 ms in MKV, FLV) are not gaps."""
_CONTEXT = 0.05
"""s. Sound decoded on both sides of a span, so that the resampler's filter sees what is really there."""
_LONGEST_GAP = 600.0
"""s. A longer jump between timestamps is taken for damage, not for silence."""
_SAME_TIME = 1e-6
"""s. Times nearer than this are equal: they are sums of rounded fractions."""
_NOT_VIDEO = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
_LONGEST_PADDING = 0.2
"""s. Codecs fill their last packet up; decoded sound may outlast the packets' durations by this much, and is cut."""
_FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}
S = TypeVar("S", VideoStream, AudioStream)


class MediaError(UserError):
    """A file that cannot give what was asked for.

    Attributes:
        reason: One word for reports: ``missing``, ``unreadable``, ``no_audio``, ``no_video`` or ``too_short``.
        path: The file.
        detail: For people, what is wrong with it.
    """

    def __init__(self, reason: str, path: Path, detail: str) -> None:
        super().__init__(reason, path, detail)
        self.reason, self.path, self.detail = reason, path, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


@dataclass(frozen=True)
class AudioSpan:
    """Some seconds of sound."""

    waveform: np.ndarray
    """(N,) float32, nominally in [-1, 1]; zero from ``valid_samples`` on."""
    valid_samples: int
    """Samples before the file's sound ended, 1..N. Gaps inside, and a late start, are silence that counts."""


@dataclass(frozen=True)
class FrameSpan:
    """Some frames of video."""

    frames: np.ndarray
    """(V, H, W, 3) uint8 RGB; from ``valid_frames`` on the last picture is repeated."""
    valid_frames: int
    """Frames before the file's video ended, 1..V."""


class OpenMedia:
    """An open file: the two streams that are used, and the zero of its timeline."""

    def __init__(self, path: str | Path, generate_pts: bool = False) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise MediaError("missing", self.path, "there is no such file")
        if not self.path.is_file():
            raise MediaError("unreadable", self.path, "is not a file")
        # A media file can refer to others, also over the network: files alone are followed.
        options = {"protocol_whitelist": "file"} | ({"fflags": "+genpts"} if generate_pts else {})
        try:
            self.container = av.open(f"file:{self.path}", options=options, metadata_errors="replace")
        except (FFmpegError, OSError) as error:
            raise self.unreadable(error) from error
        streams = self.container.streams
        if not len(streams):
            raise self.unreadable("it holds no stream")
        video = [s for s in streams.video if not s.disposition & _NOT_VIDEO]
        self.video = self._best("video", video)
        self.audio = self._best("audio", streams.audio)
        starts = [
            float(s.start_time * s.time_base)
            for s in (self.video, self.audio)
            if s and s.start_time is not None and s.time_base
        ]
        self.zero = max(0.0, min(starts, default=0.0))

    def _best(self, kind: Literal["video", "audio"], candidates: Sequence[S]) -> S | None:
        """FFmpeg's choice, unless it cannot be decoded and another one can."""
        best = self.container.streams.best(kind)
        # False sorts before True, and equals stay in the order of the file.
        order = sorted(candidates, key=lambda s: (s.codec_context is None, best is None or s.index != best.index))
        return order[0] if order else None

    def __enter__(self) -> OpenMedia:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()

    def packets(self, streams: Sequence[VideoStream | AudioStream]) -> Iterator[Packet[Any]]:
        """The packets of these streams in the order of the file; an empty one per stream marks its end.

        Raises:
            MediaError: If the container is damaged.
        """
        if not streams:
            return
        packets = self.container.demux(*streams)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError as error:
                raise self.unreadable(error) from error
            if packet is None:
                return
            yield packet

    def unreadable(self, error: Exception | str) -> MediaError:
        """What to raise when FFmpeg gives up."""
        said = error if isinstance(error, str) else (getattr(error, "strerror", None) or str(error))
        return MediaError("unreadable", self.path, f"cannot be read: {said}")


class SoundTaker:
    """Gathers the sound of a span, sample by sample of the file's own rate."""

    def __init__(self, source: OpenMedia, sample_rate: int, start: float, seconds: float | None) -> None:
        if sample_rate < 1:
            raise ValueError(f"sample rate must be at least 1 Hz, got {sample_rate}")
        if source.audio is None:
            raise MediaError("no_audio", source.path, "has no sound track")
        self.source, self.stream = source, source.audio
        self.sample_rate, self.start, self.seconds = sample_rate, start, seconds
        self.rate = 0  # of the file, known once something is decoded
        self.first = 0  # number of the first sample gathered, on the file's timeline
        self.stop: int | None = None  # one past the last sample gathered
        self.position: int | None = None  # one past the last sample decoded
        self.last_packet = -math.inf  # s, where the packets so far end
        self.pieces: list[tuple[int, np.ndarray]] = []
        self.landed_late = False

    @property
    def complete(self) -> bool:
        """Whether all that was asked for has been decoded."""
        if self.position is None or self.seconds is None:
            return False
        return self.position >= round((self.start + self.seconds) * self.rate)

    @property
    def done(self) -> bool:
        """Whether decoding more would change nothing."""
        return self.stop is not None and self.position is not None and self.position >= self.stop

    def see_packet(self, packet: Packet[Any]) -> None:
        """Note where the packet ends: the last one's padding is decoded too, but its duration does not count it."""
        if packet.pts is not None and packet.duration and packet.time_base is not None:
            end = float((packet.pts + packet.duration) * packet.time_base) - self.source.zero
            self.last_packet = max(self.last_packet, end)

    def add(self, frame: AudioFrame) -> None:
        """Put a decoded frame in its place."""
        if not self.rate:
            self._begin(frame.sample_rate)
        if frame.sample_rate != self.rate:
            raise self.source.unreadable(f"its sample rate changes from {self.rate} to {frame.sample_rate} Hz")
        position = self.position or 0
        if frame.pts is not None and frame.time_base is not None:
            time = float(frame.pts * frame.time_base) - self.source.zero
            if self.position is None:
                position = round(time * self.rate)
                self.landed_late = position > max(self.first, 0)
            elif abs(time - position / self.rate) > _JITTER:
                if time - position / self.rate > _LONGEST_GAP:
                    raise self.source.unreadable(f"its sound has a gap of {time - position / self.rate:.0f} s")
                position = round(time * self.rate)
        end = position + frame.samples
        if end > self.first and (self.stop is None or position < self.stop):
            self.pieces.append((position, to_mono(_channels(frame))))
        self.position = end

    def result(self) -> AudioSpan:
        """The span at the rate wanted.

        Raises:
            MediaError: If nothing was decoded, or nothing after the start.
        """
        path = self.source.path
        if self.position is None:
            raise self.source.unreadable("its sound track holds nothing that can be decoded")
        end = self.position
        if not self.done and 0 < end / self.rate - self.last_packet < _LONGEST_PADDING:
            end = round(self.last_packet * self.rate)
        wanted = end / self.rate - self.start if self.seconds is None else self.seconds
        samples = max(0, round(wanted * self.sample_rate))
        valid = min(samples, round((end / self.rate - self.start) * self.sample_rate))
        if valid < 1:
            raise MediaError("too_short", path, f"its sound ends at {end / self.rate:.2f} s, before {self.start:g} s")
        stop = end if self.stop is None else self.stop
        gathered = np.zeros(stop - self.first, np.float32)
        for position, piece in self.pieces:
            begin, finish = max(position, self.first), min(position + len(piece), stop, end)
            if begin < finish:
                gathered[begin - self.first : finish - self.first] = piece[begin - position : finish - position]
        if not np.isfinite(gathered).all():
            raise self.source.unreadable("its sound holds values that are not numbers")
        skip = (round(self.start * self.rate) - self.first) * self.sample_rate // self.rate
        waveform = np.zeros(samples, np.float32)
        heard = resample(gathered, self.rate, self.sample_rate)[skip : skip + valid]
        waveform[: len(heard)] = heard
        return AudioSpan(waveform, valid)

    def _begin(self, rate: int) -> None:
        # The context is a whole number of samples at both rates, so that the result is on the span's own grid.
        step = rate // math.gcd(rate, self.sample_rate)
        context = 0 if rate == self.sample_rate else math.ceil(_CONTEXT * rate / step) * step
        self.rate = rate
        self.first = round(self.start * rate) - context
        if self.seconds is not None:
            self.stop = round((self.start + self.seconds) * rate) + context


class PictureTaker:
    """Gathers the pictures that are shown at given times, and turns only these into RGB."""

    def __init__(self, source: OpenMedia, fps: float, start: float, count: int) -> None:
        if source.video is None:
            raise MediaError("no_video", source.path, "has no video track")
        self.source, self.stream = source, source.video
        self.times = start + (np.arange(count) + 0.5) / fps  # (V,)
        self.shown_since = np.full(count, -math.inf)  # (V,) s, presentation time of the frame chosen so far
        self.chosen: list[np.ndarray | None] = [None] * count
        self.latest: tuple[float, VideoFrame] | None = None  # not yet chosen: the next frame's time decides
        self.end = -math.inf
        self.interval = float(1 / source.video.average_rate) if source.video.average_rate else 0.0
        self.size: tuple[int, int] | None = None
        self.reformatter = VideoReformatter()
        self.landed_late = False  # only asked after a seek

    @property
    def complete(self) -> bool:
        """Whether the frame after the last one wanted has been seen."""
        return self.latest is not None and self.latest[0] > self.times[-1] + _SAME_TIME

    @property
    def done(self) -> bool:
        """Whether decoding more would change nothing."""
        return self.complete

    def see_packet(self, packet: Packet[Any]) -> None:
        """Packets say nothing about pictures that the pictures do not say."""

    def add(self, frame: VideoFrame) -> None:
        """Take note of a decoded frame; the one before it is now known to be shown until then."""
        if frame.pts is not None and frame.time_base is not None:
            time = float(frame.pts * frame.time_base) - self.source.zero
        else:
            time = 0.0 if self.latest is None else self.latest[0] + self.interval
        if self.latest is None:
            # A seek can land on what the file calls a keyframe and is not: then the first picture is a damaged one.
            self.landed_late = time > self.times[0] + _SAME_TIME or frame.is_corrupt or not frame.key_frame
            self.latest = (time, frame)
            self._choose(-math.inf, frame, until=time)
        elif time < self.latest[0]:
            self._choose(time, frame, until=self.latest[0])  # timestamps out of order
        else:
            self._choose(*self.latest, until=time)
            self.interval = time - self.latest[0] or self.interval
            self.latest = (time, frame)
        duration = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else self.interval
        self.end = max(self.end, time + duration)

    def result(self) -> FrameSpan:
        """The frames at the times wanted.

        Raises:
            MediaError: If nothing was decoded, or the video ends before the first time.
        """
        if self.latest is None:
            raise self.source.unreadable("its video track holds nothing that can be decoded")
        self._choose(*self.latest, until=math.inf)
        end = math.inf if self.complete else self.end
        valid = int((self.times < end - _SAME_TIME).sum())
        if not valid:
            raise MediaError(
                "too_short", self.source.path, f"its video ends at {end:.2f} s, before {self.times[0]:g} s"
            )
        frames = [frame for frame in self.chosen if frame is not None]
        assert len(frames) == len(self.times)
        return FrameSpan(np.stack(frames), valid)

    def _choose(self, time: float, frame: VideoFrame, until: float) -> None:
        """Let ``frame``, shown from ``time`` on, be the picture of all times up to ``until`` that have no later one."""
        wanted = (self.times >= time - _SAME_TIME) & (self.times < until - _SAME_TIME) & (self.shown_since <= time)
        if wanted.any():
            if frame.is_corrupt:
                raise self.source.unreadable(f"its picture at {time:.2f} s is damaged")
            pixels = self._rgb(frame)
            for number in np.flatnonzero(wanted):
                self.chosen[number] = pixels
            self.shown_since[wanted] = time

    def _rgb(self, frame: VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8, upright, all of the first one's size."""
        self.size = self.size or (frame.width, frame.height)
        converted = self.reformatter.reformat(frame, *self.size, format="rgb24", threads=1)
        return upright(converted.to_ndarray(), frame)


class Taker(Protocol):
    """What ``take_span`` feeds with the frames of one stream."""

    stream: Any
    """The stream wanted."""
    landed_late: bool
    """Whether its first frame after a seek was not one from which the span can be had."""

    @property
    def complete(self) -> bool:
        """Whether all that was asked for has been decoded."""

    @property
    def done(self) -> bool:
        """Whether decoding more would change nothing."""

    def see_packet(self, packet: Packet[Any]) -> None:
        """Look at a packet before it is decoded."""

    def add(self, frame: Any) -> None:
        """Take a decoded frame."""


def take_span(path: str | Path, start: float, make_takers: Callable[[OpenMedia], Sequence[Taker]]) -> Sequence[Taker]:
    """One pass over the file that feeds each taker the frames of its stream, until all have enough.

    Raises:
        MediaError: If the file, or a stream before its taker was complete, cannot be decoded.
    """
    if start > _SEEK_BEYOND:
        try:
            takers = _pass(path, make_takers, seek=start - _PREROLL)
        except MediaError as error:
            if error.reason in ("missing", "no_audio", "no_video"):
                raise
        else:
            if not any(taker.landed_late for taker in takers):
                return takers
        # Seeking went wrong (no index, a false keyframe, timestamps guessed): what is read from the start is right.
    return _pass(path, make_takers, seek=None)


def _pass(path: str | Path, make_takers: Callable[[OpenMedia], Sequence[Taker]], seek: float | None) -> Sequence[Taker]:
    with OpenMedia(path) as source:
        takers = make_takers(source)
        for taker in takers:
            if taker.stream.codec_context is None:
                raise source.unreadable(f"there is no decoder for its {taker.stream.type} track")
            # One thread: extraction runs one process per core, and frame threads decode more than is wanted.
            taker.stream.codec_context.thread_count = 1
        if seek is not None:
            try:
                source.container.seek(int((source.zero + seek) * av.time_base))
            except FFmpegError as error:
                raise source.unreadable(error) from error
        waiting = {taker.stream.index: taker for taker in takers}
        try:
            for packet in source.packets([taker.stream for taker in takers]):
                current = waiting.get(packet.stream.index)
                if current is None:
                    continue
                current.see_packet(packet)
                try:
                    for frame in packet.decode():
                        current.add(frame)
                except FFmpegError as error:
                    if not current.complete:
                        raise source.unreadable(error) from error
                    del waiting[packet.stream.index]
                if current.done:
                    waiting.pop(packet.stream.index, None)
                if not waiting:
                    break
        except MediaError:
            if not all(taker.complete for taker in takers):
                raise
        return takers


def _channels(frame: AudioFrame) -> np.ndarray:
    """(channels, N) float32 in [-1, 1] of a frame in any sample format."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(frame.samples, -1).T
    kind = frame.format.name.removesuffix("p")
    centred = values.astype(np.float32) - (128.0 if kind == "u8" else 0.0)
    return (centred / np.float32(_FULL_SCALE[kind])).astype(np.float32)


def upright(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Apply the frame's display matrix (FFmpeg's libavutil/display.h), rounded to quarter turns and mirrors."""
    try:
        matrix = cast(Mapping[SideDataType, Any], frame.side_data).get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # PyAV 18 stumbles over side data that it does not know, such as EXIF
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    if matrix is None:
        return pixels
    # (x, y) goes to (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5]
    if abs(int(a)) + abs(int(d)) < abs(int(b)) + abs(int(c)):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
