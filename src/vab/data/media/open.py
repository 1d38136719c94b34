"""An open media file: which of its streams are used, where its timeline begins, and what can be wrong with it.

``vab.data.media.segments`` says what the timeline is.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MediaError("missing", self.path, "there is no such file") from error
        except (OSError, ValueError) as error:  # no access, a name that is too long, a disk that does not answer
            raise MediaError("unreadable", self.path, f"cannot be read: {_said(error)}") from error
        if not is_file:
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
            except (FFmpegError, IndexError) as error:  # IndexError: of PyAV, if a stream begins in the middle
                raise self.unreadable(error) from error
            if packet is None:
                return
            yield packet

    def unreadable(self, error: Exception | str) -> MediaError:
        """What to raise when FFmpeg gives up."""
        return MediaError("unreadable", self.path, _no_media(self.path) or f"cannot be read: {_said(error)}")


def _said(error: Exception | str) -> str:
    """What an error says, without its number."""
    return error if isinstance(error, str) else (getattr(error, "strerror", None) or str(error))


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD_BYTES = 512
_QUOTED = 60
"""Characters of a text that is shown."""


def _no_media(path: Path) -> str:
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
