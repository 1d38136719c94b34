"""The codec that the paper generates with, as far as speed goes: its architecture with random weights."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from vab.frozen.codec import load_codec
from vab.frozen.protocols import Codec


class RandomEncodec(Codec):
    """AudioGen's 16 kHz EnCodec with random weights: what it gives is noise, in the time that sound would take.

    Source: sizes as in AudioGen, Kreuk et al. 2023; put together as the package encodec does it, Defossez et al. 2022.
    """

    def __init__(self, num_filters: int = 64) -> None:
        super().__init__()
        from encodec.modules import SEANetDecoder
        from encodec.quantization import ResidualVectorQuantizer

        self.name = "EnCodec 16 kHz (AudioGen's architecture, random weights)"
        self.weight_hash = ""
        self.sample_rate, self.code_rate = 16000, 50.0
        self.num_codebooks, self.codebook_size, self.code_dim = 4, 2048, 128
        self.quantizer = ResidualVectorQuantizer(
            dimension=self.code_dim, n_q=self.num_codebooks, bins=self.codebook_size, kmeans_init=False
        )
        self.decoder: nn.Module = SEANetDecoder(
            dimension=self.code_dim,
            n_filters=num_filters,
            ratios=[8, 5, 4, 2],
            norm="weight_norm",
            causal=False,
            lstm=2,
        )

    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32."""
        return torch.stack([layer.codebook for layer in self.quantizer.vq.layers])

    def _encode(self, waveform: Tensor) -> Tensor:
        raise NotImplementedError("the benchmark decodes only")

    def _decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.quantizer.decode(codes.transpose(0, 1)))


def benchmark_codec(device: torch.device) -> Codec:
    """The paper's codec where the package encodec is installed, else the tiny one that ships with vab."""
    if importlib.util.find_spec("encodec") is None:
        return load_codec("tiny", device)
    return RandomEncodec().freeze().to(device)


def fitted(codes: Tensor, codec: Codec) -> Tensor:
    """Codes of any codec as codes of this one, (B, K, T): folded into its range, as the tiny codec's is smaller."""
    return codes[:, : codec.num_codebooks] % codec.codebook_size
