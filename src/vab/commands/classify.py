"""The classes of media files, by a trained classification."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vab.console import ProgressBar
from vab.data.inputs.listing import MEDIA_SUFFIXES, find_sources
from vab.data.media.segments import MediaError
from vab.evaluation.embedding import MediaEncoders, load_encoders
from vab.files import check_files, write_atomically
from vab.frozen import device_named
from vab.spec import UserError
from vab.tasks import ClassifyTask, load_task

_LISTED = 20
"""Files without a result that the last message names; the table has all."""


@dataclass(frozen=True)
class Guess:
    """What a file was taken for."""

    file: str
    """As it was listed."""
    classes: tuple[tuple[str, float], ...]
    """The likeliest classes and their probabilities, likeliest first; none if there is an error."""
    error: str = ""
    """Why there are none."""


def classify(
    checkpoint: str,
    media: str,
    top: int = 5,
    out: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> list[Guess]:
    """Print the likeliest classes of media files, with their probabilities.

    A file longer than a segment is cut into segments one after the other; its probabilities are the mean of theirs.

    Args:
        checkpoint: Of a classification: a .ckpt file or a run's folder.
        media: A file, a folder of them, or a CSV with a column file.
        top: How many classes.
        out: A .csv file for all of them: file, class_1, probability_1, class_2, ... and error.
        device: Where the networks run: auto, cpu, cuda, cuda:1, ...
        overwrite: Replace the file that is there.

    Raises:
        UserError: If the checkpoint is of another task, or there is no media file. At the end, if files gave no result,
            with the list of them.
    """
    if top < 1:
        raise UserError(f"--top must be 1 or more, got {top}")
    check_files({"out": (out, ".csv")}, [checkpoint, media], overwrite)
    files = _files(media)
    task = load_task(checkpoint)
    if not isinstance(task, ClassifyTask):
        raise UserError(
            f"{checkpoint} is a checkpoint of {type(task).__name__}: classify needs a ClassifyTask, made by "
            "vab fit with a recipe of configs/classify/"
        )
    where = device_named(device)
    task.to(where)
    encoders = load_encoders(task.spec, where, audio=task.inputs != "video", video=task.inputs != "audio")
    guesses = []
    with ProgressBar("classifying", len(files), "files") as bar:
        for name, path in files:
            try:
                guesses.append(Guess(name, classes_of(task, encoders, path, top)))
            except MediaError as error:
                guesses.append(Guess(name, (), str(error)))
            bar.advance()
    if out is not None:
        write_atomically(Path(out), guesses_csv(guesses, min(top, len(task.labels))))
    _show([guess for guess in guesses if not guess.error])
    if failed := [guess for guess in guesses if guess.error]:
        lines = [guess.error for guess in failed[:_LISTED]]
        if len(failed) > _LISTED:
            lines.append(f"and {len(failed) - _LISTED} more" + (f": see {out}" if out else ""))
        raise UserError(
            lines[0] if len(files) == 1 else f"{len(failed)} of {len(files)} files gave no result:\n" + "\n".join(lines)
        )
    return guesses


def classes_of(task: ClassifyTask, encoders: MediaEncoders, path: Path, top: int) -> tuple[tuple[str, float], ...]:
    """The ``top`` likeliest classes of a file with their probabilities, likeliest first.

    Raises:
        MediaError: If it is unreadable, or lacks what the task looks at.
    """
    segments = encoders.encode(path, audio=task.inputs != "video", video=task.inputs != "audio")
    rows = [task.probabilities(*part) for part in segments]
    mean = torch.cat(rows).mean(0).cpu()
    best = torch.sort(mean, descending=True, stable=True)
    return tuple(
        (task.labels[number], value)
        for number, value in zip(best.indices[:top].tolist(), best.values[:top].tolist(), strict=True)
    )


def guesses_csv(guesses: Sequence[Guess], top: int) -> str:
    """A line for each file: its classes with their probabilities, likeliest first, or why there are none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    columns = [name for rank in range(1, top + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    writer.writerow(["file", *columns, "error"])
    for guess in guesses:
        cells = [cell for name, value in guess.classes for cell in (name, f"{value:.6g}")] or [""] * len(columns)
        writer.writerow([guess.file, *cells, guess.error])
    return text.getvalue()


def _files(media: str) -> list[tuple[str, Path]]:
    path = Path(media)
    if path.is_dir() or path.suffix.lower() == ".csv":
        return [(source.name, source.path) for source in find_sources(path, "none")]
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.suffix.lower() not in MEDIA_SUFFIXES:
        known = " ".join(sorted(MEDIA_SUFFIXES))
        raise UserError(f"{path} is no media file: they are known by their suffix ({known})")
    return [(media, path)]


def _show(guesses: Sequence[Guess]) -> None:
    if not guesses:
        return
    console = Console(width=None if Console().is_terminal else 110)
    table = Table("file", "class", "probability")
    table.columns[2].justify = "right"
    for guess in guesses:
        for rank, (name, value) in enumerate(guess.classes):
            table.add_row("" if rank else guess.file, name, f"{value:.3f}")
    console.print(table, markup=False)
