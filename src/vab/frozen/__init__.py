"""Networks that are used and never trained: codecs, vision encoders, judges.

Each kind has one protocol and one loader, by name: `vab.frozen.codec.load_codec`, `vab.frozen.vision.load_vision`,
`vab.frozen.judges.load_judge`. What they share is here: being frozen, and computing in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn

from vab.spec import UserError


def device_named(name: str) -> torch.device:
    """The device that a user names: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.

    Raises:
        UserError: If there is no such device here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


class Frozen(nn.Module):
    """A network as it was loaded: evaluation mode and no gradients, whatever a trainer does to its parent modules."""

    name: str
    """What its loader was asked for."""
    weight_hash: str
    """SHA-256 of the file of its weights, in hex: two networks of one hash give the same numbers."""

    def freeze(self) -> Self:
        """Stop gradients and switch to evaluation mode; the loaders call this last."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: trainers switch whole trees to training, and batch statistics would follow."""
        return super().train(False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast, and no TF32 on a GPU.

    Codes are an argmin: rounding that no ear would notice still flips them, so precision is not the caller's choice.
    """
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
