"""Synthesize the sound of a scene of the demo world: how each kind of object sounds.

A strike is one short waveform that is added at every event; a cycle or a call is a waveform of the whole segment with a
time-varying envelope. Each kind has its own frequency band, pitch movement and decay, so that a small network can tell
them apart, even after a codec of low bit rate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vab.demo.scene import SECONDS, Scene, SoundingObject

SAMPLE_RATE = 16000
"""Hz."""
NUM_SAMPLES = round(SECONDS * SAMPLE_RATE)

LOUDEST_DBFS = -14.0
"""Level of the loudest half second of the nearest possible object, dBFS RMS."""
CEILING = 0.9
"""Largest amplitude of a single object."""
FLOOR_DBFS = -60.0
"""Level of the noise floor, dBFS RMS."""

XYLOPHONE_BARS = (1.0, 1.26, 1.5, 2.0)
"""Frequencies of the bars, from the longest to the shortest, relative to the first."""
VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
"""First three resonances, Hz, of a, i, u, e, o. Source: Peterson and Barney 1952, table II, men."""


def render_audio(scene: Scene) -> np.ndarray:
    """Synthesize the sound of a scene.

    Args:
        scene: The scene. Its distractors and background are silent.

    Returns:
        (64000,) float32 at 16 kHz, |x| <= 0.99.
    """
    times = _TIMES
    floor = np.random.default_rng(scene.noise_seed).standard_normal(NUM_SAMPLES, dtype=np.float32)
    mix = 10.0 ** (FLOOR_DBFS / 20.0) * floor
    for item in scene.objects:
        mix += _levelled(render_object(item)) * item.gain(times).astype(np.float32)
    peak = float(np.abs(mix).max())
    return mix * np.float32(min(1.0, 0.99 / peak))


def render_object(item: SoundingObject) -> np.ndarray:
    """Synthesize the sound of one object, before its level is set.

    Args:
        item: The object.

    Returns:
        (64000,) float32 at 16 kHz; silent outside its events and intervals.
    """
    rng = np.random.default_rng(item.noise_seed)
    if item.kind in _STRIKES:
        return _struck(item, _STRIKES[item.kind](item, rng))
    return _SUSTAINED[item.kind](item, rng)


_TIMES = (np.arange(NUM_SAMPLES) / SAMPLE_RATE).astype(np.float32)


def _levelled(waveform: np.ndarray) -> np.ndarray:
    """Bring the loudest half second to ``LOUDEST_DBFS`` and limit peaks softly at ``CEILING``.

    Without the limiter short clicks could not be loud. No peak is amplified beyond twice the ceiling.
    """
    blocks = waveform.reshape(-1, SAMPLE_RATE // 2)
    loudest = np.sqrt(np.einsum("bn,bn->b", blocks, blocks).max() / blocks.shape[1])
    factor = min(10.0 ** (LOUDEST_DBFS / 20.0) / loudest, 2 * CEILING / np.abs(waveform).max())
    return np.float32(CEILING) * np.tanh(waveform * np.float32(factor / CEILING))


def _struck(item: SoundingObject, sounds: list[np.ndarray]) -> np.ndarray:
    """Add the note of every event at its onset."""
    waveform = np.zeros(NUM_SAMPLES, np.float32)
    for event, strength, note in zip(item.events, item.strengths, item.notes, strict=True):
        start = round(event * SAMPLE_RATE)
        stop = min(NUM_SAMPLES, start + len(sounds[note % len(sounds)]))
        waveform[start:stop] += np.float32(strength) * sounds[note % len(sounds)][: stop - start]
    return waveform


# --- material ---------------------------------------------------------------------------------------------------------


def _span(seconds: float) -> np.ndarray:
    return _TIMES[: round(seconds * SAMPLE_RATE)]


def _decay(times: np.ndarray, tau: float) -> np.ndarray:
    """Exponential decay with a rise of 1 ms, faded out over the whole span so that the end does not click."""
    return np.exp(-times / tau) * np.minimum(times * 1000.0, 1.0) * (1.0 - times / times[-1])


def _tone(frequency: np.ndarray | float, times: np.ndarray) -> np.ndarray:
    """A sine wave; ``frequency`` in Hz, one number or one per sample."""
    if isinstance(frequency, np.ndarray):
        return np.sin(2 * np.pi * _turns(frequency)).astype(np.float32)
    return np.sin((2 * np.pi * frequency) * times)


def _turns(frequency: np.ndarray) -> np.ndarray:
    """Phase, in turns, of an oscillation with a frequency (Hz) per sample; float64, because the phase grows large."""
    return np.cumsum(frequency, dtype=np.float64) / SAMPLE_RATE


def _partials(base: float, parts: tuple[tuple[float, float, float], ...], times: np.ndarray) -> np.ndarray:
    """Sum of decaying sines, each (frequency ratio, amplitude, decay s); those above 7.6 kHz are left out."""
    total = np.zeros(len(times), np.float32)
    for ratio, amplitude, tau in parts:
        if base * ratio < 7600.0:
            total += amplitude * _tone(base * ratio, times) * _decay(times, tau)
    return total


def _noise(rng: np.random.Generator, num_samples: int, low: float, high: float) -> np.ndarray:
    """Noise of unit power between two frequencies, Hz, with soft edges."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples, dtype=np.float32))
    frequencies = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE).astype(np.float32)
    frequencies[0] = 1.0
    shape = 1.0 / np.sqrt((1.0 + (low / frequencies) ** 6) * (1.0 + (frequencies / high) ** 6))
    noise = np.fft.irfft(spectrum * shape, num_samples).astype(np.float32)
    return noise / np.sqrt(np.mean(noise**2))


def _pulses(frequency: np.ndarray | float, resonances: list[tuple[float, float, float]]) -> np.ndarray:
    """A pulse train that excites resonances, each (frequency Hz, amplitude, decay s)."""
    frequency = np.broadcast_to(np.asarray(frequency, np.float64), NUM_SAMPLES)
    age = ((_turns(frequency) % 1.0) / frequency).astype(np.float32)  # since the last pulse, s
    total = np.zeros(NUM_SAMPLES, np.float32)
    for centre, amplitude, tau in resonances:
        total += amplitude * _ringing(age, centre, tau)
    return total


def _ringing(age: np.ndarray, frequency: float, tau: float) -> np.ndarray:
    """A decaying sine at the time ``age`` (s) after its start."""
    return np.exp(age * np.float32(-1 / tau)) * np.sin(age * np.float32(2 * np.pi * frequency))


# --- strikes: one waveform for each note ------------------------------------------------------------------------------


def _anvil(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(0.9)
    parts = ((1.0, 1.0, 0.3), (1.47, 0.8, 0.22), (2.09, 0.8, 0.16), (2.56, 0.6, 0.12), (3.93, 0.4, 0.08))
    click = _noise(rng, len(times), 1500, 7000) * _decay(times, 0.012)
    return [_partials(1150 * item.pitch, parts, times) + click]


def _ball(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(0.4)
    falling = 105 * item.pitch * (1 + 0.9 * np.exp(-times / 0.03))
    thud = (_tone(falling, times) + 0.35 * _tone(2 * falling, times)) * _decay(times, 0.09)
    return [thud + 0.3 * _noise(rng, len(times), 80, 500) * _decay(times, 0.03)]


def _bell(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(1.8)
    parts = ((0.5, 0.5, 1.2), (1.0, 1.0, 0.9), (1.19, 0.7, 0.7), (1.5, 0.5, 0.6), (2.0, 0.7, 0.5), (2.74, 0.4, 0.25))
    beating = 1.0 + 0.35 * np.cos(2 * np.pi * 3.0 * times)
    return [_partials(520 * item.pitch, parts, times) * beating]


def _cymbals(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(1.0)
    crash = _noise(rng, len(times), 2200 * item.pitch, 7800)
    return [crash * (0.6 * _decay(times, 0.06) + 0.5 * _decay(times, 0.32))]


def _drip(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(0.26)
    rising = _tone(520 * item.pitch * 2.0 ** (1.6 * np.minimum(times / 0.075, 1.0)), times)
    blip = rising * np.minimum(times / 0.006, 1.0) * np.clip((0.085 - times) / 0.03, 0.0, 1.0)
    echo = np.zeros_like(blip)
    delay = round(0.12 * SAMPLE_RATE)
    echo[delay:] = blip[:-delay]
    return [blip + 0.45 * echo]


def _drum(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(0.4)
    skin = _partials(185 * item.pitch, ((1.0, 1.0, 0.1), (1.59, 0.6, 0.07), (2.14, 0.4, 0.05)), times)
    return [skin + 0.55 * _noise(rng, len(times), 1300, 5000) * _decay(times, 0.07)]


def _glass(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(1.4)
    tremble = 1.0 + 0.25 * np.cos(2 * np.pi * 7.0 * times)
    return [_partials(2900 * item.pitch, ((1.0, 1.0, 0.5), (2.32, 0.25, 0.12)), times) * tremble]


def _metronome(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(0.11)
    noise = _noise(rng, len(times), 1500, 4000)
    return [(_tone(base * item.pitch, times) + 0.8 * noise) * _decay(times, 0.02) for base in (2300.0, 1700.0)]


def _xylophone(item: SoundingObject, rng: np.random.Generator) -> list[np.ndarray]:
    times = _span(0.5)
    parts = ((1.0, 1.0, 0.11), (3.93, 0.35, 0.04))
    return [_partials(640 * item.pitch * bar, parts, times) for bar in XYLOPHONE_BARS]


# --- cycles and calls: one waveform for the segment -------------------------------------------------------------------


def _bird(item: SoundingObject, rng: np.random.Generator) -> np.ndarray:
    waveform = np.zeros(NUM_SAMPLES, np.float32)
    for (start, stop), strength in zip(item.intervals, item.strengths, strict=True):
        begin = round(start * SAMPLE_RATE)
        times = _span(min(stop, SECONDS) - start)[: NUM_SAMPLES - begin]
        share = times / times[-1]
        octaves = (0.45 - 0.9 * share, 0.8 * np.sin(np.pi * share) - 0.4, 0.35 * np.cos(6 * np.pi * share))[
            item.variant
        ]
        swell = np.sqrt(np.clip(np.sin(np.pi * share), 0.0, 1.0))
        waveform[begin : begin + len(times)] += strength * swell * _tone(3300 * item.pitch**0.7 * 2.0**octaves, times)
    return waveform


def _engine(item: SoundingObject, rng: np.random.Generator) -> np.ndarray:
    stroke = item.cycles(_TIMES) % 1.0  # one chug per stroke: loud at once, then decaying
    firing = 42 * item.pitch * (1 + 0.02 * np.sin(2 * np.pi * 1.3 * _TIMES))
    rumble = _pulses(firing, [(160 * item.pitch, 1.0, 0.007), (520 * item.pitch, 0.5, 0.003)])
    return rumble * (0.3 + 0.7 * np.exp(-3.0 * stroke)) * item.envelope(_TIMES)


def _fan(item: SoundingObject, rng: np.random.Generator) -> np.ndarray:
    passing = 0.5 + 0.5 * np.cos(2 * np.pi * item.cycles(_TIMES))
    wind = _noise(rng, NUM_SAMPLES, 180 * item.pitch, 1100 * item.pitch)
    return wind * (0.12 + 0.88 * passing**2) * item.envelope(_TIMES, 0.08, 0.08)


def _robot(item: SoundingObject, rng: np.random.Generator) -> np.ndarray:
    waveform = np.zeros(NUM_SAMPLES, np.float32)
    age = ((_TIMES * (115 * item.pitch)) % 1.0) / np.float32(115 * item.pitch)  # since the last glottal pulse, s
    for (start, stop), strength, vowel in zip(item.intervals, item.strengths, item.notes, strict=True):
        part = slice(round(start * SAMPLE_RATE), min(NUM_SAMPLES, round(stop * SAMPLE_RATE)))
        share = np.linspace(0, 1, part.stop - part.start, dtype=np.float32)
        swell = strength * np.minimum(1.0, np.minimum(share / 0.12, (1 - share) / 0.3))
        for formant, amplitude, tau in zip(VOWELS[vowel], (1.0, 0.6, 0.35), (0.005, 0.0035, 0.0025), strict=True):
            waveform[part] += amplitude * swell * _ringing(age[part], formant, tau)
    return waveform


def _shaker(item: SoundingObject, rng: np.random.Generator) -> np.ndarray:
    level = np.zeros(NUM_SAMPLES, np.float32)
    burst = _span(0.16)
    shape = np.minimum(burst / 0.012, 1.0) * np.exp(-burst / 0.03)
    for event in item.events:
        start = round(event * SAMPLE_RATE)
        level[start : start + len(shape)] += shape[: NUM_SAMPLES - start]
    return _noise(rng, NUM_SAMPLES, 4200 * item.pitch**0.5, 7900) * level


def _siren(item: SoundingObject, rng: np.random.Generator) -> np.ndarray:
    turns = _turns(820 * item.pitch * 2.0 ** (0.6 * np.cos(2 * np.pi * item.cycles(_TIMES))))
    return _looked_up(_SIREN_PERIOD, turns) * item.envelope(_TIMES)


def _violin(item: SoundingObject, rng: np.random.Generator) -> np.ndarray:
    bow_speed = np.abs(np.sin(2 * np.pi * item.cycles(_TIMES)))
    turns = _turns(330 * item.pitch * (1 + 0.008 * np.sin(2 * np.pi * 5.5 * _TIMES)))
    return _looked_up(_VIOLIN_PERIOD, turns) * bow_speed**0.8 * item.envelope(_TIMES)


def _period(amplitudes: dict[int, float]) -> np.ndarray:
    """One period of a harmonic tone; {harmonic: amplitude}."""
    turn = np.arange(8192) / 8192
    waves = [level * np.sin(2 * np.pi * k * turn) for k, level in amplitudes.items()]
    return np.sum(waves, axis=0).astype(np.float32)


def _looked_up(period: np.ndarray, turns: np.ndarray) -> np.ndarray:
    return period[(turns * len(period)).astype(np.int64) % len(period)]


_SIREN_PERIOD = _period({1: 1.0, 3: 0.33})
_VIOLIN_PERIOD = _period({k: 1.0 / k**0.8 for k in range(1, 13)})

_STRIKES: dict[str, Callable[[SoundingObject, np.random.Generator], list[np.ndarray]]] = {
    "anvil": _anvil,
    "ball": _ball,
    "bell": _bell,
    "cymbals": _cymbals,
    "drip": _drip,
    "drum": _drum,
    "glass": _glass,
    "metronome": _metronome,
    "xylophone": _xylophone,
}
_SUSTAINED: dict[str, Callable[[SoundingObject, np.random.Generator], np.ndarray]] = {
    "bird": _bird,
    "engine": _engine,
    "fan": _fan,
    "robot": _robot,
    "shaker": _shaker,
    "siren": _siren,
    "violin": _violin,
}
