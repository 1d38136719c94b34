"""The folder of a run: what names it, when a resumed run continues in it, and that only ``vab fit`` writes there."""

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
        raise UserError(
            f"--{flag} {folder} is the folder of a run, into which only vab fit writes: give another folder"
        )


def place_of_run(settings: Any, checkpoint: Path, config: dict[str, Any]) -> tuple[str, int] | None:
    """Where a resumed run continues in its own folder: one line in TensorBoard, one best checkpoint.

    It does so with the config that lies beside the checkpoint, but for its end, and from the newest checkpoint. A run
    with a changed setting, or from an earlier checkpoint, gets a folder of its own, and nothing is lost.

    Args:
        settings: Of ``fit``.
        checkpoint: From which the run continues.
        config: The same settings, as they would be saved.

    Returns:
        The logger's version, and the step up to which its curves stay; None for a folder of its own.
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
    if _without_end(config) != _without_end(yaml.safe_load(saved.read_text())):
        return None
    with reading(checkpoint):
        step = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    rank_zero_info(f"going on in {folder}")
    return folder.name, step


def name_of_run(config: dict[str, Any]) -> str:
    """The same eight letters for a run whenever it is started, also to a later end, and others for other settings."""
    settings = json.dumps(_without_end(config), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def _without_end(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without the settings that say where it resumes and ends."""
    trainer = {name: value for name, value in config["trainer"].items() if name not in ("max_steps", "max_epochs")}
    if isinstance(logger := trainer.get("logger"), dict):
        kept = {name: value for name, value in logger["init_args"].items() if name not in ("version", "purge_step")}
        trainer["logger"] = logger | {"init_args": kept}
    return {name: value for name, value in config.items() if name not in ("ckpt_path", "config")} | {"trainer": trainer}
