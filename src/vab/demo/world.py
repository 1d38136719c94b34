"""The demo world: synthetic segments in which everything that sounds is visible, written as real video files.

``describe`` draws a scene, ``render_audio`` and ``render_frames`` render it, and ``write_world`` writes a training and
a validation set to disk in the form of a user's own videos: files and a CSV. The world is synthetic; results on it say
nothing about real sound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vab.console import track
from vab.data.media.write import write_video
from vab.demo.pictures import FPS, render_frames
from vab.demo.scene import CLASSES, SECONDS, Scene, describe
from vab.demo.sounds import SAMPLE_RATE, render_audio
from vab.files import csv_text, write_atomically
from vab.spec import UserError

__all__ = [
    "CLASSES",
    "FPS",
    "SAMPLE_RATE",
    "SECONDS",
    "Scene",
    "describe",
    "render_audio",
    "render_frames",
    "truth",
    "write_world",
]

WORLD_VERSION = 1
"""Increased when the same (seed, index) gives another scene, sound or picture than before."""
FIRST_VAL_INDEX = 1_000_000
"""Index of the first validation segment; training segments count from 0, so the two sets are disjoint."""

EVENTS = "events.json"
"""File with the ground truth of each video."""
_PARAMETERS = "world.json"


def write_world(
    out: str | Path, seed: int = 0, num_train: int = 2000, num_val: int = 200, num_workers: int = 2
) -> None:
    """Write the world as videos with labels and ground truth.

    Files::

        train/0000000.mp4 ...  val/1000000.mp4 ...   H.264 and AAC, 4 s, named by the index of their scene
        train.csv  val.csv     columns file (from the CSV's folder) and labels (joined by ;)
        events.json            {file: ground truth}, see ``truth``
        world.json             the arguments

    Every file is written atomically. After an interruption the same command writes the missing files. The CSVs and
    ``events.json`` are written last, so if they exist, the world is complete. Equal arguments give equal bytes.

    Args:
        out: Folder to write to; created if absent.
        seed: Seed of the world, >= 0.
        num_train: Number of training segments.
        num_val: Number of validation segments.
        num_workers: Number of processes; 0 uses this process alone.

    Raises:
        UserError: If a number is out of range, or ``out`` holds other files or a world with other arguments.
    """
    out = Path(out)
    _check(seed, num_train, num_val, num_workers)
    _claim(out, {"version": WORLD_VERSION, "seed": seed, "num_train": num_train, "num_val": num_val})
    splits = {"train": range(num_train), "val": range(FIRST_VAL_INDEX, FIRST_VAL_INDEX + num_val)}
    files = {f"{split}/{index:07d}.mp4": index for split, indices in splits.items() for index in indices}
    for split in splits:
        (out / split).mkdir(exist_ok=True)
    missing = [(str(out / file), index) for file, index in files.items() if not (out / file).exists()]
    written = _write_all(missing, seed, num_workers)
    for _ in track(written, "demo world", len(missing)):
        pass
    scenes = {file: describe(seed, index) for file, index in files.items()}
    write_atomically(out / EVENTS, json.dumps({file: truth(scene) for file, scene in scenes.items()}).encode())
    for split in splits:
        rows = [
            [file, ";".join(item.kind for item in scene.objects)]
            for file, scene in scenes.items()
            if file.startswith(f"{split}/")
        ]
        write_atomically(out / f"{split}.csv", csv_text([["file", "labels"], *rows]))


def truth(scene: Scene) -> dict[str, Any]:
    """A scene as plain JSON types: the ground truth of metrics.

    Args:
        scene: The scene.

    Returns:
        The fields of ``Scene``. Each of ``objects`` has its ``kind``, its ``events`` (onsets, s), its ``intervals``
        ([start, stop], s), ``size``, ``rate``, ``path``, and all other values that sound and picture are rendered from.
    """
    plain: dict[str, Any] = json.loads(json.dumps(asdict(scene)))
    return plain


def _write_all(jobs: list[tuple[str, int]], seed: int, num_workers: int) -> Iterator[None]:
    """Write the videos in `num_workers` processes; yields once per video."""
    write = partial(_write_segment, seed)
    if num_workers == 0 or len(jobs) < 2:
        yield from map(write, jobs)
        return
    # Spawned, not forked: the caller may have started threads. An executor, not a Pool: it notices a killed worker.
    with ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=get_context("spawn")) as workers:
        yield from workers.map(write, jobs, chunksize=max(1, min(16, len(jobs) // (4 * num_workers))))


def _write_segment(seed: int, job: tuple[str, int]) -> None:
    path, index = job
    scene = describe(seed, index)
    write_video(path, render_frames(scene), FPS, render_audio(scene), SAMPLE_RATE)


def _check(seed: int, num_train: int, num_val: int, num_workers: int) -> None:
    for name, number in {"seed": seed, "num_train": num_train, "num_val": num_val, "num_workers": num_workers}.items():
        if number < 0:
            raise UserError(f"demo world: {name} must be 0 or more, got {number}")
    if not 1 <= num_train <= FIRST_VAL_INDEX or not num_val:
        raise UserError(
            f"demo world: needs 1 to {FIRST_VAL_INDEX} segments to train on and at least one to validate on,"
            f" got num_train={num_train}, num_val={num_val}"
        )


def _claim(out: Path, parameters: dict[str, int]) -> None:
    """Mark the folder as this world's, or refuse a folder with other contents."""
    note = out / _PARAMETERS
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; the demo world needs a folder")
    if note.exists():
        try:
            found = json.loads(note.read_text())
        except ValueError as error:
            raise UserError(f"{note}: is not JSON; remove {out} or give another --out") from error
        if found != parameters:
            raise UserError(
                f"{out}: holds a demo world made with {_listed(found)}, asked for {_listed(parameters)};"
                f" give those numbers, another --out, or type: rm -r {out}"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: holds other files and no {_PARAMETERS}; give an empty or absent folder as --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(parameters, indent=2).encode())


def _listed(parameters: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items()) if parameters else "nothing"
