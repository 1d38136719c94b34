"""Float32 with all its digits, and where TF32 may take its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside: list[tuple[str, bool]] = []
"""The process's settings as each computation in full precision found them; several threads may be inside at once."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32: no autocast, and no TF32 on a GPU.

    For results that rounding changes: codes are an argmin, scores near each other have an order. TF32 is a setting of
    the process, so it is off for all threads until the last one leaves.
    """
    with _lock:
        _inside.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            matmul, cudnn = _inside.pop()  # the first one's settings are popped last
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = cudnn


def allow_tf32(device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32, except in ``full_precision``. CPUs compute as before."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
