"""Weights that others published: where their files are looked for, how they are read, and AudioSet's class names."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from vab.frozen.downloading import cached, download, fetch, is_offline
from vab.spec import UserError

AUDIOSET_CLASSES = 527
AUDIOSET_FILE = "class_labels_indices.csv"
"""AudioSet's list of classes: columns index, mid, display_name."""


@dataclass(frozen=True)
class Published:
    """A file (or folder) of weights as its authors published it."""

    owner: str
    """Whose it is, in words: "judge vggish"."""
    names: tuple[str, ...]
    """Under which it may lie on a disk, the authors' own first."""
    source: str
    """Who published it where, in words."""
    licence: str = ""
    """Its licence and what that asks for, in words; empty where its authors name none."""
    repository: str = ""
    """On the Hugging Face hub, ``owner/name``; empty if it is not there."""
    files: tuple[str, ...] = ()
    """What is needed of the repository: one file, or several that together are a folder."""
    url: str = ""
    """Where else it can be fetched, a single file; empty if nowhere."""
    sha256: str = ""
    """Of that file, in hex, or the beginning of it, as its authors or several others state it."""
    extra: str = ""
    """Which of this package's extras the network needs; empty if none."""

    @property
    def name(self) -> str:
        """What ``vab weights fetch`` calls it."""
        return self.owner.rpartition(" ")[2]

    def find(self, weights: Path | None) -> Path:
        """Where it is: at ``weights``, else in `folders`, else in the hub's cache; else it is fetched, unless offline.

        Raises:
            UserError: If it is in none of these, and cannot be fetched.
        """
        wanted = f"{self.owner} needs {self.names[0]}, published in {self.source}"
        if weights:
            if weights.exists():
                return weights
            if self.files and _may_be_repository(weights):
                return self._of_hub(str(weights), f"{wanted}: there is no {weights}", "give a file or a folder")
            raise UserError(f"{wanted}: there is no {weights}")
        if place := self.local():
            return place
        absent = f"it is not in {' or '.join(map(str, folders()[:-1]))}"
        advice = "put it there, or into a folder named by VAB_WEIGHTS"
        if self.repository or self.url:
            advice += f" (where there is a network: vab weights fetch --names {self.name} --out FOLDER)"
        if self.repository:
            return self._of_hub(self.repository, f"{wanted}: {absent}", advice)
        if self.url and not is_offline():
            return self._download(f"{wanted}: {absent}", advice)
        if self.url:
            absent += ", and HF_HUB_OFFLINE forbids to fetch it"
        raise UserError(f"{wanted}: {absent}; {advice}")

    def local(self) -> Path | None:
        """Where it is on this machine, or None; nothing is fetched."""
        for place in (folder / name for folder in folders() for name in self.names):
            if place.exists():
                return place
        return cached(self.repository, self.files) if self.repository else None

    def _of_hub(self, repository: str, wanted: str, advice: str) -> Path:
        if found := cached(repository, self.files):
            return found
        paths = [fetch(repository, name, f"{wanted}, nor in the hub's cache", advice) for name in self.files]
        return paths[0] if len(paths) == 1 else paths[0].parent

    def _download(self, wanted: str, advice: str) -> Path:
        place = Path(torch.hub.get_dir()) / "checkpoints" / self.names[0]
        try:
            download(self.url, place, self.sha256)
        except (UserError, OSError) as error:
            raise UserError(f"{wanted}, and {error}; {advice}") from error
        return place


def _may_be_repository(name: Path) -> bool:
    """Whether it can be ``owner/name`` on the hub, and not a misspelt path."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None
        and not name.parent.is_dir()
        and name.suffix not in (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".th")
    )


def folders() -> list[Path]:
    """Where files of weights are looked for: the folder $VAB_WEIGHTS if it is set, then torch.hub's folders."""
    own = os.environ.get("VAB_WEIGHTS")
    hub = Path(torch.hub.get_dir())
    return [*([Path(own).expanduser()] if own else []), hub / "checkpoints", hub]


_told: set[str] = set()


def tell_licence(owner: str, licence: str) -> None:
    """Say on stderr, once in a process and on rank 0 alone, under which licence weights are used."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    if licence and owner not in _told and rank == "0":
        _told.add(owner)
        print(f"{owner}: weights under {licence}", file=sys.stderr)


def read_weights(path: Path) -> dict[str, Any]:
    """The contents of a file of weights, safetensors by its name or else of torch.save; nothing in it can run code.

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
    """Configuration, weights and their file, of a folder as transformers writes it for the hub.

    Args:
        folder: With config.json and model.safetensors, or pytorch_model.bin in its place.
        model_type: What the configuration must say that it is of.
        owner: Whose it should be, in words.

    Raises:
        UserError: If a file is missing or cannot be read, or the folder is of another model.
    """
    config, file = folder / "config.json", folder / "model.safetensors"
    if not file.exists() and (folder / "pytorch_model.bin").exists():
        file = folder / "pytorch_model.bin"
    if missing := [path.name for path in (config, file) if not path.exists()]:
        raise UserError(f"{folder} is not {owner} as a hub has it: it lacks {' and '.join(missing)}")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}; fetch it anew") from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != model_type:
        raise UserError(
            f"{config} is of a model of type {kind!r}, expected {model_type!r}: fetch it anew, or give another folder"
        )
    return settings, read_weights(file), file


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a file that torch.save wrote; nothing in it can run code.

    Raises:
        UserError: If it is no such file, or holds more than tensors, numbers, text and arrays.
    """
    if is_torchscript(path):
        raise UserError(f"{path} is TorchScript, which holds a program and is not read; take another form of it")
    # Some authors left numpy arrays of their sampler's state beside the weights; an older numpy wrote them.
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
        raise UserError(f"{path} holds a {type(contents).__name__}, expected weights by name; fetch it anew")
    return contents


def is_torchscript(path: Path) -> bool:
    """Whether a file is a network with its program, as ``torch.jit.save`` writes it: to read it is to trust it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _unreadable(path: Path, error: Exception) -> UserError:
    """Why a file of weights cannot be read, in a user's words."""
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
        reason = "it only says where Git LFS has the file"
    elif isinstance(error, pickle.UnpicklingError):
        reason = f"it holds {named[1]}, which could run code" if named else "it is none"
    else:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return UserError(f"{path} cannot be read as a file of weights: {reason}; fetch it anew")


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
    with refusing_other_weights(path, type(network).__name__):
        network.load_state_dict(contents.get("model", contents), assign=True)
    network.float()


@contextmanager
def refusing_other_weights(path: Path, owner: str) -> Iterator[None]:
    """Say in a user's words that a file holds other weights than those of the network that is being filled.

    Args:
        path: Of the file.
        owner: Whose weights are expected, in words.

    Raises:
        UserError: If filling the network fails.
    """
    try:
        yield
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])[:300] or str(error)
        raise UserError(f"{path} does not hold the weights of {owner}: {reason}") from error


def audioset_classes(weights: Path) -> tuple[str, ...]:
    """Names of AudioSet's classes in the order of the logits: from `AUDIOSET_FILE` beside the weights, else numbers.

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
