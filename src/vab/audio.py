"""Functions of waveforms: mixing to mono, resampling, loudness, log-mel spectra and two distances between sounds.

All metrics use these functions, so each number has one definition. Functions of tensors work on any device and any
leading axes; samples are the last axis. They import torch when they are called: decoding processes use only the
functions of arrays, and torch would take 325 MiB of each process.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import soxr

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOG_FLOOR = 1e-5
"""Lower bound of mel magnitudes: 100 dB below a full-scale tone, about the noise floor of 16-bit sound."""

_DISTANCE_RESOLUTIONS = ((512, 128, 40), (1024, 256, 64), (2048, 512, 80))
"""(n_fft, hop, num_bands) of each spectrum that `log_mel_distance` compares."""


def to_mono(x: np.ndarray) -> np.ndarray:
    """Mix all channels to one by their mean, which cannot clip.

    Args:
        x: (channels, N) float.

    Returns:
        (N,) of the same dtype.

    Raises:
        ValueError: If `x` is not two-dimensional or has no channel.
    """
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"to_mono takes (channels, N) with at least one channel, got shape {x.shape}")
    mixed: np.ndarray = x.mean(axis=0, dtype=x.dtype)
    return mixed


def resample(x: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample a waveform with soxr's "HQ" filter.

    Args:
        x: (N,) float, mono.
        from_rate: Sampling rate of `x`, Hz.
        to_rate: Sampling rate of the result, Hz.

    Returns:
        (round(N * to_rate / from_rate),) float32, aligned with the input: the filter's delay is removed.

    Raises:
        ValueError: If `x` is not one-dimensional or a rate is not above 0.
    """
    if x.ndim != 1:
        raise ValueError(f"resample takes mono samples (N,), got shape {x.shape}: mix with to_mono first")
    if from_rate <= 0 or to_rate <= 0:
        raise ValueError(f"sampling rates must be above 0 Hz, got {from_rate} and {to_rate}")
    samples = np.ascontiguousarray(x, dtype=np.float32)
    if from_rate == to_rate:
        return samples.copy()
    return np.asarray(soxr.resample(samples, from_rate, to_rate, quality="HQ"), dtype=np.float32)


def rms_db(waveform: Tensor) -> Tensor:
    """Root-mean-square level, in dB of full scale.

    Args:
        waveform: (..., N) float in [-1, 1].

    Returns:
        (...,) dBFS: 0 for a constant 1, -3.01 for a full-scale sine, -inf for digital silence.

    Raises:
        ValueError: If there are no samples.
    """
    import torch

    if waveform.shape[-1] == 0:
        raise ValueError("rms_db: the waveform has no samples")
    return 10 * torch.log10(waveform.square().mean(dim=-1))


def level_db(waveform: np.ndarray) -> float:
    """`rms_db` of one waveform, without torch: (N,) float, N >= 1, to dBFS."""
    if not len(waveform):
        raise ValueError("level_db: the waveform has no samples")
    power = float(np.square(waveform, dtype=np.float64).mean())
    return 10 * math.log10(power) if power > 0 else -math.inf


@lru_cache(maxsize=64)
def _mel_filters(sample_rate: int, n_fft: int, num_bands: int, fmin: float, fmax: float) -> Tensor:
    """(num_bands, n_fft // 2 + 1) float32: triangles with corners evenly spaced on the HTK mel scale, peak 1."""
    import torch

    def to_mel(hz: float) -> float:
        return 2595.0 * math.log10(1.0 + hz / 700.0)

    corners = 700.0 * (10.0 ** (np.linspace(to_mel(fmin), to_mel(fmax), num_bands + 2) / 2595.0) - 1.0)
    bins = np.arange(n_fft // 2 + 1) * sample_rate / n_fft  # Hz
    rising = (bins[None] - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins[None]) / (corners[2:] - corners[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32))


@lru_cache(maxsize=64)
def _window_and_filters(
    sample_rate: int, n_fft: int, num_bands: int, fmin: float, fmax: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The Hann window, scaled so that a full-scale tone on a bin has magnitude 1, and the mel filters, on a device.

    Made outside inference mode: a cached tensor from inference mode could not be used in training.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        window = torch.hann_window(n_fft, device=device)
        filters = _mel_filters(sample_rate, n_fft, num_bands, fmin, fmax).to(device)
        return window * (2.0 / window.sum()), filters


def log_mel(
    waveform: Tensor,
    sample_rate: int,
    n_fft: int = 1024,
    hop: int = 160,
    num_bands: int = 64,
    fmin: float = 50.0,
    fmax: float | None = None,
) -> Tensor:
    """Log-mel spectrogram: the level of each band over time, in bands about as wide as an ear resolves.

    Frame k is centred on sample k * hop. The waveform is padded with silence.

    Args:
        waveform: (..., N) float32 in [-1, 1], N >= 1.
        sample_rate: Hz.
        n_fft: Length of the Hann window, samples.
        hop: Samples between frames.
        num_bands: Number of mel bands, evenly spaced on the HTK scale.
        fmin: Lowest corner, Hz.
        fmax: Highest corner, Hz; `sample_rate` / 2 if None.

    Returns:
        (..., num_bands, 1 + N // hop) float32: natural log of the magnitude in each band, at least log(1e-5). A
        full-scale tone has magnitude 1.

    Raises:
        ValueError: If there are no samples, or the corners are not 0 <= fmin < fmax <= sample_rate / 2.
    """
    import torch

    from vab.precision import full_precision

    fmax = sample_rate / 2 if fmax is None else fmax
    if not 0 <= fmin < fmax <= sample_rate / 2:
        raise ValueError(f"log_mel needs 0 <= fmin < fmax <= {sample_rate / 2} Hz, got {fmin} and {fmax}")
    if waveform.shape[-1] == 0:
        raise ValueError("log_mel: the waveform has no samples")
    window, filters = _window_and_filters(
        sample_rate, n_fft, num_bands, float(fmin), float(fmax), torch.device(waveform.device)
    )
    flat = waveform.reshape(-1, waveform.shape[-1])
    spectrum = torch.stft(
        flat, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True
    )  # (rows, n_fft // 2 + 1, frames)
    # The small term keeps the gradient of the square root finite where the spectrum is zero.
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-14).sqrt()
    with full_precision(waveform.device):
        log = (filters @ magnitude).clamp_min(LOG_FLOOR).log()  # (rows, num_bands, frames)
    return log.reshape(*waveform.shape[:-1], *log.shape[-2:])


def log_mel_distance(a: Tensor, b: Tensor, sample_rate: int) -> Tensor:
    """Perceptual distance of two sounds: the mean absolute difference of log-mel spectra at three resolutions.

    Args:
        a: (..., N) float32.
        b: (..., N) float32, aligned with `a`.
        sample_rate: Hz.

    Returns:
        (...,) natural-log units: 0 for equal sounds, 0.69 if one has twice the amplitude of the other.

    Raises:
        ValueError: If the shapes differ.
    """
    import torch

    if a.shape != b.shape:
        raise ValueError(f"log_mel_distance compares sounds of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    distances = [
        (log_mel(a, sample_rate, n_fft, hop, bands) - log_mel(b, sample_rate, n_fft, hop, bands)).abs().mean((-2, -1))
        for n_fft, hop, bands in _DISTANCE_RESOLUTIONS
    ]
    return torch.stack(distances).mean(dim=0)


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio: how closely a waveform follows another, regardless of its level.

    Args:
        estimate: (..., N) float.
        reference: (..., N) float.

    Returns:
        (...,) dB: higher is closer; inf for a scaled copy, -inf for an estimate that is silent or orthogonal.

    Raises:
        ValueError: If the shapes differ, or a reference is silent, for which the ratio is undefined.

    Source: Le Roux et al. 2019, "SDR - half-baked or well done?", eq. (2), both means removed first.
    """
    import torch

    if estimate.shape != reference.shape:
        raise ValueError(f"si_sdr compares one shape, got {tuple(estimate.shape)} and {tuple(reference.shape)}")
    estimate = estimate.double() - estimate.double().mean(dim=-1, keepdim=True)
    reference = reference.double() - reference.double().mean(dim=-1, keepdim=True)
    energy = reference.square().sum(dim=-1)
    if bool((energy == 0).any()):
        raise ValueError("si_sdr: a reference is silent, so no distortion can be measured against it")
    target = ((estimate * reference).sum(dim=-1) / energy).unsqueeze(-1) * reference
    error = (estimate - target).square().sum(dim=-1)
    power = target.square().sum(dim=-1)
    ratio = torch.where(power == 0, torch.zeros_like(power), power / error)  # 0 / 0: a silent estimate
    return 10 * torch.log10(ratio)
