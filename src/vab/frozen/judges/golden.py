"""The check of a judge after it is loaded.

The judge embeds three sounds that are the same on every machine. It is refused if their embeddings are equal (the
network has collapsed), if an embedding depends on the batch, or if the embeddings differ from those that were stored
for the same weights (a library has changed). `tools/tiny_networks` stores those of the tiny judge.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from vab.frozen.protocols import Judge
from vab.frozen.tiny import shipped_weights
from vab.spec import UserError

SOUNDS = ("tone", "noise", "clicks")
SECONDS = 1.0
COLLAPSED = 1e-3
"""Embeddings are equal if their distance is at most this fraction of their length."""
MOVED = 1e-3
"""Largest change of a stored number, as a fraction of the largest number. Libraries and devices differ by a hundredth
of that, another computation by more."""
STORED = 16
"""Numbers stored for each embedding: weighted sums of its elements."""
SHIPPED = shipped_weights("judge").parent / "golden"


def golden_sounds(sample_rate: int) -> Tensor:
    """(3, N) float32: a tone of 440 Hz, noise, and eight clicks, one second each."""
    count = int(SECONDS * sample_rate)
    time = torch.arange(count, dtype=torch.float64) / sample_rate
    tone = 0.3 * torch.sin(2 * math.pi * 440 * time)
    # Fractional parts of a chaotic sequence: the same on every machine and in every version of torch.
    noise = 0.3 * (2 * (torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 12.9898) * 43758.5453 % 1) - 1)
    clicks = torch.zeros(count, dtype=torch.float64)
    clicks[torch.arange(8) * (count // 8)] = 0.9
    return torch.stack([tone, noise, clicks]).float()


def check(judge: Judge) -> None:
    """Refuse a judge that collapsed, that mixes the sounds of a batch, or whose numbers differ from the stored ones.

    They are compared with the numbers that ship with the package, else with those in the user's cache; if there are
    none, they are written into the cache.

    Raises:
        UserError: If it is refused, with the reason and what to do.
    """
    numbers = _signature(_embed(judge))
    for folder in (SHIPPED, _cache()):
        if _file_of(judge, folder).is_file():
            _compare(judge, numbers, _file_of(judge, folder))
            return
    _write(judge, numbers, _file_of(judge, _cache()))


def store(judge: Judge, folder: Path) -> None:
    """Write a judge's numbers into a folder, as `SHIPPED` has them."""
    _write(judge, _signature(_embed(judge)), _file_of(judge, folder))


def _file_of(judge: Judge, folder: Path) -> Path:
    return folder / f"{judge.name}-{judge.weight_hash[:16]}.json"


def _embed(judge: Judge) -> Tensor:
    """(3, E) float64 on the CPU: mean embedding of each sound."""
    device = next(judge.parameters()).device
    sounds = torch.stack([judge.prepare(sound) for sound in golden_sounds(judge.sample_rate)]).unsqueeze(1).to(device)
    together, alone = judge(sounds), judge(sounds[1:2])
    for part in (together.embedding, together.logits):
        if not bool(torch.isfinite(part).all()):
            raise _refused(judge, "gives numbers that are not finite")
    embedding = together.embedding.double().mean(dim=1).cpu()
    size = float(embedding.norm(dim=1).max())
    distance = max(float((embedding[i] - embedding[j]).norm()) for i, j in ((0, 1), (0, 2), (1, 2)))
    if not distance > COLLAPSED * size:
        raise _refused(
            judge,
            f"gives equal embeddings for {', '.join(SOUNDS)} (they differ by {distance / (size or 1):.1e})",
        )
    moved = float((alone.embedding.double().mean(dim=1).cpu() - embedding[1:2]).norm())
    if moved > MOVED * size:
        raise _refused(judge, f"gives another embedding in a batch than alone (by {moved / size:.1e})")
    return embedding


def _signature(embedding: Tensor) -> list[list[float]]:
    """(3, STORED) numbers that represent embeddings (3, E)."""
    steps = torch.arange(embedding.shape[1], dtype=torch.float64)
    waves = torch.stack([torch.cos(steps * (0.1 + 0.7 * number)) for number in range(STORED)])  # (STORED, E)
    rows: list[list[float]] = (embedding @ waves.T).tolist()
    return rows


def _compare(judge: Judge, numbers: list[list[float]], path: Path) -> None:
    try:
        stored = json.loads(path.read_text())
        expected, got = torch.tensor(stored["numbers"]), torch.tensor(numbers)
        versions = dict(stored["versions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, the stored numbers of judge {judge.name}, cannot be read: delete it") from error
    same_shape = expected.shape == got.shape
    moved = float((got - expected).abs().max() / expected.abs().max()) if same_shape else math.inf
    if not moved <= MOVED:
        had, have = (", ".join(f"{k} {v}" for k, v in side.items()) for side in (versions, _versions()))
        raise _refused(
            judge, f"gives other numbers than those in {path} (by {moved:.1e}): then with {had}, now with {have}",
            "; delete that file if the present numbers are right",
        )  # fmt: skip


def _refused(judge: Judge, what: str, remedy: str = "") -> UserError:
    return UserError(
        f"judge {judge.name} (weights {judge.weight_hash[:12]}) {what}: its scores would mean nothing{remedy}"
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vab" / "judges"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vab", "torch", "torchlibrosa", "transformers", "hear21passt"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _write(judge: Judge, numbers: list[list[float]], path: Path) -> None:
    contents = {"judge": judge.name, "weight_hash": judge.weight_hash, "numbers": numbers, "versions": _versions()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(contents, indent=1) + "\n")
        Path(file.name).chmod(0o644)  # others may share the cache
        Path(file.name).replace(path)
    except OSError as error:
        # The judge passed: an unwritable folder is no reason to refuse it.
        warnings.warn(f"cannot store the numbers of judge {judge.name} ({error}): set XDG_CACHE_HOME", stacklevel=2)
