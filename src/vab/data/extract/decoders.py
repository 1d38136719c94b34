"""Decodes media files in processes, and survives files that crash or hang a decoder.

Each process imports this module: it must not import torch, which takes 325 MiB of memory and seconds to start.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from vab import UserError
from vab.data.addresses import AddressError, RemoteFile, local_file
from vab.data.extract.cutting import LeftOut, Segment
from vab.files import sha256_of, sweep


@dataclass(frozen=True)
class Ended:
    """The end of a file."""

    digest: bytes | None = None
    """Of its bytes, where that was asked for and it could be read."""


@dataclass(frozen=True)
class Again:
    """A file starts again: what came of it before does not count."""


Item = Segment | LeftOut | Ended | Again


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Decoder(Protocol[T_co]):
    """What is done with a file, such as ``Cutting``; sent to each process once."""

    def decode(self, path: Path, start: float | None) -> Iterator[T_co | LeftOut]:
        """The file's items, in order."""


@dataclass(frozen=True)
class Job:
    """A file to decode."""

    number: int
    """By which its items are known."""
    file: Path | RemoteFile
    """Where it is."""
    start: float | None = None
    """s, of the only segment wanted; None for all that the decoder takes of a file."""
    wants_digest: bool = False
    """Whether its bytes are to be hashed."""


_DIGEST_BYTES = 16


def work_on(job: Job, decoder: Decoder[T], alive: Callable[[], None] = lambda: None) -> Iterator[T | LeftOut | Ended]:
    """All items of a file, its end last.

    Args:
        job: The file; one at an address is fetched, and deleted afterwards.
        decoder: What is done with it.
        alive: Called now and then while it is fetched.

    Raises:
        UserError: If the disk of temporary files is full or cannot be written.
    """
    digest = None
    try:
        with local_file(job.file, alive) as path:
            yield from _items(path, job.start, decoder)
            digest = digest_of(path) if job.wants_digest else None
    except AddressError as error:
        yield LeftOut(None, "missing" if error.reason == "missing" else "unreadable", str(error))
    yield Ended(digest)


def _items(path: Path, start: float | None, decoder: Decoder[T]) -> Iterator[T | LeftOut]:
    """All items of a file. An exception that nobody foresaw leaves this file out, and no other."""
    try:
        yield from decoder.decode(path, start)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split()) or "no words"
        detail = f"{type(error).__name__}: {words} ({Path(at.filename).name}, line {at.lineno})"
        yield LeftOut(None, "error", f"{detail}\n{traceback.format_exc()}")  # the first line is for people


def digest_of(file: Path | RemoteFile) -> bytes | None:
    """Stands for the bytes of a file; None where it cannot be read."""
    with suppress(OSError, AddressError), local_file(file) as path:
        return bytes.fromhex(sha256_of(path))[:_DIGEST_BYTES]
    return None


_WAITING_BYTES = 128 << 20
"""Of decoded items that may wait for whoever uses them."""
_TICK_SECONDS = 0.2
"""How often a thread that waits looks whether it is still wanted."""
_READY = "ready"
"""The first thing that a process says, when its imports are done: these can take long on a busy machine."""


class _Alive:
    """What a process says while it fetches a file."""


class DecodingPool(Generic[T]):
    """Processes that decode files, each one file at a time; a slow file delays no other.

    A file that crashes or hangs its process is left out, and a new process takes the place of the old one.

    Args:
        decoder: What is done with each file; sent to each process once.
        num_workers: Processes; 0 decodes in this one, where a crash or a hang ends everything.
        timeout: s without an item after which a process is taken to hang.
    """

    def __init__(self, decoder: Decoder[T], num_workers: int, timeout: float = 300.0) -> None:
        self.decoder, self.num_workers, self.timeout = decoder, num_workers, timeout

    def run(self, jobs: Iterable[Job]) -> Generator[tuple[int, T | LeftOut | Ended | Again]]:
        """Decode each job, in any order.

        Args:
            jobs: A job is taken, in some thread, when a process is free.

        Yields:
            (number of the job, its next item). Items of a job come in order and end with an ``Ended``; those of
            several jobs are mixed. The processes continue while no item is taken, until 128 MiB are waiting.

        Raises:
            UserError: If processes cannot be started.
        """
        return self._run(iter(jobs), lambda taken: True)

    def run_in_order(self, jobs: Iterable[Job], ahead: int) -> Generator[list[T | LeftOut]]:
        """Decode each job, in order.

        Args:
            jobs: Numbered 0, 1, 2, ...
            ahead: Jobs that may be taken, decoded or not, before the first of them is yielded.

        Yields:
            All items of the next job.

        Raises:
            UserError: If processes cannot be started.
        """
        turn = 0
        decoded: dict[int, list[T | LeftOut]] = {}
        ended: set[int] = set()
        with closing(self._run(iter(jobs), lambda taken: taken < turn + ahead)) as items:
            for number, item in items:
                if isinstance(item, Ended):
                    ended.add(number)
                elif isinstance(item, Again):
                    decoded.pop(number, None)
                else:
                    decoded.setdefault(number, []).append(item)
                while turn in ended:
                    yield decoded.pop(turn, [])
                    turn += 1

    def _run(
        self, jobs: Iterator[Job], may_take: Callable[[int], bool]
    ) -> Generator[tuple[int, T | LeftOut | Ended | Again]]:
        if self.num_workers == 0:
            for job in jobs:
                yield from ((job.number, item) for item in work_on(job, self.decoder))
            return
        first = list(itertools.islice(jobs, self.num_workers))
        exchange = _Exchange(itertools.chain(first, jobs), may_take)
        workers: list[_Worker] = []
        try:
            workers += [_Worker(self.decoder, self.timeout, exchange) for _ in first]
            for worker in workers:
                worker.start()
            running = len(workers)
            while running:
                message = exchange.get()
                if isinstance(message, BaseException):
                    raise message
                if message is None:
                    running -= 1
                else:
                    yield message
        finally:
            exchange.is_closed = True
            for worker in workers:
                if worker.is_alive():
                    worker.join()
                worker.stop_process()


class _Exchange:
    """Between the threads of the workers and the caller: jobs one way, items the other, within bounded memory.

    The caller takes no lock that Ctrl-C, which only it sees, could leave locked: each counter has one writer, or a lock
    that the workers' threads alone take.
    """

    def __init__(self, jobs: Iterator[Job], may_take: Callable[[int], bool]) -> None:
        self._jobs, self._may_take, self._given = jobs, may_take, 0
        self._taking, self._putting = threading.Lock(), threading.Lock()
        self._messages: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()
        self._put = self._got = 0  # bytes
        self.is_closed = False

    def next_job(self) -> Job | None:
        """A job, once one may be taken; None if there is none left."""
        with self._taking:
            while not self.is_closed and not self._may_take(self._given):
                time.sleep(0.01)
            self._given += 1
            return None if self.is_closed else next(self._jobs, None)

    def put(self, message: tuple[int, Any] | BaseException | None, size: int = 0) -> None:
        """Hand on an item of ``size`` bytes, an error, or None at a worker's end; waits for room, if others wait."""
        with self._putting:
            while not self.is_closed and 0 < self._put - self._got > _WAITING_BYTES - size:
                time.sleep(0.01)
            self._put += size
        self._messages.put((message, size))

    def get(self) -> Any:
        """The next message; waits for one."""
        message, size = self._messages.get()
        self._got += size
        return message


class _LostError(Exception):
    """A process ended or hung in the middle of a file.

    Args:
        why: For people.
        was_killed: By the system, most likely for want of memory, which says nothing about the file.
    """

    def __init__(self, why: str, was_killed: bool = False) -> None:
        super().__init__(why)
        self.was_killed = was_killed


class _NotBegunError(Exception):
    """A process ended before it could take a job."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class _ClosedError(Exception):
    """Nobody wants items any more."""


_PAUSES = (1.0, 5.0, 20.0)
"""s, before a process that was killed as it began is started again: memory may be short for a while."""
_END_SECONDS = 5.0
"""A process that is in the kernel's hands, as at a dead network disk, is not waited for longer than this."""

_process_lock = threading.Lock()
"""Held to start and to join processes: multiprocessing looks at all children at both."""


class _Worker(threading.Thread):
    """A process, and the thread that gives it jobs and takes its items."""

    def __init__(self, decoder: Decoder[Any], timeout: float, exchange: _Exchange) -> None:
        super().__init__(daemon=True)
        self.decoder, self.timeout, self.exchange = decoder, timeout, exchange
        self._has_begun = False  # whether one of its processes could take jobs
        self._start_process()

    def run(self) -> None:
        try:
            while (job := self.exchange.next_job()) is not None:
                for item in self._items(job):
                    self.exchange.put((job.number, item), getattr(item, "nbytes", 0))
            self.exchange.put(None)
        except _ClosedError:
            pass
        except BaseException as error:  # raised again where the items are wanted
            self.exchange.put(error)
        finally:
            self.stop_process()

    def stop_process(self) -> None:
        with _process_lock:
            self.process.kill()
            self.process.join(_END_SECONDS)
        self.connection.close()
        sweep(Path(tempfile.gettempdir()))  # the file that it had fetched, if it was killed

    def _start_process(self) -> None:
        # Spawned, not forked: FFmpeg's and torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.is_ready = False
        self.process = context.Process(target=_work, args=(theirs, self.decoder), daemon=True)
        with _process_lock, _interrupts_ignored():
            self.process.start()
        theirs.close()  # so that the process's death is seen as the end of the pipe

    def _items(self, job: Job) -> Iterator[Any]:
        """All items of a job, its end last. A file whose process was killed is tried once more."""
        for is_last_try in (False, True):
            try:
                self._send(job)
                while True:
                    item = self._receive(self.timeout)
                    if isinstance(item, _Alive):
                        continue
                    yield item
                    if isinstance(item, Ended):
                        return
            except _LostError as lost:
                self.stop_process()
                self._start_process()
                if is_last_try or not lost.was_killed:
                    yield LeftOut(None, "unreadable", str(lost))
                    yield Ended()
                    return
                yield Again()

    def _send(self, job: Job) -> None:
        while True:
            if not self.is_ready:
                self._await_process()
            try:
                return self.connection.send(job)
            except (BrokenPipeError, ConnectionResetError):  # it ended idle, which is not this file's fault
                self.stop_process()
                self._start_process()

    def _await_process(self) -> None:
        """Wait until the process can take jobs; one that the system kills as it begins is started again.

        Raises:
            UserError: If it ends again and again.
        """
        for pause in (*_PAUSES, None):
            try:
                self.is_ready = self._has_begun = self._receive(float("inf")) == _READY
                return
            except _NotBegunError as error:
                was_killed = error.code == -signal.SIGKILL
                if pause is None or not (was_killed or self._has_begun):
                    way = (
                        "give a lower num_workers"
                        if was_killed
                        else (
                            'in a script of your own, call this under if __name__ == "__main__":, or give num_workers=0'
                        )
                    )
                    killed = ", for want of memory?" if was_killed else ""
                    raise UserError(
                        f"a decoding process ended before it began (exit code {error.code}{killed}): {way}"
                    ) from None
            self.stop_process()
            time.sleep(pause)
            self._start_process()

    def _receive(self, timeout: float) -> Any:
        late = time.monotonic() + timeout
        try:
            while not self.exchange.is_closed and not self.connection.poll(_TICK_SECONDS):
                if time.monotonic() > late:
                    raise _LostError(f"nothing was decoded for {timeout:g} s")
            if self.exchange.is_closed:
                raise _ClosedError
            item = self.connection.recv()
        except (EOFError, OSError):  # OSError: it ended in the middle of an item
            with _process_lock:
                self.process.join(_END_SECONDS)
                code = self.process.exitcode
            if not self.is_ready:
                raise _NotBegunError(code) from None
            was_killed = code == -signal.SIGKILL
            killed = ", for want of memory?" if was_killed else ""
            raise _LostError(f"its decoder crashed (exit code {code}{killed})", was_killed) from None
        if isinstance(item, (RuntimeError, UserError)):
            raise item
        return item


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


def _work(connection: Connection[Any, Any], decoder: Decoder[Any]) -> None:
    """A worker's life: take a file, send its items, until the other side is gone."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        connection.send(_READY)
        while True:
            job = connection.recv()
            for item in work_on(job, decoder, lambda: connection.send(_Alive())):
                try:
                    connection.send(item)
                except OSError:
                    raise
                except Exception as error:  # such as no memory to send it: of this file alone
                    connection.send(
                        LeftOut(None, "error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
                    )
                    connection.send(Ended())
                    break
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        connection.send(error)
    except Exception:
        # A bug: the main process shows it.
        connection.send(RuntimeError(f"decoding failed in a worker:\n{traceback.format_exc()}"))
