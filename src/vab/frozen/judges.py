"""Judges: networks that listen, for metrics to say how good a sound is. One protocol for all of them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vab.frozen import Frozen, full_precision
from vab.spec import UserError


class JudgeOutput(NamedTuple):
    """What a judge heard."""

    embedding: Tensor
    """(B, F, E) float32: F windows of each sound, one where the judge pools the whole."""
    logits: Tensor
    """(B, L) float32, scores of `Judge.classes` before softmax or sigmoid; (B, 0) where there are no classes."""

    @property
    def probabilities(self) -> Tensor:
        """(B, L) float32: softmax of the logits."""
        return self.logits.softmax(dim=-1)


class Judge(Frozen, ABC):
    """Listens to whole waveforms of any length, by the convention of its field for short and long ones."""

    sample_rate: int
    """Of the waveforms it takes, Hz."""
    classes: tuple[str, ...]
    """Names of the L classes, in the order of the logits; none for a judge that only embeds."""
    embedding_dim: int
    """E, the width of an embedding."""
    min_samples: int
    """Shortest waveform that `forward` takes; `prepare` pads to it."""
    conventions: dict[str, str | int | float | bool]
    """The choices that numbers depend on, for metric cards: windows, padding, layer of the embedding, class link."""

    @abstractmethod
    def _listen(self, waveform: Tensor) -> JudgeOutput:
        """Judge (B, 1, N) float32."""

    def _fit(self, waveform: Tensor) -> Tensor:
        """(N,) of at least `min_samples` -> (N',): windows, cuts; as it is, unless a judge says otherwise."""
        return waveform

    def prepare(self, waveform: Tensor) -> Tensor:
        """Bring a sound of any length to one that `forward` takes, by the judge's own convention.

        Args:
            waveform: (N,) float32 in [-1, 1] at the judge's own rate, N >= 1.

        Returns:
            (N',) float32: short sounds followed by zeros, long ones cut as `conventions` says.

        Raises:
            UserError: If there are no samples, or some that are not finite.
            ValueError: If the shape is not (N,).
        """
        if waveform.ndim != 1:
            raise ValueError(f"judge {self.name} prepares one waveform (N,), got {tuple(waveform.shape)}")
        if not len(waveform):
            raise UserError(f"judge {self.name} was given a sound without samples: leave it out")
        if not bool(torch.isfinite(waveform).all()):
            raise UserError(f"judge {self.name} was given a sound with samples that are not finite: leave it out")
        return self._fit(F.pad(waveform.float(), (0, max(0, self.min_samples - len(waveform)))))

    @torch.no_grad()
    def forward(self, waveform: Tensor, sample_rate: int | None = None) -> JudgeOutput:
        """Judge each waveform of a batch, free of any effect of the others.

        Args:
            waveform: (B, 1, N) float32 in [-1, 1] at the judge's own rate, of a length that `prepare` gives.
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
                f"got {waveform.shape[2] / self.sample_rate:g} s: Judge.prepare pads"
            )
        with full_precision(waveform.device):
            return self._listen(waveform.float())


# By name, as these files build on the class above, and some need packages that others can do without.
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("vab.frozen.tiny.TinyJudge", {}),
    "vggish": ("vab.frozen.vggish.VGGish", {}),
    "vggish_relu": ("vab.frozen.vggish.VGGish", {"final_relu": True}),
    "panns_16k": ("vab.frozen.panns.Panns", {"name": "panns_16k"}),
    "panns_32k": ("vab.frozen.panns.Panns", {"name": "panns_32k"}),
    "passt": ("vab.frozen.passt.Passt", {}),
    "clap": ("vab.frozen.clap.Clap", {}),
}

JUDGES: tuple[str, ...] = tuple(_CLASSES)
"""Names that `load_judge` knows."""


def load_judge(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> Judge:
    """Get a judge by name, after it has shown that it hears what it should (`vab.frozen.golden.check`).

    Args:
        name: "tiny" ships with the package, needs no network and knows the demo world's classes; "vggish" ends before
            the last layer's ReLU, "vggish_relu" after it; "panns_16k" and "panns_32k" are CNN14.
        device: Where it shall run.
        weights: The published file of its weights (clap: a folder). If None, it is looked for in the folder
            $VAB_WEIGHTS, then where torch.hub and the model hub keep theirs; and fetched if it is nowhere, unless
            HF_HUB_OFFLINE is set.

    Raises:
        UserError: If the name is unknown, a package or the weights are absent, or the judge fails its check.
    """
    from vab.frozen.golden import check

    if name not in JUDGES:
        raise UserError(f"unknown judge {name!r}: there is {', '.join(JUDGES)}")
    path, arguments = _CLASSES[name]
    module, _, kind = path.rpartition(".")
    own = None if weights is None else Path(weights).expanduser()
    judge: Judge = getattr(importlib.import_module(module), kind)(weights=own, **arguments).freeze().to(device)
    check(judge)
    return judge
