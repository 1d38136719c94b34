"""Folders of runs: a run's name, when a resumed run continues in its own folder, and who may write there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info

from vab.spec import UserError
from vab.tasks.checkpoints import newest_checkpoint, reading


def refuse_folder_of_run(folder: Path, flag: str) -> None:
    """Refuse a run's folder as a place to write to.

    Raises:
        UserError: If it is one.
    """
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        raise UserError(f"--{flag} {folder} is the folder of a run, where only vab fit writes: give another folder")


def logger_version(settings: Any, checkpoint: Path, config: dict[str, Any]) -> tuple[str, int] | None:
    """Decide whether a resumed run continues in its own folder: one curve in TensorBoard, one best checkpoint.

    It does if it resumes from the folder's newest checkpoint, and the folder's config differs in nothing but the length
    of the run. A run with another setting, or from an older checkpoint, gets a new folder, so that no result is lost.

    Args:
        settings: Of ``fit``.
        checkpoint: Where the run resumes.
        config: The same settings, as they are saved.

    Returns:
        The logger's ``version`` and ``purge_step``, after which old curves are hidden. None for a new folder.
    """
    logger, folder = settings.trainer.get("logger"), checkpoint.absolute().parent.parent
    if getattr(logger, "class_path", None) != "lightning.pytorch.loggers.TensorBoardLogger":
        return None
    place = logger.init_args
    home = Path(place.save_dir, place.get("name") or "", place.get("sub_dir") or "").absolute()
    saved, newest = folder / "config.yaml", newest_checkpoint(folder)
    if place.get("version") not in (None, folder.name) or folder.parent != home or not saved.is_file():
        return None
    if newest is None or not newest.samefile(checkpoint):
        return None
    if _without_length(config) != _without_length(yaml.safe_load(saved.read_text())):
        return None
    rank_zero_info(f"resuming in {folder}")
    return folder.name, global_step_in(checkpoint)


def global_step_in(checkpoint: str | Path) -> int:
    """The optimizer steps after which a checkpoint was saved."""
    with reading(checkpoint):
        step: int = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    return step


def name_of_run(config: dict[str, Any]) -> str:
    """Eight hex digits that stand for the settings of a run, its length excepted."""
    settings = json.dumps(_without_length(config), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def _without_length(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without the settings that say where it resumes and ends."""
    trainer = {name: value for name, value in config["trainer"].items() if name not in ("max_steps", "max_epochs")}
    if isinstance(logger := trainer.get("logger"), dict):
        kept = {name: value for name, value in logger["init_args"].items() if name not in ("version", "purge_step")}
        trainer["logger"] = logger | {"init_args": kept}
    return {name: value for name, value in config.items() if name not in ("ckpt_path", "config")} | {"trainer": trainer}
