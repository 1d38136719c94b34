"""Open a media file: choose its streams, place its timeline, and check it for damage.

``vab.data.media.segments`` defines the timeline; ``vab.data.media.clocks`` handles clocks that start again.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import av
import av.logging
from av import AudioStream, Packet, VideoStream
from av.error import FFmpegError
from av.stream import Disposition

from vab import UserError
from vab.data.media.clocks import Clock, is_one_segment
from vab.data.media.content import explain_content, missing_bytes

# The user sees one MediaError per file; FFmpeg's log would run across the progress bar.
av.logging.set_level(None)

_NEW_CLOCKS = frozenset(("mpegts", "mpeg", "ogg"))
"""Containers that can change their clock (FFmpeg's ``AVFMT_TS_DISCONT``)."""
_ONE_CLOCK = frozenset(("avi", "wav", "w64", "aiff", "mp3", "aac"))
"""Containers without timestamps of their own: FFmpeg counts, so that the clock never starts again."""
_NOT_VIDEO = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
S = TypeVar("S", VideoStream, AudioStream)


class MediaError(UserError):
    """A file from which the requested sound or pictures cannot be read.

    Attributes:
        reason: One word for reports: ``missing``, ``unreadable``, ``no_audio``, ``no_video`` or ``too_short``.
        path: The file.
        detail: A sentence for users: what is wrong with it.
    """

    def __init__(self, reason: str, path: Path, detail: str) -> None:
        super().__init__(reason, path, detail)
        self.reason, self.path, self.detail = reason, path, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


class OpenMedia:
    """An open file: the two streams that are used, and the zero of its timeline."""

    def __init__(self, path: str | Path, generate_pts: bool = False) -> None:
        self.path = Path(path)
        try:
            is_file = stat.S_ISREG(self.path.stat().st_mode)
            lack = missing_bytes(self.path) if is_file else 0
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MediaError("missing", self.path, "there is no such file") from error
        except (OSError, ValueError) as error:  # no access, a name that is too long, a disk that is gone
            raise MediaError("unreadable", self.path, f"cannot be read: {_said(error)}") from error
        if not is_file:
            raise MediaError("unreadable", self.path, "is not a file")
        if lack:
            raise MediaError("unreadable", self.path, f"is cut off: {lack} bytes fewer than its header says")
        # A media file can refer to others, also over the network: only local files are opened.
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
            or (name.startswith("matroska") and is_one_segment(self.path))
        )
        """Whether the clock cannot start again, so that a seek finds the only packets of a time."""
        self.may_join = not is_mp4
        self.has_pts = name != "avi"
        """Whether the container stores presentation times. FFmpeg's guesses for AVI contradict the order of frames."""
        self._clock = Clock(can_change=name in _NEW_CLOCKS, is_mpeg=name in ("mpegts", "mpeg"))

    @property
    def used(self) -> list[VideoStream | AudioStream]:
        """The streams that are used: video, audio, or both."""
        return [stream for stream in (self.video, self.audio) if stream is not None]

    @property
    def restarts(self) -> bool:
        """Whether the clock has started again in the packets read so far."""
        return len(self._clock.offsets) > 1

    def _best(self, kind: Literal["video", "audio"], candidates: Sequence[S]) -> S | None:
        """The stream that FFmpeg chooses, unless it has no decoder and another one has."""
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
        """The error to raise when FFmpeg cannot continue."""
        return MediaError("unreadable", self.path, explain_content(self.path) or f"cannot be read: {_said(error)}")


def _said(error: Exception | str) -> str:
    """The message of an error, without its number."""
    return error if isinstance(error, str) else (getattr(error, "strerror", None) or str(error))
