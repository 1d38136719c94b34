"""What does the parts of an extraction: this process, one process for each device, or Ray."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

import torch
from torch import Tensor

from vab.data.extract.cutting import Cutting
from vab.data.extract.encode import Encoders
from vab.data.extract.parts import Done, Part, PartsWorker, Settings
from vab.data.inputs.listing import Source
from vab.data.shards.folder import OutFolder
from vab.extras import install_hint
from vab.frozen import device_named
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.spec import UserError


@dataclass(frozen=True)
class Facts:
    """What the networks and rules of an extraction are."""

    spec: dict[str, Any]
    """``SegmentSpec``, as JSON."""
    extraction: dict[str, Any]
    """Rules, for the manifest."""
    codebooks: Tensor
    """(K, S, code_dim) of the codec."""
    packages: list[str]
    """Distributions that the networks come from."""

    @classmethod
    def of(cls, encoders: Encoders, cutting: Cutting) -> Facts:
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


def _require_equal(where: str, facts: Facts, others: Facts) -> None:
    """Refuse networks and rules that differ from process to process: their records would be mixed.

    Raises:
        UserError: If they differ.
    """
    if (facts.spec, facts.extraction) != (others.spec, others.extraction):
        names = [name for name, value in (facts.spec | facts.extraction).items()
                 if (others.spec | others.extraction).get(name) != value]  # fmt: skip
        raise UserError(
            f"{where} has loaded other networks or has another precision than the first ({', '.join(names)})"
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
        preprocess = encoders.vision.preprocessor()
        return encoders, Cutting(sample_rate=codec.sample_rate, preprocess=preprocess, **self.rules)


class Engine(Protocol):
    """Does parts."""

    @property
    def facts(self) -> Facts:
        """Of its networks."""

    def run(self, parts: Iterator[Part], out: OutFolder, head: Mapping[str, Any], settings: Settings) -> Iterator[Done]:
        """Do parts; yields each when it is written."""


class LocalEngine:
    """Does parts in this process.

    Args:
        encoders: The frozen networks.
        cutting: How files become segments.
    """

    def __init__(self, encoders: Encoders, cutting: Cutting) -> None:
        self.encoders, self.cutting, self.facts = encoders, cutting, Facts.of(encoders, cutting)

    def run(self, parts: Iterator[Part], out: OutFolder, head: Mapping[str, Any], settings: Settings) -> Iterator[Done]:
        """Do parts; yields each when it is written."""
        return PartsWorker(self.encoders, self.cutting, settings, out, head).run(parts)


_TRIES = 3
"""How often a part may be in a process that dies."""


class DevicesEngine:
    """Does parts in one process for each device. A process that dies is started again, and its parts are done again.

    Args:
        recipe: What each process loads.
        devices: Of each process.

    Raises:
        UserError: If a process cannot load its networks.
    """

    def __init__(self, recipe: Recipe, devices: Sequence[str]) -> None:
        self._processes = [_Process(recipe, device) for device in devices]
        try:
            facts = [process.facts() for process in self._processes]  # all of them must have loaded
            self.facts = facts[0]
            for process, other in zip(self._processes, facts, strict=True):
                _require_equal(process.device, other, self.facts)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.stop()

    def run(self, parts: Iterator[Part], out: OutFolder, head: Mapping[str, Any], settings: Settings) -> Iterator[Done]:
        """Do parts; yields each when it is written.

        Raises:
            UserError: If a process says so, or a part ends its process again and again.
        """
        again: deque[Part] = deque()
        tries: Counter[int] = Counter()
        work = (out.place, dict(head), settings)
        for process in self._processes:
            process.send(work)
        busy = list(self._processes)
        while busy or again:
            for process in busy or [*self._processes]:
                if process not in busy:  # a part came back after this process had ended
                    busy.append(process)
                    process.send(work)
            ready = wait([process.connection for process in busy])
            for process in [process for process in busy if process.connection in ready]:
                try:
                    message = process.connection.recv()
                except (EOFError, OSError):
                    lost, code = process.restart()
                    tries.update(part.number for part in lost)
                    if worst := [part.number for part in lost if tries[part.number] >= _TRIES]:
                        raise UserError(
                            f"the process of device {process.device} died {_TRIES} times in part {worst[-1]} (exit"
                            f" code {code}{', for want of memory?' if code == -signal.SIGKILL else ''})"
                        ) from None
                    again.extend(lost)
                    process.send(work)
                    continue
                if isinstance(message, UserError):
                    raise message
                if isinstance(message, Done):
                    del process.taken[message.number]
                    yield message
                elif message == _ENDED:
                    busy.remove(process)
                else:
                    part = again.popleft() if again else next(parts, None)
                    if part is not None:
                        process.taken[part.number] = part
                    process.send(part)


_NEXT, _ENDED = "next", "ended"
"""What a process asks for, and what it says when it has got no part."""


@dataclass(eq=False)
class _Process:
    """One process, and what it is at."""

    recipe: Recipe
    device: str
    taken: dict[int, Part] = field(default_factory=dict)
    connection: Connection[Any, Any] = field(init=False)
    process: SpawnProcess = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.recipe, self.device))
        self.process.start()
        theirs.close()  # so that the process's death is seen as the end of the pipe

    def facts(self) -> Facts:
        """What it has loaded."""
        try:
            message = self.connection.recv()
        except EOFError:
            self.process.join()
            raise UserError(
                f"the process of device {self.device} ended before it began (exit code {self.process.exitcode}): in a"
                ' script of your own, call extract under if __name__ == "__main__":'
            ) from None
        if isinstance(message, UserError):
            raise message
        assert isinstance(message, Facts)
        return message

    def send(self, message: Any) -> None:
        """Send it; that the process has died meanwhile is noticed when the next message of it is awaited."""
        with suppress(OSError):
            self.connection.send(message)

    def restart(self) -> tuple[list[Part], int | None]:
        """Start it again; gives the parts that it had not done, and its exit code."""
        self.stop()
        code, lost, self.taken = self.process.exitcode, list(self.taken.values()), {}
        self._start()
        self.facts()
        return lost, code

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection[Any, Any], recipe: Recipe, device: str) -> None:
    """The life of a device's process: load the networks, ask for parts, do them."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)

    def parts() -> Iterator[Part]:
        while True:
            connection.send(_NEXT)
            if (part := connection.recv()) is None:
                return
            yield part

    try:
        encoders, cutting = recipe.load(device)
        connection.send(Facts.of(encoders, cutting))
        while True:
            place, head, settings = connection.recv()
            for done in PartsWorker(encoders, cutting, settings, OutFolder(place), head).run(parts()):
                connection.send(done)
            connection.send(_ENDED)
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


class RayEngine:
    """Does parts on Ray: actors, each with networks and decoders of its own, which ask for parts.

    Ray starts an actor that died again, also on another machine, and the parts that it had are done again. Where the
    cluster scales itself, actors wait for machines and then join in.

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
        self._ray: Any = ray
        self._is_own = not ray.is_initialized()
        if self._is_own:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if device != "cpu" else 0
        count = actors or gpus or 1
        self.cores = max(2, int(there.get("CPU", 1)) // count)
        """Of each actor, one of them for the encoders."""
        options = {"num_cpus": max(1, int(there.get("CPU", 1)) // count), "num_gpus": int(gpus > 0)}
        worker = self._ray.remote(max_restarts=-1, max_task_retries=-1, **options)(_RayWorker)
        self._actors = [worker.remote(recipe, device) for _ in range(count)]
        self.facts = self._get(self._actors[0].facts.remote())

    def close(self) -> None:
        """End the actors, and Ray if this has started it."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._is_own:
            self._ray.shutdown()

    def run(self, parts: Iterator[Part], out: OutFolder, head: Mapping[str, Any], settings: Settings) -> Iterator[Done]:
        """Do parts; yields each when it is written.

        Raises:
            UserError: If an actor says so, or actors die again and again.
        """
        place = os.path.abspath(out.place)  # actors work in folders of their own
        waiting = {part.number: part._replace(sources=[_absolute(source) for source in part.sources]) for part in parts}
        for _ in range(_TRIES):
            desk = self._ray.remote(num_cpus=0)(_Desk).remote(list(waiting.values()))
            running = [actor.run.remote(desk, place, dict(head), settings, self.facts) for actor in self._actors]
            while running:
                ended, running = self._ray.wait(running, timeout=0.5)
                for done in self._get(desk.collect.remote()):
                    if waiting.pop(done.number, None) is not None:
                        yield done
                for reference in ended:
                    self._get(reference)
            for done in self._get(desk.collect.remote()):
                if waiting.pop(done.number, None) is not None:
                    yield done
            self._ray.kill(desk)
            if not waiting:  # else an actor died, and what it had is done again
                return
        raise UserError(f"{len(waiting)} parts, such as {min(waiting)}, were not done in {_TRIES} tries: actors died")

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise


def _absolute(source: Source) -> Source:
    return source._replace(root=os.path.abspath(source.root))


class _Desk:
    """Where actors get parts and say what is done."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts, self._done = deque(parts), list[Done]()

    def take(self) -> Part | None:
        return self._parts.popleft() if self._parts else None

    def note(self, done: Done) -> None:
        self._done.append(done)

    def collect(self) -> list[Done]:
        done, self._done = self._done, []
        return done


class _RayWorker:
    """An actor."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self._loaded = recipe.load(device)

    def facts(self) -> Facts:
        return Facts.of(*self._loaded)

    def run(self, desk: Any, place: str, head: dict[str, Any], settings: Settings, facts: Facts) -> None:
        import ray

        _require_equal("an actor", self.facts(), facts)

        def parts() -> Iterator[Part]:
            while (part := ray.get(desk.take.remote())) is not None:
                yield part

        for done in PartsWorker(*self._loaded, settings, OutFolder(place), head).run(parts()):
            ray.get(desk.note.remote(done))
