"""PANNs CNN14: 2048 numbers and AudioSet's 527 classes for a whole sound, at 16 and 32 kHz."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.extras import install_hint
from vab.files import sha256_of
from vab.frozen.protocols import Judge, JudgeOutput
from vab.frozen.weight_files.catalogue import published_weights
from vab.frozen.weight_files.reading import AUDIOSET_CLASSES, audioset_classes, fill
from vab.spec import UserError

EARLY_BLOCKS = 4
"""Blocks with large maps and few weights; the last two have small maps and most of the weights."""


def package_network(name: str) -> nn.Module:
    """The network that frechet-audio-distance defines, with random weights.

    At 32 kHz, the filters end at 14 kHz, as in the training of the published weights. The package has 16 kHz; this
    makes no difference once the weights are loaded, since their file contains the filters.

    Raises:
        UserError: If the package is not installed.
    """
    models = package_models()
    if name == "panns_16k":
        network: nn.Module = models.Cnn14_16k(16000, 512, 160, 64, 50, 8000, AUDIOSET_CLASSES)
    else:
        network = models.Cnn14(32000, 1024, 320, 64, 50, 14000, AUDIOSET_CLASSES)
    return network.eval()


def package_models() -> Any:
    """The package's module of networks, imported without dependencies that they do not need.

    Raises:
        UserError: If the package is not installed, or does not import.
    """
    absent = "laion_clap" not in sys.modules
    if absent:
        # The package imports it for another judge, and its import downloads tokenizers from a model hub.
        sys.modules["laion_clap"] = ModuleType("laion_clap")
    try:
        from frechet_audio_distance.models import pann
    except ImportError as error:
        raise UserError(f"judges panns_16k and panns_32k need a package ({error}): {install_hint('fad')}") from error
    finally:
        if absent:
            del sys.modules["laion_clap"]
    return pann


class Panns(Judge):
    """CNN14: the function of the package's network, arranged for speed.

    Normalisation is folded into the convolutions, which halves the passes over memory. On a CPU the early blocks run on
    one sound at a time, whose maps fit into the cache. The last two blocks, with four fifths of the weights, run on the
    whole batch, so that their weights are read once.

    Args:
        name: "panns_16k" or "panns_32k".
        weights: The published file; if None, it is searched as `Published.find` says.

    Raises:
        UserError: If the package or the file is absent, or the file does not hold these weights.

    Source: Kong et al. 2020, "PANNs: large-scale pretrained audio neural networks for audio pattern recognition".
    """

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        package_models()  # before the weights are searched, and perhaps fetched
        path = published_weights("judge", name).find(weights)
        network: Any = package_network(name)
        fill(network, path)
        self.name = name
        self.weight_hash = sha256_of(path)
        self.sample_rate, hop = (16000, 160) if name == "panns_16k" else (32000, 320)
        self.embedding_dim = 2048
        self.classes = audioset_classes(path)
        self.min_samples = 31 * hop  # 32 spectra: one is left after the five poolings
        self.conventions = {
            "length": "whole sound, mean plus maximum over time",
            "short_sounds": f"zero-padded to {self.min_samples / self.sample_rate:g} s",
            "embedding": "2048 numbers after the ReLU, before the classes",
            "class_link": "sigmoid in training; the logits are before it",
            "mel_filters": "as stored in the file of the weights",
        }
        self.spectrogram, self.mel, self.norm = network.spectrogram_extractor, network.logmel_extractor, network.bn0
        blocks = [getattr(network, f"conv_block{number}") for number in range(1, 7)]
        self.blocks = nn.ModuleList(
            nn.ModuleList([_folded(block.conv1, block.bn1), _folded(block.conv2, block.bn2)]) for block in blocks
        )
        self.embed, self.classify = network.fc1, network.fc_audioset
        self.freeze()

    def _judge(self, waveform: Tensor) -> JudgeOutput:
        at_once = 1 if waveform.device.type == "cpu" else len(waveform)
        maps = torch.cat([self._early(some) for some in waveform[:, 0].split(at_once)])
        maps = F.avg_pool2d(_convolve(self.blocks[EARLY_BLOCKS], maps), 2)
        maps = _convolve(self.blocks[EARLY_BLOCKS + 1], maps)  # (B, 2048, spectra / 32, bands / 32)
        pooled = maps.mean(dim=3)
        pooled = pooled.amax(dim=2) + pooled.mean(dim=2)  # (B, 2048)
        embedding = F.relu_(self.embed(pooled))
        return JudgeOutput(embedding.unsqueeze(1), self.classify(embedding))

    def _early(self, waveform: Tensor) -> Tensor:
        """(B, N) -> (B, 512, spectra / 16, bands / 16)."""
        mel = self.mel(self.spectrogram(waveform))  # (B, 1, spectra, bands), dB
        maps = self.norm(mel.transpose(1, 3)).transpose(1, 3)  # each band by its own mean and deviation
        for block in self.blocks[:EARLY_BLOCKS]:
            maps = F.avg_pool2d(_convolve(block, maps), 2)
        return maps


def _convolve(block: nn.Module, maps: Tensor) -> Tensor:
    """Both convolutions of a block, each with its ReLU."""
    first, second = block.children()
    return F.relu_(second(F.relu_(first(maps))))


@torch.no_grad()
def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution with the normalisation that follows it, by its running statistics, folded in."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("a normalisation without running statistics cannot be folded")
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    convolution.weight.mul_(scale.float()[:, None, None, None])  # in place: all weights are 320 MB
    convolution.bias = nn.Parameter((norm.bias - mean * scale).float())
    return convolution
