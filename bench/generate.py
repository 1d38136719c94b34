"""How long sound takes: one table, the parallel decoding of masked codes beside an autoregressive decoder.

    make bench
    make bench ARGS="--sizes paper --device cuda --precision bf16-mixed --compile --json table.json"

Random weights: what is made is noise, the time is what sound would take. Every figure is measured, none extrapolated.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.codecs import benchmark_codec
from bench.measure import BF16, Conditions, Row, autoregressive, measure, paper_spec, parallel
from bench.timing import machine, matmul_rate, run_as_program
from vab.files import write_atomically
from vab.flops import pass_flops
from vab.frozen import device_named
from vab.spec import UserError
from vab.tokens.sampler import Sampler

BACKBONES = Path(__file__).parents[1] / "configs" / "backbone"
SIZES = ("small", "base", "paper")
NO_TWIN = "without transformers there is no autoregressive decoder to compare with: make setup EXTRAS=,bench"


def main(argv: list[str] | None = None) -> None:
    """Measure and print; a mistake in the options is one line and exit status 2."""
    run_as_program(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """Print what is measured, the work in it, then the table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = device_named(options.device)
    on_gpu = device.type == "cuda"
    sizes = options.sizes or (list(SIZES) if on_gpu else ["small", "base"])
    networks = {size: arguments_of(size) for size in sizes}
    sampler = Sampler(decode_steps=options.steps)
    if min(*options.batches, 1 if options.repeats is None else options.repeats) < 1 or options.seconds < 1:
        raise UserError("batches, repeats and seconds must be at least 1")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {Path(options.json).absolute().parent}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        codec = benchmark_codec(device)
    repeats = options.repeats or (5 if on_gpu else 1)
    on = Conditions(paper_spec(options.seconds), codec, device, options.precision, options.compile, repeats)

    here = machine(device)
    print(_head(here, on, sampler))
    work = _work(networks, options.batches, sampler, on)
    print(markdown(work) + "\n", flush=True)

    rows: list[Row] = []
    has_twin = not options.skip_ar and importlib.util.find_spec("transformers") is not None
    for size, arguments in networks.items():
        for make_system in [parallel, autoregressive] if has_twin else [parallel]:
            system = make_system(arguments, sampler, on)
            for batch in options.batches:
                _say(f"{size}, {system.name}, batch {batch}")
                rows.append(measure(system, size, batch, on))
            del system  # before the next is made: its memory is not to be counted there
            gc.collect()
    rows.sort(key=lambda row: (sizes.index(row.size), row.batch, row.system != "vab"))
    print(markdown(_table(rows, options.seconds)))
    print(_notes(rows, sizes, options, has_twin, on_gpu))
    if options.json:
        content = {
            "machine": here,
            "settings": {**vars(options), "sizes": sizes, "repeats": repeats, "sampler": asdict(sampler)},
            "codec": codec.name,
            "work": work,
            "rows": [
                {**asdict(row), "rest_seconds": row.rest_seconds, "network_share": row.network_share} for row in rows
            ],
        }
        write_atomically(Path(options.json), json.dumps(content, indent=2).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench.generate", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", help="files of configs/backbone; small base, on a GPU paper too")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="records at once")
    parser.add_argument("--steps", type=int, default=Sampler().decode_steps, help="guided passes of the network")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the segment")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--precision", choices=["32-true", BF16], default="32-true")
    parser.add_argument("--compile", action="store_true", help="compile the networks; warm-up then takes minutes")
    parser.add_argument("--skip_ar", action="store_true", help="without the autoregressive decoder")
    parser.add_argument("--repeats", type=int, help="of each measurement, median; 1, on a GPU 5")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    parser.add_argument("--json", help="write everything measured to this file too")
    return parser


def arguments_of(size: str) -> dict[str, Any]:
    """Of `Backbone`, from configs/backbone."""
    path = BACKBONES / f"{size}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in BACKBONES.glob("*.yaml")))
        raise UserError(f"no backbone {size!r}: configs/backbone has {names}")
    return yaml.safe_load(path.read_text())["init_args"]


def _head(here: dict[str, Any], on: Conditions, sampler: Sampler) -> str:
    spec = on.spec
    lines = [
        f"machine: {here['cpu']}, {here['cores']} cores, {here['threads']} threads; torch {here['torch']}; "
        f"device {here['device']}; {on.precision}, {'compiled' if on.compile else 'not compiled'}; "
        f"median of {on.repeats}",
        f"segment: {spec.segment_seconds:g} s at {spec.code_rate:g} Hz: K {spec.num_codebooks} x T {spec.num_steps} of "
        f"S {spec.codebook_size}, {spec.num_frames} frames; {sampler.total_steps} passes of {sampler.passes} rows per "
        f"record",
        f"codec: {on.codec.name}" + ("" if on.codec.name != "tiny" else " (the package encodec is not installed)"),
    ]
    load = here["load"]
    if on.device.type == "cpu" and load is not None and load > 0.3:
        lines.append(f"warning: load {load} before the start: something else is running, and the times are too long")
    return "\n".join(lines) + "\n"


def _work(networks: dict[str, Any], batches: list[int], sampler: Sampler, on: Conditions) -> list[dict[str, str]]:
    """How much there is to compute, and how fast a plain matrix product of the same shape is here."""
    dtype = torch.bfloat16 if on.precision == BF16 else torch.float32
    table = []
    for size, arguments in networks.items():
        for batch in batches:
            rows = batch * sampler.passes
            flops = pass_flops(on.spec, arguments, rows)
            positions = rows * (on.spec.num_frames + on.spec.num_steps)
            rate = matmul_rate(positions, arguments["dim"], on.device, dtype)
            table.append(
                {
                    "size": size,
                    "batch": str(batch),
                    "rows x positions": f"{rows} x {positions // rows}",
                    "GFLOP per pass": f"{flops / 1e9:.3g}",
                    "GFLOP in all": f"{flops * sampler.total_steps / 1e9:.4g}",
                    "plain product, GFLOP/s": f"{rate / 1e9:.0f}",
                }
            )
    return table


def _table(rows: list[Row], seconds: float) -> list[dict[str, str]]:
    """Seconds per segment of audio; the autoregressive rows say how many times as long they take."""
    ours = {(row.size, row.batch): row.total_seconds for row in rows if row.system == "vab"}
    table = []
    for row in rows:
        each = row.batch
        table.append(
            {
                "size": row.size,
                "batch": str(row.batch),
                "system": row.system,
                "parameters": f"{row.parameters / 1e6:.1f}M",
                "calls": str(row.calls),
                f"s per {seconds:g} s": f"{row.total_seconds / each:.3f}",
                "network": f"{row.network_seconds / each:.3f}",
                "sampling + Python": f"{row.rest_seconds / each:.3f}",
                "codec": f"{row.codec_seconds / each:.3f}",
                "network in loop": f"{100 * row.network_share:.1f} %",
                "GFLOP/s": f"{row.flops / row.network_seconds / 1e9:.3g}",
                "peak MiB": "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
                "times vab": f"{row.total_seconds / ours[row.size, row.batch]:.1f}",
            }
        )
    return table


def _notes(rows: list[Row], sizes: list[str], options: argparse.Namespace, has_twin: bool, on_gpu: bool) -> str:
    what = "allocated on the GPU" if on_gpu else "of the whole process"
    notes = [
        f"Seconds are per {options.seconds:g} s of audio: of a batch, divided by its records. The total is measured by "
        f"itself, the parts in runs of their own. Peak memory {what}."
    ]
    left_out = [size for size in SIZES if size not in sizes]
    if left_out:
        notes.append(f"Left out: {', '.join(left_out)}: --sizes {' '.join([*sizes, *left_out])}")
    if not has_twin:
        notes.append("Left out: the autoregressive decoder (--skip_ar)." if options.skip_ar else f"Left out: {NO_TWIN}")
    return "\n" + "\n".join(notes)


def markdown(table: list[dict[str, str]]) -> str:
    """Aligned columns, as Markdown has them."""
    names = list(table[0])
    widths = [max(len(name), *(len(line[name]) for line in table)) for name in names]
    lines = [names, ["-" * width for width in widths], *([line[name] for name in names] for line in table)]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"measuring {what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
