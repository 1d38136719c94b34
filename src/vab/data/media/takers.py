"""What is gathered from a file's frames as they are decoded: the sound of some seconds, the pictures at some times.

A track follows one stream and knows where on the file's timeline each of its frames lies. A taker keeps of these what
belongs to one span; several can follow the same track.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from av import AudioFrame, Packet, VideoFrame
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from vab.audio import resample
from vab.data.media.open import AudioSpan, FrameSpan, MediaError, OpenMedia
from vab.data.media.pictures import display_size, to_rgb

_JITTER = 0.02
"""s. Timestamps this near to the end of the sound so far continue it: coarse clocks (1 ms in MKV, FLV) are not gaps."""
_OVERLAP = 0.1
"""s. Sound that would replace more than this of the sound before it is put behind it."""
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


class SoundTrack:
    """Follows the sound: at which sample of the file's own rate each decoded frame begins."""

    def __init__(self, source: OpenMedia) -> None:
        if source.audio is None:
            raise MediaError("no_audio", source.path, "has no sound track")
        self.source, self.stream = source, source.audio
        self.rate = 0  # of the file, Hz; known once something is decoded
        self.landed: int | None = None  # the first sample decoded
        self.position: int | None = None  # one past the last sample decoded
        self.last_packet = -math.inf  # s, where the packets so far end
        self.takers: list[SoundTaker] = []
        self.has_packets = source.audio.frames > 0  # by the container's index
        self.shift = 0.0  # s, added to all times: packets without a time came before, whose length nobody knew
        self._clock = _Clock(source.zero)
        self._mixer: tuple[tuple[str, str, int], Graph] | None = None  # for frames of one kind

    def see_packet(self, packet: Packet[Any]) -> None:
        """Note where the packet ends: the last one's padding is decoded too, but its duration does not count it."""
        self.has_packets = self.has_packets or packet.size > 0
        if packet.pts is not None and packet.duration and packet.time_base is not None:
            self.last_packet = max(self.last_packet, self._clock.seconds(packet.pts + packet.duration, packet))

    def time_of(self, frame: AudioFrame) -> float | None:
        """s; None if the frame does not say."""
        return self._clock.time_of(frame)

    def add(self, frame: AudioFrame) -> None:
        """Put a decoded frame in its place, and give it to the takers."""
        self.rate = self.rate or frame.sample_rate
        position = self.position or 0
        time = self.time_of(frame)
        if time is not None:
            time += self.shift
            if self.position is None:
                position = round(time * self.rate)
            elif position / self.rate - time > _OVERLAP:
                self.shift += position / self.rate - time
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
            graph = Graph()
            channels = len(frame.layout.channels)
            mixing = graph.add("aresample", f"osf=flt:osr={self.rate}:ochl=mono:rematrix_maxval=1")
            source = graph.add_abuffer(None, frame.sample_rate, kind[0], kind[1], channels, "", frame.time_base)
            source.link_to(mixing)
            mixing.link_to(graph.add("abuffersink"))
            graph.configure()
            self._mixer = kind, graph
        graph = self._mixer[1]
        graph.push(frame)
        mixed: list[np.ndarray] = []
        while True:
            try:
                mixed.append(cast(AudioFrame, graph.pull()).to_ndarray()[0])
            except (BlockingIOError, EOFError):
                return np.concatenate(mixed) if mixed else np.zeros(0, np.float32)


class SoundTaker:
    """Gathers the sound of a span, sample by sample of the file's own rate."""

    def __init__(
        self, track: SoundTrack, sample_rate: int, start: float, seconds: float | None, remove_mean: bool = False
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

    def let_go(self) -> None:
        """Take no more frames."""
        self.track.takers.remove(self)

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
            raise _nothing(track, "no_audio")
        (first, stop), end, rate = self.bounds, track.position, track.rate
        if not self.done and 0 < end / rate - track.last_packet < _LONGEST_PADDING:
            end = round(track.last_packet * rate)
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


class PictureTrack:
    """Follows the pictures: from when until when each is shown.

    Args:
        source: The file.
        convert: What is kept of a picture that is wanted; the picture itself if None.
        unwanted: Presentation times, in the stream's units, of packets that need not be decoded if no other depends on
            them.
    """

    def __init__(
        self, source: OpenMedia, convert: Convert | None = None, unwanted: frozenset[int] = frozenset()
    ) -> None:
        if source.video is None:
            raise MediaError("no_video", source.path, "has no video track")
        self.source, self.stream, self.convert, self.unwanted = source, source.video, convert, unwanted
        self.latest: tuple[float, VideoFrame] | None = None  # not yet given out: the next frame's time decides
        self.end = -math.inf  # s, where the pictures so far end
        self.interval = float(1 / source.video.average_rate) if source.video.average_rate else 0.0
        self.landed_on: tuple[float, bool] | None = None  # time of the first frame, and whether it is whole
        self.takers: list[PictureTaker] = []
        self._size: tuple[int, int] | None = None
        self._pixel = source.video.sample_aspect_ratio  # read here: results are made when the file is closed
        self._reformatter = VideoReformatter()
        self._kept: tuple[VideoFrame, np.ndarray] | None = None
        self.has_packets = source.video.frames > 0
        self._skips = False
        self._clock = _Clock(source.zero)
        self._order = _Order(source.has_pts)

    def see_packet(self, packet: Packet[Any]) -> None:
        """Let the decoder leave out a picture that nobody wants and no other picture is built on."""
        self.has_packets = self.has_packets or packet.size > 0
        skips = packet.pts in self.unwanted
        if skips != self._skips and self.stream.codec_context is not None:
            self.stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            self._skips = skips

    def time_of(self, frame: VideoFrame) -> float | None:
        """s; None if the frame does not say."""
        return self._clock.time_of(frame)

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
        duration = self._clock.length(frame) if frame.duration and given is not None else self.interval
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


class PictureTaker:
    """Gathers the pictures that are shown at given times, and turns only these into RGB."""

    def __init__(self, track: PictureTrack, times: np.ndarray) -> None:
        self.track, self.times = track, times  # (V,) s, rising
        self.chosen: list[np.ndarray | None] = [None] * len(times)
        self._times = times.tolist()  # in Python's numbers, as every frame is compared with them
        self._shown_since = [-math.inf] * len(times)  # s, presentation time of the frame chosen so far
        track.takers.append(self)

    def let_go(self) -> None:
        """Take no more frames."""
        self.track.takers.remove(self)

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
            raise _nothing(track, "no_video")
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


def frame_times(fps: float, start: float, count: int) -> np.ndarray:
    """(V,) s: the middles of frames at an even rate."""
    return start + (np.arange(count) + 0.5) / fps


Track = SoundTrack | PictureTrack
Taker = SoundTaker | PictureTaker


def _nothing(track: SoundTrack | PictureTrack, reason: str) -> MediaError:
    """Why nothing of a track was decoded."""
    kind = "sound" if reason == "no_audio" else "video"
    if not track.has_packets:
        return MediaError(reason, track.source.path, f"announces a {kind} track and has no packet of it")
    return track.source.unreadable(f"its {kind} track holds nothing that can be decoded")


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


class _Clock:
    """A stream's units of time in seconds; asked for every frame, while PyAV makes the unit anew each time it is asked.

    Args:
        zero: s, on the stream's clock, of the beginning of the file's timeline.
    """

    def __init__(self, zero: float) -> None:
        self.zero = zero
        self._numerator, self._denominator = 0, 1

    def time_of(self, frame: AudioFrame | VideoFrame) -> float | None:
        return None if frame.pts is None or not self._is_set(frame) else self.seconds(frame.pts, frame)

    def seconds(self, units: int, of: AudioFrame | VideoFrame | Packet[Any]) -> float:
        self._is_set(of)
        return units * self._numerator / self._denominator - self.zero

    def length(self, frame: VideoFrame) -> float:
        return frame.duration * self._numerator / self._denominator

    def _is_set(self, of: AudioFrame | VideoFrame | Packet[Any]) -> bool:
        if not self._numerator and (base := of.time_base) is not None:
            self._numerator, self._denominator = base.numerator, base.denominator
        return bool(self._numerator)


class PictureStream(PictureTaker):
    """Hands pictures on as soon as they are final."""

    def __init__(self, track: PictureTrack, times: np.ndarray, take: Callable[[np.ndarray], None]) -> None:
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
            raise _nothing(track, "no_video")
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
