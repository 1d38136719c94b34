"""Audio codecs: waveform to codes and back, one protocol for all of them.

Extraction encodes with it, generation and the metrics decode with it. Training never sees it: shards carry the codes
and the codebooks.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vab.frozen import Frozen, full_precision, one_by_one
from vab.spec import UserError

PIECE_SECONDS = 30
"""s. Longer sounds go through a codec's convolutions piece by piece, which bounds the memory and changes nothing."""


class Codec(Frozen, ABC):
    """Turns sound into K levels of codes, each level refining the sum of those above it (residual quantisation).

    Equal waveforms of equal length give equal codes, alone or in any batch, and on a CPU with any number of threads.
    Other devices, other kinds of processor and other versions of torch may round otherwise, and a few codes with it.
    """

    sample_rate: int
    """Of the waveforms it takes and gives, Hz."""
    code_rate: float
    """Steps per second."""
    num_codebooks: int
    """K."""
    codebook_size: int
    """S."""
    code_dim: int
    """Width of the codebook vectors."""

    @property
    def samples_per_step(self) -> int:
        """Samples of one step, exactly: ``sample_rate / code_rate`` may be off in its last digit."""
        return round(self.sample_rate / self.code_rate)

    @abstractmethod
    def steps_for(self, samples: int) -> int:
        """T for a waveform of `samples` samples."""

    @abstractmethod
    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32: the decoder reads nothing of a step but the sum of its codes' vectors."""

    @abstractmethod
    def _encode(self, waveform: Tensor) -> Tensor:
        """(B, 1, N) float32 -> (B, K, T) int64, in full precision and free of any effect of the batch."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """(B, k, T) int64, the first k levels -> (B, 1, at least the samples of T steps) float32."""

    @torch.no_grad()
    def encode(self, waveform: Tensor, sample_rate: int | None = None) -> Tensor:
        """Sound to codes.

        Args:
            waveform: (B, 1, N) float32 in [-1, 1] at the codec's own rate, N >= 1. Cut or pad before batching.
            sample_rate: The waveform's rate, Hz, where the caller knows it: another than the codec's is refused.

        Returns:
            (B, K, T) int64 in [0, S), with T = `steps_for(N)`.

        Raises:
            UserError: If the rate is not the codec's: nothing is resampled silently.
            ValueError: If the shape is not (B, 1, N), or a sample is not finite.
        """
        if sample_rate is not None and sample_rate != self.sample_rate:
            raise UserError(
                f"codec {self.name} takes {self.sample_rate} Hz, got {sample_rate} Hz: "
                f"resample first, with vab.audio.resample(x, {sample_rate}, {self.sample_rate})"
            )
        if waveform.ndim != 3 or waveform.shape[1] != 1 or waveform.shape[2] == 0:
            raise ValueError(f"codec {self.name} takes a waveform (B, 1, N), N >= 1, got {tuple(waveform.shape)}")
        if not bool(torch.isfinite(waveform).all()):
            raise ValueError(f"codec {self.name}: the waveform has samples that are not finite")
        with full_precision(waveform.device):
            return one_by_one(self._encode, waveform.float())

    @torch.no_grad()
    def decode(self, codes: Tensor, samples: int | None = None) -> Tensor:
        """Codes to sound. The first levels alone make a coarser sound, as if the finer ones added nothing.

        Args:
            codes: (B, k, T) int64 in [0, S): the first k levels, 1 <= k <= K.
            samples: Length wanted, one for which `steps_for(samples)` is T; the whole of T steps if None.

        Returns:
            (B, 1, samples) float32, nominally in [-1, 1]: a decoder may overshoot, and writers clip.

        Raises:
            ValueError: If the shape is not (B, k, T), a code is outside [0, S), or T steps do not make `samples`.
        """
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= self.num_codebooks or codes.shape[2] == 0:
            raise ValueError(
                f"codec {self.name} takes codes (B, k, T) of its first k levels, 1 <= k <= {self.num_codebooks}, "
                f"got {tuple(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codec {self.name} takes codes in [0, {self.codebook_size}), "
                f"got values from {int(codes.min())} to {int(codes.max())}"
            )
        if samples is not None and (samples < 1 or self.steps_for(samples) != codes.shape[2]):
            raise ValueError(
                f"codec {self.name}: {samples} samples are {self.steps_for(max(samples, 0))} steps, "
                f"but the codes have {codes.shape[2]}"
            )
        with full_precision(codes.device):
            waveform = self._decode(codes)
        return waveform[..., :samples]


BANDWIDTHS = {"1.5": 2, "3": 4, "6": 8, "12": 16, "24": 32}
"""Of encodec_24khz, kbit/s, and the levels that each has."""
# By name, as these files build on the class above, and some need packages that others can do without.
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("vab.frozen.tiny.TinyCodec", {}),
    "tiny8": ("vab.frozen.tiny.TinyCodec8", {}),
    **{
        name: ("vab.frozen.encodec.EnCodec", {"name": name})
        for name in ("audiogen_16khz", "encodec_32khz", *(f"encodec_24khz:{kbits}" for kbits in BANDWIDTHS))
    },
    **{name: ("vab.frozen.dac.Dac", {"name": name}) for name in ("dac_16khz", "dac_24khz", "dac_44khz")},
}

NUMBERS: dict[str, tuple[int, float, int, int]] = {
    "audiogen_16khz": (16000, 50.0, 4, 2048),
    "encodec_32khz": (32000, 50.0, 4, 2048),
    **{f"encodec_24khz:{kbits}": (24000, 75.0, levels, 1024) for kbits, levels in BANDWIDTHS.items()},
    "dac_16khz": (16000, 50.0, 12, 1024),
    "dac_24khz": (24000, 75.0, 32, 1024),
    "dac_44khz": (44100, 44100 / 512, 9, 1024),
}
"""Sample rate (Hz), steps per second, K and S of the published codecs, for those who have codes and not the weights."""

CODECS: tuple[str, ...] = tuple(_CLASSES)
"""Names that `load_codec` knows."""


def check_sample_rate(name: str, sample_rate: int, path: Path) -> None:
    """Refuse weights of another sample rate than the codec's.

    Args:
        name: Of the codec, one of `NUMBERS`.
        sample_rate: Of the network that the file holds, Hz.
        path: Of the file, for the message.

    Raises:
        UserError: If they differ.
    """
    expected = NUMBERS[name][0]
    if sample_rate == expected:
        return
    others = [
        other for other in NUMBERS if _CLASSES[other][0] == _CLASSES[name][0] and NUMBERS[other][0] == sample_rate
    ]
    advice = f"load it as codec {others[0]}" if others else "take another file"
    raise UserError(f"{path} is for {sample_rate} Hz, codec {name} for {expected} Hz: {advice}")


def load_codec(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> Codec:
    """Get a codec by name.

    Args:
        name: "tiny" ships with the package and needs no network; so does "tiny8", the same with four finer levels more.
            "audiogen_16khz" is the paper's EnCodec, "encodec_24khz:6" the public one (after the colon its bandwidth,
            kbit/s), "encodec_32khz" MusicGen's, "dac_16khz" the paper's DAC, "dac_24khz" and "dac_44khz" the others.
        device: Where it shall run.
        weights: Its published file or folder. If None, it is looked for in the folder $VAB_WEIGHTS, then where
            torch.hub and the model hub keep theirs; and fetched if it is nowhere, unless HF_HUB_OFFLINE is set.

    Raises:
        UserError: If the name is unknown, or a package or the weights are absent.
    """
    if name not in CODECS:
        raise UserError(f"unknown codec {name!r}: there is {', '.join(CODECS)}")
    path, arguments = _CLASSES[name]
    if weights is not None:
        if name.startswith("tiny"):
            raise UserError(f"codec {name} ships with its weights: leave out {weights}")
        arguments = {**arguments, "weights": Path(weights).expanduser()}
    module, _, kind = path.rpartition(".")
    codec: Codec = getattr(importlib.import_module(module), kind)(**arguments)
    return codec.freeze().to(device)
