"""Extraction beside pure decoding: how much of the time that FFmpeg alone needs for the files is left to the rest.

    make bench BENCH=extract ARGS="--media VIDEOS"

Pure decoding is PyAV alone: every frame of each file's best video and audio stream, one thread a process, as many
processes as extraction has decoders. Extraction is ``vab extract`` as a user types it, tiny codec and vision encoder:
decoding, resampling, preparing pictures, both networks, and writing shards. Both times run from the moment at which the
processes are ready, which is measured with a single file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import av
import torch
from rich.console import Console
from rich.table import Table

from bench.timing import machine, run_as_program
from vab.cores import usable_cores
from vab.data.inputs.listing import find_sources
from vab.spec import UserError


def main(argv: list[str] | None = None) -> None:
    """Measure and print; a mistake in the options is one line and exit status 2."""
    run_as_program(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """Decode, extract with one device and with several, print the table."""
    if min(options.copies, options.processes) < 1:
        raise UserError("copies and processes must be 1 or more")
    files = [source.path.resolve() for source in find_sources(options.media)]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder, single = Path(scratch) / "media", Path(scratch) / "single"
        folder.mkdir()
        single.mkdir()
        for copy in range(options.copies):
            for number, path in enumerate(files):
                (folder / f"{copy:03d}_{number:05d}{path.suffix}").symlink_to(path)
        (single / files[0].name).symlink_to(files[0])
        rows = []
        seconds = _decode(sorted(folder.iterdir()), options.processes)
        count = len(files) * options.copies
        pure = count / seconds
        rows.append((f"PyAV alone, {options.processes} processes", seconds, 0.0, 0))
        for ranks, workers in ((1, options.processes), (1, 1), (options.processes, 1)):
            flags = ["--devices", str(ranks), "--num_workers", str(workers), *options.flags]
            start = _extract(single, Path(scratch) / "out", flags)[0]
            seconds, memory = _extract(folder, Path(scratch) / "out", flags)
            words = f"vab extract, {ranks} device{'s' * (ranks > 1)} with {workers} decoder{'s' * (workers > 1)} each"
            rows.append((words, seconds - start, start, memory))
    table = Table("what", "s", "files/s", "of PyAV alone", "to start, s", "memory of a process, MiB")
    figures = {"machine": machine(torch.device("cpu")), "files": count, "rows": []}
    for words, seconds, start, memory in rows:
        share = f"{count / seconds / pure:.2f}"
        table.add_row(words, f"{seconds:.1f}", f"{count / seconds:.2f}", share, f"{start:.1f}", f"{memory / 2**20:.0f}")
        figures["rows"].append({"what": words, "seconds": seconds, "start_seconds": start, "share": share})
    Console().print(table)
    print(json.dumps(figures))


def _decode(files: list[Path], processes: int) -> float:
    with get_context("spawn").Pool(processes) as pool:
        pool.map(_decode_one, files[:1] * processes)  # they have started
        begin = time.perf_counter()
        for _ in pool.imap_unordered(_decode_one, files):
            pass
        return time.perf_counter() - begin


def _decode_one(path: Path) -> int:
    frames = 0
    with av.open(str(path)) as container:
        best = [container.streams.best("video"), container.streams.best("audio")]
        streams = [stream for stream in best if stream is not None]
        for stream in streams:
            stream.codec_context.thread_count = 1
        for packet in container.demux(*streams):
            frames += len(packet.decode())
    return frames


def _extract(folder: Path, out: Path, flags: list[str]) -> tuple[float, int]:
    """Seconds, and the largest resident memory of any of its processes, bytes."""
    command = [sys.executable, "-m", "vab.cli", "extract", "--media", str(folder), "--out", str(out), *flags]
    with tempfile.TemporaryFile() as said:
        begin = time.perf_counter()
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(run.pid, 0)  # of this run alone, with those it has waited for
        seconds = time.perf_counter() - begin
        run.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if run.returncode not in (0, 3):
            raise UserError(f"extraction failed: {said.read().decode().strip()}")
    shutil.rmtree(out)
    return seconds, usage.ru_maxrss * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.extract", description=__doc__.partition("\n")[0])
    parser.add_argument("--media", required=True, help="folder of videos")
    parser.add_argument("--copies", type=int, default=4, help="times that each file is taken")
    parser.add_argument("--processes", type=int, default=usable_cores(), help="decoders, and devices")
    parser.add_argument("--scratch", help="folder for temporary files")
    parser.add_argument("flags", nargs="*", help="for vab extract, after --")
    return parser


if __name__ == "__main__":
    main()
