"""The tiny codec, which ships with the package: 16 kHz, 50 steps per second, at 1.6 or 3.2 kbit/s."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.frozen.protocols import Codec
from vab.frozen.tiny import read_weights, shipped_weights
from vab.spec import UserError


@dataclass(frozen=True)
class CodecConfig:
    """Architecture of `CodecNetwork`; rates in Hz, lengths in samples."""

    sample_rate: int = 16000
    hop: int = 320
    long_window: int = 1280
    short_window: int = 320
    dim: int = 128
    hidden: int = 384
    encoder_blocks: int = 4
    decoder_blocks: int = 5
    num_codebooks: int = 4
    codebook_size: int = 256
    code_dim: int = 128
    num_partials: int = 128


class ConvNeXtBlock(nn.Module):
    """Mix seven neighbouring steps in each channel, then the channels of each step; add the result to the input.

    Source: Liu et al. 2022 (ConvNeXt), in one dimension as in Siuzdak 2023 (Vocos).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.shrink = nn.Linear(hidden, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        mixed = self.mix(x.transpose(1, 2)).transpose(1, 2)
        added: Tensor = self.scale * self.shrink(F.gelu(self.expand(self.norm(mixed))))
        return x + added


class CodecNetwork(nn.Module):
    """A codec at frame rate: spectra in, a few convolutions, a residual quantiser, partials and noise out.

    No convolution runs at the sample rate, so on a CPU the codec runs and trains ten times faster than the usual
    waveform codecs. For each step, the decoder gives the amplitude and the frequency of one partial in each band of
    62.5 Hz, and the spectrum of the noise. `synthesise` continues the phase of the partials from step to step, so codes
    do not contain phase: a steady tone has a constant code. The spectrum of a sound is preserved, its waveform is not.

    Source: sinusoids and noise as in Serra and Smith 1990, sinusoids added as lobes of a spectrum as in Rodet and
    Depalle 1992, from a network as in Engel et al. 2020 (DDSP); residual quantiser as in Zeghidour et al. 2021.
    """

    LOBE_BINS = 6
    """Bins of a partial's lobe on either side of its band; beyond, the lobe of a Hann window is below -60 dB."""
    CEILING = 0.99
    """Largest magnitude that `synthesise` returns; 1 is full scale."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        dim, frame = config.dim, 2 * config.hop
        inputs = config.long_window // 2 + config.short_window // 2 + 2
        outputs = 2 * config.num_partials + config.hop + 1
        self.embed = nn.Linear(inputs, dim)
        self.past_encoder = nn.Linear(inputs, config.code_dim)
        self.encoder = nn.ModuleList(ConvNeXtBlock(dim, config.hidden) for _ in range(config.encoder_blocks))
        self.encoder_norm = nn.LayerNorm(dim)
        self.to_latent = nn.Linear(dim, config.code_dim)
        self.codebooks = nn.Parameter(torch.zeros(config.num_codebooks, config.codebook_size, config.code_dim))
        self.from_latent = nn.Linear(config.code_dim, dim)
        self.decoder = nn.ModuleList(ConvNeXtBlock(dim, config.hidden) for _ in range(config.decoder_blocks))
        self.decoder_norm = nn.LayerNorm(dim)
        self.to_spectrum = nn.Linear(dim, outputs)
        self.past_decoder = nn.Linear(config.code_dim, outputs)
        # Bands of equal width from 0 Hz to half the rate, in bins of the synthesis frame; the lobes' bins around them.
        width = (frame / 2) / config.num_partials
        centres = (torch.arange(config.num_partials) + 0.5) * width  # (J,)
        bins = centres.round().long()[:, None] + torch.arange(-self.LOBE_BINS, self.LOBE_BINS + 1)  # (J, lobe)
        self.band_width = width
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("bins", bins, persistent=False)
        inside = ((bins >= 0) & (bins <= config.hop)).flatten().nonzero()[:, 0]  # indices, as a mask would stop a GPU
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("hann", torch.hann_window(frame), persistent=False)
        self.centres: Tensor
        self.bins: Tensor
        self.inside: Tensor
        self.hann: Tensor

    def steps_for(self, samples: int) -> int:
        """A step for every `hop` samples, the last one begun included."""
        return math.ceil(samples / self.config.hop)

    def analyse(self, waveform: Tensor) -> Tensor:
        """Waveform (B, N) to latent (B, T, code_dim), not yet quantised.

        Step t sees a long and a short window around samples t * hop to (t + 1) * hop, one for pitch and one for time;
        outside the waveform there is silence.
        """
        steps = self.steps_for(waveform.shape[1])
        spectra = [self._log_spectra(waveform, steps, w) for w in (self.config.long_window, self.config.short_window)]
        features = torch.cat(spectra, dim=-1)
        x = self.embed(features)  # (B, T, dim)
        for block in self.encoder:
            x = block(x)
        latent: Tensor = self.to_latent(self.encoder_norm(x)) + self.past_encoder(features)
        return latent

    def _log_spectra(self, waveform: Tensor, steps: int, window: int) -> Tensor:
        """(B, N) -> (B, T, window // 2 + 1): log power, about -3.8 for silence and 2 for a full-scale tone."""
        hop = self.config.hop
        margin = (window - hop) // 2
        padded = F.pad(waveform, (margin, margin + steps * hop - waveform.shape[1]))
        shape = torch.hann_window(window, device=waveform.device) * (4.0 / window)  # a full-scale tone has magnitude 1
        spectrum = torch.fft.rfft(padded.unfold(1, window, hop) * shape)
        return 0.25 * (spectrum.real.square() + spectrum.imag.square() + 1e-10).log() + 2.0

    def quantise(self, latent: Tensor) -> Tensor:
        """Latent (B, T, code_dim) to codes (B, K, T): each level takes the entry nearest to the residual."""
        residual, codes = latent, []
        for entries in self.codebooks:  # (S, code_dim)
            distance = entries.square().sum(-1) - 2 * residual @ entries.T  # (B, T, S), less the residual's own norm
            code = distance.argmin(dim=-1)  # (B, T)
            residual = residual - entries[code]
            codes.append(code)
        return torch.stack(codes, dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        """The sums of the vectors of codes (B, K, T): (B, T, code_dim)."""
        levels = torch.arange(codes.shape[1], device=codes.device)[:, None]  # (K, 1) against (B, K, T)
        return self.codebooks[levels, codes].sum(dim=1)

    def synthesise(self, latent: Tensor) -> Tensor:
        """Latent (B, T, code_dim) to waveform (B, T * hop): a spectrum per step, overlapped and added, then limited."""
        hop, steps = self.config.hop, latent.shape[1]
        x = self.from_latent(latent)
        for block in self.decoder:
            x = block(x)
        spectrum = self.to_spectrum(self.decoder_norm(x)) + self.past_decoder(latent)
        loudness, offset, floor = spectrum.split([self.config.num_partials] * 2 + [hop + 1], dim=-1)
        # The offset makes an untrained network quiet, the clamp prevents overflow. A partial may leave its band a bit.
        amplitude = (loudness - 6.0).clamp_max(1.0).exp()
        frequency = self.centres + 0.7 * self.band_width * torch.tanh(offset)  # bins of 1 / (2 hop) cycles per sample
        noise = (floor - 6.0).clamp_max(1.0).exp()  # (B, T, hop + 1)
        real, imag = self._partials(amplitude, frequency)
        hiss = self._hiss(steps, noise.device)
        both = (torch.complex(real, imag) + noise * hiss) * (2 * hop)
        frames = torch.fft.irfft(both, n=2 * hop)  # (B, T, 2 hop), its middle at the middle of step t
        halves = F.pad(frames, (0, 0, 1, 1)).unflatten(2, (4, hop // 2))  # (B, T + 2, 4, hop / 2)
        # The first half of step t overlaps the end of frame t - 1; its second half the beginning of frame t + 1.
        first = halves[:, 1:-1, 1] + halves[:, :-2, 3]
        second = halves[:, 1:-1, 2] + halves[:, 2:, 0]
        waveform = torch.stack([first, second], dim=2).flatten(1)  # (B, T * hop)
        # At the two ends there is only one frame; elsewhere the windows add up to 1.
        weight = torch.ones_like(waveform[0])
        weight[: hop // 2], weight[-hop // 2 :] = self.hann[hop // 2 : hop], self.hann[hop : hop + hop // 2]
        return self._limit(waveform / weight)

    def _limit(self, waveform: Tensor) -> Tensor:
        """Scale a waveform (B, T * hop) down where it would exceed `CEILING`; the rest stays unchanged.

        Peaks are higher than in the original, as its phases are lost. The gain of a step is limited by its peak and the
        peaks of its two neighbours. Between the middles of steps the gain is interpolated: it is continuous, and no
        sample exceeds the gain of its step.
        """
        peak = waveform.unflatten(1, (-1, self.config.hop)).abs().amax(dim=2)  # (B, T)
        excess = (peak - self.CEILING).clamp_min(0) / peak.clamp_min(self.CEILING)  # exactly 0 for a gain of 1
        excess = F.max_pool1d(excess.unsqueeze(1), kernel_size=3, stride=1, padding=1)  # (B, 1, T)
        return waveform * (1 - F.interpolate(excess, size=waveform.shape[1], mode="linear").squeeze(1))

    def _partials(self, amplitude: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrum of the partials, times a Hann window with its middle at phase 0: (B, T, J) to twice (B, T, hop + 1).

        Between two steps, the phase of a partial advances with the mean of its frequencies. Phase has no gradient: it
        would couple each step to all earlier ones, and the position of the lobe already trains the frequency.
        """
        bins = frequency.detach()
        advance = F.pad((bins[:, :-1] + bins[:, 1:]) / 4 % 1.0, (0, 0, 1, 0))  # cycles in one hop, whole ones left out
        start = torch.arange(frequency.shape[2], device=frequency.device) * 0.381966  # each band has its own
        # Whole numbers of 2**-30 cycles: exact, and GPUs have no deterministic kernel for a running sum of floats.
        cycles = (advance * 2**30).long().cumsum(dim=1) % 2**30 / 2**30
        phase = 2 * math.pi * ((cycles + start) % 1.0)  # (B, T, J)
        away = self.bins - frequency.unsqueeze(-1)  # (B, T, J, lobe): bins from the partial
        below = 1 - away.square()
        edge = below.abs() < 1e-4  # 0 / 0, of which the limit is a half
        lobe = torch.where(edge, 0.5, torch.sinc(away) / torch.where(edge, 1.0, below))  # transform of a Hann window
        sign = 1 - 2 * (self.bins % 2)  # shifts the lobe in time from the beginning of the frame to its middle
        lobe = 0.25 * amplitude.unsqueeze(-1) * lobe * sign
        totals = []
        for wave in (phase.cos(), phase.sin()):
            parts = (lobe * wave.unsqueeze(-1)).flatten(2)[..., self.inside]
            empty = parts.new_zeros(*parts.shape[:2], self.config.hop + 1)
            totals.append(empty.index_add(2, self.bins.flatten()[self.inside], parts))
        return totals[0], totals[1]

    def _hiss(self, steps: int, device: torch.device) -> Tensor:
        """(T, hop + 1) complex: spectra of windowed white noise of about unit size, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        white = torch.randn(steps, 2 * self.config.hop, generator=generator).to(device)
        hiss: Tensor = torch.fft.rfft(white * self.hann) / math.sqrt(2 * self.config.hop)
        return hiss


class TinyCodec(Codec):
    """16 kHz, 50 steps per second, 4 levels of 256: 1.6 kbit/s.

    It was trained on procedural sound only, half of it from the demo world. It preserves the spectrum, not the phase.

    Args:
        weights: A file made by `tools/tiny_networks`; the shipped one if None.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        config, tensors, self.weight_hash = read_weights(weights or shipped_weights("codec"))
        self._build("tiny", CodecConfig(**config), tensors)

    def _build(self, name: str, config: CodecConfig, tensors: dict[str, Tensor]) -> None:
        self.name = name
        self.sample_rate = config.sample_rate
        self.code_rate = config.sample_rate / config.hop
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self.code_dim = config.code_dim
        self.network = CodecNetwork(config)
        self.network.load_state_dict(tensors)
        self.freeze()

    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32: the decoder reads the sum over levels."""
        return self.network.codebooks.detach().clone()

    def _encode(self, waveform: Tensor) -> Tensor:
        return self.network.quantise(self.network.analyse(waveform[:, 0]))

    def _decode(self, codes: Tensor) -> Tensor:
        return self.network.synthesise(self.network.lookup(codes)).unsqueeze(1)


class TinyCodec8(TinyCodec):
    """`TinyCodec` with four more levels of 256, which quantise the residual of its four: 3.2 kbit/s.

    The network and the first four levels are those of tiny, bit for bit: the codes are tiny's with four more rows, and
    the first four rows decode to the same sound. The decoder was not trained with the finer levels, but it reads only
    the sum over levels. They are for models in two stages, with a coarse model for the first levels and a fine one for
    the rest, and correct errors that a fine model can predict: see `tools/tiny_networks/train_codec.py`.

    Args:
        weights: A codec's file made by `tools/tiny_networks`; the shipped one if None.
        levels: The file of its further levels; the shipped one if None.

    Attributes:
        weight_hash: SHA-256 over the hashes of both files.

    Raises:
        UserError: If the levels were made for another codec.
    """

    def __init__(self, weights: Path | None = None, levels: Path | None = None) -> None:
        Codec.__init__(self)
        config, tensors, codec_hash = read_weights(weights or shipped_weights("codec"))
        path = levels or shipped_weights("codec8")
        made, finer, levels_hash = read_weights(path, "levels")
        if made["codec_hash"] != codec_hash:
            raise UserError(
                f"{path} holds levels for a codec of weights {made['codec_hash'][:12]}, but {codec_hash[:12]} is "
                "installed: make them again, in a checkout: python -m tools.tiny_networks --part codec8 --out DIR"
            )
        self.weight_hash = hashlib.sha256(f"{codec_hash}{levels_hash}".encode()).hexdigest()
        tensors["codebooks"] = torch.cat([tensors["codebooks"], finer["codebooks"]])
        self._build("tiny8", CodecConfig(**config | {"num_codebooks": len(tensors["codebooks"])}), tensors)
