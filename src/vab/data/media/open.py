"""An open media file: its streams, its timeline, and what can be wrong with it.

The clock of a file can start again (joined transport streams, chained Ogg). Packets whose time goes back then get an
offset that puts them behind what came before, as ``ffmpeg`` does. Clocks of 33 bits can pass their end.
``vab.data.media.segments`` says what the timeline is.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import av
import av.logging
import numpy as np
from av import AudioStream, Packet, VideoStream
from av.error import FFmpegError
from av.stream import Disposition

from vab import UserError

# What FFmpeg has to say reaches the user as one MediaError, not as lines across a progress bar.
av.logging.set_level(None)

_BACKWARDS = 0.1
"""s. A decoding time so far before the last one of its stream begins a new clock. Source: FFmpeg's ffmpeg_demux.c."""
_REORDERED = 1.0
"""s. The same where decoding times are presentation times or guessed from them, which are in another order."""
_FORWARDS = 10.0
"""s. Where a container can change its clock, all streams jumping ahead by this begin a new one. Source: the same."""
_APART = 2.0
"""s. In MPEG streams, what is shown at the same time is no further apart in the file (by its decoding times)."""
_NEW_CLOCKS = frozenset(("mpegts", "mpeg", "ogg"))
"""Containers that can change their clock (FFmpeg's ``AVFMT_TS_DISCONT``)."""
_ONE_CLOCK = frozenset(("avi", "wav", "w64", "aiff", "mp3", "aac"))
"""Containers without timestamps of their own: FFmpeg counts, so that the clock never starts again."""
_NOT_VIDEO = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
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
        try:
            is_file = stat.S_ISREG(self.path.stat().st_mode)
            lack = missing_bytes(self.path) if is_file else 0
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MediaError("missing", self.path, "there is no such file") from error
        except (OSError, ValueError) as error:  # no access, a name that is too long, a disk that does not answer
            raise MediaError("unreadable", self.path, f"cannot be read: {_said(error)}") from error
        if not is_file:
            raise MediaError("unreadable", self.path, "is not a file")
        if lack:
            raise MediaError("unreadable", self.path, f"is cut off: {lack} bytes fewer than its header says")
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
        name = self.container.format.name
        # What lies before 0 is priming of an audio codec; but in MPEG it lies before the end of the 33-bit clock.
        self.zero = min(starts, default=0.0) if name in ("mpegts", "mpeg") else max(0.0, min(starts, default=0.0))
        is_mp4 = name.startswith("mov,")
        self.has_one_clock = (
            name in _ONE_CLOCK
            or (is_mp4 and all(stream.frames for stream in self.used))  # not in fragments
            or (name.startswith("matroska") and _is_one_segment(self.path))
        )
        """Whether the clock cannot start again, so that a seek finds the only packets of a time."""
        self.may_join = not is_mp4
        self.has_pts = name != "avi"
        """Whether the container stores presentation times. FFmpeg's guesses for AVI contradict the order of frames."""
        self._clock = _Clock(can_change=name in _NEW_CLOCKS, is_mpeg=name in ("mpegts", "mpeg"))

    @property
    def used(self) -> list[VideoStream | AudioStream]:
        """The streams that are used: video, audio, or both."""
        return [stream for stream in (self.video, self.audio) if stream is not None]

    @property
    def restarts(self) -> bool:
        """Whether the clock has started again in the packets read so far."""
        return len(self._clock.offsets) > 1

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

    def packets(self) -> Iterator[Packet[Any]]:
        """The packets of the used streams in the order of the file, on one clock; an empty one marks a stream's end.

        Raises:
            MediaError: If the container is damaged.
        """
        if not self.used:
            return
        packets = self.container.demux(*self.used)
        joined_mp3 = self.container.format.name == "mp3"
        while True:
            try:
                packet = next(packets, None)
            except (FFmpegError, IndexError) as error:  # IndexError: of PyAV, if a stream begins in the middle
                raise self.unreadable(error) from error
            if packet is None:
                return
            if joined_mp3 and bytes(packet)[:3] in (b"ID3", b"TAG", b"APE"):
                continue  # a tag between joined files, which no decoder knows
            if not self.has_one_clock:
                self._clock.correct(packet)
            if self.restarts and not self.may_join:
                detail = "its clock starts again: it is several MP4 files in one, of which only the first can be read"
                raise MediaError("unreadable", self.path, detail)
            if self._clock.is_split:
                raise MediaError("unreadable", self.path, "its streams do not share one clock: only one starts again")
            yield packet

    def unreadable(self, error: Exception | str) -> MediaError:
        """What to raise when FFmpeg gives up."""
        return MediaError("unreadable", self.path, explain_content(self.path) or f"cannot be read: {_said(error)}")


def _is_one_segment(path: Path) -> bool:
    """Whether a Matroska file is one segment of known size up to the end of the file (EBML, RFC 8794)."""
    with path.open("rb") as file:
        head, size = file.read(4096), file.seek(0, 2)
    place, lengths = 0, []
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if head[place : place + 4] != name or place + 5 > len(head) or not head[place + 4]:
            return False
        width = 9 - head[place + 4].bit_length()
        unknown = (1 << 7 * width) - 1
        length = int.from_bytes(head[place + 4 : place + 4 + width], "big") & unknown
        if length == unknown:
            return False
        lengths.append(place + 4 + width + length)
        place = lengths[-1]
    return lengths[-1] >= size


class _Clock:
    """Puts the packets of a file whose clock starts again on one clock.

    Each start of the clock has an offset. A stream changes to the next one at its own packet, since packets of the old
    clock can still come after the first of the new one.

    Args:
        can_change: Whether the container's own clock can change, in both directions.
        is_mpeg: Whether no stream can be far behind the others.
    """

    def __init__(self, can_change: bool, is_mpeg: bool) -> None:
        self.can_change, self.is_mpeg = can_change, is_mpeg
        self.is_split = False  # whether a stream goes on where another one has started again
        self.offsets = [0.0]  # s, by start of the clock
        self._units: dict[int, float] = {}  # by stream, s
        self._current: dict[int, int] = {}  # by stream, which start of the clock it is at
        self._last: dict[int, float] = {}  # by stream, s, decoding time of the last packet, corrected
        self._left: dict[int, float] = {}  # by stream, s, what ``_last`` was when the newest clock began
        self._end: dict[int, float] = {}  # by stream, s, where its packets so far end, corrected

    def correct(self, packet: Packet[Any]) -> None:
        """Change the packet's times where the clock has started again."""
        stream, time = packet.stream.index, packet.dts if packet.dts is not None else packet.pts
        if not packet.size:
            return
        if stream not in self._units:  # PyAV makes a Fraction each time it is asked
            base = packet.time_base or Fraction(1)
            self._units[stream] = base.numerator / base.denominator
        unit = self._units[stream]
        length = (packet.duration or 0) * unit
        if time is None:
            self._end[stream] = self._end.get(stream, 0.0) + length
            return
        back = _BACKWARDS if self.can_change and packet.dts is not None else _REORDERED
        newest = len(self.offsets) - 1
        current = self._current.get(stream, newest)  # a stream that comes later is where the others are
        last, now = self._last.get(stream), time * unit + self.offsets[current]
        if last is None:
            current += self._is_behind(now)
        # The first half is quick, for every packet.
        elif not last - back <= now <= last + _FORWARDS and self._is_jump(stream, now, back):
            current = max(current + 1, newest)
            if current == newest:  # another stream began it, perhaps some parts later
                now = time * unit + self.offsets[current]
                current += self._is_jump(stream, now, _REORDERED) or self._is_behind(now)
        self._current[stream] = current
        shown = (packet.pts if packet.pts is not None else time) * unit
        if current > newest:
            self.offsets.append(max(self._end.values()) - shown)
            self._left = dict(self._last)
        if shift := round(self.offsets[current] / unit):
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.dts = None if packet.dts is None else packet.dts + shift
        self._last[stream] = time * unit + self.offsets[current]
        self.is_split |= current < newest and self._last[stream] > self._left[stream] + _APART
        self._end[stream] = max(self._end.get(stream, -math.inf), shown + self.offsets[current] + length)

    def _is_behind(self, time: float) -> bool:
        return self.is_mpeg and time < max(self._last.values(), default=-math.inf) - _APART

    def _is_jump(self, stream: int, time: float, back: float) -> bool:
        ahead = self.can_change and time > max(self._end.values()) + _FORWARDS  # one stream alone has a gap
        return ahead or time < self._last[stream] - back


_PIPED = (1 << 31) - (1 << 16)
"""Bytes. Tools that write to a pipe put 0 or more than this into the header: 0x7FFFF024 (sox), 0x80000024 (arecord),
2^31 - 1, 2^32 - 1 (FFmpeg)."""
_SLACK = 9
"""Bytes. Some writers count the 8 bytes before the size, too, or leave out the last pad byte."""


def missing_bytes(path: Path) -> int:
    """How many bytes a WAV or AIFF file lacks of what its header promises: decoders take what is there, silently.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        head, size = file.read(12), file.seek(0, 2)
    order = {(b"RIFF", b"WAVE"): "little", (b"FORM", b"AIFF"): "big", (b"FORM", b"AIFC"): "big"}.get(
        (head[:4], head[8:])
    )
    if order is None:
        return 0
    promised = int.from_bytes(head[4:8], "little" if order == "little" else "big")
    lack = promised + 8 - size
    return lack if lack > _SLACK and promised < _PIPED else 0


def _said(error: Exception | str) -> str:
    """What an error says, without its number."""
    return error if isinstance(error, str) else (getattr(error, "strerror", None) or str(error))


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD_BYTES = 512
_QUOTED = 60
"""Characters of a text that is shown."""


def explain_content(path: Path) -> str:
    """What a file is that FFmpeg cannot read, where it is one of the things that downloads leave; else nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(_LFS_POINTER):
        return "is a pointer of Git LFS, not the file itself: type git lfs pull"
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return ""
    if not all(character.isprintable() or character in "\t\r\n" for character in text):
        return ""
    kind = "a web page" if text.lstrip().lower().startswith(("<!doctype html", "<html")) else "text"
    return f"is {kind}, not media: {' '.join(text.split())[:_QUOTED]!r}"
