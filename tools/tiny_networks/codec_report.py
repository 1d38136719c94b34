"""How good the tiny codec is: round trips of demo and real sound, compared with two trivial baselines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from tools.tiny_networks.train_judge import class_targets
from tools.tiny_networks.training import UNSEEN_SEED, world_sounds
from vab.audio import log_mel_distance, resample, si_sdr, to_mono
from vab.data.media.segments import read_audio
from vab.frozen.codec.tiny import TinyCodec
from vab.frozen.judges.tiny import TinyJudge
from vab.metrics.agreement import class_agreement

SECONDS = 4.0
"""Real recordings are cut into pieces of this length; a shorter rest is left out."""
QUIETEST_DB = -60.0
"""Pieces below this level, dBFS RMS, are left out: there is nothing to compare."""


def codec_report(weights: Path | None, segments: int, folders: dict[str, Path]) -> str:
    """A Markdown table of log-mel distance (lower is better), SI-SDR and the judge's agreement (higher is better).

    Args:
        weights: Folder of the weights of codec and judge; the shipped ones if None.
        segments: How many unseen demo segments.
        folders: Name to folder of real recordings, searched for sound and video files.

    Returns:
        The table, with what was measured on what.
    """
    codec = TinyCodec(weights and weights / "tiny_codec.safetensors")
    judge = TinyJudge(weights and weights / "tiny_judge.safetensors")
    scenes, sounds = world_sounds(UNSEEN_SEED, segments)
    targets = class_targets(scenes)
    sets = {"demo, unseen": torch.from_numpy(sounds / np.float32(32767))}
    sets |= {name: real_pieces(folder, codec.sample_rate) for name, folder in folders.items()}
    lines = [
        f"codec {codec.name} {codec.weight_hash[:12]}, judge {judge.name} {judge.weight_hash[:12]}; "
        f"pieces of {SECONDS:g} s, 16 kHz mono.",
        "",
        "| sound | pieces | heard | log-mel distance | SI-SDR, dB (median) | judge's agreement | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pieces in sets.items():
        original = None
        for heard, versions in _versions(codec, pieces).items():
            distance, ratio = "0", "inf"
            if versions is not pieces:
                distance = f"{float(log_mel_distance(versions, pieces, codec.sample_rate).mean()):.3f}"
                ratio = f"{float(si_sdr(versions, pieces).median()):.1f}"
            score, kept = "-", "-"
            if name.startswith("demo"):
                guesses = torch.cat([judge(rows.unsqueeze(1)).probabilities for rows in versions.split(50)])
                value = float(class_agreement(guesses, targets > 0).mean())
                original = original or value
                score, kept = f"{value:.4f}", f"{100 * value / original:.1f} %"
            lines.append(f"| {name} | {len(pieces)} | {heard} | {distance} | {ratio} | {score} | {kept} |")
    return "\n".join(lines)


def _versions(codec: TinyCodec, pieces: Tensor) -> dict[str, Tensor]:
    """The pieces (M, N) and what they are compared with, each (M, N)."""
    rows = [codec.decode(codec.encode(row.view(1, 1, -1)), row.numel())[0, 0] for row in pieces]
    return {
        "original": pieces,
        f"codec, {codec.code_rate * codec.num_codebooks * np.log2(codec.codebook_size) / 1000:g} kbit/s": torch.stack(
            rows
        ),
        "noise of the piece's mean spectrum and 50 Hz loudness": torch.stack([shaped_noise(row) for row in pieces]),
        "silence": torch.zeros_like(pieces),
    }


def shaped_noise(piece: Tensor, hop: int = 320) -> Tensor:
    """The baseline: noise with a sound's mean spectrum and its loudness at 50 Hz.

    The loudness alone, 16 bits 50 times a second, is 0.8 kbit/s, so it is of the codec's class of rates.

    Args:
        piece: (N,) float32.
        hop: Samples per loudness value.

    Returns:
        (N,) float32.
    """
    noise = torch.randn(piece.shape, generator=torch.Generator().manual_seed(0))
    window = torch.hann_window(1024)
    spectra = [torch.stft(x, 1024, 256, window=window, return_complex=True) for x in (piece, noise)]
    power, flat = (s.abs().square().mean(dim=1, keepdim=True) for s in spectra)  # (513, 1)
    coloured = torch.istft(spectra[1] * (power / flat).sqrt(), 1024, 256, window=window, length=len(piece))
    wanted, given = (_loudness(x, hop) for x in (piece, coloured))
    return coloured * wanted / (given + 1e-9)


def _loudness(x: Tensor, hop: int) -> Tensor:
    """(N,) -> (N,): root mean square of each hop, linear between their middles."""
    frames = torch.nn.functional.pad(x, (0, -len(x) % hop)).view(1, 1, -1, hop).square().mean(-1).sqrt()  # (1, 1, T)
    return torch.nn.functional.interpolate(frames, size=frames.shape[2] * hop, mode="linear")[0, 0, : len(x)]


def real_pieces(folder: Path, sample_rate: int) -> Tensor:
    """All whole pieces of the recordings below a folder, (M, N) float32; nearly silent pieces are left out."""
    length, pieces = round(SECONDS * sample_rate), []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in {".wav", ".ogg", ".flac", ".mp4", ".webm", ".mkv", ".mov"}:
            continue
        waveform = _read(path, sample_rate)
        for start in range(0, len(waveform) - length + 1, length):
            piece = waveform[start : start + length]
            if np.mean(piece**2) > 10 ** (QUIETEST_DB / 10):
                pieces.append(piece)
    return torch.from_numpy(np.stack(pieces))


def _read(path: Path, sample_rate: int) -> np.ndarray:
    if path.suffix.lower() in {".wav", ".ogg", ".flac"}:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return resample(to_mono(samples.T), rate, sample_rate)
    return read_audio(path, sample_rate).waveform
