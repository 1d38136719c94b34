"""The tiny judge, which ships with the package and knows the demo world's sounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.audio import log_mel
from vab.frozen.protocols import Judge, JudgeOutput
from vab.frozen.tiny import halve, read_weights, shipped_weights


@dataclass(frozen=True)
class JudgeConfig:
    """Architecture of `JudgeNetwork`; rates in Hz, lengths in samples."""

    classes: tuple[str, ...]
    sample_rate: int = 16000
    n_fft: int = 1024
    hop: int = 320
    num_bands: int = 64
    widths: tuple[int, int, int, int] = (32, 64, 128, 192)
    embedding_dim: int = 128
    min_samples: int = 3200


class JudgeNetwork(nn.Module):
    """A convolutional network on log-mel spectra, pooled over time, for sounds of any length."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        a, b, c, d = config.widths
        self.body = nn.Sequential(
            halve(1, a),
            halve(a, b),
            halve(b, c),
            halve(c, d),
            nn.Conv2d(d, d, (3, 1), padding=(1, 0), bias=False),
            nn.BatchNorm2d(d),
            nn.ReLU(),
        )
        self.embed = nn.Linear(2 * d, config.embedding_dim)
        self.classify = nn.Linear(config.embedding_dim, len(config.classes))

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) -> embedding (B, embedding_dim) and scores before softmax (B, L)."""
        c = self.config
        mel = log_mel(waveform, c.sample_rate, c.n_fft, c.hop, c.num_bands)  # (B, bands, frames)
        x = self.body((mel.unsqueeze(1) + 7.0) / 3.0)  # (B, d, bands / 16, frames / 16)
        x = x.mean(dim=2)  # over bands
        embedding = self.embed(torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1))
        return embedding, self.classify(F.relu(embedding))


class TinyJudge(Judge):
    """Classifies the demo world's sounds. For a segment with two sounding objects each has probability one half.

    Args:
        weights: A file made by `tools/tiny_networks`; the shipped one if None.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        numbers, tensors, self.weight_hash = read_weights(weights or shipped_weights("judge"))
        config = JudgeConfig(**numbers)
        self.name = "tiny"
        self.sample_rate = config.sample_rate
        self.classes = config.classes
        self.embedding_dim = config.embedding_dim
        self.min_samples = config.min_samples
        self.conventions = {
            "length": "whole sound",
            "short_sounds": f"zero-padded to {config.min_samples / config.sample_rate:g} s",
            "embedding": "last layer before the classes, pooled over time",
            "class_link": "softmax",
        }
        self.network = JudgeNetwork(config)
        self.network.load_state_dict(tensors)
        self.freeze()

    def _judge(self, waveform: Tensor) -> JudgeOutput:
        embedding, scores = self.network(waveform[:, 0])
        return JudgeOutput(embedding.unsqueeze(1), scores)
