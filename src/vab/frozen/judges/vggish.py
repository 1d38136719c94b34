"""VGGish, the judge of the first Frechet audio distances: 128 numbers for each 0.96 s."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from vab.files import sha256_of
from vab.frozen.protocols import Judge, JudgeOutput
from vab.frozen.weight_files.catalogue import published_weights
from vab.frozen.weight_files.reading import fill

SAMPLE_RATE = 16000
WINDOW = 400
"""Samples of a spectrum: 25 ms, periodic Hann."""
HOP = 160
"""Samples from one spectrum to the next: 10 ms."""
N_FFT = 512
NUM_BANDS = 64
LOWEST_HZ, HIGHEST_HZ = 125.0, 7500.0
LOG_OFFSET = 0.01
FRAMES = 96
"""Spectra of an example, 0.96 s; examples follow each other without overlap."""
EXAMPLES_AT_ONCE = 64
"""Examples of a batch: a long sound takes no more memory than a batch of short ones."""


def mel_matrix() -> Tensor:
    """(N_FFT / 2 + 1, NUM_BANDS) float64: triangles in the mel scale 1127 ln(1 + f / 700), peak 1; nothing of 0 Hz.

    The slopes are straight in mel, not in Hz: bands are not those of `vab.audio.log_mel`.
    """
    hertz = torch.arange(N_FFT // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / N_FFT
    mel = 1127.0 * torch.log1p(hertz / 700.0)
    low, high = (1127.0 * math.log1p(f / 700.0) for f in (LOWEST_HZ, HIGHEST_HZ))
    edges = torch.linspace(low, high, NUM_BANDS + 2, dtype=torch.float64)
    rising = (mel[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel[:, None]) / (edges[2:] - edges[1:-1])
    matrix = torch.minimum(rising, falling).clamp(min=0)
    matrix[0] = 0
    return matrix


class VGGish(Judge):
    """Hershey et al.'s network in the layout of torchvggish, without PCA and quantisation.

    Args:
        weights: The published file; if None, it is searched as `Published.find` says.
        final_relu: Whether the last layer's ReLU is applied. Without it the numbers are those of
            frechet-audio-distance and of the present reference network; with it, those of torchvggish itself.

    Raises:
        UserError: If the file is absent or does not hold these weights.

    Source: Hershey et al. 2017, "CNN architectures for large-scale audio classification"; constants as published with
    the network (vggish_params.py of the AudioSet models).
    """

    def __init__(self, weights: Path | None = None, final_relu: bool = False) -> None:
        super().__init__()
        path = published_weights("judge", "vggish").find(weights)
        self.name = "vggish_relu" if final_relu else "vggish"
        self.weight_hash = sha256_of(path)
        self.sample_rate = SAMPLE_RATE
        self.embedding_dim = 128
        self.classes = ()
        self.min_samples = _samples_for(1)
        self.final_relu = final_relu
        self.conventions = {
            "windows": "examples of 0.96 s (96 spectra), hop 0.96 s; the rest beyond whole examples dropped",
            "short_sounds": "zero-padded to one example",
            "embedding": f"last layer, {'after' if final_relu else 'before'} its ReLU; no PCA, no quantisation",
        }
        layers: list[nn.Module] = []
        channels = 1
        for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 6 * 4, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, 128),
        )  # fmt: skip
        fill(self, path)
        # Not persistent, since the published file has none of them.
        self.register_buffer("hann", torch.hann_window(WINDOW, dtype=torch.float64), persistent=False)
        self.register_buffer("mel", mel_matrix(), persistent=False)
        self.hann: Tensor
        self.mel: Tensor
        self.freeze()

    def _fit(self, waveform: Tensor) -> Tensor:
        return waveform[: _samples_for(_examples_in(len(waveform)))]

    def log_mel(self, waveform: Tensor) -> Tensor:
        """(B, N) -> (B, spectra, NUM_BANDS) float32: log(magnitude in each band + LOG_OFFSET).

        Frames begin at each HOP, the last one wholly inside; nothing is padded.
        """
        # In float64, as in the reference: in float32, a quiet band next to a loud one would be rounding noise.
        frames = waveform.double().unfold(1, WINDOW, HOP)  # (B, spectra, WINDOW)
        magnitude = torch.fft.rfft(frames * self.hann, n=N_FFT).abs()  # (B, spectra, N_FFT / 2 + 1)
        return (magnitude @ self.mel + LOG_OFFSET).log().float()

    def _judge(self, waveform: Tensor) -> JudgeOutput:
        count = _examples_in(waveform.shape[2])
        mel = self.log_mel(waveform[:, 0])[:, : count * FRAMES]
        examples = mel.reshape(-1, 1, FRAMES, NUM_BANDS)  # (B * F, 1, FRAMES, NUM_BANDS)
        embedding = torch.cat([self._embed(some) for some in examples.split(EXAMPLES_AT_ONCE)])
        return JudgeOutput(embedding.view(len(waveform), count, -1), waveform.new_zeros(len(waveform), 0))

    def _embed(self, examples: Tensor) -> Tensor:
        maps = self.features(examples)  # (M, 512, 6, 4)
        # Channels last, as in the original network.
        embedding: Tensor = self.embeddings(rearrange(maps, "M C H W -> M (H W C)"))
        return embedding.relu() if self.final_relu else embedding


def _samples_for(examples: int) -> int:
    return WINDOW + (examples * FRAMES - 1) * HOP


def _examples_in(samples: int) -> int:
    return (1 + (samples - WINDOW) // HOP) // FRAMES
