"""Decodes media files in worker processes, in order, and outlives files that crash or hang a decoder."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vab.audio import rms_db
from vab.data.media import MediaError, MediaSegment, read_segments, scan_packets
from vab.spec import UserError


@dataclass(frozen=True)
class Cutting:
    """How files are cut into segments, and which segments are left out. Goes to the workers whole."""

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
    """What a file or a last segment must have of sound and of picture; the rest is padded."""
    silence_db: float
    """dBFS. A segment whose valid sound is less loud is left out."""
    still_pictures: str
    """``keep``, or ``leave_out``: segments whose frames are all the same picture."""
    preprocess: Callable[[np.ndarray], Tensor]
    """Frames (V, H, W, 3) uint8 to what the vision encoder reads, (V, 3, h, w) float32."""
    without_video: str = "leave_out"
    """``keep``, or ``leave_out``: files that have sound alone."""

    def prepare(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (3, h, w) float32: at once, as prepared pictures are small."""
        return self.preprocess(picture[None])[0].numpy()


@dataclass(frozen=True)
class Segment:
    """A decoded segment on its way to the encoders."""

    start: float
    """s, on the file's timeline."""
    waveform: np.ndarray
    """(N,) float32; zero from ``valid_samples`` on."""
    valid_samples: int
    """Samples that are sound."""
    pixels: np.ndarray
    """(V, 3, h, w) float32, as the vision encoder reads them; empty where there is no video."""
    valid_frames: int
    """Frames that are picture; 0 where there is no video."""
    loudness_db: float
    """Of the valid sound, dBFS."""


@dataclass(frozen=True)
class LeftOut:
    """Why a segment, or all of a file, gives no record."""

    start: float | None
    """s; None for the whole file."""
    reason: str
    """One word."""
    detail: str
    """For people."""


Item = Segment | LeftOut | None
"""None marks the end of a file."""

_READY = "ready"
"""The first thing a worker says."""
_GRACE = 0.02
"""s. A file that is shorter than the least length by less than a frame of sound is not too short."""
_STILL = 1.0
"""Levels of 255. Coding noise on an unmoving picture stays below; mean difference to the first frame."""


def decode(path: Path, start: float | None, cutting: Cutting) -> Iterator[Segment | LeftOut]:
    """Cut one file into segments.

    Args:
        path: The file.
        start: s, of the only segment wanted; None to cut as ``cutting`` says.
        cutting: Numbers and rules.

    Yields:
        In order of time, each segment or why it is left out. Whatever is wrong with a file is one of these.
    """
    try:
        scan = scan_packets(path)
    except MediaError as error:
        yield LeftOut(None, error.reason, error.detail)
        return
    if scan.audio_end is None or (scan.video_end is None and cutting.without_video != "keep"):
        kind = "no_video" if scan.video_end is None else "no_audio"
        yield LeftOut(None, kind, "has no video track" if scan.video_end is None else "has no sound track")
        return
    end = scan.audio_end if scan.video_end is None else min(scan.video_end, scan.audio_end)
    if start is None and end < cutting.min_seconds - _GRACE:
        yield LeftOut(
            None, "too_short", f"sound and picture last {end:.2f} s, at least {cutting.min_seconds:g} s needed"
        )
        return
    starts = list(_starts(end, cutting)) if start is None else [start]
    fps = None if scan.video_end is None else cutting.video_fps
    # Whether pictures are all the same can be told of the pictures only.
    convert = None if cutting.still_pictures == "leave_out" else cutting.prepare
    outcomes = read_segments(path, cutting.sample_rate, fps, starts, cutting.segment_seconds, convert, scan)
    try:
        for number, (begin, got) in enumerate(zip(starts, outcomes, strict=True)):
            if isinstance(got, MediaSegment):
                yield _segment(begin, got, cutting, is_prepared=convert is not None)
            elif got.reason == "too_short" and number > 0:
                return  # the packets promised more than there is: what follows is not a part of the file
            else:
                yield LeftOut(begin, got.reason, got.detail)
    except MemoryError:
        yield LeftOut(None, "unreadable", "needs more memory than there is")


def _starts(end: float, cutting: Cutting) -> Iterator[float]:
    if cutting.segments == "centre":
        yield max(0.0, (end - cutting.segment_seconds) / 2)
        return
    yield from segment_starts(end, cutting.segment_seconds, cutting.hop_seconds, cutting.min_seconds)


def segment_starts(end: float, segment_seconds: float, hop_seconds: float, min_seconds: float) -> Iterator[float]:
    """Where segments start in a file of ``end`` seconds; the last may be shorter, and is the only one that is.

    Args:
        end: Of the file, s.
        segment_seconds: Length of a segment.
        hop_seconds: From the start of one to that of the next.
        min_seconds: What a last segment must have, unless it is the first.
    """
    for number in itertools.count():
        start = number * hop_seconds
        if number > 0 and end - start < min_seconds:
            return
        yield start
        if start + segment_seconds >= end:
            return


def _segment(start: float, got: MediaSegment, cutting: Cutting, is_prepared: bool) -> Segment | LeftOut:
    """What becomes of a segment; one without video has no frames."""
    needed, heard = min(cutting.min_seconds, cutting.segment_seconds), got.valid_samples / cutting.sample_rate
    has_video = len(got.frames) > 0
    seen = (got.valid_frames + 0.5) / cutting.video_fps if has_video else heard
    if min(heard, seen) < needed - _GRACE:
        frames = f", {got.valid_frames} frames" if has_video else ""
        return LeftOut(start, "too_short", f"has {heard:.2f} s of sound{frames}; {needed:g} s needed")
    loudness = float(rms_db(torch.from_numpy(got.waveform[: got.valid_samples])))
    if loudness < cutting.silence_db:
        return LeftOut(start, "silent", f"its sound has {loudness:.1f} dBFS, below {cutting.silence_db:g}")
    pixels = got.frames
    if not has_video:
        pixels = np.zeros((0, 3, 0, 0), np.float32)
    elif not is_prepared:
        if _is_still(got.frames):
            return LeftOut(start, "still", "its picture does not change")
        pixels = cutting.preprocess(got.frames).numpy()
    return Segment(start, got.waveform, got.valid_samples, pixels, got.valid_frames, loudness)


def _is_still(frames: np.ndarray) -> bool:
    first = frames[0].astype(np.int16)
    return all(float(np.abs(frame - first).mean()) < _STILL for frame in frames[1:])


class DecodingPool:
    """Worker processes that decode ahead of whoever takes the segments.

    Args:
        cutting: For all files.
        num_workers: Processes; 0 decodes in this one, where a crash or a hang is not survived.
        ahead: Segments that may wait decoded, beside those of the file whose turn it is; this bounds the memory.
        timeout: s without a segment after which a worker is taken to hang.
    """

    def __init__(self, cutting: Cutting, num_workers: int, ahead: int = 16, timeout: float = 300.0) -> None:
        self.cutting, self.num_workers, self.ahead, self.timeout = cutting, num_workers, ahead, timeout
        self._workers: list[_Worker] = []

    def run(self, jobs: Sequence[tuple[Path, float | None]]) -> Generator[tuple[int, Item]]:
        """Decode each job: a file, and where its only segment starts or None.

        Yields:
            (number of the job, segment or left-out or None at its end), strictly in the order of the jobs.

        Raises:
            UserError: If worker processes cannot be started.
        """
        if self.num_workers == 0:
            for number, (path, start) in enumerate(jobs):
                yield from ((number, item) for item in decode(path, start, self.cutting))
                yield number, None
            return
        try:
            self._workers = [_Worker(self.cutting) for _ in range(min(self.num_workers, len(jobs)))]
            buffers: dict[int, deque[Item]] = {}
            to_do = iter(enumerate(jobs))
            for turn in range(len(jobs)):
                while True:
                    self._assign(to_do, buffers)
                    if buffers[turn]:
                        item = buffers[turn].popleft()
                        yield turn, item
                        if item is None:
                            del buffers[turn]
                            break
                    else:
                        self._gather(turn, buffers)
        finally:
            for worker in self._workers:
                worker.stop()
            self._workers = []

    def _assign(self, to_do: Iterator[tuple[int, tuple[Path, float | None]]], buffers: dict[int, deque[Item]]) -> None:
        for worker in self._workers:
            if worker.job is None and (job := next(to_do, None)) is not None:
                number, (path, start) = job
                buffers[number] = deque()
                worker.begin(number, path, start)

    def _gather(self, turn: int, buffers: dict[int, deque[Item]]) -> None:
        """Take what workers have: always of the file whose turn it is, of later ones while there is room."""
        busy = [worker for worker in self._workers if worker.job is not None]
        room = sum(len(buffer) for buffer in buffers.values()) < self.ahead
        heard = [worker for worker in busy if room or worker.job == turn]
        ready = wait([worker.connection for worker in heard], timeout=1.0)
        for worker in heard:
            assert worker.job is not None
            if worker.connection in ready:
                buffers[worker.job].extend(worker.take())
            elif worker.ready and time.monotonic() - worker.active > self.timeout and not worker.connection.poll():
                buffers[worker.job].extend(worker.give_up(f"nothing was decoded for {self.timeout:g} s"))


@dataclass
class _Worker:
    """One process, and what it is at."""

    cutting: Cutting
    job: int | None = None
    ready: bool = False  # its imports are done, which can take long on a busy machine and says nothing of a file
    active: float = 0.0
    connection: Connection[Any, Any] = field(init=False)
    process: SpawnProcess = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        # Spawned, not forked: FFmpeg's and torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.ready = False
        self.process = context.Process(target=_work, args=(theirs, self.cutting), daemon=True)
        with _interrupts_ignored():
            self.process.start()
        theirs.close()  # so that the worker's death is seen as the end of the pipe

    def begin(self, job: int, path: Path, start: float | None) -> None:
        self.job, self.active = job, time.monotonic()
        try:
            self.connection.send((path, start))
        except (BrokenPipeError, ConnectionResetError):
            # Died idle: not this file's fault.
            self.stop()
            self._start()
            self.connection.send((path, start))

    def take(self) -> list[Item]:
        """What the worker sent; if it died instead, why its file is left out, and a fresh process takes its place."""
        try:
            item = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            if not self.ready:
                raise UserError(
                    f"a decoding process ended before it began (exit code {code}): in a script of your own, call"
                    ' extract under if __name__ == "__main__":, or give num_workers=0'
                ) from None
            return self.give_up(f"its decoder crashed (exit code {code})")
        self.active = time.monotonic()
        if item == _READY:
            self.ready = True
            return []
        if isinstance(item, str):
            raise RuntimeError(f"decoding failed in a worker:\n{item}")
        if item is None:
            self.job = None
        return [item]

    def give_up(self, why: str) -> list[Item]:
        self.stop()
        self._start()
        self.job = None
        return [LeftOut(None, "unreadable", why), None]

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which goes to all of them: the main one decides for the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _work(connection: Connection[Any, Any], cutting: Cutting) -> None:
    """A worker's life: take a file, send its segments, until the other side is gone."""
    torch.set_num_threads(1)
    try:
        connection.send(_READY)
        while True:
            path, start = connection.recv()
            for item in decode(path, start, cutting):
                connection.send(item)
            connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:
        # A bug: the main process shows it.
        connection.send(traceback.format_exc())
