"""Where generated sounds go: targets that overwrite no input, the files, and the JSON files beside them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vab.data.inputs.listing import VIDEO_SUFFIXES, find_sources
from vab.data.media import segments as media
from vab.data.media.write import replace_audio, write_wav
from vab.files import fitting_name, write_atomically
from vab.generation.request import Request
from vab.generation.sound import Sound
from vab.spec import UserError

OUTPUTS = (".wav", ".mp4", ".mkv")
"""Suffixes of the files that ``generate`` writes."""
WavFormat = Literal["pcm16", "float"]
_SUBTYPES = {"pcm16": "PCM_16", "float": "FLOAT"}


@dataclass(frozen=True)
class Job:
    """A sound to generate and the file that it goes to."""

    request: Request
    target: Path


def is_many(video: Path) -> bool:
    """Whether a path stands for many inputs: a folder or a CSV."""
    return video.is_dir() or video.suffix.lower() == ".csv"


def single_jobs(request: Request, target: Path, num_variations: int) -> list[Job]:
    """The jobs of one input, one for each variation.

    Raises:
        UserError: If the input is missing, or the target's file format cannot hold the sound.
    """
    source = request.source
    if not source.exists():
        raise UserError(f"no video at {source}")
    if target.suffix not in OUTPUTS:
        raise UserError(f"--out must end in {', '.join(OUTPUTS[:-1])} or {OUTPUTS[-1]}, got {target}")
    jobs = _variations(request, target, num_variations)
    _check(jobs)
    return jobs


def many_jobs(media_list: Path, template: Request, out: Path, suffix: str, num_variations: int) -> list[Job]:
    """The jobs of a folder of videos, or of a CSV with a column ``file``.

    Args:
        media_list: The folder or CSV.
        template: The fields that all requests share; its source and name are replaced.
        out: Folder for the outputs.
        suffix: Suffix of the outputs, such as ``mp4``.
        num_variations: Outputs for each input.

    Raises:
        UserError: If an output would overwrite an input or another output, or its file format cannot hold the sound.
    """
    if out.suffix in OUTPUTS:
        raise UserError(f"--video {media_list} may hold many videos: give a folder for --out, got {out}")
    if template.audio is not None:
        raise UserError(f"--audio is the sound of one video, but --video {media_list} may hold many: leave it out")
    sources = find_sources(media_list, "none", VIDEO_SUFFIXES)
    if any(source.start is not None for source in sources):
        raise UserError(f"{media_list} has start times: sound is made for whole videos; leave the column out")
    jobs = []
    for source in sources:
        # From the id, which is relative: a CSV may list files anywhere, and none may be overwritten.
        target = _inside(out, source.id, f".{suffix}")
        # The name as listed, with its folder: else every ID/video.mp4 would get the same random numbers.
        request = replace(template, source=source.path, name=source.name)
        jobs += _variations(request, target, num_variations)
    _check(jobs)
    if media_list.is_dir() and out.resolve().is_relative_to(media_list.resolve()):
        raise UserError(
            f"--out {out} lies in --video {media_list}, so the outputs would be the next run's inputs: give a folder "
            f"elsewhere"
        )
    return jobs


def write_sound(job: Job, sound: Sound, sample_rate: int, wav_format: WavFormat = "pcm16") -> None:
    """Write a sound to its job's target, whole or not at all: a WAV file, or the video with it as its sound track."""
    target, waveform = job.target, sound.waveform.numpy()
    if target.suffix == ".wav":
        write_wav(target, waveform, sample_rate, _SUBTYPES[wav_format])
    else:
        replace_audio(job.request.source, waveform, sample_rate, target)


def write_note(job: Job, sound: Sound, notes: list[str], settings: Mapping[str, Any]) -> None:
    """Write how a sound was made, its health and its warnings to ``x.wav.json`` beside ``x.wav`` (`fitting_name`)."""
    request = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(job.request).items()}
    note = {
        "video": request.pop("source"),
        **request,
        **settings,
        "gain_db": sound.gain_db,
        "health": asdict(sound.health),
        "warnings": sound.warnings,
        "notes": notes,
    }
    path = job.target.with_name(fitting_name(job.target.name, ".json"))
    write_atomically(path, (json.dumps(note, indent=2) + "\n").encode())


def refuse_overwriting(targets: Iterable[Path], inputs: Iterable[Path | str | None]) -> None:
    """Refuse outputs that are inputs.

    Raises:
        UserError: Naming the first.
    """
    originals = {Path(path).resolve() for path in inputs if path is not None}
    for target in targets:
        if target.resolve() in originals:
            raise UserError(f"--out {target} is one of the inputs, which would be lost: give another name")


def _check(jobs: list[Job]) -> None:
    requests, targets = [job.request for job in jobs], [job.target for job in jobs]
    refuse_overwriting(targets, {path for request in requests for path in (request.source, request.audio)})
    twice = [target for target, count in Counter(targets).items() if count > 1]
    if twice:
        raise UserError(f"several videos would be written to {twice[0]}: rename one of them")
    for target in targets:
        place = next(folder for folder in target.absolute().parents if folder.exists())
        if target.is_dir() or not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--out {target} cannot be written: {target if target.is_dir() else place} is in the way")
    for job in jobs:
        if job.target.suffix == ".wav":
            continue
        if media.is_picture(job.request.source):
            raise UserError(f"{job.request.source} is a still picture: its sound is written as .wav, got {job.target}")
        if job.request.seconds is not None:
            raise UserError(f"--seconds shortens the sound, not the picture: write it as .wav, got {job.target}")


def _variations(request: Request, target: Path, count: int) -> list[Job]:
    if count < 1:
        raise UserError(f"--num_variations must be at least 1, got {count}")
    if count == 1:
        return [Job(request, target)]
    names = [fitting_name(target.stem, f"_{number}{target.suffix}") for number in range(1, count + 1)]
    return [Job(replace(request, variation=number), target.with_name(name)) for number, name in enumerate(names)]


def _inside(folder: Path, name: str, suffix: str) -> Path:
    """The path of an output within a folder, from a file name or relative path; names are shortened to fit."""
    *folders, last = [part for part in Path(name).parts if part not in ("..", "/")] or ["video"]
    return folder.joinpath(*map(fitting_name, folders), fitting_name(last, suffix))
