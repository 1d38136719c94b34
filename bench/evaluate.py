"""Frechet distance of two folders: vab beside the package `frechet-audio-distance`, on equal sounds and weights.

    make bench BENCH=evaluate ARGS="--clips 2000 --seconds 10"

Each side runs in its own process, from files on the disk to the distance, with PANNs CNN14 at 16 kHz. Random weights:
the distance means nothing, but both must find the same one. The package's own `score` treats PANNs embeddings as
numbers of one dimension; here its parts are called one by one, and its embeddings put into rows first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.timing import machine, peak_memory, reset_peak_memory
from vab.data.media.write import write_wav
from vab.files import write_atomically
from vab.spec import UserError

RATE = 16000
WEIGHTS = "Cnn14_16k_mAP=0.438.pth"
WEIGHTS_OF_PACKAGE = "Cnn14_16k_mAP%3D0.438.pth"
"""The package asks for the published file by its address."""
CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> None:
    """Measure and print; a mistake in the options is one line and exit status 2."""
    options = _parser().parse_args(argv)
    try:
        if options.side:
            print(json.dumps(SIDES[options.side](Path(options.folder), options.device)))
        else:
            run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run(options: argparse.Namespace) -> None:
    """Make sounds and weights, let each side work on them, print the table."""
    if options.clips < 4 or options.seconds < 1:
        raise UserError(f"clips must be 4 or more and seconds 1 or more, got {options.clips} and {options.seconds:g}")
    figures: dict[str, Any] = {"machine": machine(CPU), "clips": options.clips, "seconds": options.seconds}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        _make_weights(folder)
        _make_sounds(folder, options.clips, options.seconds)
        for side in SIDES:
            command = [sys.executable, "-m", "bench.evaluate", "--side", side, "--folder", scratch]
            done = subprocess.run([*command, "--device", options.device], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"{side} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no word'}")
            figures[side] = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = figures["vab"]["distance"], figures["package"]["distance"]
    figures["relative_difference"] = abs(ours - theirs) / theirs
    _print(figures)
    if options.json:
        write_atomically(Path(options.json), (json.dumps(figures, indent=2) + "\n").encode())


def measure_vab(folder: Path, device: str) -> dict[str, Any]:
    """Files to distance, as `vab evaluate` goes; it also finds the sounds' onsets and the files' hashes."""
    from vab.data.extract.sounds import Listening
    from vab.evaluation.sides import find_folder, judge_folder
    from vab.frozen.judges import load_judge
    from vab.metrics.frechet import frechet_distance, moments

    judge = load_judge("panns_16k", device, folder / WEIGHTS)
    listening = Listening((RATE,), None, "keep", False)

    def embed(part: str) -> torch.Tensor:
        side = judge_folder(
            find_folder(str(folder / part)),
            [judge],
            listening,
            num_workers=0,
            batch_size=16,
            on_error="stop",
            title=part,
        )
        return side.outputs[judge.name].embedding

    def distance(real: torch.Tensor, made: torch.Tensor) -> float:
        return float(frechet_distance(*moments(real), *moments(made)))

    return _measure(embed, distance)


def measure_package(folder: Path, device: str) -> dict[str, Any]:
    """The package's own steps; its loader's threads, its network one sound at a time, its matrix root."""
    # Imported for a judge that is not used here, it would look for models on the network.
    sys.modules["laion_clap"] = types.ModuleType("laion_clap")
    from frechet_audio_distance import FrechetAudioDistance

    judge = FrechetAudioDistance(ckpt_dir=str(folder), model_name="pann", sample_rate=RATE)
    if torch.device(device).type != judge.device.type:
        judge.device = torch.device(device)
        judge.model.to(device)
    width = judge.model.fc1.out_features

    def embed(part: str) -> np.ndarray:
        sounds = judge._FrechetAudioDistance__load_audio_files(str(folder / part))
        return judge.get_embeddings(sounds, sr=RATE).reshape(-1, width)

    def distance(real: np.ndarray, made: np.ndarray) -> float:
        statistics = judge.calculate_embd_statistics
        return float(judge.calculate_frechet_distance(*statistics(real), *statistics(made)))

    return _measure(embed, distance)


SIDES = {"package": measure_package, "vab": measure_vab}


def _measure(embed: Callable[[str], Any], distance: Callable[[Any, Any], float]) -> dict[str, Any]:
    embed("warm_up")  # what a first call makes slow is in nobody's time
    reset_peak_memory(CPU)
    before = peak_memory(CPU) or 0
    begun = time.perf_counter()
    real, made = embed("real"), embed("generated")
    embedded = time.perf_counter()
    value = distance(real, made)
    return {
        "embed_seconds": embedded - begun,
        "distance_seconds": time.perf_counter() - embedded,
        "peak_bytes": peak_memory(CPU),
        "bytes_before": before,
        "distance": value,
        "shape": [*real.shape],
    }


def _make_weights(folder: Path) -> None:
    """Random ones in the published layout."""
    from vab.frozen.judges.panns import package_network

    torch.manual_seed(0)
    torch.save({"model": package_network("panns_16k").state_dict()}, folder / WEIGHTS)
    os.link(folder / WEIGHTS, folder / WEIGHTS_OF_PACKAGE)


def _make_sounds(folder: Path, clips: int, seconds: float) -> None:
    """Noise whose colour and level wander, 16-bit WAV; half of it real, half generated, and two to warm up with."""
    generator = np.random.default_rng(0)
    parts = ["real"] * (clips // 2) + ["generated"] * (clips - clips // 2) + ["warm_up"] * 2
    for number, part in enumerate(parts):
        (folder / part).mkdir(exist_ok=True)
        noise = generator.standard_normal(round(seconds * RATE)).astype(np.float32)
        low = np.convolve(noise, np.ones(1 + number % 7, np.float32) / (1 + number % 7), "same")
        level = np.repeat(generator.uniform(0.01, 0.2, -(-len(low) // RATE)), RATE)[: len(low)]
        write_wav(folder / part / f"{number:05d}.wav", low * level, RATE)


def _print(figures: dict[str, Any]) -> None:
    ours, theirs, clips = figures["vab"], figures["package"], figures["clips"]
    table = Table(title=f"{clips} clips of {figures['seconds']:g} s, PANNs CNN14 16 kHz", title_justify="left")
    for column in ("", "frechet-audio-distance", "vab", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, their: float, our: float, form: str, better_if_more: bool = False) -> None:
        ratio = our / their if better_if_more else their / our
        table.add_row(name, format(their, form), format(our, form), f"{ratio:.2f}")

    row("files to embeddings, clips/s", clips / theirs["embed_seconds"], clips / ours["embed_seconds"], ".2f", True)
    row("embeddings to distance, s", theirs["distance_seconds"], ours["distance_seconds"], ".2f")
    row("peak memory, MiB", theirs["peak_bytes"] / 2**20, ours["peak_bytes"] / 2**20, ".0f")
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    console.print(
        f"ratio above 1: vab is ahead; distances {theirs['distance']:.6f} and {ours['distance']:.6f}, "
        f"relative difference {figures['relative_difference']:.1e}; {figures['machine']}",
        style="dim",
        highlight=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=2000, help="of both folders together")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of both sides")
    parser.add_argument("--scratch", help="folder with room for the sounds: 320 kB for each clip of 10 s")
    parser.add_argument("--json", help="where the figures go, too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
