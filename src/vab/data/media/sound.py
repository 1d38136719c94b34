"""The sound track of an open file: decoded frames are placed on the timeline, mixed to mono and cut into spans."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from av import AudioFrame, Packet
from av.error import FFmpegError
from av.filter import Graph

from vab.audio import resample
from vab.data.media.open import MediaError, OpenMedia
from vab.data.media.tracks import MediaSegment, Track

_JITTER = 0.02
"""s. A frame whose time is this near to the end of the last one continues it: 1 ms steps (MKV) are no gaps."""
_OVERLAP = 0.1
"""s. A frame that would overlap sound without timestamps by more than this is placed after it."""
_CONTEXT = 0.05
"""s. Sound decoded on both sides of a span, so that the resampler's filter reads real samples there."""
_HARMLESS = 1.5
"""s. Damaged sound that lies this long before a span does not reach into it."""
_LONGEST_GAP = 600.0
"""s. A longer jump between timestamps is taken for damage, not for silence."""
_LONGEST_PADDING = 0.2
"""s. Codecs fill up their last packet; decoded sound that outlasts the packets' durations by up to this is cut."""


class SoundTrack(Track):
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
        """Note where the packet ends: its duration excludes padding, which is decoded too."""
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
        # Of a frame at another rate, only the mixer knows how many samples it becomes.
        mono = None if frame.sample_rate == self.rate else self._mix(frame)
        self._position = begin + (frame.samples if mono is None else len(mono))
        begun = self.begun
        if begun > self._next and begin < self._stops[begun - 1]:
            self._pieces.append((begin, self._mix(frame) if mono is None else mono))

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
        resampled = resample(gathered, rate, self.sample_rate)[skip : skip + valid]
        segment.waveform, segment.valid_samples = np.zeros(samples, np.float32), valid
        segment.waveform[: len(resampled)] = resampled

    def _set_rate(self, rate: int) -> None:
        self.rate = rate
        # The context is a whole number of samples at both rates, so that the result is on the span's own grid.
        step = rate // math.gcd(rate, self.sample_rate)
        context = 0 if rate == self.sample_rate else math.ceil(_CONTEXT * rate / step) * step
        self._firsts = [round(start * rate) - context for start in self.starts]
        self._stops = [math.inf if self.to_end else self._end(span) + context for span in range(self.num_spans)]

    def _end(self, span: int) -> int:
        return round(self.starts[span] * self.rate) + round((self.seconds or 0) * self.rate)

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
