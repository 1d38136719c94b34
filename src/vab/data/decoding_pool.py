"""Decodes media files in worker processes, and outlives files that crash or hang a decoder."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vab.audio import rms_db
from vab.data.format import KEY_SECONDS
from vab.data.media import MediaError, MediaSegment, read_segments, scan_packets, scan_streams
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
    """(valid_frames, 3, h, w) float32, as the vision encoder reads them: the rest repeats the last one."""
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


@dataclass(frozen=True)
class Ended:
    """The end of a file."""

    digest: bytes | None = None
    """Of its bytes, where that was asked for and it could be read."""


@dataclass(frozen=True)
class Again:
    """A file begins anew: what came of it before does not count."""


Item = Segment | LeftOut | Ended | Again


@dataclass(frozen=True)
class Job:
    """A file to decode."""

    number: int
    """By which its items are known."""
    path: Path
    """Where it is."""
    start: float | None = None
    """s, of the only segment wanted; None to cut the file as ``Cutting`` says."""
    wants_digest: bool = False
    """Whether its bytes are to be hashed."""


_DIGEST_BYTES = 16


def work_on(job: Job, cutting: Cutting) -> Iterator[Item]:
    """All items of a file, its end last. An exception that nobody foresaw leaves this file out, and no other."""
    try:
        yield from decode(job.path, job.start, cutting)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split()) or "no words"
        yield LeftOut(None, "error", f"{type(error).__name__}: {words} ({Path(at.filename).name}, line {at.lineno})")
    yield Ended(digest_of(job.path) if job.wants_digest else None)


def digest_of(path: Path) -> bytes | None:
    """Stands for the bytes of a file; None where it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()[:_DIGEST_BYTES]
    return None


_WAITING_BYTES = 128 << 20
"""Of decoded segments that may wait to be encoded."""
_READY = "ready"
"""The first thing a worker says."""
GRACE = 0.02
"""s. A file that is shorter than the least length by less than a frame of sound is not too short."""
_STILL = 1.0
"""Levels of 255. Coding noise on an unmoving picture stays below; mean difference to the first frame, as prepared."""


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
        # For a single segment the rest of the file, which may be hours, is not read.
        scan = scan_packets(path) if start is None else scan_streams(path)
    except MediaError as error:
        yield LeftOut(None, error.reason, error.detail)
        return
    if scan.audio_end is None or (scan.video_end is None and cutting.without_video != "keep"):
        kind = "no_video" if scan.video_end is None else "no_audio"
        yield LeftOut(None, kind, "has no video track" if scan.video_end is None else "has no sound track")
        return
    end = scan.audio_end if scan.video_end is None else min(scan.video_end, scan.audio_end)
    if start is None and end < cutting.min_seconds - GRACE:
        yield LeftOut(
            None, "too_short", f"sound and picture last {end:.2f} s, at least {cutting.min_seconds:g} s needed"
        )
        return
    starts = list(_starts(end, cutting)) if start is None else [start]
    fps = None if scan.video_end is None else cutting.video_fps
    outcomes = read_segments(path, cutting.sample_rate, fps, starts, cutting.segment_seconds, cutting.prepare, scan)
    try:
        for number, (begin, got) in enumerate(zip(starts, outcomes, strict=True)):
            if isinstance(got, MediaSegment):
                yield _segment(begin, got, cutting)
            elif got.reason == "missing":  # it was there a moment before: all of it is tried again, not this part
                yield LeftOut(None, got.reason, got.detail)
                return
            elif got.reason == "too_short" and number > 0:
                return  # the packets promised more than there is: what follows is not a part of the file
            else:
                yield LeftOut(begin, got.reason, got.detail)
    except MediaError as error:  # that could be read a moment before
        yield LeftOut(None, error.reason, error.detail)
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


def check_segments(
    segments: str, segment_seconds: float, video_fps: float, hop_seconds: float, min_seconds: float
) -> None:
    """Refuse a way of cutting that makes no sense.

    Args:
        segments: ``all`` or ``centre``.
        segment_seconds: Length of a segment.
        video_fps: Frames wanted per second.
        hop_seconds: From the start of one segment to that of the next.
        min_seconds: What a file or a last segment must have.

    Raises:
        UserError: Saying which number.
    """
    numbers = {"segment_seconds": segment_seconds, "video_fps": video_fps, "hop_seconds": hop_seconds}
    for name, value in (numbers | {"min_seconds": min_seconds}).items():
        if not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, got {value}")
    if min_seconds > segment_seconds:
        raise UserError(
            f"min_seconds ({min_seconds:g}) is longer than a segment ({segment_seconds:g}):"
            " nothing could have that much"
        )
    if round(segment_seconds * video_fps) < 1:
        raise UserError(f"a segment of {segment_seconds:g} s has no frame at {video_fps:g} frames per second")
    if segments not in ("all", "centre"):
        raise UserError(f"segments must be all or centre, got {segments!r}")
    if segments == "all" and hop_seconds < KEY_SECONDS:
        raise UserError(
            f"hop_seconds must be {KEY_SECONDS:g} or more, got {hop_seconds:g}: records are named by their start in"
            " milliseconds, and two would have one name"
        )


def _segment(start: float, got: MediaSegment, cutting: Cutting) -> Segment | LeftOut:
    """What becomes of a segment; one without video has no frames."""
    needed, heard = min(cutting.min_seconds, cutting.segment_seconds), got.valid_samples / cutting.sample_rate
    has_video = len(got.frames) > 0
    seen = (got.valid_frames + 0.5) / cutting.video_fps if has_video else heard
    if min(heard, seen) < needed - GRACE:
        frames = f", {got.valid_frames} frames" if has_video else ""
        return LeftOut(start, "too_short", f"has {heard:.2f} s of sound{frames}; {needed:g} s needed")
    loudness = float(rms_db(torch.from_numpy(got.waveform[: got.valid_samples])))
    if loudness < cutting.silence_db:
        return LeftOut(start, "silent", f"its sound has {loudness:.1f} dBFS, below {cutting.silence_db:g}")
    pixels = got.frames[: got.valid_frames] if has_video else np.zeros((0, 3, 0, 0), np.float32)
    if has_video and cutting.still_pictures == "leave_out" and _is_still(pixels, cutting):
        return LeftOut(start, "still", "its picture does not change")
    return Segment(start, got.waveform, got.valid_samples, pixels, got.valid_frames, loudness)


def _is_still(pixels: np.ndarray, cutting: Cutting) -> bool:
    """Whether prepared pictures (V, 3, h, w) are all the first one, but for coding noise."""
    black, white = (cutting.prepare(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255))
    levels = 255 / np.abs(white - black)  # preparing is linear in brightness
    return all(float((np.abs(picture - pixels[0]) * levels).mean()) < _STILL for picture in pixels[1:])


class DecodingPool:
    """Worker processes that decode files, each one of its own; a slow one keeps none of the others waiting.

    Args:
        cutting: For all files.
        num_workers: Processes; 0 decodes in this one, where a crash or a hang is not survived.
        timeout: s without a segment after which a worker is taken to hang.
    """

    def __init__(self, cutting: Cutting, num_workers: int, timeout: float = 300.0) -> None:
        self.cutting, self.num_workers, self.timeout = cutting, num_workers, timeout
        self._workers: list[_Worker] = []

    def run(self, jobs: Iterable[Job]) -> Generator[tuple[int, Item]]:
        """Decode each job.

        Args:
            jobs: A job is taken when a worker has nothing to do.

        Yields:
            (number of the job, its next item). Items of a job come in order and end with an ``Ended``; those of
            several jobs are mixed. Workers go on while nothing is taken, until some memory is full.

        Raises:
            UserError: If worker processes cannot be started.
        """
        to_do = iter(jobs)
        if self.num_workers == 0:
            for job in to_do:
                yield from ((job.number, item) for item in work_on(job, self.cutting))
            return
        first = list(itertools.islice(to_do, self.num_workers))
        inbox = _Inbox()
        manager = threading.Thread(target=self._manage, args=(itertools.chain(first, to_do), inbox), daemon=True)
        try:
            self._workers = [_Worker(self.cutting) for _ in first]
            manager.start()
            while (message := inbox.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                yield message
        finally:
            inbox.close()
            if manager.is_alive():
                manager.join()
            for worker in self._workers:
                worker.stop()
            self._workers = []

    def _manage(self, jobs: Iterator[Job], inbox: _Inbox) -> None:
        """Give workers files and take their segments, also while whoever wants these is busy."""
        try:
            while not inbox.is_closed:
                for worker in self._workers:
                    if worker.job is None and (job := next(jobs, None)) is not None:
                        worker.begin(job)
                busy = [worker for worker in self._workers if worker.job is not None]
                if not busy:
                    break
                ready = wait([worker.connection for worker in busy], timeout=0.2)
                for worker in busy:
                    assert worker.job is not None
                    number, items = worker.job.number, []
                    if worker.connection in ready:
                        items = worker.take()
                    elif worker.ready and worker.is_late(self.timeout):
                        items = worker.give_up(f"nothing was decoded for {self.timeout:g} s")
                    for item in items:
                        inbox.put((number, item))
            inbox.put(None)
        except BaseException as error:  # raised again where the segments are wanted
            inbox.put(error)


class _Inbox:
    """Segments that wait for whoever encodes them: as many as fit into some memory, and always at least one.

    Without a lock that Ctrl-C could leave taken, which would hold up the other thread for ever: each thread has a
    count of its own.
    """

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()
        self._put = self._taken = 0  # bytes
        self.is_closed = False

    def put(self, message: tuple[int, Item] | BaseException | None) -> None:
        """Add a message; waits for room."""
        item = message[1] if isinstance(message, tuple) else None
        size = item.waveform.nbytes + item.pixels.nbytes if isinstance(item, Segment) else 0
        while not self.is_closed and 0 < self._put - self._taken > _WAITING_BYTES - size:
            time.sleep(0.01)
        self._put += size
        self._messages.put((message, size))

    def get(self) -> tuple[int, Item] | BaseException | None:
        """The next message; waits for one."""
        message, size = self._messages.get()
        self._taken += size
        answer: tuple[int, Item] | BaseException | None = message
        return answer

    def close(self) -> None:
        """Nobody wants messages any more."""
        self.is_closed = True


@dataclass
class _Worker:
    """One process, and what it is at."""

    cutting: Cutting
    job: Job | None = None
    ready: bool = False  # its imports are done, which can take long on a busy machine and says nothing of a file
    active: float = 0.0
    is_second_try: bool = False  # of a file that was taken up when its first decoder was killed
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

    def begin(self, job: Job) -> None:
        self.job, self.active, self.is_second_try = job, time.monotonic(), False
        try:
            self.connection.send(job)
        except (BrokenPipeError, ConnectionResetError):
            # Died idle: not this file's fault.
            self.stop()
            self._start()
            self.connection.send(job)

    def is_late(self, timeout: float) -> bool:
        return time.monotonic() - self.active > timeout and not self.connection.poll()

    def take(self) -> list[Item]:
        """What the worker sent; if it died instead, why its file is left out, and a fresh process takes its place."""
        try:
            item = self.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a segment
            self.process.join()
            code = self.process.exitcode
            if not self.ready:
                raise UserError(
                    f"a decoding process ended before it began (exit code {code}): in a script of your own, call"
                    ' extract under if __name__ == "__main__":, or give num_workers=0'
                ) from None
            if code == -signal.SIGKILL and self.job is not None and not self.is_second_try:
                # Most likely by a system that is short of memory, which says nothing of this file.
                job = self.job
                self.give_up("")
                self.begin(job)
                self.is_second_try = True
                return [Again()]
            killed = ", for want of memory?" if code == -signal.SIGKILL else ""
            return self.give_up(f"its decoder crashed (exit code {code}{killed})")
        self.active = time.monotonic()
        if item == _READY:
            self.ready = True
            return []
        if isinstance(item, str):
            raise RuntimeError(f"decoding failed in a worker:\n{item}")
        if isinstance(item, Ended):
            self.job = None
        return [item]

    def give_up(self, why: str) -> list[Item]:
        self.stop()
        self._start()
        self.job = None
        return [LeftOut(None, "unreadable", why), Ended()]

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
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        connection.send(_READY)
        while True:
            job = connection.recv()
            for item in work_on(job, cutting):
                connection.send(item)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:
        # A bug: the main process shows it.
        connection.send(traceback.format_exc())
