"""A trained model as files that cannot run code: weights as safetensors, the rest as JSON.

A folder::

    config.json          format, class and arguments of the task, spec, labels, which weights, how it was trained
    model.safetensors    the weights, codebooks of the codec among them
    README.md            the model card; not read by vab
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vab.spec import UserError

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
