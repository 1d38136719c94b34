"""What to run first on a machine with a GPU: whether vab is right and fast there, in one table.

    make gpu-check
    make gpu-check ARGS="--size base --batch_size 64"

Paste the table into an issue. The exit status is 0 if all is well, 1 if a row says CHECK, 2 without a GPU. Nothing is
downloaded: weights and data are random.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys

import torch

from bench.codecs import benchmark_codec
from bench.generate import arguments_of, markdown
from bench.gpu_steps import (
    FIRST,
    LAST,
    LOGGED,
    RECORDS,
    ROOT,
    TASKS,
    Measured,
    difference,
    make_task,
    predicted_peak,
    train,
)
from bench.measure import BF16, Conditions, measure, paper_spec, parallel
from bench.timing import run_as_program
from vab import __version__
from vab.callbacks.matmul_rate import matmul_rate
from vab.spec import SegmentSpec, UserError
from vab.tokens.sampler import Sampler

OK, CHECK = "ok", "CHECK"


def main(argv: list[str] | None = None) -> None:
    """Check and print; without a GPU, or with a mistake in the options, one line and exit status 2."""
    run_as_program(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """Print a table; exit status 1 if a row says CHECK."""
    if not torch.cuda.is_available():
        raise UserError("gpu-check needs a GPU that torch can use; vab doctor says what is missing")
    if min(options.batch_size or 1, options.repeats) < 1 or options.seconds < 1:
        raise UserError("batch_size, repeats and seconds must be at least 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    spec = paper_spec(options.seconds)
    rows = [] if options.skip_tests else [tests_row()]
    for name in TASKS:
        _say(name)
        rows += checked(name, options, spec)
    _say("generation")
    rows += generation_rows(options, spec)
    print(f"{head()}\n{options.size}, {BF16}, segments of {options.seconds:g} s\n\n{markdown(rows)}")
    print(
        "\nA gradient's difference is the norm of the difference as a share of the norm. MFU is the share of the rate "
        "of a plain bfloat16 product on this card. Memory is what torch allocated at the peak."
    )
    if any(row["verdict"] == CHECK for row in rows):
        raise SystemExit(1)


def checked(name: str, options: argparse.Namespace, spec: SegmentSpec) -> list[dict[str, str]]:
    """Rows of one task: its gradients in bfloat16, then its speed and memory, eager and compiled."""
    dropout = arguments_of(options.size).get("dropout", 0.0)

    def trained(records: int, precision: str, steps: int, *, dropout: float = 0.0, compile: bool = False) -> Measured:
        gc.collect()
        torch.cuda.empty_cache()  # what the run before has left
        return train(make_task(name, options.size, spec, dropout, compile), records, precision, steps)

    exact, eager = (trained(RECORDS, precision, 1) for precision in ("32-true", BF16))
    rounding = difference(eager, exact)
    rows = [_row(f"{name}: gradient, {BF16} - float32", f"{rounding:.2%}", "below 5 %", rounding < 0.05)]
    if not options.skip_compile:
        found = difference(trained(RECORDS, BF16, 1, compile=True), eager)
        limit = 2 * rounding
        rows.append(_row(f"{name}: gradient, compiled - eager", f"{found:.2%}", f"below {limit:.2%}", found < limit))
    records = options.batch_size or fitting_batch()
    predicted = predicted_peak(name, options.size, options.seconds, records)
    rate = matmul_rate(options.width, torch.device("cuda", 0), torch.bfloat16)
    for kind in ("eager",) if options.skip_compile else ("eager", "compiled"):
        title = f"{name}: {records} records, {kind}"
        try:
            ran = trained(records, BF16, LOGGED + 2, dropout=dropout, compile=kind == "compiled")
        except torch.OutOfMemoryError:
            rows.append(_row(f"{title}: a step", "out of memory", "a smaller --batch_size", False))
            continue
        speed = f"{ran.seconds:.3f} s, {records / ran.seconds:.0f} records/s, MFU {ran.flops / ran.seconds / rate:.0%}"
        rows.append(_row(f"{title}: a step", speed, "-", True))
        peak = f"{ran.peak_bytes / 2**30:.2f} GiB"
        if predicted is None or kind == "compiled":
            rows.append(_row(f"{title}: peak memory", peak, "-", True))
        else:
            is_near = abs(ran.peak_bytes / predicted - 1) < 0.05
            rows.append(_row(f"{title}: peak memory", peak, f"{predicted / 2**30:.2f} GiB planned, 5 %", is_near))
        waits = f"{ran.waits} in {LAST - FIRST} steps, {ran.waits_logged} in one that logs"
        rows.append(_row(f"{title}: waits of the host", waits, "0, up to 2", not ran.waits and ran.waits_logged <= 2))
    return rows


def generation_rows(options: argparse.Namespace, spec: SegmentSpec) -> list[dict[str, str]]:
    """Seconds from features to waveform."""
    device = torch.device("cuda", 0)
    on = Conditions(spec, benchmark_codec(device), device, BF16, repeats=options.repeats)
    system = parallel(arguments_of(options.size), Sampler(), on)
    rows = []
    for batch in (1, 8):
        row = measure(system, options.size, batch, on)
        parts = f"network {row.network_seconds:.2f} s, codec {row.codec_seconds:.2f} s"
        rows.append(_row(f"generate: {batch} at once", f"{row.total_seconds:.2f} s ({parts})", "-", True))
    return rows


def fitting_batch() -> int:
    """A power of 2 that the paper's network trains with on this card: 7 GiB, and 0.7 GiB a record."""
    room = 0.85 * torch.cuda.mem_get_info()[1] / 2**30 - 7
    return max((size for size in (2, 4, 8, 16, 32, 64, 128) if 0.7 * size < room), default=1)


def tests_row() -> dict[str, str]:
    """The tests that need a GPU."""
    _say("tests")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "needs_cuda", "--durations=0", "tests"],
        cwd=ROOT, env=os.environ | {"FAIL_WITHOUT_CUDA": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-2000:], file=sys.stderr)
    return _row("tests that need a GPU", done.stdout.strip().splitlines()[-1], "all pass", not done.returncode)


def head() -> str:
    """Versions, and the card."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    memory = torch.cuda.mem_get_info()[1] / 2**30
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return (
        f"vab {__version__} ({commit or 'no commit'}), torch {torch.__version__}, CUDA {torch.version.cuda}, Python "
        f"{sys.version.split()[0]}\n{torch.cuda.get_device_name()}, {memory:.1f} GiB, compute capability {capability}"
    )


def _row(what: str, found: str, expected: str, is_well: bool) -> dict[str, str]:
    return {"what": what, "measured": found, "expected": expected, "verdict": OK if is_well else CHECK}


def _say(words: str) -> None:
    print(f"{words} ...", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="paper", help="file of configs/backbone")
    parser.add_argument("--batch_size", type=int, help="records of a step; by default what the paper's network fits")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the segment")
    parser.add_argument("--repeats", type=int, default=5, help="of generation, median")
    parser.add_argument("--width", type=int, default=8192, help="of the product whose rate MFU is a share of")
    parser.add_argument("--skip_tests", action="store_true", help="without the tests that need a GPU")
    parser.add_argument("--skip_compile", action="store_true", help="eager only")
    return parser


if __name__ == "__main__":
    main()
