"""Full precision, and on a CPU results that do not depend on the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast, and no TF32 on a GPU.

    Codes are an argmin: rounding that no ear would notice still flips them, so precision is not the caller's choice.
    """
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


_counting = threading.RLock()
"""Held while the number of threads is another: what the next one took for the user's number would be ours."""


@contextmanager
def single_threaded(device: torch.device) -> Iterator[int]:
    """On a CPU, compute in one thread: how a sum is shared out to threads decides how it is rounded.

    It holds for the thread that asks for it, and for those that it starts.

    Args:
        device: Where the computation is; elsewhere than on a CPU nothing is done.

    Yields:
        How many threads there were.
    """
    if device.type != "cpu":
        yield 1
        return
    with _counting:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)


def one_by_one(run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Run a network so that on a CPU what it gives for a row depends on nothing but this row.

    On a CPU each row goes through it alone and in one thread; there are as many rows at a time as torch has threads, so
    that all of them are used. Elsewhere all rows go through it together.

    Args:
        run: (B, ...) to (B, ...), with no memory of what it has run before.
        rows: (B, ...).

    Returns:
        (B, ...), without gradients.
    """

    @torch.no_grad()  # each thread has a switch of its own
    def alone(row: Tensor) -> Tensor:
        return run(row.clone())  # at an address of its own: where a row lies in memory is not to matter either

    if rows.device.type != "cpu" or not len(rows):
        with torch.no_grad():
            return run(rows)
    with single_threaded(rows.device) as threads:
        if min(threads, len(rows)) == 1:
            return torch.cat([alone(row) for row in rows.split(1)])
        with ThreadPoolExecutor(min(threads, len(rows)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(alone, rows.split(1))))
