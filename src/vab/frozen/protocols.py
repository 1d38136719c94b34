"""The protocols of frozen networks: audio codecs, vision encoders and judges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vab.frozen.precision import one_by_one
from vab.precision import full_precision
from vab.resizing import Resizer
from vab.spec import UserError


class Frozen(nn.Module):
    """A network with fixed weights: it stays in evaluation mode and without gradients, whatever a trainer does."""

    name: str
    """The name that its loader was given."""
    weight_hash: str
    """SHA-256 of the file of its weights, in hex: networks with the same hash give the same outputs."""
    packages: tuple[str, ...] = ()
    """Distributions with its layers, besides torch: another version may compute something else."""

    def freeze(self) -> Self:
        """Stop gradients and switch to evaluation mode; the loaders call this last."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a trainer switches all its modules, and normalisation would use batch statistics."""
        return super().train(False)


def _require_rate(owner: str, expected: int, got: int | None) -> None:
    if got not in (None, expected):
        raise UserError(
            f"{owner} takes {expected} Hz, got {got} Hz: resample first, with vab.audio.resample(x, {got}, {expected})"
        )


class Codec(Frozen, ABC):
    """Encodes waveforms to K levels of codes, each level refining the sum of the previous ones (residual quantisation).

    Equal waveforms give equal codes, alone or in any batch, and on a CPU with any number of threads. Rounding differs
    between devices, kinds of processor and versions of torch, and may change a few codes.
    """

    sample_rate: int
    """Hz."""
    code_rate: float
    """Steps per second."""
    num_codebooks: int
    """K."""
    codebook_size: int
    """S."""
    code_dim: int
    """Dimension of the codebook vectors."""

    @property
    def samples_per_step(self) -> int:
        """Samples of one step, exactly; ``sample_rate / code_rate`` may be inexact in its last digit."""
        return round(self.sample_rate / self.code_rate)

    def steps_for(self, samples: int) -> int:
        """T for a waveform of `samples` samples: the last step is included, even if it is not full."""
        return -(-samples // self.samples_per_step)

    @abstractmethod
    def codebooks(self) -> Tensor:
        """(K, S, code_dim) float32; the decoder's input at a step is the sum of the vectors of its codes."""

    @abstractmethod
    def _encode(self, waveform: Tensor) -> Tensor:
        """(1, 1, N) float32 -> (1, K, T) int64; runs in full precision."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """(B, k, T) int64, the first k levels -> (B, 1, at least the samples of T steps) float32."""

    @torch.no_grad()
    def encode(self, waveform: Tensor, sample_rate: int | None = None) -> Tensor:
        """Encode waveforms to codes.

        Args:
            waveform: (B, 1, N) float32 in [-1, 1] at the codec's own rate, N >= 1. Cut or pad before batching.
            sample_rate: The waveform's rate, Hz, if known; a rate other than the codec's is refused.

        Returns:
            (B, K, T) int64 in [0, S), with T = `steps_for(N)`.

        Raises:
            UserError: If the rate is not the codec's: nothing is resampled silently.
            ValueError: If the shape is not (B, 1, N), or a sample is not finite.
        """
        _require_rate(f"codec {self.name}", self.sample_rate, sample_rate)
        if waveform.ndim != 3 or waveform.shape[1] != 1 or waveform.shape[2] == 0:
            raise ValueError(f"codec {self.name} takes a waveform (B, 1, N), N >= 1, got {tuple(waveform.shape)}")
        if not bool(torch.isfinite(waveform).all()):
            raise ValueError(f"codec {self.name}: the waveform has samples that are not finite")
        if not len(waveform):
            return waveform.new_empty((0, self.num_codebooks, self.steps_for(waveform.shape[2])), dtype=torch.int64)
        with full_precision(waveform.device):
            # Row by row on a GPU, too: in a batch, kernels add in another order, and that changes some codes.
            return one_by_one(lambda rows: torch.cat([self._encode(row) for row in rows.split(1)]), waveform.float())

    @torch.no_grad()
    def decode(self, codes: Tensor, samples: int | None = None) -> Tensor:
        """Decode codes to waveforms. The first levels alone give a coarser sound.

        Args:
            codes: (B, k, T) int64 in [0, S): the first k levels, 1 <= k <= K.
            samples: Length of the result, with `steps_for(samples)` equal to T; the length of T steps if None.

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


class VisionEncoder(Frozen, ABC):
    """Encodes frames to feature vectors. Resizing is separate from encoding, so that decoding processes can do it.

    The same batch of frames gives the same features bit for bit, on a CPU with any number of threads.
    """

    feature_dim: int
    """C."""
    precision: str = "float32"
    """Floating-point type of the computation."""
    encodes_frames_alone: bool = False
    """Whether the features of a frame are independent of the batch, bit for bit."""
    preprocessing: str
    """What `preprocess` does to a frame, in words, for the manifest."""
    resizer: Resizer
    """The first part of `preprocess`, for decoding processes: (V, H, W, 3) uint8 to pixels (V, 3, h, w) uint8."""

    @abstractmethod
    def normalise(self, pixels: Tensor) -> Tensor:
        """The second part of `preprocess`: (M, 3, h, w) uint8 -> float32, on the device of the pixels."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """(M, 3, h, w) uint8, or normalised float32 -> (M, C) float32; on a CPU in one thread, or as if it were."""

    def preprocess(self, frames: np.ndarray) -> Tensor:
        """Resize and normalise frames for the network.

        Args:
            frames: (V, H, W, 3) uint8 RGB, any height and width.

        Returns:
            (V, 3, h, w) float32.

        Raises:
            ValueError: If the frames have another shape or dtype.
        """
        return self.normalise(torch.from_numpy(self.resizer(frames)))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features of prepared frames.

        Args:
            pixels: (M, 3, h, w), uint8 from `resizer` or float32 from `preprocess`.

        Returns:
            (M, C) float32.

        Raises:
            ValueError: If the pixels are not (M, 3, h, w).
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"vision encoder {self.name} takes pixels (M, 3, h, w), got {tuple(pixels.shape)}")
        with full_precision(pixels.device):
            return self._encode(pixels)


class JudgeOutput(NamedTuple):
    """Embeddings and class scores of a batch of sounds."""

    embedding: Tensor
    """(B, F, E) float32: F windows of each sound; F is 1 if the judge pools the whole sound."""
    logits: Tensor
    """(B, L) float32, scores of `Judge.classes` before softmax or sigmoid; (B, 0) if there are no classes."""

    @property
    def probabilities(self) -> Tensor:
        """(B, L) float32: softmax of the logits."""
        return self.logits.softmax(dim=-1)


class Judge(Frozen, ABC):
    """Embeds and classifies waveforms of any length, each judge with its usual treatment of short and long ones."""

    sample_rate: int
    """Hz."""
    classes: tuple[str, ...]
    """Names of the L classes, in the order of the logits; empty for a judge that only embeds."""
    embedding_dim: int
    """E, the width of an embedding."""
    min_samples: int
    """Length of the shortest waveform that `forward` accepts; `prepare` pads to it."""
    conventions: dict[str, str | int | float | bool]
    """Choices that affect the metrics, for metric cards: windows, padding, layer of the embedding, class link."""

    @abstractmethod
    def _judge(self, waveform: Tensor) -> JudgeOutput:
        """Judge (B, 1, N) float32."""

    def _fit(self, waveform: Tensor) -> Tensor:
        """Cut (N,) of at least `min_samples` to (N',); by default unchanged."""
        return waveform

    def prepare(self, waveform: Tensor) -> Tensor:
        """Pad or cut a sound to a length that `forward` accepts, as the judge's `conventions` state.

        Args:
            waveform: (N,) float32 in [-1, 1] at the judge's own rate, N >= 1.

        Returns:
            (N',) float32: short sounds followed by zeros, long ones cut.

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
        """Judge each waveform of a batch, independently of the others.

        Args:
            waveform: (B, 1, N) float32 in [-1, 1] at the judge's own rate, of a length that `prepare` gives.
            sample_rate: The waveform's rate, Hz, if known; a rate other than the judge's is refused.

        Raises:
            UserError: If the rate is not the judge's, or the waveform is too short to judge.
            ValueError: If the shape is not (B, 1, N).
        """
        _require_rate(f"judge {self.name}", self.sample_rate, sample_rate)
        if waveform.ndim != 3 or waveform.shape[1] != 1:
            raise ValueError(f"judge {self.name} takes a waveform (B, 1, N), got {tuple(waveform.shape)}")
        if waveform.shape[2] < self.min_samples:
            raise UserError(
                f"judge {self.name} needs at least {self.min_samples / self.sample_rate:g} s of sound, "
                f"got {waveform.shape[2] / self.sample_rate:g} s: Judge.prepare pads"
            )
        with full_precision(waveform.device):
            return self._judge(waveform.float())
