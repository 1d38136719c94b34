"""Generate the sound of one input, in one or several variations, each with a JSON file beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vab.console import ProgressBar
from vab.generation.outputs import Job, write_note
from vab.generation.recipe import Recipe
from vab.spec import UserError


def generate_one(jobs: Sequence[Job], recipe: Recipe, batch_size: int = 8, device: str = "auto") -> None:
    """Generate the sounds of one input, and print a line about each.

    Args:
        jobs: The variations of one request.
        recipe: What they are generated with.
        batch_size: Variations that are generated together.
        device: auto, cpu, cuda, cuda:1, ...
    """
    if batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more, got {batch_size}")
    generator = recipe.load(device)
    prepared = generator.prepare(jobs[0].request)
    _print("note", jobs[0].request.source, prepared.notes)
    rate = generator.codec.sample_rate
    settings = {
        "checkpoint": recipe.checkpoint,
        "fine_checkpoint": recipe.fine_checkpoint,
        "weights": recipe.weights,
        "seed": recipe.seed,
        "sampler": asdict(generator.task.sampler),
        "fine_sampler": None if generator.fine is None else asdict(generator.fine.sampler),
        "overlap_seconds": recipe.overlap_seconds,
        "precision": generator.precision,
    }
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        items = [replace(prepared, request=job.request) for job in batch]
        windows = generator.num_windows(items)
        with ProgressBar("generating", windows, "windows", show=windows > 1, transient=True) as bar:
            sounds = generator.make(items, recipe.seed, on_window=bar.advance)
        for job, sound in zip(batch, sounds, strict=True):
            recipe.write(job, sound, rate)
            write_note(job, sound, prepared.notes, settings)
            level = f"{sound.health.rms_db + sound.gain_db:.1f} dBFS"
            scaled = f", turned down by {-sound.gain_db:.1f} dB so as not to clip" if sound.gain_db < -0.05 else ""
            print(f"{job.target}  {len(sound.waveform) / rate:.2f} s  {level}{scaled}")
            _print("warning", job.target, sound.warnings)


def _print(kind: str, path: Path, messages: list[str]) -> None:
    for message in messages:
        print(f"{kind}: {path.name}: {message}", file=sys.stderr)
