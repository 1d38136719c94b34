"""Cut a file into segments, and leave out those that are too short, silent or still."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vab import UserError
from vab.audio import level_db
from vab.data.media.open import MediaError
from vab.data.media.scan import scan_packets, scan_streams
from vab.data.media.segments import read_segments
from vab.data.media.tracks import MediaSegment


@dataclass(frozen=True)
class Segment:
    """A decoded segment on its way to the encoders."""

    start: float
    """s, on the file's timeline."""
    waveform: np.ndarray
    """(N,) float32; zero from ``valid_samples`` on."""
    valid_samples: int
    """Samples before the end of the sound."""
    pixels: np.ndarray
    """(valid_frames, 3, h, w) uint8; frames after these repeat the last one."""
    valid_frames: int
    """Frames before the end of the video; 0 without video."""
    loudness_db: float
    """Of the valid samples, dBFS; 0 if the sound is not read."""

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.waveform.nbytes + self.pixels.nbytes


@dataclass(frozen=True)
class LeftOut:
    """A segment, or a whole file, that gives no record, and why."""

    start: float | None
    """s; None for the whole file."""
    reason: str
    """One word."""
    detail: str
    """A sentence for users."""


GRACE = 0.02
"""s. A file that is shorter than ``min_seconds`` by less than this, a frame of sound, is not too short."""

_STILL = 1.0
"""Mean difference to the first frame, in levels of 255, after resizing. Coding noise on a still picture is less."""


@dataclass(frozen=True)
class Cutting:
    """How files are cut into segments, and which segments are left out. It is pickled for the worker processes."""

    segment_seconds: float
    """Length of a segment."""
    sample_rate: int
    """Of the waveforms wanted, Hz."""
    video_fps: float
    """Frames wanted per second."""
    segments: str
    """``all``: one after the other; ``centre``: one from the middle of each file."""
    hop_seconds: float
    """From the start of a segment to that of the next."""
    min_seconds: float
    """Least length of sound and picture, of a file or of a last segment, which is then padded."""
    silence_db: float
    """dBFS. A segment whose valid samples are less loud is left out."""
    still_pictures: str
    """``keep``, or ``leave_out``: segments whose frames are all the same picture."""
    preprocess: Callable[[np.ndarray], np.ndarray]
    """Frames (V, H, W, 3) uint8 to pixels (V, 3, h, w) uint8, as ``VisionEncoder.resizer`` does."""
    without_video: str = "leave_out"
    """``keep``, or ``leave_out``: files that have sound alone."""
    streams: str = "both"
    """``both``; or ``audio``, ``video``: the other stream is not read, and the file need not have it."""
    short_first: bool = False
    """Whether a file's first segment may have less than ``min_seconds``."""

    def prepare(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (3, h, w) uint8. Each picture is resized as soon as it is decoded, to save memory."""
        return np.asarray(self.preprocess(picture[None])[0])

    def decode(self, path: Path, start: float | None) -> Iterator[Segment | LeftOut]:
        """Cut one file into segments.

        Args:
            path: The file.
            start: s, of the only segment wanted; None to cut all of the file.

        Yields:
            In order of time, each segment or why it is left out. Faults of the file are yielded, not raised.
        """
        try:
            # For a single segment, the rest of the file, which may be hours, is not read.
            scan = scan_packets(path) if start is None else scan_streams(path)
        except MediaError as error:
            yield LeftOut(None, error.reason, error.detail)
            return
        audio_end = None if self.streams == "video" else scan.audio_end
        video_end = None if self.streams == "audio" else scan.video_end
        needs_video = self.streams == "video" or (self.streams == "both" and self.without_video != "keep")
        if (audio_end is None and self.streams != "video") or (video_end is None and needs_video):
            if video_end is None and self.streams != "audio":
                yield LeftOut(None, "no_video", "has no video track")
            else:
                yield LeftOut(None, "no_audio", "has no sound track")
            return
        end = min(end for end in (audio_end, video_end) if end is not None)
        if start is None and end < self.min_seconds - GRACE and not self.short_first:
            detail = f"sound and picture last {end:.2f} s, at least {self.min_seconds:g} s needed"
            yield LeftOut(None, "too_short", detail)
            return
        starts = list(self._starts(end)) if start is None else [start]
        fps = None if video_end is None else self.video_fps
        rate = None if audio_end is None else self.sample_rate
        outcomes = read_segments(path, rate, fps, starts, self.segment_seconds, self.prepare, scan)
        try:
            for number, (begin, got) in enumerate(zip(starts, outcomes, strict=True)):
                if isinstance(got, MediaSegment):
                    yield self._segment(begin, got)
                elif got.reason == "missing":  # it was there a moment before: retry the whole file, not this segment
                    yield LeftOut(None, got.reason, got.detail)
                    return
                elif got.reason == "too_short" and number > 0:
                    return  # decoding ended before the packets did: nothing follows
                else:
                    yield LeftOut(begin, got.reason, got.detail)
        except MemoryError:
            yield LeftOut(None, "unreadable", "needs more memory than there is")

    def _starts(self, end: float) -> Iterator[float]:
        if self.segments == "centre":
            yield max(0.0, (end - self.segment_seconds) / 2)
            return
        yield from segment_starts(end, self.segment_seconds, self.hop_seconds, self.min_seconds)

    def _segment(self, start: float, got: MediaSegment) -> Segment | LeftOut:
        """Apply the rules to a segment."""
        needed, sound_seconds = min(self.min_seconds, self.segment_seconds), got.valid_samples / self.sample_rate
        if self.short_first and start == 0:
            needed = GRACE + 1 / self.sample_rate  # some sound and some picture
        has_sound, has_video = len(got.waveform) > 0, len(got.frames) > 0
        frame_seconds = (got.valid_frames + 0.5) / self.video_fps if has_video else sound_seconds
        if min(sound_seconds if has_sound else frame_seconds, frame_seconds) < needed - GRACE:
            frames = f", {got.valid_frames} frames" if has_video else ""
            return LeftOut(start, "too_short", f"has {sound_seconds:.2f} s of sound{frames}; {needed:g} s needed")
        loudness = level_db(got.waveform[: got.valid_samples]) if has_sound else 0.0
        if loudness < self.silence_db:
            return LeftOut(start, "silent", f"its sound has {loudness:.1f} dBFS, below {self.silence_db:g}")
        pixels = got.frames[: got.valid_frames] if has_video else np.zeros((0, 3, 0, 0), np.uint8)
        if has_video and self.still_pictures == "leave_out" and _is_still(pixels):
            return LeftOut(start, "still", "its picture does not change")
        return Segment(start, got.waveform, got.valid_samples, pixels, got.valid_frames, loudness)


def segment_starts(end: float, segment_seconds: float, hop_seconds: float, min_seconds: float) -> Iterator[float]:
    """Where segments start in a file of ``end`` seconds. Only the last can be shorter than ``segment_seconds``.

    Args:
        end: Of the file, s.
        segment_seconds: Length of a segment.
        hop_seconds: From the start of one to that of the next.
        min_seconds: Least length of the last segment, unless it is the only one.
    """
    for number in itertools.count():
        start = number * hop_seconds
        if number > 0 and end - start < min_seconds:
            return
        yield start
        if start + segment_seconds >= end:
            return


def check_segments(
    segments: str, segment_seconds: float, video_fps: float, hop_seconds: float, min_seconds: float
) -> None:
    """Check the numbers of a ``Cutting``.

    Args:
        segments: ``all`` or ``centre``.
        segment_seconds: Length of a segment.
        video_fps: Frames wanted per second.
        hop_seconds: From the start of one segment to that of the next.
        min_seconds: Least length of a file or of a last segment.

    Raises:
        UserError: If a number is out of range; the message names it.
    """
    from vab.data.shards.format import KEY_SECONDS  # here, because it imports torch, which decoding processes must not

    numbers = {"segment_seconds": segment_seconds, "video_fps": video_fps, "hop_seconds": hop_seconds}
    for name, value in (numbers | {"min_seconds": min_seconds}).items():
        if not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, got {value}")
    if min_seconds > segment_seconds:
        raise UserError(
            f"min_seconds ({min_seconds:g}) is longer than a segment ({segment_seconds:g}): no file would be kept"
        )
    if round(segment_seconds * video_fps) < 1:
        raise UserError(f"a segment of {segment_seconds:g} s has no frame at {video_fps:g} frames per second")
    if segments not in ("all", "centre"):
        raise UserError(f"segments must be all or centre, got {segments!r}")
    if segments == "all" and hop_seconds < KEY_SECONDS:
        raise UserError(
            f"hop_seconds must be {KEY_SECONDS:g} or more, got {hop_seconds:g}: records are named by their start in"
            " milliseconds, and two records would get the same name"
        )


def _is_still(pixels: np.ndarray) -> bool:
    """Whether pictures (V, 3, h, w) are all equal to the first one, except for coding noise."""
    first = pixels[0].astype(np.int16)
    return all(float(np.abs(picture - first).mean()) < _STILL for picture in pixels[1:])
