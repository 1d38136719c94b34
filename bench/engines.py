"""Training as users start it, ``vab fit``, on one device: plain, compiled, sharded by FSDP, and both.

    make bench BENCH=engines
    make bench BENCH=engines ARGS="--size tiny --device cpu --precision 32-true --batch_size 8 --steps 8 --records 64"

Random records of the paper's sizes are made, then the recipe for VGGSound runs on them for some steps, once with each
engine: the order, the masks and the first weights are the same, so the losses are to be alike. Rates are those that the
run logs itself, of its last steps: with a loader, an average of the weights and the meters, without validation.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.loader import write_records
from bench.measure import BF16
from bench.timing import machine, run_as_program
from vab.spec import UserError

_CONFIGS = Path(__file__).parents[1] / "configs"
_ENGINES = {
    "plain": [],
    "compiled": ["--model.compile=true"],
    "FSDP, one rank": ["--trainer.strategy=fsdp"],
    "FSDP, one rank, compiled": ["--trainer.strategy=fsdp", "--model.compile=true"],
}


@dataclass
class Row:
    """What a run has logged."""

    engine: str
    losses: list[float]
    """Of the steps at which the run logs."""
    records_per_second: float
    data_wait_share: float
    peak_memory_gib: float
    mfu: float | None


def main(argv: list[str] | None = None) -> None:
    """Run and print; a mistake in the options is one line and exit status 2."""
    run_as_program(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """All engines, then the table."""
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here: --device cpu")
    if options.steps < 4 or options.records < options.batch_size:
        raise UserError("steps must be at least 4, and records at least a batch")
    if not (_CONFIGS / "backbone" / f"{options.size}.yaml").exists():
        known = ", ".join(sorted(path.stem for path in (_CONFIGS / "backbone").glob("*.yaml")))
        raise UserError(f"--size must be one of {known}, got {options.size!r}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        write_records(folder / "shards", options.records)
        rows = [_fit(folder, engine, flags, options, on_gpu) for engine, flags in _ENGINES.items()]
    device = torch.device("cuda" if on_gpu else "cpu")
    here = machine(device)
    print(
        f"machine: {here['cpu']}, {here['cores']} cores; torch {here['torch']}; device {here['device']}\n"
        f"{options.size}: {options.precision}, {options.batch_size} records a step, {options.steps} steps"
    )
    table = Table("engine", "records/s", "of plain", "MFU", "waits for data", "peak GiB", "last loss", "farthest loss")
    for row in rows:
        apart = max(abs(mine - plain) for mine, plain in zip(row.losses, rows[0].losses, strict=True))
        table.add_row(
            row.engine,
            f"{row.records_per_second:.4g}",
            f"{row.records_per_second / rows[0].records_per_second:.3f}",
            "-" if row.mfu is None else f"{100 * row.mfu:.1f} %",
            f"{100 * row.data_wait_share:.2f} %",
            f"{row.peak_memory_gib:.2f}",
            f"{row.losses[-1]:.5f}",
            f"{apart:.1e}",
        )
    Console(width=120).print(table)
    print(json.dumps({"machine": here, "settings": vars(options), "rows": [asdict(row) for row in rows]}))


def _fit(folder: Path, engine: str, flags: list[str], options: argparse.Namespace, on_gpu: bool) -> Row:
    place = folder / engine.replace(" ", "_").replace(",", "")
    meters = {"class_path": "vab.callbacks.Meters", "init_args": {"mfu": True}}
    average = {"class_path": "vab.callbacks.EMA", "init_args": {"decay": 0.999}}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(place)}}
    command = [
        *(sys.executable, "-m", "vab.cli", "fit", f"--config={_CONFIGS / 'pretrain.yaml'}"),
        *(f"--data.train={folder / 'shards'}", f"--data.val={folder / 'shards'}"),
        *("--data.global_batch_size=null", f"--data.batch_size={options.batch_size}"),
        f"--data.num_workers={options.workers}",
        *(f"--model.backbone={_CONFIGS / 'backbone' / options.size}.yaml", "--model.warmup_steps=1"),
        *("--model.schedule_steps=100000", f"--trainer.accelerator={'gpu' if on_gpu else 'cpu'}"),
        *("--trainer.devices=1", "--trainer.strategy=auto", f"--trainer.precision={options.precision}"),
        *(f"--trainer.max_steps={options.steps}", f"--trainer.log_every_n_steps={options.steps // 4}"),
        *(f"--trainer.val_check_interval={options.steps}", "--trainer.limit_val_batches=0"),
        *(f"--trainer.logger={json.dumps(logger)}", f"--trainer.callbacks={json.dumps([average, meters])}"),
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise UserError(f"{engine}: vab fit ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    (file,) = place.rglob("metrics.csv")
    with file.open(newline="") as lines:
        logged = list(csv.DictReader(lines))

    def values(name: str) -> list[float]:
        return [float(line[name]) for line in logged if line.get(name)]

    return Row(
        engine,
        values("train/loss"),
        values("meters/records_per_second")[-1],
        values("meters/data_wait_share")[-1],
        values("meters/peak_memory_gib")[-1],
        values("meters/mfu")[-1] if values("meters/mfu") else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench.engines", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="paper", help="file of configs/backbone")
    parser.add_argument("--batch_size", type=int, default=64, help="records of a step")
    parser.add_argument("--steps", type=int, default=80, help="of each run, of which the last quarter is timed")
    parser.add_argument("--records", type=int, default=2048, help="to make")
    parser.add_argument("--workers", type=int, default=4, help="processes that read ahead")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default=BF16, choices=["32-true", BF16, "bf16-true"])
    parser.add_argument("--scratch", help="folder for the records; a temporary one where not given")
    return parser


if __name__ == "__main__":
    main()
