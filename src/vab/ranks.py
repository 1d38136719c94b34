"""The processes of one command: one by itself, or several on many devices and machines, started by Lightning Fabric."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from vab.frozen import device_named
from vab.spec import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")

_ENDED_EARLY = (
    "another process of this command has ended too early, see its message: mend that and run the same command again,"
    " what is done is kept"
)

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
        """Leave the other ranks, once nothing is left to say; it waits for them.

        Left to the end of the interpreter, a thread of the connection may still be at work there, and abort the
        process.
        """
        import torch.distributed

        if self.fabric is not None and torch.distributed.is_initialized():
            with suppress(RuntimeError):  # one that is gone already has nothing to say
                torch.distributed.barrier()
            torch.distributed.destroy_process_group()


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
