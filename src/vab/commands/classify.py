"""``vab classify``: the classes of media files, by a trained classification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vab import UserError
from vab.console import print_table
from vab.files import check_files, write_atomically

if TYPE_CHECKING:
    from vab.evaluation.classification import Guess

_LISTED = 20
"""Files without a result that the last message names; the table has all."""


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
    from vab.evaluation.classification import classify_files, find_files, guesses_csv
    from vab.evaluation.embedding import load_encoders
    from vab.frozen import device_named
    from vab.precision import allow_tf32
    from vab.tasks import ClassifyTask, load_task

    if top < 1:
        raise UserError(f"--top must be 1 or more, got {top}")
    check_files({"out": (out, ".csv")}, [checkpoint, media], overwrite)
    files = find_files(media)
    task = load_task(checkpoint)
    if not isinstance(task, ClassifyTask):
        raise UserError(
            f"{checkpoint} is a checkpoint of {type(task).__name__}: classify needs a ClassifyTask, made by "
            "vab fit with a recipe of configs/classify/"
        )
    where = device_named(device)
    allow_tf32(where)
    encoders = load_encoders(task.spec, where, audio=task.inputs != "video", video=task.inputs != "audio")
    guesses = classify_files(task.to(where), encoders, files, top)
    if out is not None:
        write_atomically(Path(out), guesses_csv(guesses, min(top, len(task.labels))))
    rows = [
        ["" if rank else guess.file, name, f"{value:.3f}"]
        for guess in guesses
        for rank, (name, value) in enumerate(guess.classes)
    ]
    if rows:
        print_table("", ["file", "class", "probability"], rows, left=(0, 1))
    if failed := [guess.error for guess in guesses if guess.error]:
        lines = failed[:_LISTED]
        if len(failed) > _LISTED:
            lines.append(f"and {len(failed) - _LISTED} more" + (f": see {out}" if out else ""))
        if len(files) > 1:
            lines.insert(0, f"{len(failed)} of {len(files)} files gave no result:")
        raise UserError("\n".join(lines))
    return guesses
