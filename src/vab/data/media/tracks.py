"""One stream of an open file, decoded frame by frame: its sound or its pictures for each span.

A span is a part of the timeline that is wanted. A track knows all spans of a reading from the beginning, in order of
their starts. It keeps only what a span needs, and gives it away span by span.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

import numpy as np
from av import AudioFrame, AudioStream, Packet, VideoFrame, VideoStream
from av.error import FFmpegError
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from vab.audio import resample
from vab.data.media.open import MediaError, OpenMedia
from vab.data.media.pictures import display_size, to_rgb

SAME_TIME = 1e-6
"""s. Times nearer than this are equal: they are sums of rounded fractions."""
_JITTER = 0.02
"""s. Timestamps this near to the end of the sound so far continue it: coarse clocks (1 ms in MKV, FLV) are not gaps."""
_OVERLAP = 0.1
"""s. Sound that would replace more than this of sound whose packets had no times is put behind it."""
_CONTEXT = 0.05
"""s. Sound decoded on both sides of a span, so that the resampler's filter sees what is really there."""
_HARMLESS = 1.5
"""s. Damaged sound that lies this long before a span does not reach into it."""
_LONGEST_GAP = 600.0
"""s. A longer jump between timestamps is taken for damage, not for silence."""
_LONGEST_PADDING = 0.2
"""s. Codecs fill up their last packet; decoded sound that outlasts the packets' durations by up to this is cut."""

Convert = Callable[[np.ndarray], np.ndarray]
"""What is kept of a picture, (H, W, 3) uint8 RGB."""


@dataclass
class MediaSegment:
    """Sound and frames of the same seconds; empty where one of them was not asked for."""

    waveform: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """(N,) float32, nominally in [-1, 1]; zero from ``valid_samples`` on."""
    valid_samples: int = 0
    """Samples before the file's sound ended, 1..N. Gaps inside, and a late start, are silence that counts."""
    frames: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))
    """(V, H, W, 3) uint8 RGB; from ``valid_frames`` on the last picture is repeated."""
    valid_frames: int = 0
    """Frames before the file's video ended, 1..V."""


class _Track:
    """A stream whose decoded frames are put on the file's timeline."""

    def __init__(self, source: OpenMedia, stream: AudioStream | VideoStream | None, kind: str, num_spans: int) -> None:
        self.reason = "no_audio" if kind == "sound" else "no_video"
        if stream is None:
            raise MediaError(self.reason, source.path, f"has no {kind} track")
        self.source, self.stream, self.kind, self.num_spans = source, stream, kind, num_spans
        self.has_packets = stream.frames > 0  # by the container's index
        base = stream.time_base or Fraction(1)
        self._numerator, self._denominator = base.numerator, base.denominator  # PyAV makes a Fraction for each frame

    def prepare(self) -> None:
        """Set the decoder up.

        Raises:
            MediaError: If there is none.
        """
        if self.stream.codec_context is None:
            raise self.source.unreadable(f"there is no decoder for its {self.stream.type} track")
        # One thread: extraction runs one process per core, and frame threads decode more than is wanted.
        self.stream.codec_context.thread_count = 1

    def see_packet(self, packet: Packet[Any]) -> None:
        """Take note of a packet before it is decoded."""
        self.has_packets = self.has_packets or packet.size > 0

    def length(self, units: int) -> float:
        """A duration in s."""
        return units * self._numerator / self._denominator

    def time_of(self, units: int) -> float:
        """A presentation time on the timeline, s."""
        return self.length(units) - self.source.zero

    def nothing(self) -> MediaError:
        """Why nothing was decoded."""
        if self.has_packets:
            return self.source.unreadable(f"its {self.kind} track holds nothing that can be decoded")
        return MediaError(self.reason, self.source.path, f"announces a {self.kind} track and has no packet of it")


class SoundTrack(_Track):
    """The sound of each span, as mono at the rate wanted.

    Args:
        source: The file.
        sample_rate: Hz, wanted.
        starts: s, of the spans.
        seconds: Length of each span; None for all up to the end.
        remove_mean: Whether the mean over all sound from the start to the end of the file is subtracted.

    Raises:
        MediaError: ``no_audio``.
        ValueError: If the rate is below 1.
    """

    def __init__(
        self,
        source: OpenMedia,
        sample_rate: int,
        starts: Sequence[float],
        seconds: float | None,
        remove_mean: bool = False,
    ) -> None:
        super().__init__(source, source.audio, "sound", len(starts))
        if sample_rate < 1:
            raise ValueError(f"sample rate must be at least 1 Hz, got {sample_rate}")
        self.sample_rate, self.starts, self.seconds, self.remove_mean = sample_rate, starts, seconds, remove_mean
        self.to_end = seconds is None or remove_mean
        self.rate = 0  # of the file, Hz; known once something is decoded
        self._firsts: list[int] = []  # of each span, the first sample that is gathered, at the file's rate
        self._stops: list[float] = []  # of each span, one past the last sample that is gathered
        self._next = 0  # the first span that is still gathered
        self._pieces: list[tuple[int, np.ndarray]] = []  # in order of decoding: later ones replace earlier ones
        self._landed: int | None = None  # the first sample decoded
        self._position: int | None = None  # one past the last sample decoded
        self._last_packet = -math.inf  # s, where the packets so far end
        self._shift = 0.0  # s, added to all times: packets without a time came before, whose length nobody knew
        self._untimed = False  # whether such came since the shift was set
        self._mixer: tuple[tuple[str, str, int], Graph] | None = None  # for frames of one kind

    @property
    def begun(self) -> int:
        """How many spans begin before the end of what has been decoded."""
        return bisect_left(self._firsts, self._position or 0)

    @property
    def landed_late(self) -> bool:
        """Whether decoding began, after a seek, too late for the first span."""
        return self._landed is None or self._landed > max(self._firsts[0], 0)

    def is_complete(self, span: int) -> bool:
        """Whether all that a span asks for has been decoded."""
        return self._position is not None and not self.to_end and self._position >= self._end(span)

    def is_done(self, span: int) -> bool:
        """Whether decoding more would not change a span."""
        return self._position is not None and self._position >= self._stops[span]

    def see_packet(self, packet: Packet[Any]) -> None:
        """Note where the packet ends: the last one's padding is decoded too, but its duration does not count it."""
        super().see_packet(packet)
        if packet.pts is not None and packet.duration and not packet.is_discard:
            self._last_packet = max(self._last_packet, self.time_of(packet.pts + packet.duration))

    def is_harmless(self, packet: Packet[Any]) -> bool:
        """Whether damage in a packet does not reach into the first span."""
        return packet.pts is not None and self.time_of(packet.pts) < self.starts[0] - _HARMLESS

    def add(self, frame: Any) -> None:
        """Put a decoded frame on the timeline."""
        if not self.rate:
            self._set_rate(frame.sample_rate)
        begin = self._place(frame)
        if self._landed is None:
            self._landed = begin
        self._position = begin + frame.samples
        begun = self.begun
        is_wanted = begun > self._next and begin < self._stops[begun - 1]
        if is_wanted or frame.sample_rate != self.rate:
            mono = self._mix(frame)
            self._position = begin + len(mono)
            if is_wanted:
                self._pieces.append((begin, mono))

    def fill(self, span: int, segment: MediaSegment) -> None:
        """Put the sound of a span into a segment and forget it; spans are asked for in order.

        Raises:
            MediaError: If nothing was decoded, or nothing after the span's start.
        """
        path, rate, start = self.source.path, self.rate, self.starts[span]
        if self._position is None:
            raise self.nothing()
        first, end = self._firsts[span], self._position
        last_packet = self._last_packet + self._shift
        if not self.is_done(span) and 0 < end / rate - last_packet < _LONGEST_PADDING:
            end = round(last_packet * rate)
        wanted = end / rate - start if self.seconds is None else self.seconds
        samples = max(0, round(wanted * self.sample_rate))
        valid = min(samples, round((end / rate - start) * self.sample_rate))
        if valid < 1:
            raise MediaError("too_short", path, f"its sound ends at {end / rate:.2f} s, before {start:g} s")
        stop = end if self.to_end else int(self._stops[span])
        gathered = np.zeros(stop - first, np.float32)
        for position, piece in self._pieces:
            begin, finish = max(position, first), min(position + len(piece), stop, end)
            if begin < finish:
                gathered[begin - first : finish - first] = piece[begin - position : finish - position]
        self._next = span + 1
        following = self._firsts[self._next] if self._next < self.num_spans else math.inf
        self._pieces = [piece for piece in self._pieces if piece[0] + len(piece[1]) > following]
        if not np.isfinite(gathered).all():
            raise self.source.unreadable("its sound holds values that are not numbers")
        if self.remove_mean:
            own = gathered[max(0, -first) :]  # before 0 there is no sound
            own -= own.mean(dtype=np.float64).astype(np.float32)
        skip = (round(start * rate) - first) * self.sample_rate // rate
        heard = resample(gathered, rate, self.sample_rate)[skip : skip + valid]
        segment.waveform, segment.valid_samples = np.zeros(samples, np.float32), valid
        segment.waveform[: len(heard)] = heard

    def _set_rate(self, rate: int) -> None:
        self.rate = rate
        # The context is a whole number of samples at both rates, so that the result is on the span's own grid.
        step = rate // math.gcd(rate, self.sample_rate)
        context = 0 if rate == self.sample_rate else math.ceil(_CONTEXT * rate / step) * step
        self._firsts = [round(start * rate) - context for start in self.starts]
        self._stops = [math.inf if self.to_end else self._end(span) + context for span in range(self.num_spans)]

    def _end(self, span: int) -> int:
        return round((self.starts[span] + (self.seconds or 0)) * self.rate)

    def _place(self, frame: AudioFrame) -> int:
        """At which sample of the timeline a frame begins."""
        position = self._position or 0
        if frame.pts is None:
            self._untimed = True
            return position
        time = self.time_of(frame.pts) + self._shift
        ahead = time - position / self.rate
        if self._position is None:
            return round(time * self.rate)
        if self._untimed and -ahead > _OVERLAP:
            self._shift -= ahead
            self._untimed = False
        elif abs(ahead) > _JITTER:
            if ahead > _LONGEST_GAP:
                raise self.source.unreadable(f"its sound has a gap of {ahead:.0f} s")
            return round(time * self.rate)
        return position

    def _mix(self, frame: AudioFrame) -> np.ndarray:
        """(N,) float32: one channel at ``rate``, as ``ffmpeg -ac 1`` mixes; where the rate changes, N is another."""
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if self._mixer is None or self._mixer[0] != kind:
            resampling = ("aresample", f"osf=flt:osr={self.rate}:ochl=mono:rematrix_maxval=1")
            try:
                graph = _make_mixer(frame, resampling)
            except FFmpegError:  # no layout has so many channels
                channels = len(frame.layout.channels)
                mean = "mono|c0=" + "+".join(f"{1 / channels}*c{number}" for number in range(channels))
                graph = _make_mixer(frame, ("pan", mean), resampling)
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


def _make_mixer(frame: AudioFrame, *filters: tuple[str, str]) -> Graph:
    graph = Graph()
    channels, layout = len(frame.layout.channels), frame.layout.name
    buffer = graph.add_abuffer(None, frame.sample_rate, frame.format.name, layout, channels, "", frame.time_base)
    graph.link_nodes(buffer, *(graph.add(*one) for one in filters), graph.add("abuffersink")).configure()
    return graph


class PictureTrack(_Track):
    """The pictures that are shown at the times of each span; only these become RGB.

    Args:
        source: The file.
        times: Of each span, (V,) s, rising.
        convert: What is kept of a picture, (H, W, 3) uint8 RGB; all of it if None.
        unwanted: Presentation times, in the stream's units, of pictures that need not be decoded if no other depends
            on them.
        repeat_last: Whether a span behind the end of the video gets the last picture, instead of an error.

    Raises:
        MediaError: ``no_video``.
    """

    def __init__(
        self,
        source: OpenMedia,
        times: Sequence[np.ndarray],
        convert: Convert | None = None,
        unwanted: frozenset[int] = frozenset(),
        repeat_last: bool = False,
    ) -> None:
        super().__init__(source, source.video, "video", len(times))
        assert source.video is not None
        self.times, self.convert, self.unwanted, self.repeat_last = times, convert, unwanted, repeat_last
        together = np.concatenate(times)
        order = np.argsort(together, kind="stable")
        ranks = np.empty(len(order), int)
        ranks[order] = np.arange(len(order))
        self._ranks = np.split(ranks, np.cumsum([len(own) for own in times])[:-1])  # of each span, in what follows
        self._sorted = together[order].tolist()  # in Python's numbers, as every frame is compared with them
        self._chosen: list[np.ndarray | None] = [None] * len(order)
        self._shown_since = [-math.inf] * len(order)  # s, presentation time of the picture chosen so far
        self._latest: tuple[float, VideoFrame] | None = None  # the next frame's time decides until when it is shown
        self._end = -math.inf  # s, where the pictures so far end
        self._interval = float(1 / source.video.average_rate) if source.video.average_rate else 0.0
        self._landed: tuple[float, bool] | None = None  # time of the first frame, and whether it is whole
        self._size: tuple[int, int] | None = None  # of all pictures: that of the first
        self._pixel = source.video.sample_aspect_ratio  # read here: the last pictures are made when the file is closed
        self._reformatter = VideoReformatter()
        self._skips = False
        self._order = _Order(source.has_pts)

    @property
    def begun(self) -> int:
        """As of a ``SoundTrack``."""
        latest = -math.inf if self._latest is None else self._latest[0]
        return bisect_left(self.times, latest, key=lambda times: float(times[0]))

    @property
    def landed_late(self) -> bool:
        """As of a ``SoundTrack``; also if the first picture is one that only the file calls a keyframe."""
        return self._landed is None or self._landed[0] > self.times[0][0] + SAME_TIME or not self._landed[1]

    def is_complete(self, span: int) -> bool:
        """As of a ``SoundTrack``."""
        return self._latest is not None and self._latest[0] > self._sorted[self._ranks[span][-1]] + SAME_TIME

    is_done = is_complete

    def is_harmless(self, packet: Packet[Any]) -> bool:
        """Never: pictures depend on those before."""
        return False

    def see_packet(self, packet: Packet[Any]) -> None:
        """Let the decoder leave out a picture that nobody wants and no other picture is built on."""
        super().see_packet(packet)
        skips = packet.pts in self.unwanted
        if skips != self._skips and self.stream.codec_context is not None:
            self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            self._skips = skips

    def add(self, frame: Any) -> None:
        """Put a decoded frame on the timeline; the frame before it is shown until then."""
        frame.pts = self._order.time(frame)
        given = None if frame.pts is None else self.time_of(frame.pts)
        time = given if given is not None else 0.0 if self._latest is None else self._latest[0] + self._interval
        if self._latest is None:
            self._landed = time, frame.key_frame and not frame.is_corrupt
            self._latest = (time, frame)
            self._choose(-math.inf, frame, until=time)
        elif time < self._latest[0]:
            self._choose(time, frame, until=self._latest[0])  # timestamps out of order
        else:
            self._choose(*self._latest, until=time)
            self._interval = time - self._latest[0] or self._interval
            self._latest = (time, frame)
        duration = self.length(frame.duration) if frame.duration and given is not None else self._interval
        self._end = max(self._end, time + duration)

    def fill(self, span: int, segment: MediaSegment) -> None:
        """Put the pictures of a span into a segment and forget it; spans are asked for in order.

        Raises:
            MediaError: If nothing was decoded, or nothing after the span's start.
        """
        if self._latest is None:
            raise self.nothing()
        end = math.inf
        if not self.is_done(span):  # the file has ended
            self._choose(*self._latest, until=math.inf)
            end = self._end
        times = self.times[span]
        segment.valid_frames = int((times < end - SAME_TIME).sum())
        if not segment.valid_frames and not self.repeat_last:
            detail = f"its video ends at {end:.2f} s, before {times[0]:g} s"
            raise MediaError("too_short", self.source.path, detail)
        frames = [frame for rank in self._ranks[span] if (frame := self._chosen[rank]) is not None]
        assert len(frames) == len(times)
        segment.frames = np.stack(frames)
        for rank in self._ranks[span]:
            self._chosen[rank], self._shown_since[rank] = None, math.inf

    def _choose(self, time: float, frame: VideoFrame, until: float) -> None:
        """Let ``frame``, shown from ``time`` on, be the picture of all times up to ``until`` that have no later one."""
        first, stop = bisect_left(self._sorted, time - SAME_TIME), bisect_left(self._sorted, until - SAME_TIME)
        kept = None
        for rank in range(first, stop):
            if self._shown_since[rank] <= time:
                if frame.is_corrupt:
                    raise self.source.unreadable(f"its picture at {time:.2f} s is damaged")
                if kept is None:
                    self._size = self._size or display_size(frame.width, frame.height, self._pixel)
                    pixels = to_rgb(frame, self._size, self._reformatter)
                    kept = pixels if self.convert is None else self.convert(pixels)
                self._chosen[rank], self._shown_since[rank] = kept, time


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
