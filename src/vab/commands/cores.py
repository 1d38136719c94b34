"""How many processor cores there are to work with."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any


def usable_cores() -> int:
    """Cores that this process may use, where the system tells (Linux); else those of the machine."""
    return len(_own_cores()) or os.cpu_count() or 1


def cores_per_process(gather: Callable[[Any], list[Any]]) -> int:
    """Cores for each of a command's processes, 1 or more: its own ones, or its share of those that several may use.

    SLURM gives each task cores of its own; torchrun and Lightning let all processes of a machine use the same ones.

    Args:
        gather: Gives every process's value to each of them, as ``Ranks.gather``.
    """
    mine = (socket.gethostname(), _own_cores())
    sharing = gather(mine).count(mine)
    return max(1, usable_cores() // sharing)


def _own_cores() -> list[int]:
    """Numbers of the cores that this process may use; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
