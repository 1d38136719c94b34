"""Judges: networks that listen, for metrics to say how good a sound is. One protocol for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vab.frozen import Frozen, full_precision
from vab.spec import UserError


class JudgeOutput(NamedTuple):
    """What a judge heard."""

    embedding: Tensor
    """(B, embedding_dim) float32."""
    probabilities: Tensor
    """(B, L) float32 over `Judge.classes`; each row sums to 1."""


class Judge(Frozen, ABC):
    """Listens to whole waveforms of any length it can use."""

    sample_rate: int
    """Of the waveforms it takes, Hz."""
    classes: tuple[str, ...]
    """Names of the L classes, in the order of the probabilities."""
    embedding_dim: int
    """Width of an embedding."""
    min_samples: int
    """Shortest waveform it can judge."""

    @abstractmethod
    def _listen(self, waveform: Tensor) -> JudgeOutput:
        """Judge (B, 1, N) float32."""

    @torch.no_grad()
    def forward(self, waveform: Tensor, sample_rate: int | None = None) -> JudgeOutput:
        """Judge each waveform of a batch, free of any effect of the others.

        Args:
            waveform: (B, 1, N) float32 in [-1, 1] at the judge's own rate, N >= `min_samples`.
            sample_rate: The waveform's rate, Hz, where the caller knows it: another than the judge's is refused.

        Raises:
            UserError: If the rate is not the judge's, or the waveform is too short to judge.
            ValueError: If the shape is not (B, 1, N).
        """
        if sample_rate is not None and sample_rate != self.sample_rate:
            raise UserError(
                f"judge {self.name} takes {self.sample_rate} Hz, got {sample_rate} Hz: "
                f"resample first, with vab.audio.resample(x, {sample_rate}, {self.sample_rate})"
            )
        if waveform.ndim != 3 or waveform.shape[1] != 1:
            raise ValueError(f"judge {self.name} takes a waveform (B, 1, N), got {tuple(waveform.shape)}")
        if waveform.shape[2] < self.min_samples:
            raise UserError(
                f"judge {self.name} needs at least {self.min_samples / self.sample_rate:g} s of sound, "
                f"got {waveform.shape[2] / self.sample_rate:g} s"
            )
        with full_precision(waveform.device):
            return self._listen(waveform.float())


def _tiny() -> Judge:
    from vab.frozen.tiny import TinyJudge  # here, since tiny.py builds on the class above

    return TinyJudge()


_JUDGES: dict[str, Callable[[], Judge]] = {"tiny": _tiny}


def load_judge(name: str, device: torch.device | str = "cpu") -> Judge:
    """Get a judge by name.

    Args:
        name: "tiny" ships with the package, needs no network and knows the demo world's classes.
        device: Where it shall run.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in _JUDGES:
        raise UserError(f"unknown judge {name!r}: there is {', '.join(sorted(_JUDGES))}")
    return _JUDGES[name]().freeze().to(device)
