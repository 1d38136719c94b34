"""The base of ``SoundTrack`` and ``PictureTrack``, and the segment that they fill.

A span is a part of the timeline that the caller asks for. A track is given all spans of a reading when it is made, in
order of their starts. It keeps only what the spans need, and fills a segment as soon as a span is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from av import AudioStream, Packet, VideoStream

from vab.data.media.open import MediaError, OpenMedia

SAME_TIME = 1e-6
"""s. Times nearer than this are equal: they are sums of rounded fractions."""


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


class Track:
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
        """Set up the decoder.

        Raises:
            MediaError: If there is none.
        """
        if self.stream.codec_context is None:
            raise self.source.unreadable(f"there is no decoder for its {self.stream.type} track")
        # One thread: extraction runs one process per core, and frame threads decode more than is wanted.
        self.stream.codec_context.thread_count = 1

    def see_packet(self, packet: Packet[Any]) -> None:
        """Inspect a packet before it is decoded."""
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
