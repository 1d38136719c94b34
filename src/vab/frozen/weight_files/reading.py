"""Read files of weights without running code, and load them into a network."""

from __future__ import annotations

import csv
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from vab import UserError

AUDIOSET_CLASSES = 527
AUDIOSET_FILE = "class_labels_indices.csv"
"""AudioSet's list of classes: columns index, mid, display_name."""


def read_weights(path: Path) -> dict[str, Any]:
    """Read a file of weights, safetensors by its suffix, else of torch.save. Nothing in it can run code.

    Raises:
        UserError: If it is no such file.
    """
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        return dict(safetensors.torch.load_file(path))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_model_folder(folder: Path, model_type: str, owner: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Read a folder as transformers writes it for the hub: its configuration, its weights, and their path.

    Args:
        folder: A folder with config.json and model.safetensors, or pytorch_model.bin in its place.
        model_type: The model type that the configuration must state.
        owner: The expected network, in words.

    Raises:
        UserError: If a file is missing or cannot be read, or the folder is of another model.
    """
    config, file = folder / "config.json", folder / "model.safetensors"
    if not file.exists() and (folder / "pytorch_model.bin").exists():
        file = folder / "pytorch_model.bin"
    if missing := [path.name for path in (config, file) if not path.exists()]:
        raise UserError(f"{folder} is not {owner} as a hub has it: it lacks {' and '.join(missing)}")
    settings = read_json(config)
    kind = settings.get("model_type")
    if kind != model_type:
        raise UserError(
            f"{config} is of a model of type {kind!r}, expected {model_type!r}: fetch it again, or give another folder"
        )
    return settings, read_weights(file), file


def read_json(path: Path) -> dict[str, Any]:
    """Read the configuration of a model.

    Raises:
        UserError: If it is not a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a JSON object: fetch it again")
    return settings


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that torch.save wrote. Nothing in it can run code.

    Raises:
        UserError: If it is no such file, or contains more than tensors, numbers, text and arrays.
    """
    if is_torchscript(path):
        raise UserError(f"{path} is TorchScript, which holds a program and is not read; take another form of it")
    # Some files contain numpy arrays of a sampler's state, which an older numpy wrote.
    rebuild, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    for function, name in ((rebuild, "_reconstruct"), (scalar, "scalar")):
        allowed += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected weights by name; fetch it again")
    return contents


def is_torchscript(path: Path) -> bool:
    """Whether a file is a network with its program, as ``torch.jit.save`` writes it: reading it could run code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _unreadable(path: Path, error: Exception) -> UserError:
    """The message for a file of weights that cannot be read."""
    if not path.is_file():
        return UserError(
            f"there is no file {path}{': it is a folder' if path.is_dir() else ''}; give a file of weights"
        )
    with path.open("rb") as file:
        begin = file.read(40)
    named = re.search(r"GLOBAL (\S+)", str(error))
    if not begin:
        reason = "it is empty"
    elif begin.lstrip().startswith(b"<"):
        reason = "it is a web page"
    elif begin.startswith(b"version https://git-lfs"):
        reason = "it is a pointer of Git LFS, not the file"
    elif isinstance(error, pickle.UnpicklingError):
        reason = f"it holds {named[1]}, which could run code" if named else "it is none"
    else:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return UserError(f"{path} cannot be read as a file of weights: {reason}; fetch it again")


def fill(network: nn.Module, path: Path) -> None:
    """Assign the tensors of a file to a network, without a copy in memory.

    Args:
        network: A network on the CPU, without buffers other than those in the file.
        path: Path of a file with the weights by name, or with these under "model".

    Raises:
        UserError: If the file cannot be read, or its names or shapes are not the network's.
    """
    network.to("meta")  # frees its random weights before the file is read
    contents = read_checkpoint(path)
    with refusing(f"{path} does not hold the weights of {type(network).__name__}"):
        network.load_state_dict(contents.get("model", contents), assign=True)
    network.float()


@contextmanager
def refusing(problem: str, remedy: str = "") -> Iterator[None]:
    """Turn exceptions that a package raises at a wrong configuration or wrong weights into a ``UserError``.

    Args:
        problem: The beginning of the message; the text of the exception follows.
        remedy: The end of the message.

    Raises:
        UserError: If the block fails.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
        raise UserError(f"{problem}: {reason or type(error).__name__}{remedy}") from error


def audioset_classes(weights: Path) -> tuple[str, ...]:
    """Names of AudioSet's classes in the order of the logits, from `AUDIOSET_FILE` beside the weights; else numbers.

    Raises:
        UserError: If the file there does not list the 527 classes in order.
    """
    path = weights.parent / AUDIOSET_FILE
    if not path.is_file():
        return tuple(f"audioset_{number:03d}" for number in range(AUDIOSET_CLASSES))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if [row.get("index") for row in rows] != [str(number) for number in range(AUDIOSET_CLASSES)]:
        raise UserError(f"{path} does not list AudioSet's {AUDIOSET_CLASSES} classes, index 0 to 526 in order")
    return tuple(row["display_name"] for row in rows)
