"""Decodes media files in worker processes, and outlives files that crash or hang a decoder."""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from vab.data.extract.cutting import Cutting, LeftOut, Segment, decode
from vab.files import sha256_of
from vab.spec import UserError


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
        detail = f"{type(error).__name__}: {words} ({Path(at.filename).name}, line {at.lineno})"
        yield LeftOut(None, "error", f"{detail}\n{traceback.format_exc()}")  # the first line is for people
    yield Ended(digest_of(job.path) if job.wants_digest else None)


def digest_of(path: Path) -> bytes | None:
    """Stands for the bytes of a file; None where it cannot be read."""
    with suppress(OSError):
        return bytes.fromhex(sha256_of(path))[:_DIGEST_BYTES]
    return None


_WAITING_BYTES = 128 << 20
"""Of decoded segments that may wait to be encoded."""
_READY = "ready"
"""The first thing a worker says."""


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
