"""Clocks that do not disturb what they measure, peak memory, and what the machine is."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vab.spec import UserError

Result = TypeVar("Result")


def run_as_program(
    run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: list[str] | None
) -> None:
    """Run a benchmark with the options of a command line; a mistake in them is one line and exit status 2."""
    options = parser.parse_args(argv)
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def measured(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds from the call to the last of its work on the device, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timed(nn.Module):
    """A network whose calls are timed without waiting for the device: on a GPU by events in its stream.

    It stands in the network's place. The time between two events also counts the moments in which the device waits
    for Python inside the network, so that the parts add up to what passes on the clock.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        for name in ("spec", "blocks"):  # what a task asks of its backbone
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network answers."""
        start = self._mark()
        answer = self.network(*args, **kwargs)
        self.marks.append((start, self._mark()))
        return answer

    def seconds(self) -> float:
        """In all calls so far; to be asked when the device has done its work."""
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in self.marks) / 1000
        return sum(end - start for start, end in self.marks)

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def matmul_rate(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one plain matrix product of a feed-forward layer's shape, (rows, D) x (D, 4 D): the machine's best.

    The best of several, after a warm-up: what the network's own rate is to be held against.
    """
    a = torch.randn(rows, dim, device=device, dtype=dtype)
    b = torch.randn(dim, 4 * dim, device=device, dtype=dtype)
    flops = 2 * rows * dim * 4 * dim
    times = max(1, round(2e9 / flops)) if device.type == "cpu" else 20

    def products() -> Tensor:
        for _ in range(times):
            product = a @ b
        return product

    return times * flops / min(measured(products, device)[0] for _ in range(6))


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of this process falls to what it holds


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on the GPU, or of the whole process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


_STATUS = Path("/proc/self/status")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to, for the head of a table."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
