"""What does the parts of an extraction: this process, one process for each device, or Ray."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vab.data.extract.cutting import Cutting
from vab.data.extract.encode import Encoders
from vab.data.extract.parts import Done, Part, PartsWorker, Settings
from vab.data.shards.folder import OutFolder
from vab.extras import install_hint
from vab.frozen import device_named
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.spec import UserError


class MadeWith(NamedTuple):
    """The networks and rules that the records of an extraction are made with."""

    spec: dict[str, Any]
    """``SegmentSpec``, as JSON."""
    extraction: dict[str, Any]
    """Rules, for the manifest."""
    codebooks: Tensor
    """(K, S, code_dim) of the codec."""
    packages: list[str]
    """Distributions that the networks come from."""

    @classmethod
    def of(cls, encoders: Encoders, cutting: Cutting) -> MadeWith:
        """Those of loaded networks."""
        rules = {
            "segments": cutting.segments,
            "hop_seconds": cutting.hop_seconds,
            "min_seconds": cutting.min_seconds,
            "silence_db": cutting.silence_db,
            "still_pictures": cutting.still_pictures,
            "vision_preprocessing": encoders.vision.preprocessing,
            "channels": "as ffmpeg -ac 1",
            "resampler": "soxr HQ",
            "encoder_precision": _precision(encoders),
            # Not where it is as it always was: data sets from before the choice are what they were.
            **({"without_video": "keep"} if cutting.without_video == "keep" else {}),
        }
        spec = encoders.spec(cutting.segment_seconds, cutting.video_fps).to_dict()
        packages = list(dict.fromkeys((*encoders.codec.packages, *encoders.vision.packages)))
        return cls(spec, rules, encoders.codec.codebooks().cpu(), packages)

    def head(self, labels: Sequence[str], settings: Settings) -> dict[str, Any]:
        """What all parts share: spec, label vocabulary and the rules that go to the manifest."""
        rules = self.extraction | ({"duplicates": "leave_out"} if settings.leaves_out_duplicates else {})
        return {"spec": self.spec, "labels": list(labels), "extraction": rules}


def _require_equal(worker: object, found: MadeWith, first: MadeWith) -> None:
    """Refuse a worker whose networks or rules differ from the first one's: their records would be mixed.

    Raises:
        UserError: If they differ.
    """
    here, there = found.spec | found.extraction, first.spec | first.extraction
    if names := sorted(name for name in here | there if here.get(name) != there.get(name)):
        raise UserError(
            f"{worker} has other networks or another precision than the first worker"
            f" ({'; '.join(f'{name}: {here.get(name)} != {there.get(name)}' for name in names)})"
        )


def _precision(encoders: Encoders) -> str:
    """Codecs always compute in float32, as codes are an argmin."""
    vision = encoders.vision.precision
    return vision if vision == "float32" else f"codec float32, vision {vision}"


@dataclass(frozen=True)
class Recipe:
    """The networks by name, and the rules: each process loads its own from it."""

    codec: str
    vision: str
    codec_weights: str | None
    vision_weights: str | None
    rules: dict[str, Any]
    """Arguments of ``Cutting`` besides those that the networks say."""
    threads: int | None = None
    """Of torch, in each process; None to leave them as they are."""

    def load(self, device: str) -> tuple[Encoders, Cutting]:
        """Load the networks onto a device.

        Raises:
            UserError: If there is no such network, or no such device.
        """
        where = device_named(device)
        codec = load_codec(self.codec, where, self.codec_weights)
        encoders = Encoders(codec, load_vision(self.vision, where, self.vision_weights), where)
        preprocess = encoders.vision.resizer
        return encoders, Cutting(sample_rate=codec.sample_rate, preprocess=preprocess, **self.rules)


class LocalEngine:
    """Does parts in this process.

    Args:
        encoders: The frozen networks.
        cutting: How files become segments.
    """

    def __init__(self, encoders: Encoders, cutting: Cutting) -> None:
        self.encoders, self.cutting, self.made_with = encoders, cutting, MadeWith.of(encoders, cutting)

    def run(self, parts: Iterator[Part], out: OutFolder, head: Mapping[str, Any], settings: Settings) -> Iterator[Done]:
        """Do parts; yields each when it is written."""
        return PartsWorker(self.encoders, self.cutting, settings, out, head).run(parts)


_TRIES = 3
"""How often a part may be in a worker that dies, and a worker may die before its networks are loaded."""
_GRACE, _GRACE_AT_WORK = 2.0, 1.0
"""s. How long processes may take to end by themselves, without a part and with one."""
_NEXT, _IDLE = "next", "idle"
"""What a worker sends to get its next part, and when it has none left."""


class _DiedError(Exception):
    """A worker died; the message says how."""


class WorkersEngine:
    """Does parts in workers, each with networks and decoders of its own.

    A worker asks for its next part as soon as one of its decoders is free. If it dies, it is started again, and its
    parts are done again, by any worker. Where workers wait for machines of a cluster, the others begin without them.

    Args:
        workers: At least one, not started.
        ready: Waits until some of the given workers have sent something or died, and returns these.

    Raises:
        UserError: If the first one cannot load its networks.
    """

    def __init__(self, workers: Sequence[_Process | _Actor], ready: Callable[[Any], list[Any]]) -> None:
        self._workers, self._ready = list[Any](), ready
        try:
            for worker in workers:
                worker.start()
                self._workers.append(worker)
            self.made_with: MadeWith = _checked(workers[0].receive())
        except BaseException as error:
            self.close()
            if not isinstance(error, _DiedError):
                raise
            raise UserError(
                f"{workers[0]} died before its networks were loaded ({error}): in a script of your own, call extract"
                ' under if __name__ == "__main__":'
            ) from None

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.stop()

    def run(self, parts: Iterator[Part], out: OutFolder, head: Mapping[str, Any], settings: Settings) -> Iterator[Done]:
        """Do parts, once; yields each when it is written.

        Raises:
            UserError: If a worker says so, has other networks or another precision than the first, or dies again and
                again.
        """
        work = (out.place, dict(head), settings)
        again, tries, are_left = deque[Part](), Counter[Any](), True
        busy = list(self._workers)
        busy[0].send(work)
        while are_left or again or any(worker.parts for worker in busy):
            for worker in self._ready(busy):
                try:
                    message = _checked(worker.receive())
                except _DiedError as died:
                    keys = list(worker.parts) or [worker]
                    tries.update(keys)
                    if worst := [key for key in keys if tries[key] >= _TRIES]:
                        when = f"in part {worst[0]}" if worker.parts else "before it had a part"
                        raise UserError(f"{worker} died {_TRIES} times {when} ({died})") from None
                    again.extend(worker.parts.values())
                    worker.parts.clear()
                    worker.start()
                    for idle in [other for other in self._workers if again and other not in busy]:
                        idle.send(work)
                        busy.append(idle)
                    continue
                if isinstance(message, MadeWith):
                    _require_equal(worker, message, self.made_with)
                    worker.send(work)
                elif isinstance(message, Done):
                    del worker.parts[message.number]
                    yield message
                elif message == _IDLE:
                    busy.remove(worker)
                else:
                    part = again.popleft() if again else next(parts, None)
                    are_left = part is not None
                    if part is not None:
                        worker.parts[part.number] = part
                    worker.send(part)


def _checked(message: Any) -> Any:
    if isinstance(message, UserError):
        raise message
    return message


def _serve(send: Callable[[Any], object], receive: Callable[[], Any], recipe: Recipe, device: str) -> None:
    """The life of a worker: load the networks, ask for parts, do them."""

    def next_part() -> Part | None:
        send(_NEXT)
        part: Part | None = receive()
        return part

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        loaded = recipe.load(device)
        send(MadeWith.of(*loaded))
        while True:
            place, head, settings = receive()
            for done in PartsWorker(*loaded, settings, OutFolder.at(place), head).run(iter(next_part, None)):
                send(done)
            send(_IDLE)
    except UserError as error:
        send(error)


class DevicesEngine(WorkersEngine):
    """Does parts in one process for each device.

    Args:
        recipe: What each process loads.
        devices: Of each process.

    Raises:
        UserError: If a process cannot load its networks.
    """

    def __init__(self, recipe: Recipe, devices: Sequence[str]) -> None:
        super().__init__([_Process(recipe, device) for device in devices], _Process.ready)

    def close(self) -> None:
        """End the processes; they first delete their temporary files, except where they are still at work."""
        begin = time.monotonic()
        try:
            for process in self._workers:
                process.connection.close()
            for process in self._workers:
                until = begin + (_GRACE_AT_WORK if process.parts else _GRACE)
                process.process.join(max(0.0, until - time.monotonic()))
        finally:
            super().close()


@dataclass(eq=False)
class _Process:
    recipe: Recipe
    device: str
    parts: dict[int, Part] = field(default_factory=dict)
    connection: Connection[Any, Any] = field(init=False)
    process: SpawnProcess = field(init=False)

    def __str__(self) -> str:
        return f"the process of device {self.device}"

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve_process, args=(theirs, self.recipe, self.device))
        self.process.start()
        theirs.close()  # so that the process's death is seen as the end of the pipe

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def send(self, message: Any) -> None:
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5.0)  # else its exit code would be that of the next line
            self.stop()
            code = self.process.exitcode
            raise _DiedError(f"exit code {code}{', out of memory?' if code == -signal.SIGKILL else ''}") from None

    @staticmethod
    def ready(workers: Sequence[_Process]) -> list[_Process]:
        """Those that have sent something, or died."""
        connections = wait([worker.connection for worker in workers])
        return [worker for worker in workers if worker.connection in connections]


def _serve_process(connection: Connection[Any, Any], recipe: Recipe, device: str) -> None:
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(connection.send, connection.recv, recipe, device)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


class RayEngine(WorkersEngine):
    """Does parts in Ray actors, also on other machines. Where the cluster scales itself, actors wait for machines.

    Args:
        recipe: What each actor loads.
        device: ``auto``, ``cpu`` or ``cuda``: an actor sees the GPU that Ray gives it alone.
        actors: How many; None for one for each GPU of the cluster, or one.

    Raises:
        UserError: If Ray is not installed, or an actor cannot load its networks.
    """

    def __init__(self, recipe: Recipe, device: str, actors: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(f"--engine ray needs a package ({error}): {install_hint('ray')}") from error
        if actors is not None and actors < 1:
            raise UserError(f"--actors must be 1 or more, got {actors}")
        self._shutdown = (lambda: None) if ray.is_initialized() else ray.shutdown
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if device != "cpu" else 0
        count = actors or gpus or 1
        cores = int(there.get("CPU", 1)) // count
        self.cores = max(2, cores)
        """Of each actor, one of them for the encoders."""
        kind = ray.remote(num_cpus=max(1, cores), num_gpus=int(gpus > 0))(_RayWorker)
        workers = [_Actor(ray, lambda: kind.remote(recipe, device, os.getcwd()), number) for number in range(count)]
        super().__init__(workers, _Actor.ready)

    def close(self) -> None:
        """End the actors, and Ray if this has started it."""
        super().close()
        self._shutdown()


@dataclass(eq=False)
class _Actor:
    ray: Any
    make: Callable[[], Any]
    number: int
    parts: dict[int, Part] = field(default_factory=dict)
    actor: Any = None
    reply: Any = None

    def __str__(self) -> str:
        return f"Ray actor {self.number}"

    def start(self) -> None:
        self.actor, self.reply = self.make(), None

    def stop(self) -> None:
        self.ray.kill(self.actor)

    def send(self, message: Any) -> None:
        self.reply = self.actor.talk.remote(message)

    def receive(self) -> Any:
        reply, self.reply = self.reply or self.actor.talk.remote(), None
        try:
            return self.ray.get(reply)
        except self.ray.exceptions.RayActorError:
            raise _DiedError("Ray's logs say why") from None

    @staticmethod
    def ready(workers: Sequence[_Actor]) -> list[_Actor]:
        """Those that have sent something, or died."""
        for worker in workers:
            worker.reply = worker.reply or worker.actor.talk.remote()
        replies, _ = workers[0].ray.wait([worker.reply for worker in workers])
        return [worker for worker in workers if worker.reply in replies]


class _RayWorker:
    """What an actor is: ``_serve`` in a thread, and a method that hands on its messages."""

    def __init__(self, recipe: Recipe, device: str, folder: str) -> None:
        with suppress(OSError):  # another machine need not have it, where inputs and output are at addresses
            os.chdir(folder)  # paths may be relative to it
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._serve, args=(recipe, device), daemon=True).start()

    def talk(self, *messages: Any) -> Any:
        """Take messages, and wait for the next one of the worker."""
        for message in messages:
            self._inbox.put(message)
        return self._outbox.get()

    def _serve(self, recipe: Recipe, device: str) -> None:
        try:
            _serve(self._outbox.put, self._inbox.get, recipe, device)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
