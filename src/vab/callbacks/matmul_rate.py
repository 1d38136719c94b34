"""The rate of matrix products that a device reaches, to compare a model's own rate with."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from vab.files import write_atomically

_SECONDS = 0.3
"""Time that a measurement takes."""
_WIDTH = {"cuda": 8192, "cpu": 1024}
"""Width of the square matrices: large enough to keep a device busy."""


def precision_dtype(precision: str) -> torch.dtype | None:
    """The type in which a trainer's precision, such as ``bf16-mixed``, multiplies matrices; None if not known."""
    names = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
    return names.get(precision.partition("-")[0])


def known_matmul_rate(device: torch.device, dtype: torch.dtype, cache: Path | None = None) -> float:
    """FLOP/s of a matrix product on this kind of device; measured the first time, then read from a file.

    Args:
        device: Where.
        dtype: Of the matrices; float32 as torch is set to multiply it now.
        cache: The file; by default ``vab/matmul_rates.json`` in the user's cache folder. If it cannot be read or
            written, the rate is measured each time.
    """
    path = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vab" / "matmul_rates.json"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    way = f" {torch.get_float32_matmul_precision()}" if dtype == torch.float32 else ""
    name = f"{kind}, {str(dtype).removeprefix('torch.')}{way}"
    known = _read(path)
    if name not in known:
        known[name] = matmul_rate(_WIDTH.get(device.type, 1024), device, dtype)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known, indent=2) + "\n")
        except (OSError, ValueError):
            pass  # a home that is full or read-only
    return known[name]


def matmul_rate(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several products of square matrices, in about a third of a second."""
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + _SECONDS
    a @ b  # the first call also prepares
    while best == float("inf") or time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best


def _read(path: Path) -> dict[str, float]:
    """Measured rates by name; empty if there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {name: rate for name, rate in pairs if isinstance(rate, float) and rate > 0}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
