"""What the tiny codec, vision encoder and judge share: their weights, which ship with the package, and a layer.

`tools/tiny_networks`, outside the package, trains them. A weights file is safetensors: its metadata holds the numbers
of the architecture and how it was made, so that the file alone defines the network.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from vab.files import sha256_of


def shipped_weights(part: str) -> Path:
    """Where the package keeps the weights of "codec", "codec8" (its further levels), "vision" or "judge"."""
    return Path(str(resources.files("vab.frozen") / "weights" / f"tiny_{part}.safetensors"))


def read_weights(path: Path, key: str = "config") -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Read a weights file.

    Args:
        path: Path of the file.
        key: Entry of its metadata to read, JSON.

    Returns:
        That entry, with tuples for lists; the tensors in float32 by name; the SHA-256 of the file.
    """
    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()[key])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    entry = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return entry, tensors, sha256_of(path)


def halve(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution that halves both sides."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
