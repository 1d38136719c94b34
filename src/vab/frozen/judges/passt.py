"""PaSST: 768 numbers and AudioSet's 527 classes for 10 s of sound, from a transformer on patches of spectra."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vab.extras import install_hint
from vab.files import sha256_of
from vab.frozen.protocols import Judge, JudgeOutput
from vab.frozen.weight_files.catalogue import published_weights
from vab.frozen.weight_files.reading import audioset_classes, fill
from vab.spec import UserError

SAMPLE_RATE = 32000
SECONDS = 10


def package_modules() -> tuple[Any, Any]:
    """Modules of hear21passt: the one of networks, and the one of spectra.

    Raises:
        UserError: If the package is not installed.
    """
    try:
        from hear21passt.models import passt, preprocess
    except ImportError as error:
        raise UserError(f"judge passt needs a package ({error}): {install_hint('passt')}") from error
    return passt, preprocess


def package_network() -> tuple[nn.Module, nn.Module]:
    """The spectra and the network of hear21passt's ``get_basic_model``, with random weights.

    Raises:
        UserError: If the package is not installed.
    """
    passt, preprocess = package_modules()
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints its network
        mel = preprocess.AugmentMelSTFT(
            n_mels=128, sr=SAMPLE_RATE, win_length=800, hopsize=320, n_fft=1024, freqm=48, timem=192, htk=False,
            fmin=0.0, fmax=None, norm=1, fmin_aug_range=10, fmax_aug_range=2000,
        )  # fmt: skip
        network = passt.get_model(arch="passt_s_swa_p16_128_ap476", pretrained=False)
    passt.first_RUN = False  # else its first call prints shapes
    return mel.eval(), network.eval()


class Passt(Judge):
    """Koutini et al.'s network with averaged weights (swa), patches of 16 with stride 10.

    Args:
        weights: The published file; if None, it is searched as `Published.find` says.

    Raises:
        UserError: If the package or the file is absent, or the file does not hold these weights.

    Source: Koutini et al. 2022, "Efficient training of audio transformers with patchout".
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        package_modules()  # before the weights are searched, and perhaps fetched
        path = published_weights("judge", "passt").find(weights)
        mel, network = package_network()
        fill(network, path)
        self.name = "passt"
        self.weight_hash = sha256_of(path)
        self.sample_rate = SAMPLE_RATE
        self.embedding_dim = 768
        self.classes = audioset_classes(path)
        self.min_samples = SECONDS * SAMPLE_RATE
        self.conventions = {
            "length": f"first {SECONDS} s; what follows is dropped",
            "short_sounds": f"zero-padded to {SECONDS} s",
            "embedding": "768 numbers, mean of the class and distillation tokens",
            "class_link": "sigmoid in training; the logits are before it",
        }
        self.mel, self.network = mel, network
        self.freeze()

    def _fit(self, waveform: Tensor) -> Tensor:
        return waveform[: self.min_samples]

    def _judge(self, waveform: Tensor) -> JudgeOutput:
        # The package draws random filter corners that it does not use in evaluation. It warns of two spectra more than
        # its table of positions has, as it does in its authors' own wrapper.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            spectra = self.mel(waveform[:, 0])  # (B, 128, steps)
            logits, embedding = self.network(spectra.unsqueeze(1))
        return JudgeOutput(embedding.unsqueeze(1), logits)
