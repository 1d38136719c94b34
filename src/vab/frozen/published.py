"""Weights that others published: where their files are searched, how they are read, and AudioSet's class names."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from vab.frozen.downloading import cached, fetch, from_address, from_hub
from vab.spec import UserError

AUDIOSET_CLASSES = 527
AUDIOSET_FILE = "class_labels_indices.csv"
"""AudioSet's list of classes: columns index, mid, display_name."""


@dataclass(frozen=True)
class Published:
    """A file (or folder) of weights as its authors published it."""

    owner: str
    """The network, in words: "judge vggish"."""
    names: tuple[str, ...]
    """Names of the file or folder below a folder of weights, the authors' own first."""
    source: str
    """Who published it where, in words."""
    licence: str = ""
    """Its licence and what that asks for, in words; empty if its authors state none."""
    repository: str = ""
    """``owner/name`` on the Hugging Face hub; empty if it is not there."""
    files: tuple[str, ...] = ()
    """Files that are needed of the repository: one, or several that make a folder."""
    url: str = ""
    """Address of a single file that is not on the hub."""
    sha256: str = ""
    """Hash of that file, in hex, or the beginning of it, as its authors or several others state it."""
    extra: str = ""
    """The extra of this package that the network needs; empty if none."""

    @property
    def name(self) -> str:
        """Its name for ``vab weights fetch``."""
        return self.owner.rpartition(" ")[2]

    def find(self, weights: Path | None) -> Path:
        """Get the path of the weights, and fetch them if they are absent, unless the user forbids it.

        Args:
            weights: File, folder or repository on the hub that the user names; if None, look in `folders` and in the
                hub's cache.

        Raises:
            UserError: If they are absent, and cannot be fetched.
        """
        problem = f"{self.owner} needs {self.names[0]}, published in {self.source}"
        if weights:
            if weights.exists():
                return weights
            problem += f": there is no {weights}"
            if self.files and _may_be_repository(weights):
                advice, name = "give a file or a folder", str(weights)
                return cached(name, self.files) or fetch(problem, advice, from_hub, name, self.files)
            raise UserError(problem)
        if place := self.local():
            return place
        problem += f": it is not in {' or '.join(map(str, folders()[:-1]))}"
        advice = "put it there, or into a folder named by VAB_WEIGHTS"
        if self.repository or self.url:
            advice += f" (where there is a network: vab weights fetch --names {self.name} --out FOLDER)"
        if self.repository:
            return fetch(problem, advice, from_hub, self.repository, self.files)
        if self.url:
            return fetch(problem, advice, from_address, self.url, folders()[-2] / self.names[0], self.sha256)
        raise UserError(f"{problem}; {advice}")

    def local(self) -> Path | None:
        """The path of the weights on this machine, or None; nothing is fetched."""
        for place in (folder / name for folder in folders() for name in self.names):
            if place.exists():
                return place
        return cached(self.repository, self.files) if self.repository else None

    def files_at(self, place: Path) -> list[Path]:
        """The files of the weights at one of their paths; empty if one is missing."""
        paths = [place / name for name in self.files] if len(self.files) > 1 and not place.is_file() else [place]
        return paths if all(path.is_file() for path in paths) else []

    def files_in(self, folder: Path) -> list[Path]:
        """The files of the weights in a folder such as $VAB_WEIGHTS, under any of their names; empty if incomplete."""
        return next(filter(None, (self.files_at(folder / name) for name in self.names)), [])


def _may_be_repository(name: Path) -> bool:
    """Whether it can be ``owner/name`` on the hub, and not a misspelt path."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None
        and not name.parent.is_dir()
        and name.suffix not in (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".th")
    )


def folders() -> list[Path]:
    """Folders that are searched for weights: $VAB_WEIGHTS if it is set, then torch.hub's folders."""
    own = os.environ.get("VAB_WEIGHTS")
    hub = Path(torch.hub.get_dir())
    return [*([Path(own).expanduser()] if own else []), hub / "checkpoints", hub]


_printed: set[str] = set()


def tell_licence(owner: str, licence: str) -> None:
    """Print the licence of weights on stderr, once in a process and on rank 0 only."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    if licence and owner not in _printed and rank == "0":
        _printed.add(owner)
        print(f"{owner}: weights under {licence}", file=sys.stderr)


def read_weights(path: Path) -> dict[str, Any]:
    """Read a file of weights, safetensors by its suffix, else of torch.save; nothing in it can run code.

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
    """Read a file that torch.save wrote; nothing in it can run code.

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
    """Turn the exceptions of a package at a wrong configuration or wrong weights, which it does not check, into one.

    Args:
        problem: The beginning of the message, which the exception's own follows.
        remedy: The end of the message.

    Raises:
        UserError: If the block fails.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{problem}: {one_line(error)}{remedy}") from error


def one_line(error: Exception) -> str:
    """The message of an exception, in one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300] or type(error).__name__


def check_sample_rate(name: str, numbers: Mapping[str, tuple[int, float, int, int]], rate: int, path: Path) -> None:
    """Refuse weights of another sample rate than the codec's.

    Args:
        name: Name of the codec.
        numbers: The numbers of all codecs of this architecture by name; the first is the sample rate, Hz.
        rate: Sample rate of the network in the file, Hz.
        path: Path of the file, for the message.

    Raises:
        UserError: If they differ.
    """
    if rate != numbers[name][0]:
        others = [other for other in numbers if numbers[other][0] == rate]
        advice = f"load it as codec {others[0]}" if others else "take another file"
        raise UserError(f"{path} is for {rate} Hz, codec {name} for {numbers[name][0]} Hz: {advice}")


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
