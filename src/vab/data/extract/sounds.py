"""Sound files to waveforms: in worker processes, in order, never more of them in memory than a look-ahead.

For listening to whole folders. It imports little, since every worker process imports it, too.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vab.audio import rms_db
from vab.data.media.segments import MediaError, read_audio
from vab.files import sha256_of
from vab.spec import UserError

LEAST_SECONDS = 0.05
"""Less is no sound that anything could be said of."""
PATIENCE_SECONDS = 300
_GRACE = 0.02
"""s. A file shorter than what is wanted by less than a frame of sound is not short."""

Short = Literal["keep", "pad", "refuse"]


@dataclass(frozen=True)
class Listening:
    """What is decoded of each file; the same for both sides."""

    rates: tuple[int, ...]
    """Sample rates wanted, Hz, each once, at least one."""
    seconds: float | None
    """The first so many seconds; None for all."""
    short: Short
    """Shorter files: as long as they are, followed by silence, or refused."""
    remove_mean: bool
    """Whether the mean over time of the whole file is subtracted, before resampling and cutting."""

    @property
    def length(self) -> str:
        """For metric cards."""
        if self.seconds is None:
            return "whole sounds"
        rules = {"keep": "as long as they are", "pad": "followed by silence", "refuse": "refused"}
        return f"first {self.seconds:g} s; shorter ones {rules[self.short]}"

    @property
    def mono(self) -> str:
        """For metric cards."""
        return "mean of channels" + (
            ", mean over the whole file subtracted before resampling" if self.remove_mean else ""
        )


@dataclass(frozen=True)
class Decoded:
    """A file's sound."""

    waveforms: dict[int, np.ndarray]
    """By sample rate, (N,) float32."""
    seconds: float
    """Of sound heard, without padding."""
    level_db: float
    """dBFS of that; -inf for silence."""
    sha256: str
    """Of the file's bytes."""


@dataclass(frozen=True)
class Unusable:
    """Why a file gives no sound."""

    reason: str


def decode(path: Path, listening: Listening) -> Decoded | Unusable:
    """Decode one file. Whatever is wrong with it is returned, not raised."""
    try:
        waveforms = {}
        for rate in listening.rates:
            span = read_audio(path, rate, seconds=listening.seconds, remove_mean=listening.remove_mean)
            valid = span.valid_samples / rate
            waveform = span.waveform[: span.valid_samples]
            padding = len(span.waveform) - len(waveform) if listening.short == "pad" else 0
            waveforms[rate] = np.pad(waveform, (0, padding))
        digest = sha256_of(path)
    except MediaError as error:
        return Unusable(error.detail)
    except OSError as error:
        return Unusable(f"cannot be read: {error.strerror or error}")
    except MemoryError:
        return Unusable("needs more memory than there is")
    if listening.short == "refuse" and listening.seconds is not None and valid < listening.seconds - _GRACE:
        return Unusable(f"has {valid:.2f} s of sound, and --short refuse asks for {listening.seconds:g} s")
    if valid < LEAST_SECONDS:
        return Unusable(f"has {valid:.3f} s of sound, at least {LEAST_SECONDS:g} s are needed")
    rate = listening.rates[0]
    level = rms_db(torch.from_numpy(waveforms[rate][: round(valid * rate)]))
    return Decoded(waveforms, valid, float(level), digest)


def decode_all(
    paths: Sequence[Path], listening: Listening, num_workers: int, ahead: int, patience: int = PATIENCE_SECONDS
) -> Generator[Decoded | Unusable]:
    """Decode files in order.

    Args:
        paths: The files.
        listening: What is wanted of them.
        num_workers: Processes; 0 decodes in this one, where a file that crashes the decoder takes all with it.
        ahead: Files that may wait decoded.
        patience: s after which a file that a worker has not decoded is given up, and its worker with it.

    Raises:
        UserError: If worker processes cannot be started.
    """
    if num_workers == 0:
        yield from (decode(path, listening) for path in paths)
        return
    pool = _Pool(num_workers, patience)
    try:
        coming: deque[tuple[Path, Future[Decoded | Unusable]]] = deque()
        to_do = iter(paths)
        while True:
            while len(coming) < max(ahead, num_workers) and (path := next(to_do, None)) is not None:
                coming.append((path, pool.submit(path, listening)))
            if not coming:
                return
            path, future = coming.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                # Any of the files under way may have done it: the first in turn goes alone, the others again.
                pool.restart()
                try:
                    yield pool.submit(path, listening).result()
                except BrokenProcessPool:
                    pool.restart()
                    yield Unusable(f"crashed the decoder, or kept it for more than {patience} s")
                coming = deque((other, pool.submit(other, listening)) for other, _ in coming)
    finally:
        pool.stop()


class _Pool:
    """Worker processes that can be started anew."""

    def __init__(self, num_workers: int, patience: int) -> None:
        self.num_workers, self.patience = num_workers, patience
        self._start()

    def submit(self, path: Path, listening: Listening) -> Future[Decoded | Unusable]:
        try:
            return self.executor.submit(_decode_in_time, path, listening, self.patience)
        except BrokenProcessPool as error:  # a file before this one did it: its own result says so
            broken: Future[Decoded | Unusable] = Future()
            broken.set_exception(error)
            return broken

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        # Spawned, not forked: FFmpeg's and torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(self.num_workers, context, initializer=_begin)
        try:
            self.executor.submit(_begin).result()
        except BrokenProcessPool:
            raise UserError(
                "a decoding process ended before it began: in a script of your own, call evaluate under if __name__ == "
                '"__main__":, or give num_workers=0'
            ) from None


def _begin() -> None:
    """A worker's first act. Ctrl-C goes to all processes of a terminal: the main one decides for the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _decode_in_time(path: Path, listening: Listening, patience: int) -> Decoded | Unusable:
    """``decode``, in a process that ends where it hangs: the alarm's default is to end it, in native code too."""
    signal.alarm(patience)
    try:
        return decode(path, listening)
    finally:
        signal.alarm(0)
