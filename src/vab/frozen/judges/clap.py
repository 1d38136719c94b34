"""CLAP, its audio encoder: 512 numbers for 10 s of sound, in a space shared with text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vab.extras import install_hint
from vab.files import sha256_of
from vab.frozen.protocols import Judge, JudgeOutput
from vab.frozen.weight_files.catalogue import published_weights
from vab.spec import UserError

FILES = ("config.json", "model.safetensors")


class Clap(Judge):
    """The audio encoder of a CLAP in transformers' layout. It takes the first 10 s, not a random excerpt.

    Args:
        weights: Folder with config.json and model.safetensors; if None, it is searched as `Published.find` says.

    Raises:
        UserError: If transformers or the folder is absent, or the folder does not hold a CLAP.

    Source: Wu et al. 2023, "Large-scale contrastive language-audio pretraining"; spectra as transformers'
    ClapFeatureExtractor computes them.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        try:  # before the weights are searched, and perhaps fetched
            from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor, logging
        except ImportError as error:
            raise UserError(f"judge clap needs a package ({error}): {install_hint('dac')}") from error
        folder = published_weights("judge", "clap").find(weights)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(f"judge clap takes a folder with {' and '.join(FILES)}: {folder} has no {missing[0]}")
        model: Any = ClapAudioModelWithProjection
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # else it lists the weights of the text encoder as unexpected
        try:
            network, loading = model.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        finally:
            logging.set_verbosity(verbosity)
        if loading["missing_keys"]:
            some = ", ".join(sorted(loading["missing_keys"])[:3])
            raise UserError(f"{folder / FILES[1]} does not hold the audio side of a CLAP: there is no {some}")
        stored = (folder / "preprocessor_config.json").is_file()
        extractor = ClapFeatureExtractor.from_pretrained(folder) if stored else ClapFeatureExtractor()
        self.network = network
        self.fused = bool(network.config.enable_fusion)
        self.name = "clap"
        self.weight_hash = sha256_of(folder / "model.safetensors")
        self.sample_rate = int(extractor.sampling_rate)
        self.embedding_dim = int(network.config.projection_dim)
        self.classes = ()
        self.min_samples = int(extractor.nb_max_samples)
        self.n_fft, self.hop = int(extractor.fft_window_size), int(extractor.hop_length)
        seconds = f"{self.min_samples / self.sample_rate:g} s"
        self.conventions = {
            "length": f"first {seconds}; what follows is dropped",
            "short_sounds": f"repeated as often as fits into {seconds}, then zeros",
            "embedding": "projection into the space of sound and text, unit length",
            "fusion": self.fused,
        }
        filters = extractor.mel_filters if self.fused else extractor.mel_filters_slaney  # (bins, bands)
        self.register_buffer("mel", torch.from_numpy(filters).double(), persistent=False)
        self.register_buffer("hann", torch.hann_window(self.n_fft, dtype=torch.float64), persistent=False)
        self.mel: Tensor
        self.hann: Tensor
        self.freeze()

    def prepare(self, waveform: Tensor) -> Tensor:
        """The first 10 s; a shorter sound is repeated as often as it fits, then followed by zeros."""
        if waveform.ndim == 1 and 0 < len(waveform) < self.min_samples:
            waveform = waveform.repeat(self.min_samples // len(waveform))
        return super().prepare(waveform)

    def _fit(self, waveform: Tensor) -> Tensor:
        return waveform[: self.min_samples]

    def log_mel(self, waveform: Tensor) -> Tensor:
        """(B, N) -> (B, spectra, bands) float32: power in each band, dB, floored at -100."""
        spectra = torch.stft(
            waveform.double(), self.n_fft, self.hop, window=self.hann, pad_mode="reflect", return_complex=True
        )  # (B, bins, spectra)
        power = spectra.real.square() + spectra.imag.square()
        return (10 * (power.transpose(1, 2) @ self.mel).clamp(min=1e-10).log10()).float()

    def _judge(self, waveform: Tensor) -> JudgeOutput:
        mel = self.log_mel(waveform[:, 0]).unsqueeze(1)  # (B, 1, spectra, bands)
        # The fused network takes four views of a longer sound, and the same view four times of another.
        views = mel.expand(-1, 4, -1, -1) if self.fused else mel
        longer = torch.zeros(len(waveform), 1, dtype=torch.bool, device=waveform.device)
        embedding = F.normalize(self.network(input_features=views, is_longer=longer).audio_embeds, dim=-1)
        return JudgeOutput(embedding.unsqueeze(1), waveform.new_zeros(len(waveform), 0))
