"""``vab generate``: sound for videos and still pictures."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from vab.console import ProgressBar
from vab.generation.batch import Recipe, generate_many
from vab.generation.filling import Precision
from vab.generation.generator import Generator, Sound
from vab.generation.inpainting import parse_spans
from vab.generation.outputs import (
    Job,
    WavFormat,
    is_many,
    many_jobs,
    refuse_overwriting,
    single_jobs,
    write_note,
    write_sound,
)
from vab.generation.request import Prepared, Request
from vab.generation.samplers import Changes, changed_sampler, sampler_file
from vab.spec import UserError
from vab.tasks import PretrainTask
from vab.tokens.sampler import Sampler


def generate(
    checkpoint: str,
    video: str,
    out: str,
    fine_checkpoint: str | None = None,
    audio: str | None = None,
    keep: str | None = None,
    keep_levels: int = 0,
    seconds: float | None = None,
    num_variations: int = 1,
    seed: int = 0,
    sampler: Changes = None,
    fine_sampler: Changes = None,
    overlap_seconds: float | None = None,
    format: Literal["mp4", "mkv", "wav"] = "mp4",
    wav_format: WavFormat = "pcm16",
    weights: Literal["ema", "live"] = "ema",
    precision: Precision = "32-true",
    compile: bool = False,
    batch_size: int = 8,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    overwrite: bool = False,
) -> None:
    """Make sound for silent video: one file, a folder of files, or a CSV of them; or for a still picture.

    Beside a single output, x.mp4 say, lies x.mp4.json with the settings that made it and what it is like; for a folder
    or CSV that is the table generations.csv, and an interrupted run goes on where it stopped.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        video: A video or a still picture, a folder of videos, or a CSV with a column file.
        out: A .wav, or an .mp4 or .mkv with the video's own picture and the new sound; a folder for many videos.
        fine_checkpoint: The fine stage, where the checkpoint is a coarse one.
        audio: Known sound: it is kept, and made longer up to the end of the video, unless keep or keep_levels say
            what to keep of it.
        keep: Seconds of the known sound (of audio, or else the video's own) that stay, such as 0-2,5- (5 s to the
            end); everything else is made to go with them.
        keep_levels: Keep so many of the coarsest levels of the known sound everywhere and make the finer ones anew.
        seconds: Length of the sound of a still picture (a segment by default); at most so much of a video's.
        num_variations: Make several different sounds: x_1.wav, x_2.wav, ...
        seed: Of the randomness. The same seed, checkpoint and name, as given or listed, give the same sound.
        sampler: Changes to the checkpoint's own sampler: a YAML file, or single settings such as
            --sampler.decode_steps 8 --sampler.order halton, or both.
        fine_sampler: Likewise for the fine stage.
        overlap_seconds: Context that a window of a long video takes from the one before; a quarter of a segment by
            default.
        format: What is written into a folder.
        wav_format: Of .wav files: 16-bit integers, which clip at full scale, or 32-bit floats.
        weights: The averaged weights, or the live ones.
        precision: Of the model's passes.
        compile: Compile the model, which pays off from some dozens of sounds on.
        batch_size: Sounds that are generated together.
        device: auto, cpu, cuda, cuda:1, ...
        devices: For a folder or CSV, processes on each machine, each with a device of its own.
        num_nodes: For a folder or CSV, machines.
        overwrite: For a folder or CSV, delete what an earlier run made in the output folder, and begin again.
    """
    source = Path(video)
    request = Request(source, source.name, 0, None if audio is None else Path(audio), keep, keep_levels, seconds)
    many = is_many(source)
    if many:
        jobs = many_jobs(source, request, Path(out), format, num_variations)
    else:
        jobs = single_jobs(request, Path(out), num_variations)
    inputs = [checkpoint, fine_checkpoint, sampler_file(sampler), sampler_file(fine_sampler)]
    refuse_overwriting([job.target for job in jobs], inputs)
    # What can be seen to be wrong already, before the networks are loaded.
    changed_sampler(Sampler(), sampler, "--sampler")
    changed_sampler(Sampler(), fine_sampler, "--fine_sampler")
    if keep is not None:
        parse_spans(keep, math.inf)

    def load(device: str) -> Generator:
        return Generator.load(checkpoint, weights, device, fine_checkpoint, precision, compile, overlap_seconds)

    def samplers(generator: Generator) -> tuple[Sampler, Sampler | None]:
        return _samplers(generator, sampler, fine_sampler)

    def write(job: Job, sound: Sound, sample_rate: int) -> None:
        write_sound(job, sound, sample_rate, wav_format)

    if many:
        settings = {"weights": weights, "wav_format": wav_format}
        recipe = Recipe(checkpoint, load, samplers, write, fine_checkpoint, seed, settings)
        generate_many(jobs, Path(out), recipe, batch_size, device, devices, num_nodes, overwrite)
        return
    if devices * num_nodes != 1:
        raise UserError(f"--devices and --num_nodes are for many videos, but --video {video} is one: leave them out")
    if overwrite:
        raise UserError("--overwrite is for a folder or CSV; the sound of one video is always replaced: leave it out")
    if batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more, got {batch_size}")
    generator = load(device)
    chosen, fine_chosen = samplers(generator)
    prepared = generator.prepare(request)
    _say("note", source, prepared.notes)
    rate = generator.codec.sample_rate
    how = {
        "checkpoint": checkpoint,
        "fine_checkpoint": fine_checkpoint,
        "weights": weights,
        "seed": seed,
        "sampler": asdict(chosen),
        "fine_sampler": None if fine_chosen is None else asdict(fine_chosen),
        "overlap_seconds": overlap_seconds,
        "precision": precision,
    }
    for start in range(0, len(jobs), batch_size):
        some = jobs[start : start + batch_size]
        batch = [replace(prepared, request=job.request) for job in some]
        for job, sound in zip(some, _make(generator, batch, seed, chosen, fine_chosen), strict=True):
            write(job, sound, rate)
            write_note(job, sound, prepared.notes, how)
            level = f"{sound.health.rms_db + sound.gain_db:.1f} dBFS"
            turned = f", turned down by {-sound.gain_db:.1f} dB so as not to clip" if sound.gain_db < -0.05 else ""
            print(f"{job.target}  {len(sound.waveform) / rate:.2f} s  {level}{turned}")
            _say("warning", job.target, sound.warnings)


def _samplers(generator: Generator, changes: Changes, fine_changes: Changes) -> tuple[Sampler, Sampler | None]:
    """The checkpoints' own samplers, changed as asked for, and checked against the levels they are to fill."""
    sampler = changed_sampler(generator.task.sampler, changes, "--sampler")
    _require_levels(sampler, generator.task, "--sampler")
    if generator.fine is None:
        if fine_changes is not None:
            raise UserError("--fine_sampler is for the fine stage: give one with --fine_checkpoint")
        return sampler, None
    fine_sampler = changed_sampler(generator.fine.sampler, fine_changes, "--fine_sampler")
    _require_levels(fine_sampler, generator.fine, "--fine_sampler")
    return sampler, fine_sampler


def _require_levels(sampler: Sampler, task: PretrainTask, flag: str) -> None:
    try:
        sampler.stages(task.made_levels)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def _make(
    generator: Generator, batch: list[Prepared], seed: int, sampler: Sampler, fine_sampler: Sampler | None
) -> list[Sound]:
    """Make a batch, with a progress bar where there are several windows and someone to watch."""
    total = generator.passes_of(batch)
    with ProgressBar("generating", total, "windows", show=total > 1, transient=True) as bar:
        return generator.make(batch, seed, sampler, fine_sampler, on_pass=bar.advance)


def _say(kind: str, name: Path, sentences: list[str]) -> None:
    for sentence in sentences:
        print(f"{kind}: {name.name}: {sentence}", file=sys.stderr)
