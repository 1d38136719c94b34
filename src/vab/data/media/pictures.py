"""Still pictures, and the pictures of a video at any times, a few at a time."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import av.error
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from vab.data.media.open import OpenMedia
from vab.data.media.spans import take_span
from vab.data.media.takers import PictureTaker, PictureTrack, Taker, Track, _nothing

PICTURE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Files that are taken for still pictures."""

_PICTURE_FORMAT = re.compile(r"_pipe$|^image2$")
"""FFmpeg's names of what reads still pictures."""
_EXIF = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4}|\A)(II\*\0|MM\0\*)", re.DOTALL)
"""Where EXIF begins in JPEG, PNG, WebP, and in TIFF, which is itself of that form."""
_ORIENTATION = 0x0112
"""Its number in EXIF."""
_CHUNK_FRAMES, _CHUNK_BYTES = 64, 64 << 20
"""Pictures handed on at once: as many as this, or as fill this much memory."""
_SETTLED_SECONDS = 1.0
"""Timestamps can be out of order by so much at most; older pictures are final."""


def is_picture(path: str | Path) -> bool:
    """Whether a file is taken for a still picture, by its suffix."""
    return Path(path).suffix.lower() in PICTURE_SUFFIXES


def read_picture(path: str | Path) -> tuple[np.ndarray, bool]:
    """A still picture as it is to be looked at: upright, without transparency.

    Args:
        path: A PNG, JPEG, WebP, BMP, TIFF, ... of any colour model that FFmpeg decodes.

    Returns:
        (H, W, 3) uint8 RGB, and whether parts of it were transparent: these are laid over white.

    Raises:
        MediaError: ``missing`` or ``unreadable``.
    """
    with OpenMedia(path) as source:
        if not _PICTURE_FORMAT.search(source.container.format.name) or not source.container.streams.video:
            raise source.unreadable("it is not a still picture")
        stream = source.container.streams.video[0]
        # Or the rest of a cut-off picture is grey.
        stream.codec_context.options = {"err_detect": "explode"}
        try:
            frame = next(source.container.decode(stream), None)
            if frame is None or frame.is_corrupt:
                raise source.unreadable("its picture is damaged or missing")
            # One thread: with several, swscale's last columns of a row can land in the row that another one has done.
            pixels = VideoReformatter().reformat(frame, format="rgba", threads=1).to_ndarray()
        except FFmpegError as error:
            raise source.unreadable(error) from error
    pixels = _turned(pixels, exif_orientation(Path(path).read_bytes()))
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(colour), False
    opacity = alpha.astype(np.float32) / 255
    return (colour * opacity + 255 * (1 - opacity)).round().astype(np.uint8), True


def exif_orientation(content: bytes) -> int:
    """How a picture file says that its pixels are to be turned: EXIF's number, 1 (as they are) to 8."""
    match = _EXIF.search(content)
    if match is None:
        return 1
    start, order = match.start(1), "<" if match.group(1) == b"II*\0" else ">"
    try:
        directory = start + struct.unpack_from(order + "I", content, start + 4)[0]
        for entry in range(struct.unpack_from(order + "H", content, directory)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", content, directory + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # EXIF that ends too early says nothing
    return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, channels) turned and mirrored as EXIF has it."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def stream_frames(path: str | Path, times: np.ndarray, take: Callable[[np.ndarray], None]) -> np.ndarray:
    """The pictures shown at given times, in one pass over the file and with little memory.

    As ``vab.data.media.segments.read_frames`` chooses them; the last picture is repeated after the end.

    Args:
        path: Any file with a video track that FFmpeg decodes.
        times: (F,) float64 s on the file's timeline, rising.
        take: Is called with (n, H, W, 3) uint8 RGB, several times, until all F have been handed over in order.

    Returns:
        (F,) bool: whether the video had not ended by that time; the first is always True.

    Raises:
        MediaError: ``missing``, ``unreadable`` or ``no_video``.
    """

    def make_takers(tracks: Sequence[Track], _: float) -> Sequence[Taker]:
        (track,) = tracks
        assert isinstance(track, PictureTrack)
        return [_PictureStream(track, times, take)]

    (taker,) = take_span(path, 0.0, lambda source: [PictureTrack(source)], make_takers)
    assert isinstance(taker, _PictureStream)
    return taker.finish()


class _PictureStream(PictureTaker):
    """Hands pictures on as soon as they are final."""

    def __init__(self, track: PictureTrack, times: np.ndarray, take: Callable[[np.ndarray], None]) -> None:
        super().__init__(track, times)
        self.take = take
        self.given = 0

    def choose(self, time: float, frame: av.VideoFrame, until: float) -> None:
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
        self.choose(*track.latest, until=np.inf)
        end = np.inf if self.complete else track.end
        running = self.times < end - 1e-6
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
