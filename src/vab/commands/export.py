"""``vab export``: a trained model as a folder to pass on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vab import UserError


def export(
    checkpoint: str,
    out: str,
    weights: Literal["ema", "live"] = "ema",
    report: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained model as a folder to pass on: model.safetensors, config.json and README.md, the model card.

    Every --checkpoint and --model.init_from takes the folder. Nothing in it can run code, and it holds neither
    optimizer nor data: no run can be resumed from it.

    Args:
        checkpoint: A .ckpt file, or a run's folder.
        out: Folder to write.
        weights: The averaged weights where the run kept an average, or the live ones.
        report: A report of vab evaluate, whose figures the card is to show with what they depend on.
        overwrite: Replace an exported model that is there.

    Raises:
        UserError: If there is no checkpoint, or the folder cannot be written.
    """
    import torch

    from vab.evaluation.model_card import model_card
    from vab.evaluation.report import read_figures
    from vab.tasks import load_task
    from vab.tasks.checkpoints import find_checkpoint
    from vab.tasks.exported import WEIGHTS, describe, settings_of_run, write_exported

    folder = Path(out)
    _check(folder, overwrite)
    figures = {} if report is None else read_figures(Path(report))
    path = find_checkpoint(checkpoint)
    if path.suffix == Path(WEIGHTS).suffix:
        raise UserError(f"{path.parent} is an exported model already: copy it, or export the run's checkpoint")
    task = load_task(path, weights)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = describe(task.spec, getattr(task, "labels", ()), content, weights, settings_of_run(path))
    write_exported(folder, config, task.state_dict(), model_card(task, config, figures, folder.name))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{folder}: {type(task).__name__}, {config['weights']} weights of step {content['global_step']}, {size:,} bytes"
    )
    return folder


def _check(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, before anything is read."""
    from vab.tasks.exported import is_exported

    if folder.exists() and not (folder.is_dir() and is_exported(folder)):
        raise UserError(f"--out {folder} is there already, and is no exported model: give another name")
    if folder.exists() and not overwrite:
        raise UserError(f"--out {folder} is there already: give another name, or --overwrite true")
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder} cannot be written: {parent} is not a folder to write in")
