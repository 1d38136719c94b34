"""The video track of an open file: the pictures that are shown at the times of each span."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from av import Packet, VideoFrame
from av.video.reformatter import VideoReformatter

from vab.data.media.open import MediaError, OpenMedia
from vab.data.media.pictures import display_size, to_rgb
from vab.data.media.tracks import SAME_TIME, MediaSegment, Track

Convert = Callable[[np.ndarray], np.ndarray]
"""Makes of a picture, (H, W, 3) uint8 RGB, what is stored in its place."""


class PictureTrack(Track):
    """The pictures that are shown at the times of each span; only these are converted to RGB.

    Args:
        source: The file.
        times: Of each span, (V,) s, rising.
        convert: Applied to each chosen picture; None keeps the picture.
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
        """Never: pictures depend on earlier ones."""
        return False

    def see_packet(self, packet: Packet[Any]) -> None:
        """Let the decoder skip a picture that is not asked for and that no other picture depends on."""
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


def frame_times(fps: float, start: float, count: int) -> np.ndarray:
    """(V,) s: the middles of frames at an even rate."""
    return start + (np.arange(count) + 0.5) / fps
