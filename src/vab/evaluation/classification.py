"""Classify media files with a trained classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vab.console import track
from vab.data.inputs.listing import MEDIA_SUFFIXES, find_sources
from vab.data.media.open import MediaError
from vab.files import csv_text
from vab.spec import UserError

if TYPE_CHECKING:  # they import Lightning, which the command's help does without
    from vab.evaluation.embedding import MediaEncoders
    from vab.tasks import ClassifyTask


@dataclass(frozen=True)
class Guess:
    """The likeliest classes of a file."""

    file: str
    """As it was listed."""
    classes: tuple[tuple[str, float], ...]
    """Classes and their probabilities, likeliest first; none if there is an error."""
    error: str = ""
    """Why there are none."""


def find_files(media: str) -> list[tuple[str, Path]]:
    """Names and paths of a media file, or of those of a folder or a CSV with a column file.

    Raises:
        UserError: If there is none.
    """
    path = Path(media)
    if path.is_dir() or path.suffix.lower() == ".csv":
        return [(source.name, source.path) for source in find_sources(path, "none")]
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.suffix.lower() not in MEDIA_SUFFIXES:
        known = " ".join(sorted(MEDIA_SUFFIXES))
        raise UserError(f"{path} is no media file: they are known by their suffix ({known})")
    return [(media, path)]


def classify_files(
    task: ClassifyTask, encoders: MediaEncoders, files: Sequence[tuple[str, Path]], top: int
) -> list[Guess]:
    """The ``top`` likeliest classes of files; a file that cannot be read, or lacks sound or picture, has an error."""
    guesses = []
    for name, path in track(files, "classifying", len(files), "files"):
        try:
            guesses.append(Guess(name, _classes(task, encoders, path, top)))
        except MediaError as error:
            guesses.append(Guess(name, (), str(error)))
    return guesses


def _classes(task: ClassifyTask, encoders: MediaEncoders, path: Path, top: int) -> tuple[tuple[str, float], ...]:
    segments = encoders.encode(path, audio=task.inputs != "video", video=task.inputs != "audio")
    mean = torch.cat([task.probabilities(*part) for part in segments]).mean(0).cpu()
    best = torch.sort(mean, descending=True, stable=True)
    labels = [task.labels[number] for number in best.indices[:top].tolist()]
    return tuple(zip(labels, best.values[:top].tolist(), strict=True))


def guesses_csv(guesses: Sequence[Guess], top: int) -> str:
    """A line for each file: its ``top`` classes with their probabilities, likeliest first, or why there are none."""
    columns = [name for rank in range(1, top + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    rows: list[list[str]] = [["file", *columns, "error"]]
    for guess in guesses:
        cells = [cell for name, value in guess.classes for cell in (name, f"{value:.6g}")] or [""] * len(columns)
        rows.append([guess.file, *cells, guess.error])
    return csv_text(rows)
