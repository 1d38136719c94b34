"""Read a file without decoding it: where its streams end, and when each picture is shown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from vab.data.media.open import OpenMedia
from vab.data.media.tracks import SAME_TIME


@dataclass(frozen=True)
class Scan:
    """What is known of a file before it is decoded; times are on the file's timeline."""

    video_end: float | None
    """s; None without video, inf if the packets were not read."""
    audio_end: float | None
    """The same for the sound."""
    pictures: np.ndarray | None = None
    """(F,) int64: when each picture is shown, in the stream's own units, rising; None if a packet has no time, or if
    the codec does not mark pictures that no other depends on."""
    time_base: Fraction = Fraction(1)
    """s per unit."""
    zero: float = 0.0
    """s, on the stream's clock, of the beginning of the timeline."""
    restarts: bool | None = None
    """Whether the clock starts again; None if the packets were not read."""

    def unwanted(self, times: np.ndarray) -> frozenset[int]:
        """Times of the pictures that are not shown at any of these times, s; empty if ``pictures`` is not known."""
        if self.pictures is None or not len(self.pictures):
            return frozenset()
        shown = self.pictures * self.time_base.numerator / self.time_base.denominator - self.zero
        chosen = np.searchsorted(shown, times + SAME_TIME, side="right") - 1
        is_wanted = np.zeros(len(shown), bool)
        is_wanted[np.maximum(chosen, 0)] = True
        is_wanted[[0, -1]] = True  # the first and the last say where the video begins and ends
        return frozenset(self.pictures[~is_wanted].tolist()) - frozenset(self.pictures[is_wanted].tolist())


def scan_streams(path: str | Path) -> Scan:
    """Find which streams a file has, without reading its packets: their ends are inf, their pictures are not known.

    Raises:
        MediaError: If the file is missing or unreadable.
    """
    with OpenMedia(path) as source:
        video, audio = (None if stream is None else math.inf for stream in (source.video, source.audio))
        return Scan(video, audio, zero=source.zero)


def scan_packets(path: str | Path) -> Scan:
    """Read all packets of a file, decoding none. Decoding can still end earlier, where packets are damaged.

    Raises:
        MediaError: If the file is missing or unreadable.
    """
    with OpenMedia(path) as source:
        # A stream that is announced and has no packets is not there, unless an index lists packets that were cut off.
        ends = {stream.index: 0 for stream in source.used if stream.frames}
        pictures: list[int] = []
        codec = None if source.video is None else source.video.codec_context
        is_known = codec is not None and codec.name == "h264" and source.has_pts
        for packet in source.packets():
            if packet.size == 0 or packet.is_discard:
                continue  # the end marker; MP4 packets that are not shown, whose times are those of shown pictures
            number, time = packet.stream.index, packet.pts if packet.pts is not None else packet.dts
            if time is None:
                ends.setdefault(number, 0)
                is_known = False
                continue
            ends[number] = max(ends.get(number, 0), time + (packet.duration or 0))
            if is_known and source.video is not None and number == source.video.index:
                pictures.append(time)
                is_known = packet.pts is not None and bool(packet.duration)
        video, audio = (
            None
            if stream is None or stream.index not in ends
            else max(0.0, float(ends[stream.index] * (stream.time_base or 0)) - source.zero)
            for stream in (source.video, source.audio)
        )
        order = np.sort(np.array(pictures, np.int64)) if is_known else None
        unit = source.video.time_base if source.video is not None else None
        return Scan(video, audio, order, unit or Fraction(1), source.zero, source.restarts)
