"""Whether a device computes in bfloat16, and on a CPU results that do not depend on the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


def has_bfloat16(device: torch.device) -> bool:
    """Whether this is a GPU that computes in bfloat16 (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


_thread_count = threading.RLock()
"""Held while the number of threads is changed, so that no other thread reads the changed number as the user's."""


@contextmanager
def single_threaded(device: torch.device) -> Iterator[int]:
    """On a CPU, compute in one thread: the way in which threads split a sum decides how it is rounded.

    It holds for the calling thread, and for those that it starts.

    Args:
        device: Device of the computation; if it is not a CPU, nothing changes.

    Yields:
        The number of threads before.
    """
    if device.type != "cpu":
        yield 1
        return
    with _thread_count:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)


def one_by_one(run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Run a network so that on a CPU the result for a row depends on this row only.

    On a CPU each row is computed alone and in one thread; as many rows run at a time as torch has threads. On other
    devices all rows are computed together.

    Args:
        run: (B, ...) to (B, ...), without a state.
        rows: (B, ...).

    Returns:
        (B, ...), without gradients.
    """

    @torch.no_grad()  # it is set for each thread
    def alone(row: Tensor) -> Tensor:
        return run(row.clone())  # a kernel may depend on the alignment in memory

    if rows.device.type != "cpu" or not len(rows):
        with torch.no_grad():
            return run(rows)
    with single_threaded(rows.device) as threads:
        if min(threads, len(rows)) == 1:
            return torch.cat([alone(row) for row in rows.split(1)])
        with ThreadPoolExecutor(min(threads, len(rows)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(alone, rows.split(1))))
