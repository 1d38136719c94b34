"""Health of single generated sounds: level, silence, variety, repetition, and warnings about them.

Masked decoding typically fails with silence, steady noise or one repeated moment. Distances over a whole test set do
not show which output did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vab.audio import rms_db

FRAME_SECONDS = 0.05
"""Length of the frames in which silence is measured."""
SILENT_DB = -60.0
"""A frame below this is silent, dBFS: a thousandth of full scale, below the noise of most recordings."""
FLOOR_DB = -120.0
"""Lower levels, digital silence too, are reported as this, dBFS: 16 bits hold none as low, and JSON no infinity."""


@dataclass(frozen=True)
class Health:
    """Measurements of one sound that need no judge."""

    peak: float
    """Largest magnitude; 1 is full scale, and a 16-bit file clips what is above."""
    rms_db: float
    """Loudness, dBFS, not below -120."""
    silence: float
    """Share of the duration, in 50-ms frames, that is below -60 dBFS."""
    entropy: tuple[float, ...]
    """Bits, for each level: entropy of the distribution of this sound's codes. 0 for a single code; at most log2 of the
    number of steps, or of the codebook's size."""
    longest_repeat_seconds: float
    """Longest run of steps whose codes are the same on all levels; at least one step."""
    seconds: float
    """Duration of the codes."""


def health(waveform: Tensor, codes: Tensor, sample_rate: int, code_rate: float) -> Health:
    """Measure one sound.

    Args:
        waveform: (N,) float in about [-1, 1], N >= 1.
        codes: (K, T) int64, T >= 1, of which the waveform was decoded. Both without padding.
        sample_rate: Hz.
        code_rate: Steps per second.

    Raises:
        ValueError: If there is no sample or no step, or a sample is not finite.
    """
    if waveform.ndim != 1 or codes.ndim != 2 or 0 in (*waveform.shape, *codes.shape):
        raise ValueError(f"health takes (N,) samples and (K, T) codes, got {tuple(waveform.shape)}, {(*codes.shape,)}")
    waveform, codes = waveform.detach().double().cpu(), codes.cpu()
    if not bool(torch.isfinite(waveform).all()):
        raise ValueError("health: the sound has samples that are not finite")
    return Health(
        peak=float(waveform.abs().max()),
        rms_db=max(FLOOR_DB, float(rms_db(waveform))),
        silence=_silence(waveform, max(1, round(FRAME_SECONDS * sample_rate))),
        entropy=tuple(_entropy(level) for level in codes),
        longest_repeat_seconds=_longest_run(codes) / code_rate,
        seconds=codes.shape[1] / code_rate,
    )


def _silence(waveform: Tensor, frame: int) -> float:
    """Share of the samples in silent frames; the last frame may be shorter."""
    frames = waveform.split(frame)
    return sum(len(piece) for piece in frames if float(rms_db(piece)) < SILENT_DB) / len(waveform)


def _entropy(codes: Tensor) -> float:
    """Bits."""
    share = codes.unique(return_counts=True)[1].double() / len(codes)
    return max(0.0, -float((share * share.log2()).sum()))


def _longest_run(codes: Tensor) -> int:
    """Steps of the longest run of equal columns."""
    changes = (codes[:, 1:] != codes[:, :-1]).any(0).nonzero()[:, 0] + 1  # first steps of runs, but the first run's
    edges = torch.cat([changes.new_zeros(1), changes, changes.new_full((1,), codes.shape[1])])
    return int(edges.diff().max())


def audio_statistics(sounds: Sequence[Health]) -> dict[str, float]:
    """Statistics of sounds such as the training set's: the reference for `warnings_for`.

    Args:
        sounds: At least one; equally many levels in each.

    Returns:
        Plain floats by name: ``sounds`` (how many), ``seconds_mean``, ``peak_p95``, ``silence_mean``, ``silence_p95``,
        ``longest_repeat_seconds_p95``, ``entropy_level_0_mean``, ``entropy_level_0_std``, ...; and ``rms_db_mean``,
        ``rms_db_std`` over the sounds that are not silent throughout, absent where all are.

    Raises:
        ValueError: If there is none, or they differ in their levels.
    """
    if not sounds or len({len(sound.entropy) for sound in sounds}) > 1:
        raise ValueError(f"audio statistics need sounds with one number of levels, got {len(sounds)} sounds")

    table = {"sounds": float(len(sounds)), "seconds_mean": math.fsum(sound.seconds for sound in sounds) / len(sounds)}
    table["silence_mean"] = math.fsum(sound.silence for sound in sounds) / len(sounds)
    for name in ("peak", "silence", "longest_repeat_seconds"):
        column = torch.tensor([getattr(sound, name) for sound in sounds], dtype=torch.float64)
        table[f"{name}_p95"] = float(column.quantile(0.95))
    levels = zip(*(sound.entropy for sound in sounds), strict=True)
    columns = {f"entropy_level_{level}": values for level, values in enumerate(levels)}
    columns["rms_db"] = tuple(sound.rms_db for sound in sounds if sound.silence < 1)
    for name, values in columns.items():
        if values:
            column = torch.tensor(values, dtype=torch.float64)
            table |= {f"{name}_mean": float(column.mean()), f"{name}_std": float(column.std(correction=0))}
    return table


def warnings_for(sound: Health, reference: Mapping[str, float] | None) -> list[str]:
    """Warnings about a generated sound, and what to try.

    Args:
        sound: Measurements of the sound.
        reference: `audio_statistics` of the training audio. None if not known: warnings are then about what is unusual
            for any sound.

    Returns:
        A sentence for each finding; none for a sound like those of the training set.
    """
    known = {} if reference is None else dict(reference)
    return [*_level_warnings(sound, known), *_silence_warnings(sound, known), *_variety_warnings(sound, known)]


def _level_warnings(sound: Health, known: dict[str, float]) -> list[str]:
    found = []
    # Above 1 a file clips, or the sound must be scaled down. But lossy codecs overshoot, in some data sets on every
    # twentieth sound: there only a peak 2 dB above those says something about the model.
    limit = max(1.0, 1.25 * known.get("peak_p95", 0.0))
    if sound.peak > limit:
        usual = f" (training audio: mostly up to {known['peak_p95']:.2f})" if "peak_p95" in known else ""
        found.append(
            f"the peak is {sound.peak:.2f}, beyond full scale{usual}: try a lower guidance_scale or temperature"
        )
    if "rms_db_mean" in known and sound.silence < 1:
        # 3 standard deviations exclude about one natural sound in 400; less than 6 dB, half or twice the amplitude, is
        # no fault, however similar the training sounds are.
        margin = max(3 * known["rms_db_std"], 6.0)
        apart = sound.rms_db - known["rms_db_mean"]
        if abs(apart) > margin:
            more, other = ("louder", "a lower") if apart > 0 else ("quieter", "another")
            found.append(
                f"the sound is {abs(apart):.0f} dB {more} than training audio "
                f"({sound.rms_db:.0f} dBFS instead of {known['rms_db_mean']:.0f}): try {other} guidance_scale"
            )
    return found


def _silence_warnings(sound: Health, known: dict[str, float]) -> list[str]:
    # Without a reference, nine tenths: a single bark in ten seconds is natural. With one, a tenth above its 95th
    # percentile, which alone would warn about one natural sound in 20.
    limit = known["silence_p95"] + 0.1 if "silence_p95" in known else 0.9
    if sound.silence < 1 and sound.silence <= limit:
        return []
    usual = f" (training audio: {known['silence_mean']:.0%} on average)" if "silence_mean" in known else ""
    share = f"{sound.silence:.0%}" if sound.silence < 1 else "all"
    return [f"{share} of the sound is silence{usual}: try a higher choice_temperature, or another guidance_scale"]


def _variety_warnings(sound: Health, known: dict[str, float]) -> list[str]:
    found = []
    # In silence codes repeat, and silence has its own warning. A second of one repeated moment is a fault; training
    # audio with such moments (sirens, hums) allows half a second more than it has itself.
    frozen = sound.longest_repeat_seconds - sound.silence * sound.seconds
    limit = known["longest_repeat_seconds_p95"] + 0.5 if "longest_repeat_seconds_p95" in known else 1.0
    if frozen > limit:
        found.append(
            f"the same codes repeat for {sound.longest_repeat_seconds:.1f} s: "
            f"try a higher temperature or choice_temperature"
        )
    if sound.silence >= 1:
        return found
    poor, wild, compared = [], [], 0
    for level, entropy in enumerate(sound.entropy):
        mean = known.get(f"entropy_level_{level}_mean")
        if mean is None:
            continue
        compared += 1
        # As for loudness 3 standard deviations, at least 1 bit: half or twice as many codes in use. Entropy grows by up
        # to 1 bit for each doubling of the duration, so sounds much shorter or longer than training segments are not
        # compared.
        margin = max(3 * known[f"entropy_level_{level}_std"], 1.0)
        words = f"level {level}: {entropy:.1f} bits, training audio {mean:.1f}"
        if entropy < mean - margin and sound.seconds >= known["seconds_mean"] / 2:
            poor.append(words)
        if entropy > mean + margin and sound.seconds <= known["seconds_mean"] * 2:
            wild.append(words)
    # One level may differ in a natural sound: of 200 sounds of the demo world 11 have such a level, none has two of
    # four. Faulty decoding shows on most levels.
    poor, wild = (levels if 2 * len(levels) >= compared else [] for levels in (poor, wild))
    # Without a reference: below 1 bit on all levels, a sound has hardly two different moments. A short sound may.
    if not known and sound.seconds >= 1 and max(sound.entropy) < 1:
        poor = [f"at most {max(sound.entropy):.1f} bits on any level"]
    if poor:
        found.append(f"the codes hardly vary ({'; '.join(poor)}): try a higher temperature, top_k or top_p")
    if wild:
        found.append(f"the codes vary as noise does ({'; '.join(wild)}): try a lower temperature or a smaller top_k")
    return found
