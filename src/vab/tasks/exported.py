"""A trained model as files that cannot run code: weights as safetensors, the rest as JSON.

A folder::

    config.json          format, class and arguments of the task, spec, labels, which weights, how it was trained
    model.safetensors    the weights, codebooks of the codec among them
    README.md            the model card; not read by vab
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from vab import UserError, __version__
from vab.files import fitting_name, sync_folder, write_atomically
from vab.spec import SegmentSpec

FORMAT, FORMAT_VERSION = "vab-model", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_COMPILED = "_orig_mod."
"""Prefix of weight names in a module wrapped by ``torch.compile(module)``."""


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names in a network that is not compiled."""
    return {name.replace(_COMPILED, ""): value for name, value in state.items()}


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported model."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def read_exported(file: Path) -> dict[str, Any]:
    """An exported model as the entries of a checkpoint; ``file`` holds its weights.

    Raises:
        UserError: If something is missing or has another format.
    """
    place = file.with_name(CONFIG)
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(file)
    except OSError as error:
        raise UserError(f"{error.filename or place} cannot be read: {error.strerror or error}") from error
    except (ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.parent} is no whole exported model ({reason}): export it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{place} does not describe a model of vab: export it with vab export")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{place} has format version {config.get('format_version')}, this vab reads {FORMAT_VERSION}:"
            " install the vab that wrote it, or export again"
        )
    if missing := [name for name in ("class_path", "init_args", "weights", "state") if name not in config]:
        raise UserError(f"{place} lacks {', '.join(missing)}: export it again")
    return {
        "hyper_parameters": {**config["init_args"], "_class_path": config["class_path"]},
        "state_dict": weights,
        "weights": config["weights"],
        **config["state"],
    }


def describe(
    spec: SegmentSpec,
    labels: Sequence[str],
    content: Mapping[str, Any],
    weights: str,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        spec: Of the task.
        labels: Of the task; empty if it has none.
        content: The checkpoint.
        weights: ``ema`` or ``live``, as asked for; a run without an average has live ones only.
        settings: The run's config.yaml, if it is known.
    """
    hyper_parameters = content["hyper_parameters"]
    init_args = {name: value for name, value in hyper_parameters.items() if not name.startswith("_")}
    data, run = content.get("ShardDataModule", {}), dict(content.get("run", {}))
    trainer = (settings or {}).get("trainer") or {}
    has_average = "live_state_dict" in content
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class_path": hyper_parameters["_class_path"],
        "init_args": init_args | {"init_from": None},
        "spec": spec.to_dict(),
        "labels": list(labels),
        "weights": weights if has_average else "live",
        "state": {"audio_statistics": content.get("audio_statistics")},
        "trained": {
            "steps": content["global_step"],
            "epochs": content["epoch"],
            "began_with": init_args.get("init_from"),
            "data_sha256": data.get("manifest_hash"),
            "average_of_steps": content.get("ema_updates") if weights == "ema" else None,
            "gradient_clip_val": trainer.get("gradient_clip_val"),
            **run,
        },
        "vab": __version__,
    }


def write_exported(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], card: str) -> None:
    """Write a folder whole or not at all; one that is there is replaced at the end.

    Raises:
        UserError: If the disk is full.
    """
    whole, former = (
        folder.with_name(fitting_name(f".{folder.name}", f".{kind}-{os.getpid()}")) for kind in ("new", "former")
    )
    try:
        whole.mkdir(parents=True)
        stored = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write_atomically(whole / WEIGHTS, safetensors.torch.save(stored, {"format": "pt"}))
        write_atomically(whole / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        write_atomically(whole / CARD, card)
        if folder.exists():
            folder.rename(former)
        whole.rename(folder)
        sync_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def settings_of_run(path: Path) -> dict[str, Any] | None:
    """The config of the run that a checkpoint lies in."""
    file = path.parent.parent / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None  # a checkpoint alone: the card has a line less
    return content if isinstance(content, dict) else None
