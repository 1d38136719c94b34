"""The processes of one command: one by itself, or several on many devices and machines, started by Lightning Fabric."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from vab.frozen import device_named
from vab.spec import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch.distributed import TCPStore

T = TypeVar("T")

_ENDED_EARLY = (
    "another process of this command has ended too early, see its message: mend that and run the same command again,"
    " what is done is kept"
)

_BEAT_SECONDS, _SILENT_SECONDS = 5.0, 120.0
"""How often a rank says that it is there, and after how long without a word it is taken to have ended."""

# Ranks end when their share is done, the first perhaps days before the last.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the command. They share no tensors, only what was done and what went wrong."""

    rank: int
    """Of this process, over all machines."""
    world_size: int
    """Processes in all."""
    device: str
    """Of this process."""
    fabric: Fabric | None = None
    """None for a process by itself, which needs no ``torch.distributed``."""
    _heard: list[_Heartbeats] = field(default_factory=list, compare=False, repr=False)
    _beating: list[threading.Thread] = field(default_factory=list, compare=False, repr=False)
    _parting: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.fabric is None:
            return value
        with _end_of_others():
            return self.fabric.broadcast(value)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank; waits for all of them."""
        if self.fabric is None:
            return [value]
        import torch.distributed

        values: list[T | None] = [None] * self.world_size
        with _end_of_others():
            torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def counter(self) -> Callable[[], int]:
        """A function that gives 0, 1, 2, ..., each number to one caller on one rank alone; waits for all ranks."""
        if self.fabric is None:
            return itertools.count().__next__
        from torch.distributed import TCPStore

        host, store = os.environ["MASTER_ADDR"], None
        if self.rank == 0:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
        port = self.broadcast(0 if store is None else store.port)
        if store is None:
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        shared = store
        if self.rank == 0:
            self._heard.append(_Heartbeats(shared, self.world_size))
        else:
            # A connection of its own: one that is asked from two threads mixes up the answers.
            own = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
            beating = threading.Thread(target=_beat, args=(own, self.rank, self._parting), daemon=True)
            beating.start()
            self._beating.append(beating)

        def count() -> int:
            with _end_of_others():
                return int(shared.add("count", 1)) - 1

        return count

    def require_others(self) -> None:
        """Notice, on rank 0, that another process has failed: one that this started, or one that is silent.

        Raises:
            UserError: If one has.
        """
        started = [] if self.fabric is None else getattr(self.fabric.strategy.launcher, "procs", [])
        if any(process.poll() not in (None, 0) for process in started):
            raise UserError(_ENDED_EARLY)
        with _end_of_others():
            silent = [rank for heartbeats in self._heard for rank in heartbeats.silent()]
        if silent:
            raise UserError(f"rank {silent[0]} has said nothing for {_SILENT_SECONDS:g} s: {_ENDED_EARLY}")

    def agree(self, error: UserError | None) -> None:
        """Go on only if no rank met an error; waits for all of them.

        Raises:
            UserError: On rank 0, the first one that any rank met.
            SystemExit: On the other ranks, silently: one line is enough.
        """
        if self.fabric is None:
            if error is not None:
                raise error
            return
        words = [text for text in self.gather(None if error is None else str(error)) if text is not None]
        if not words:
            return
        self._part()
        if self.rank == 0:
            raise error if error is not None else UserError(words[0])
        raise SystemExit(0)

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Let no rank outlive the first one, and say no word twice."""
        try:
            yield
            self._part()
        except BaseException as error:
            if self.fabric is not None and self.rank == 0:
                for process in getattr(self.fabric.strategy.launcher, "procs", ()):
                    process.terminate()
            is_started_by_other = self.fabric is not None and os.environ.get("LOCAL_RANK", "0") != "0"
            if isinstance(error, KeyboardInterrupt) and is_started_by_other:
                # The process that started this one speaks for both; Fabric would kill it if this one failed first.
                raise SystemExit(0) from None
            raise

    def _part(self) -> None:
        """End the threads that talk to the other ranks, once nothing is left to say.

        Left to the end of the interpreter, one of them may still be at work there, and aborts the process. While
        something is being said this would wait for the others, so it is not for a rank that stops early.
        """
        import torch.distributed

        if self.fabric is not None and torch.distributed.is_initialized():
            self._parting.set()
            for beating in self._beating:
                beating.join()
            # Rank 0 holds what the others speak to: it goes when they have all said their last.
            with suppress(RuntimeError):  # one that is gone already has nothing to say
                torch.distributed.barrier()
            torch.distributed.destroy_process_group()


class _Heartbeats:
    """What rank 0 hears of the others: neither SLURM nor a hand-made start tells it that one was killed.

    Args:
        store: That all ranks write to.
        world_size: Ranks.
    """

    def __init__(self, store: TCPStore, world_size: int) -> None:
        self.store = store
        self.counts, self.since = (
            dict.fromkeys(range(1, world_size), 0),
            dict.fromkeys(range(1, world_size), monotonic()),
        )
        self.asked = monotonic()

    def silent(self) -> list[int]:
        """Ranks that have said nothing for long; asks only now and then."""
        now = monotonic()
        if now - self.asked >= _BEAT_SECONDS:
            self.asked = now
            for rank, before in self.counts.items():
                count = int(self.store.add(f"beat{rank}", 0))
                if count != before:
                    self.counts[rank], self.since[rank] = count, now
        return [rank for rank, since in self.since.items() if now - since > _SILENT_SECONDS]


def _beat(store: TCPStore, rank: int, parting: threading.Event) -> None:
    """Say that this rank is there, until it or rank 0 is not."""
    with suppress(RuntimeError):
        store.add(f"beat{rank}", 1)
        while not parting.wait(_BEAT_SECONDS):
            store.add(f"beat{rank}", 1)


def start_ranks(device: str, devices: int, num_nodes: int) -> Ranks:
    """Start the other processes, if there are to be any, by running this one's command line once more for each.

    On several machines, or under torchrun or SLURM, the processes are there already; they find each other by the
    environment, as for training.

    Args:
        device: As a user names it: auto, cpu, cuda, and for a single process cuda:1.
        devices: Processes on each machine.
        num_nodes: Machines.

    Raises:
        UserError: If there are not as many devices, or the environment says otherwise.
    """
    for name, count in (("devices", devices), ("num_nodes", num_nodes)):
        if count < 1:
            raise UserError(f"--{name} must be 1 or more, got {count}")
    where = device_named(device)
    if devices * num_nodes == 1:
        return Ranks(0, 1, device)
    if where.index is not None:
        raise UserError(f"--device {device} is a single device, but --devices is {devices}: give --device {where.type}")
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # how the processes meet is of no interest
    try:
        # gloo, which needs nothing of a GPU: some words are all that is exchanged.
        strategy = DDPStrategy(process_group_backend="gloo", timeout=_PATIENCE)
        fabric = Fabric(accelerator=where.type, devices=devices, num_nodes=num_nodes, strategy=strategy)
        by_hand = isinstance(strategy.cluster_environment, LightningEnvironment)
        if num_nodes > 1 and by_hand and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            # They would wait for each other, each at an address of its own.
            raise ValueError(
                "nothing here says where the other machines are; on each of them, with"
                f" --node_rank 0, 1, ..., type: torchrun --nnodes {num_nodes} --node_rank 0 --nproc_per_node {devices}"
                " --master_addr HOST --master_port 29500 -m vab, then the command (under SLURM: srun vab)"
            )
        fabric.launch()
    except (MisconfigurationException, ValueError, RuntimeError) as error:  # Lightning's words for wrong settings
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: {' '.join(str(error).split())}") from error
    finally:
        logging.disable(before)
    return Ranks(fabric.global_rank, fabric.world_size, str(fabric.device), fabric)


@contextmanager
def _end_of_others() -> Iterator[None]:
    """Say in a user's words that another process has gone, which shows as a broken connection."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(_ENDED_EARLY) from error
