"""Sounds of every sort, made by formula: what the tiny networks train on so that they are not deaf to real audio.

Nothing here belongs to the demo world: tones, sweeps, coloured noise, impacts, speech-like syllables, modulations and
mixtures of them, at levels from faint to loud.
"""

from __future__ import annotations

import numpy as np

LOUDEST_DB, FAINTEST_DB = -6.0, -40.0
"""Range of levels, dBFS RMS. A peaky sound is turned down further until its peaks fit."""


def broad_sound(rng: np.random.Generator, samples: int, sample_rate: int = 16000) -> np.ndarray:
    """A sound of a random sort.

    Args:
        rng: Decides everything about it.
        samples: Length wanted.
        sample_rate: Hz.

    Returns:
        (samples,) float32, peak at most 0.99.
    """
    sorts = (_tones, _sweep, _coloured_noise, _impacts, _syllables, _modulated)
    count = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    x = np.zeros(samples)
    for _ in range(count):
        part = sorts[rng.integers(len(sorts))](rng, samples, sample_rate)
        x += part / (np.sqrt(np.mean(part**2)) + 1e-9) * 10 ** (rng.uniform(-12, 0) / 20)
    if rng.random() < 0.5:  # no recording is without a floor
        x += _coloured_noise(rng, samples, sample_rate) * 10 ** (rng.uniform(-50, -20) / 20)
    if rng.random() < 0.3:
        x = _echo(rng, x, sample_rate)
    if rng.random() < 0.25:  # begins or ends in silence
        cut = rng.integers(samples)
        x[slice(0, cut) if rng.random() < 0.5 else slice(cut, None)] = 0.0
    level = 10 ** (rng.uniform(FAINTEST_DB, LOUDEST_DB) / 20)
    x *= level / (np.sqrt(np.mean(x**2)) + 1e-9)
    return (x * min(1.0, 0.99 / (np.abs(x).max() + 1e-9))).astype(np.float32)


def _seconds(samples: int, sample_rate: int) -> np.ndarray:
    return np.arange(samples) / sample_rate


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _smooth_walk(rng: np.random.Generator, samples: int, points: int) -> np.ndarray:
    """A curve through `points` normal draws, linear between them."""
    return np.interp(np.linspace(0, points - 1, samples), np.arange(points), rng.standard_normal(points))


def _spectrum_shaped(rng: np.random.Generator, noise: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """`noise` with its spectrum multiplied by `gain` (N // 2 + 1,)."""
    return np.fft.irfft(np.fft.rfft(noise) * gain, n=len(noise))


def _bell(frequency: np.ndarray, centre: float, width: float) -> np.ndarray:
    return 1.0 / (1.0 + ((frequency - centre) / width) ** 2)


def _tones(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """Notes of a harmonic sound with vibrato, or a few unrelated sines."""
    t = _seconds(samples, sample_rate)
    x = np.zeros(samples)
    if rng.random() < 0.3:
        for _ in range(rng.integers(1, 6)):
            x += rng.uniform(0.1, 1) * np.sin(2 * np.pi * (_log_uniform(rng, 60, 7500) * t + rng.random()))
        return x
    start, tilt = 0, rng.uniform(0.3, 2.0)
    while start < samples:
        end = min(samples, start + int(sample_rate * _log_uniform(rng, 0.08, 2.0)))
        pitch = _log_uniform(rng, 55, 1500)
        vibrato = rng.uniform(0, 0.02) * np.sin(2 * np.pi * rng.uniform(3, 8) * t[start:end])
        phase = 2 * np.pi * np.cumsum(pitch * (1 + vibrato)) / sample_rate
        harmonics = np.arange(1, int(min(40, 0.47 * sample_rate / pitch)) + 1)
        note = np.sin(phase[None] * harmonics[:, None] + 2 * np.pi * rng.random((len(harmonics), 1)))
        weight = harmonics**-tilt * rng.uniform(0.3, 1, len(harmonics))
        x[start:end] = weight @ note * _envelope(rng, end - start, sample_rate)
        start = end
    return x


def _envelope(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """A note's rise and fall: plucked or held."""
    t = _seconds(samples, sample_rate)
    rise = np.minimum(1.0, t / _log_uniform(rng, 0.002, 0.1))
    fall = np.exp(-t / _log_uniform(rng, 0.03, 3.0)) if rng.random() < 0.6 else np.ones(samples)
    return rise * fall * np.minimum(1.0, (t[-1] - t) / 0.01)


def _sweep(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """A tone whose pitch wanders or sweeps, once or again and again."""
    period = int(sample_rate * _log_uniform(rng, 0.1, 3.0))
    along = (np.arange(samples) % period) / period
    low, high = np.log(_log_uniform(rng, 80, 7000)), np.log(_log_uniform(rng, 80, 7000))
    frequency = np.exp(low + (high - low) * along)
    if rng.random() < 0.4:
        frequency = np.clip(np.exp(low + 0.4 * _smooth_walk(rng, samples, 8)), 50, 7500)
    phase = 2 * np.pi * np.cumsum(frequency) / sample_rate
    return np.sin(phase) + rng.uniform(0, 0.5) * np.sin(2 * phase) * (frequency < 3700)


def _coloured_noise(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """Noise with a sloping, banded or bumpy spectrum."""
    frequency = np.fft.rfftfreq(samples, 1 / sample_rate) + 1.0
    gain = frequency ** -rng.uniform(-0.3, 1.2)
    sort = rng.random()
    if sort < 0.35:
        centre = _log_uniform(rng, 100, 7000)
        gain = _bell(frequency, centre, centre * rng.uniform(0.05, 0.7))
    elif sort < 0.6:
        gain *= np.exp(np.interp(frequency, np.geomspace(20, 8000, 12), 1.2 * rng.standard_normal(12)))
    if rng.random() < 0.3:
        gain = gain * (frequency < _log_uniform(rng, 1000, 8000))
    x = _spectrum_shaped(rng, rng.standard_normal(samples), gain)
    return x / (x.std() + 1e-9)


def _impacts(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """Struck things: decaying partials, bursts of noise or bare clicks, in rhythm or at random."""
    length = min(samples, sample_rate)
    t = _seconds(length, sample_rate)
    hit = np.zeros(length)
    sort = rng.random()
    if sort < 0.5:
        base, stretch = _log_uniform(rng, 60, 2500), rng.uniform(0.8, 2.2)
        for partial in range(1, rng.integers(2, 12)):
            frequency = base * partial**stretch * rng.uniform(0.97, 1.03)
            if frequency < 0.47 * sample_rate:
                decay = _log_uniform(rng, 0.01, 0.6)
                hit += rng.uniform(0.1, 1) * np.exp(-t / decay) * np.sin(2 * np.pi * (frequency * t + rng.random()))
    if sort > 0.35:
        hit += (
            rng.uniform(0.2, 1) * _coloured_noise(rng, length, sample_rate) * np.exp(-t / _log_uniform(rng, 0.002, 0.3))
        )
    x = np.zeros(samples)
    gap = _log_uniform(rng, 0.05, 1.2)
    at = rng.uniform(0, gap)
    while at * sample_rate < samples:
        start = int(at * sample_rate)
        stop = min(samples, start + length)
        x[start:stop] += rng.uniform(0.4, 1) * hit[: stop - start]
        at += gap * (1.0 if sort < 0.6 else rng.uniform(0.2, 2.0))
    return x


def _syllables(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """Speech-like: a buzzing or hissing source through moving resonances, in syllables with pauses."""
    voice = _log_uniform(rng, 80, 320)
    x = np.zeros(samples)
    start = 0
    while start < samples:
        length = min(samples - start, int(sample_rate * rng.uniform(0.06, 0.35)))
        if length < 256:
            break
        shape = np.sin(np.pi * np.linspace(0, 1, length)) ** rng.uniform(0.3, 1.0)
        frequency = np.fft.rfftfreq(length, 1 / sample_rate)
        if rng.random() < 0.7:
            glide = voice * np.exp(rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, length) + 0.2 * rng.standard_normal())
            turns = np.cumsum(glide) / sample_rate
            source = np.diff(np.floor(turns), prepend=0.0) + 0.01 * rng.standard_normal(length)
            resonances = [
                rng.uniform(250, 900),
                rng.uniform(800, 2400),
                rng.uniform(2200, 3400),
                rng.uniform(3200, 4500),
            ]
            gains = [_bell(frequency, r, 40 + 0.05 * r) * 10 ** (-0.35 * i) for i, r in enumerate(resonances)]
            later = [
                _bell(frequency, r * rng.uniform(0.7, 1.4), 40 + 0.05 * r) * 10 ** (-0.35 * i)
                for i, r in enumerate(resonances)
            ]
            fade = np.linspace(1, 0, length)
            part = fade * _spectrum_shaped(rng, source, np.sum(gains, 0))
            part += (1 - fade) * _spectrum_shaped(rng, source, np.sum(later, 0))
        else:
            gain = _bell(frequency, rng.uniform(2000, 7000), rng.uniform(500, 2500))
            part = 0.4 * _spectrum_shaped(rng, rng.standard_normal(length), gain)
        part /= np.abs(part).max() + 1e-9
        x[start : start + length] = part * shape * rng.uniform(0.3, 1)
        start += length + int(sample_rate * rng.choice([0.0, rng.uniform(0.02, 0.3)], p=[0.6, 0.4]))
    return x


def _modulated(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """Engines, sirens, wind: a carrier whose loudness or pitch beats or wanders."""
    t = _seconds(samples, sample_rate)
    rate = _log_uniform(rng, 0.5, 80)
    beat = np.sin(2 * np.pi * (rate * t + rng.random()))
    sort = rng.random()
    if sort < 0.3:  # frequency modulation
        return np.sin(2 * np.pi * _log_uniform(rng, 100, 4000) * t + _log_uniform(rng, 0.5, 8) * beat)
    if sort < 0.6:  # a train of pulses, as of an engine
        turns = np.cumsum(_log_uniform(rng, 12, 150) * np.exp(0.2 * _smooth_walk(rng, samples, 5))) / sample_rate
        source = np.diff(np.floor(turns), prepend=0.0) + 0.02 * rng.standard_normal(samples)
        frequency = np.fft.rfftfreq(samples, 1 / sample_rate)
        peaks = [_bell(frequency, _log_uniform(rng, 60, 4000), _log_uniform(rng, 50, 600)) for _ in range(4)]
        return _spectrum_shaped(rng, source, np.sum(peaks, 0))
    depth = rng.uniform(0.4, 1.0)
    if sort < 0.8:
        return _coloured_noise(rng, samples, sample_rate) * np.exp(0.8 * _smooth_walk(rng, samples, 10))
    carrier = _tones if rng.random() < 0.4 else _coloured_noise
    return carrier(rng, samples, sample_rate) * (1 + depth * beat)


def _echo(rng: np.random.Generator, x: np.ndarray, sample_rate: int) -> np.ndarray:
    """The sound in a room: decaying noise as the room's answer."""
    length = int(sample_rate * rng.uniform(0.05, 0.6))
    answer = rng.standard_normal(length) * np.exp(-6.0 * np.arange(length) / length)
    size = len(x) + length
    wet = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(answer, size), size)[: len(x)]
    return x + rng.uniform(0.1, 0.6) * wet * x.std() / (wet.std() + 1e-9)
