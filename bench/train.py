"""One training step timed: the backbone beside encoders of others of equal width, layers and heads.

    make bench BENCH=train
    make bench BENCH=train ARGS="--size paper --device cuda --precision bf16-mixed --compile --batch_size 64"

Forward, loss over the hidden codes, backward, AdamW, on random codes of the paper's segment. All have the same inputs,
heads and loss: the encoders differ. Each is a process of its own, so that peaks of memory are its own; steps of all are
taken in turn, and the best of each counts, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.generate import arguments_of, markdown
from bench.measure import BF16, paper_spec, weights_of
from bench.peers import PEERS, Peer, installed
from bench.timing import machine, peak_memory, reset_peak_memory, run_as_program, synchronize
from vab.backbone import Backbone
from vab.callbacks.matmul_rate import matmul_rate
from vab.engines import compile_blocks
from vab.files import write_atomically
from vab.flops import step_flops
from vab.frozen import device_named
from vab.losses import hidden_code_loss, masked_code_loss
from vab.spec import UserError
from vab.tokens.masking import Masking
from vab.tokens.noise import record_keys

OURS = "vab"
ALL_SCORED = "vab, all codes scored"
"""The same network, its heads and loss as the others have them: also where codes are visible."""
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product",
             "aten::_flash_attention", "aten::_efficient_attention", "aten::_cudnn_attention")  # fmt: skip
"""Operations that are matrix products, as they begin."""


@dataclass(frozen=True)
class Settings:
    """What all systems of a run share."""

    arguments: dict[str, Any]
    seconds: float
    batch_size: int
    device: str
    precision: str
    compile: bool
    threads: int


@dataclass
class Row:
    """One line of the table."""

    system: str
    parameters: int
    flops: int
    """Of a step."""
    seconds: list[float]
    """Of each step that was timed."""
    peak_bytes: int | None
    outside: float
    """Share of the time outside matrix products and attention."""
    compiled_difference: float | None = None
    """Of the loss, against the same network that is not compiled."""
    batch_size: int = 1

    @property
    def activations(self) -> int | None:
        """Bytes at the peak beside weights, gradients and AdamW's two averages, of 4 bytes each."""
        return None if self.peak_bytes is None else self.peak_bytes - 16 * self.parameters

    @property
    def rate(self) -> float:
        """Records/s of the best step."""
        return self.batch_size / min(self.seconds)


class Trained:
    """A system with its optimizer and a batch."""

    def __init__(self, system: str, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        torch.manual_seed(0)
        self.device, self.settings = torch.device(settings.device), settings
        self.scores_all = system != OURS
        self.alone = self.device.type == "cpu" and settings.threads == 1
        spec = paper_spec(settings.seconds)
        network: Backbone | Peer
        if system in (OURS, ALL_SCORED):
            network = Backbone(spec, **settings.arguments)
        else:
            network = Peer(spec, settings.arguments, PEERS[system][1](settings.arguments))
        network.set_codebooks(torch.randn(spec.num_codebooks, spec.codebook_size, spec.code_dim))
        self.network = network.to(self.device).train()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)  # as the tasks'
        batch = settings.batch_size
        codes = torch.randint(spec.codebook_size, (batch, spec.num_codebooks, spec.num_steps))
        steps = torch.full((batch,), spec.num_steps)
        mask = Masking().mask(record_keys(0, torch.arange(batch)), spec.num_codebooks, spec.num_steps, steps)
        features = torch.randn(batch, spec.num_frames, spec.feature_dim)
        self.codes, self.features, self.mask = (x.to(self.device) for x in (codes, features, mask))

    def loss(self) -> torch.Tensor:
        """Of the network as it is."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == BF16):
            if isinstance(self.network, Backbone) and not self.scores_all:  # as the task does
                x = self.network.trunk(self.codes, self.features, self.mask)
                return hidden_code_loss(x, self.network.heads, self.codes, self.mask)
            logits = self.network(self.codes, self.features, self.mask)
            return masked_code_loss(logits, self.codes, self.mask)

    def step(self) -> float:
        """Seconds of one."""
        # One thread's own time, where it is all there is: the machine may do other things in between.
        clock = time.process_time if self.alone else time.perf_counter
        synchronize(self.device)
        start = clock()
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        synchronize(self.device)
        return clock() - start

    def outside(self) -> float:
        """Share of a step's time outside matrix products: of the GPU's, or of the CPU's."""
        on_gpu = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
            self.step()
        times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in found.key_averages()}
        return 1 - sum(took for name, took in times.items() if name.startswith(_PRODUCTS)) / sum(times.values())


def work(pipe: Connection, system: str, settings: Settings) -> None:
    """A system's process: get ready, then take a step whenever asked; at ``None`` say the rest."""
    trained = Trained(system, settings)
    difference = None
    if settings.compile:
        with torch.no_grad():
            eager = float(trained.loss())
        if isinstance(trained.network, Backbone):
            compile_blocks(trained.network.blocks, "inductor")  # as the task does
        else:
            trained.network.compile(dynamic=False)
        with torch.no_grad():
            difference = abs(float(trained.loss()) - eager)
    trained.step()  # makes the optimizer's state; compiles
    trained.step()
    reset_peak_memory(trained.device)
    pipe.send(weights_of(trained.network))
    while pipe.recv() is not None:
        pipe.send(trained.step())
    peak = peak_memory(trained.device)
    pipe.send((peak, trained.outside(), difference))


def measure(systems: list[str], settings: Settings, rounds: int) -> list[Row]:
    """Rows of the table, the steps taken in turn."""
    # A fork has all that is imported; of CUDA it would be a broken half.
    context = multiprocessing.get_context("spawn" if settings.device.startswith("cuda") else "fork")
    flops = step_flops(paper_spec(settings.seconds), settings.arguments, settings.batch_size)
    rows, pipes, processes = [], [], []
    try:
        for system in systems:
            pipe, end = context.Pipe()
            process = context.Process(target=work, args=(end, system, settings))  # type: ignore[attr-defined]
            process.start()
            end.close()
            processes.append(process)
            pipes.append(pipe)
            rows.append(Row(system, pipe.recv(), flops, [], None, 0.0, batch_size=settings.batch_size))
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for number in range(rounds):
            if (
                cores and settings.device == "cpu" and settings.threads == 1
            ):  # on each core by turns: they need not be alike
                for process in processes:
                    os.sched_setaffinity(process.pid, {cores[number // 2 % len(cores)]})
            turns = list(zip(rows, pipes, strict=True))
            for row, pipe in turns[:: 1 if number % 2 else -1]:
                pipe.send(True)
                row.seconds.append(pipe.recv())
        for row, pipe in zip(rows, pipes, strict=True):
            pipe.send(None)
            row.peak_bytes, row.outside, row.compiled_difference = pipe.recv()
    except EOFError as error:
        raise UserError("a system's process has ended: is there memory for --batch_size?") from error
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure and print; a mistake in the options is one line and exit status 2."""
    run_as_program(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """Print what is measured, then the table."""
    on_gpu = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    device = options.device if options.device != "auto" else "cuda" if on_gpu else "cpu"
    if not on_gpu:
        device_named(device)
    if min(options.rounds, options.batch_size or 1, options.threads) < 1 or options.seconds < 1:
        raise UserError("rounds, batch_size, threads and seconds must be at least 1")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {Path(options.json).absolute().parent}")
    arguments = arguments_of(options.size) | {"dropout": options.dropout}
    batch_size = options.batch_size or (64 if on_gpu else 8)
    settings = Settings(
        arguments, options.seconds, batch_size, device, options.precision, options.compile, options.threads
    )
    peers = installed()
    rows = measure([OURS, ALL_SCORED, *peers], settings, options.rounds)
    here = machine(torch.device(device))
    dtype = torch.bfloat16 if options.precision == BF16 else torch.float32
    torch.set_num_threads(options.threads)
    ceiling = matmul_rate(8192 if on_gpu else 1024, torch.device(device), dtype)
    spec = paper_spec(options.seconds)
    print(
        f"machine: {here['cpu']}, {here['cores']} cores, {options.threads} threads; torch {here['torch']}; device "
        f"{here['device']}; load {here['load']}\n{options.size}: {options.precision}, "
        f"{'compiled' if options.compile else 'not compiled'}, dropout {options.dropout:g}, {batch_size} records of "
        f"{spec.num_frames} + {spec.num_steps} positions; best of {options.rounds}\n"
    )
    print(markdown(_table(rows, ceiling)))
    print(
        "\nPeak memory is that of the process from the third step on; beside weights: without weights, gradients and "
        "AdamW's averages.\nThe backbone's first half has two feed-forward networks a block; a position passes "
        f"one of them.\n{OURS}'s step makes its loss a level at a time, on a CPU of hidden codes alone, as its task "
        "does; the others, and the second row, make all logits.\nTimes of one thread are its own, without waiting "
        "for a core."
    )
    if missing := [name for name in PEERS if name not in peers]:
        print(f"Left out: {', '.join(missing)} (not installed): make setup EXTRAS=,bench")
    if options.json:
        content = {
            "machine": here,
            "settings": vars(options),
            "ceiling": ceiling,
            "rows": [asdict(row) for row in rows],
        }
        write_atomically(Path(options.json), json.dumps(content, indent=2).encode())


def _table(rows: list[Row], ceiling: float) -> list[dict[str, str]]:
    best = max((row.rate for row in rows if row.system not in (OURS, ALL_SCORED)), default=None)
    table = []
    for row in rows:
        line = {
            "system": row.system,
            "parameters": f"{row.parameters / 1e6:.1f}M",
            "GFLOP per step": f"{row.flops / 1e9:.4g}",
            "records/s": f"{row.rate:.4g}",
            "of the best peer": "-" if best is None else f"{row.rate / best:.3f}",
            "of a plain product": f"{100 * row.flops / min(row.seconds) / ceiling:.0f} %",
            "outside products": f"{100 * row.outside:.1f} %",
            "peak MiB": "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
            "beside weights": "-" if row.activations is None else f"{row.activations / 2**20:.0f}",
        }
        if row.compiled_difference is not None:
            line["loss, compiled - eager"] = f"{row.compiled_difference:.1e}"
        table.append(line)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench.train", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", help="file of configs/backbone")
    parser.add_argument("--batch_size", type=int, help="records of a step; 8, on a GPU 64")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each, of which the best counts")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the segment")
    parser.add_argument("--dropout", type=float, default=0.0, help="of all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--precision", choices=["32-true", BF16], default="32-true")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each")
    parser.add_argument("--json", help="write everything measured to this file too")
    return parser


if __name__ == "__main__":
    main()
