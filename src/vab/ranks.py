"""The processes of one command, on one or several devices and nodes, started by Lightning Fabric."""

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
    "another process of this command stopped early, see its message: correct the cause and run the same command again;"
    " finished work is kept"
)

# A rank waits for the others when its share is done, perhaps for days.
_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the command. They exchange results and errors, but no tensors."""

    rank: int
    """Rank of this process over all nodes."""
    world_size: int
    """Number of processes over all nodes."""
    device: str
    """Device of this process."""
    fabric: Fabric | None = None
    """None for a single process, which needs no ``torch.distributed``."""

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.fabric is None:
            return value
        with _lost_connection():
            return self.fabric.broadcast(value)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank; waits for all of them."""
        if self.fabric is None:
            return [value]
        import torch.distributed

        values: list[T | None] = [None] * self.world_size
        with _lost_connection():
            torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def agree(self, error: UserError | None) -> None:
        """Continue only if no rank has an error; waits for all of them.

        Raises:
            UserError: On rank 0, the first error of any rank.
            SystemExit: On the other ranks, silently, so that the error is printed once.
        """
        if self.fabric is None:
            if error is not None:
                raise error
            return
        words = [text for text in self.gather(None if error is None else str(error)) if text is not None]
        if not words:
            return
        self._disconnect()
        if self.rank == 0:
            raise error if error is not None else UserError(words[0])
        raise SystemExit(0)

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Stop the ranks that this process started when it stops, and print each error once."""
        try:
            yield
            self._disconnect()
        except BaseException as error:
            if self.fabric is not None and self.rank == 0:
                for process in getattr(self.fabric.strategy.launcher, "procs", ()):
                    process.terminate()
            is_started_by_other = self.fabric is not None and os.environ.get("LOCAL_RANK", "0") != "0"
            if isinstance(error, KeyboardInterrupt) and is_started_by_other:
                # The process that started this one reports for both; Fabric would kill it if this one failed first.
                raise SystemExit(0) from None
            raise

    def _disconnect(self) -> None:
        """Wait for the other ranks and close the process group.

        If it is left to the exit of the interpreter, a thread of the connection may still run and abort the process.
        """
        import torch.distributed

        if self.fabric is not None and torch.distributed.is_initialized():
            with suppress(RuntimeError):  # a rank may have stopped already
                torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def start_ranks(device: str, devices: int, num_nodes: int) -> Ranks:
    """Start the other processes, if any, by running this command line once more for each.

    On several nodes, or under torchrun or SLURM, the processes run already. They find each other through the
    environment variables, as in training.

    Args:
        device: auto, cpu, cuda, or for a single process a device such as cuda:1.
        devices: Processes per node.
        num_nodes: Number of nodes.

    Raises:
        UserError: If there are fewer devices, or the environment does not match.
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
    logging.disable(logging.INFO)  # hide how the processes connect
    try:
        # gloo needs no GPU; only small objects are exchanged.
        strategy = DDPStrategy(process_group_backend="gloo", timeout=_TIMEOUT)
        fabric = Fabric(accelerator=where.type, devices=devices, num_nodes=num_nodes, strategy=strategy)
        by_hand = isinstance(strategy.cluster_environment, LightningEnvironment)
        if num_nodes > 1 and by_hand and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            # They would wait for each other, each at its own address.
            raise ValueError(
                "MASTER_ADDR and MASTER_PORT are not set, so the nodes cannot find each other; on each of them, with"
                f" --node_rank 0, 1, ..., type: torchrun --nnodes {num_nodes} --node_rank 0 --nproc_per_node {devices}"
                " --master_addr HOST --master_port 29500 -m vab, then the command (under SLURM: srun vab)"
            )
        fabric.launch()
    except (MisconfigurationException, ValueError, RuntimeError) as error:  # Lightning's errors for wrong settings
        raise UserError(f"--devices {devices} --num_nodes {num_nodes}: {' '.join(str(error).split())}") from error
    finally:
        logging.disable(before)
    return Ranks(fabric.global_rank, fabric.world_size, str(fabric.device), fabric)


@contextmanager
def _lost_connection() -> Iterator[None]:
    """Report a lost connection as another process that has stopped."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(_ENDED_EARLY) from error
