"""``vab generate``: sound for videos and still pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vab import UserError


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
    sampler: str | dict[str, Any] | None = None,
    fine_sampler: str | dict[str, Any] | None = None,
    overlap_seconds: float | None = None,
    format: Literal["mp4", "mkv", "wav"] = "mp4",
    wav_format: Literal["pcm16", "float"] = "pcm16",
    weights: Literal["ema", "live"] = "ema",
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    compile: bool = False,
    batch_size: int = 8,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    overwrite: bool = False,
) -> None:
    """Generate sound for silent video: one file, a folder of files, or a CSV of them; or for a still picture.

    A single output, such as x.mp4, gets a file x.mp4.json with the settings that made it, its health and its warnings.
    A folder or CSV gets the table generations.csv, and is resumed if it was interrupted.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        video: A video or a still picture, a folder of videos, or a CSV with a column file.
        out: A .wav, or an .mp4 or .mkv with the picture of the video and the new sound; a folder for many videos.
        fine_checkpoint: The fine stage that belongs to a coarse checkpoint.
        audio: Known sound to keep and to continue up to the end of the video, unless keep or keep_levels say what to
            keep of it.
        keep: Seconds of the known sound (of audio, or else the video's own) to keep, such as 0-2,5- (5 s to the end);
            the rest is generated to fit.
        keep_levels: Keep this many of the coarsest codebooks of the known sound everywhere and regenerate the rest.
        seconds: Length of the sound of a still picture (a segment by default); maximum length for a video.
        num_variations: Generate several different sounds: x_1.wav, x_2.wav, ...
        seed: Random seed. The same seed, checkpoint and name, as given or listed, give the same sound.
        sampler: Changes to the checkpoint's own sampler: a YAML file, or single settings such as
            --sampler.decode_steps 8 --sampler.order halton, or both.
        fine_sampler: The same for the fine stage.
        overlap_seconds: Overlap of the windows of a long video; a quarter of a segment by default.
        format: File format of the outputs in a folder.
        wav_format: 16-bit integers, which clip at full scale, or 32-bit floats in .wav files.
        weights: The averaged (EMA) weights, or the live ones.
        precision: Of the model's passes; auto: bf16-mixed on a GPU that computes in bfloat16 (Ampere and later), else
            32-true.
        compile: Compile the model; worth it for some dozens of sounds or more.
        batch_size: Sounds that are generated together.
        device: auto, cpu, cuda, cuda:1, ...
        devices: For a folder or CSV, processes on each machine, each with its own device.
        num_nodes: For a folder or CSV, machines.
        overwrite: For a folder or CSV, delete what an earlier run made in the output folder, and start from scratch.
    """
    from vab.generation.batch import generate_many
    from vab.generation.outputs import is_many, many_jobs, refuse_overwriting, single_jobs
    from vab.generation.recipe import Recipe
    from vab.generation.request import Request
    from vab.generation.single import generate_one

    source, target = Path(video), Path(out)
    request = Request(source, source.name, 0, None if audio is None else Path(audio), keep, keep_levels, seconds)
    many = is_many(source)
    if many:
        jobs = many_jobs(source, request, target, format, num_variations)
    else:
        jobs = single_jobs(request, target, num_variations)
    models = (checkpoint, fine_checkpoint, weights, precision, compile, overlap_seconds)
    recipe = Recipe(*models, sampler, fine_sampler, seed, wav_format)
    refuse_overwriting([job.target for job in jobs], recipe.files)
    if many:
        generate_many(jobs, target, recipe, batch_size, device, devices, num_nodes, overwrite)
        return
    if devices * num_nodes != 1:
        raise UserError(f"--devices and --num_nodes are for many videos, but --video {video} is one: leave them out")
    if overwrite:
        raise UserError("--overwrite is for a folder or CSV; the sound of one video is always replaced: leave it out")
    generate_one(jobs, recipe, batch_size, device)
