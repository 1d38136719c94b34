"""Weights that others published: where their files are looked for, how they are read, and AudioSet's class names."""

from __future__ import annotations

import csv
import hashlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vab.spec import UserError

AUDIOSET_CLASSES = 527
AUDIOSET_FILE = "class_labels_indices.csv"
"""AudioSet's list of classes: columns index, mid, display_name."""


@dataclass(frozen=True)
class Published:
    """A file (or folder) of weights as its authors published it."""

    judge: str
    names: tuple[str, ...]
    """Under which it may lie on a disk, the authors' own first."""
    source: str
    """Who published it where, in words."""

    def find(self, weights: Path | None) -> Path:
        """Where it is: at ``weights``, else in the folder $VAB_WEIGHTS, else in torch.hub's folders.

        Raises:
            UserError: If it is in none of them.
        """
        own = os.environ.get("VAB_WEIGHTS")
        hub = Path(torch.hub.get_dir())
        folders = [*([Path(own)] if own else []), hub / "checkpoints", hub]
        places = [weights] if weights else [folder / name for folder in folders for name in self.names]
        for place in places:
            if place.exists():
                return place
        wanted = f"judge {self.judge} needs {self.names[0]}, published in {self.source}"
        if weights:
            raise UserError(f"{wanted}: there is no {weights}")
        raise UserError(
            f"{wanted}: it is not in {' or '.join(map(str, folders[:-1]))}; "
            "put it there, or into a folder named by VAB_WEIGHTS"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a file that torch.save wrote; nothing in it can run code.

    Raises:
        UserError: If it is no such file, or holds more than tensors, numbers, text and arrays.
    """
    # Some authors left numpy arrays of their sampler's state beside the weights; an older numpy wrote them.
    rebuild, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    for function, name in ((rebuild, "_reconstruct"), (scalar, "scalar")):
        allowed += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{path} cannot be read as a file of weights: {reason}; fetch it anew") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected weights by name; fetch it anew")
    return contents


def fill(network: nn.Module, path: Path) -> None:
    """Give a network all its weights: the very tensors of the file, so that there are never two of each in memory.

    Args:
        network: On the CPU, with no buffers but those that its file holds.
        path: Of a file with the weights by name, or with these under "model".

    Raises:
        UserError: If the file cannot be read, or names or shapes are not the network's.
    """
    network.to("meta")  # its random weights go before the file is read
    contents = read_checkpoint(path)
    try:
        network.load_state_dict(contents.get("model", contents), assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])[:300] or str(error)
        raise UserError(f"{path} does not hold the weights of {type(network).__name__}: {reason}") from error
    network.float()


def audioset_classes(weights: Path) -> tuple[str, ...]:
    """Names of AudioSet's classes in the order of the logits: from `AUDIOSET_FILE` beside the weights, else numbers.

    Raises:
        UserError: If the file there does not list the 527 classes in order.
    """
    path = weights.parent / AUDIOSET_FILE
    if not path.is_file():
        return tuple(f"audioset_{number:03d}" for number in range(AUDIOSET_CLASSES))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if [row.get("index") for row in rows] != [str(number) for number in range(AUDIOSET_CLASSES)]:
        raise UserError(f"{path} does not list AudioSet's {AUDIOSET_CLASSES} classes, index 0 to 526 in order")
    return tuple(row["display_name"] for row in rows)
