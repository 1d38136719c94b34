"""Folders of demo sounds for the tests of evaluation, and what is done to them."""

import os
import signal
import time
from functools import cache

import numpy as np
import soundfile

from vab.demo.scene import describe
from vab.demo.sounds import render_audio

RATE = 16_000


@cache
def demo_sound(index):
    """(64000,) float32, of the demo world."""
    return render_audio(describe(11, index))


def write_folder(folder, count=8, change=None, suffix="wav"):
    """Demo sounds ``s00``, ``s01``, ...; ``change`` makes of a waveform and its number another waveform."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        sound = demo_sound(index)
        write_sound(folder / f"s{index:02}.{suffix}", sound if change is None else change(sound, index))
    return folder


def write_sound(path, waveform, rate=RATE):
    """As float where the format has it: what is measured is the change, not the rounding of 16 bits."""
    options = {"subtype": "FLOAT"} if path.suffix == ".wav" else {}
    soundfile.write(path, waveform, rate, **options)


def noisy(sound, index, snr_db):
    """With white noise, at a ratio to the sound's own power."""
    noise = np.random.default_rng(index).standard_normal(len(sound)).astype(np.float32)
    return sound + noise * np.float32(np.sqrt(np.mean(sound**2) / 10 ** (snr_db / 10)))


def band_limited(sound, hertz, rate=RATE):
    """Without what is above a frequency: a raised cosine a tenth as wide takes it out."""
    spectrum = np.fft.rfft(sound)
    frequencies = np.fft.rfftfreq(len(sound), 1 / rate)
    fall = np.clip((frequencies - hertz) / (0.1 * hertz), 0, 1)
    return np.fft.irfft(spectrum * (0.5 + 0.5 * np.cos(np.pi * fall)), len(sound)).astype(np.float32)


def shuffled_names(names, share, seed=0):
    """For each name the one whose sound it gets: a share of them moved round in a circle, the others stay."""
    order = np.random.default_rng(seed).permutation(len(names))[: round(share * len(names))]
    taken = dict(zip(names, names, strict=True))
    for place, number in enumerate(order):
        taken[names[number]] = names[order[(place + 1) % len(order)]]
    return taken


class Deadly:
    """Stands for a path, and ends the process that it is sent to, as native code that crashes does."""

    def __reduce__(self):
        return _die, ()


class Endless:
    """Stands for the path of a file that keeps its decoder for ever."""

    def __fspath__(self):
        while True:
            time.sleep(1)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
