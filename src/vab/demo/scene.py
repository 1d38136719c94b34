"""Decide what happens in one segment of the demo world, before any sound or picture is rendered.

``describe`` draws a ``Scene`` from ``(seed, index)``. ``vab.demo.sounds`` and ``vab.demo.pictures`` render that scene,
so sound and picture agree. The result depends on the two numbers alone.

All that sounds is visible: a bigger object has a lower pitch, a faster one has more events, an object lower in the
picture is nearer and louder, and every impact is seen and heard at the same time. Colour has no effect on the sound.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

SECONDS = 4.0
"""Length of a segment, s."""
SIDE = 96
"""Width and height of the picture, pixels."""
FPS = 16
"""Frames per second."""
NUM_FRAMES = round(SECONDS * FPS)

DOUBLE_PROBABILITY = 0.35
"""Probability that a segment holds two sounding objects."""
LOUDNESS_RANGE_DB = 10.0
"""Level difference between an object at the bottom of the picture and one at the top, dB."""
SMALLEST, LARGEST = 16.0, 26.0
"""Half the width of a sounding object, pixels."""
LARGEST_OF_TWO = 21.0
"""Half the width of the largest object in a segment with two objects, pixels."""

DISTRACTORS = ("balloon", "cloud", "crate", "moon", "star")

Colour = tuple[float, float, float]
"""Red, green, blue in [0, 1]."""


@dataclass(frozen=True)
class Kind:
    """How a kind of object behaves in time.

    ``strikes`` are single moments (``rates`` counts them per second); a ``cycle`` repeats a movement while it lasts
    (``rates`` in Hz); ``calls`` are short sounds in groups (``rates`` in calls per second).
    """

    motion: str
    rates: tuple[float, float]
    jitter: float = 0.0
    """Relative spread of the time between strikes; 0 is as regular as a clock."""
    notes: int = 1
    """Number of pitches or vowels that an event can have."""


KINDS: dict[str, Kind] = {
    "anvil": Kind("strikes", (1.0, 2.4), jitter=0.2),
    "ball": Kind("strikes", (1.2, 2.6), jitter=0.25),
    "bell": Kind("strikes", (0.9, 1.7)),
    "bird": Kind("calls", (3.0, 5.5)),
    "cymbals": Kind("strikes", (0.9, 2.0), jitter=0.2),
    "drip": Kind("strikes", (1.0, 2.4), jitter=0.25),
    "drum": Kind("strikes", (1.5, 4.0), jitter=0.25),
    "engine": Kind("cycle", (2.0, 5.0)),
    "fan": Kind("cycle", (2.0, 6.0)),
    "glass": Kind("strikes", (0.9, 1.8), jitter=0.2),
    "metronome": Kind("strikes", (1.6, 4.0)),
    "robot": Kind("calls", (2.5, 4.2), notes=5),
    "shaker": Kind("cycle", (1.3, 3.0)),
    "siren": Kind("cycle", (0.5, 1.5)),
    "violin": Kind("cycle", (0.5, 1.3)),
    "xylophone": Kind("strikes", (2.0, 4.2), jitter=0.12, notes=4),
}
"""Every kind of sounding object, in alphabetical order."""

CLASSES: tuple[str, ...] = tuple(KINDS)
"""Names of the kinds: the demo world's labels."""


@dataclass(frozen=True)
class Path:
    """A straight path: the object is at ``start`` at 0 s and at ``stop`` at the end of the segment."""

    start: tuple[float, float]
    """x (right), y (down), pixels."""
    stop: tuple[float, float]

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position at ``times`` (s): x and y, pixels."""
        share = np.asarray(times) / SECONDS
        return (
            self.start[0] + (self.stop[0] - self.start[0]) * share,
            self.start[1] + (self.stop[1] - self.start[1]) * share,
        )


@dataclass(frozen=True)
class SoundingObject:
    """An object that is seen and heard."""

    kind: str
    size: float
    """Half its width, pixels. It sets the pitch."""
    rate: float
    """Strikes or calls per second, or cycles in Hz."""
    path: Path
    events: tuple[float, ...]
    """Onsets, s: strikes, calls, bow strokes, piston strokes, turns of the shaker, starts of fan and siren."""
    strengths: tuple[float, ...]
    """Strength of each event, in (0, 1]: how far the hammer swings, and how loud the event is."""
    notes: tuple[int, ...]
    """Note of each event: the bar, the vowel, or the side that is struck."""
    intervals: tuple[tuple[float, float], ...]
    """When it moves and sounds, s. A strike keeps ringing after the end of its interval."""
    variant: int
    """0, 1 or 2: the call of the bird."""
    colour: Colour
    accent: Colour
    noise_seed: int

    @property
    def pitch(self) -> float:
        """Factor on the frequencies of its kind, from 1.5 for the smallest to 0.66 for the largest object."""
        return float(2.0 ** (0.6 - 1.2 * (self.size - SMALLEST) / (LARGEST - SMALLEST)))

    def gain(self, times: np.ndarray) -> np.ndarray:
        """Amplitude factor at ``times`` (s): lower in the picture is nearer, hence louder."""
        nearness = np.clip((self.path.at(times)[1] - 20.0) / 54.0, 0.0, 1.0)
        return 10.0 ** (LOUDNESS_RANGE_DB * (nearness - 1.0) / 20.0)

    def cycles(self, times: np.ndarray) -> np.ndarray:
        """Number of cycles until ``times`` (s); constant outside the intervals."""
        done = sum(np.clip(times, start, stop) - start for start, stop in self.intervals)
        return self.rate * np.asarray(done)

    def envelope(self, times: np.ndarray, attack: float = 0.03, release: float = 0.06) -> np.ndarray:
        """1 inside the intervals, 0 outside, with linear ramps inside the edges (s)."""
        level = np.zeros(np.shape(times), np.float32)
        for start, stop in self.intervals:
            level = np.maximum(level, np.minimum((times - start) / attack, (stop - times) / release))
        return np.clip(level, 0.0, 1.0)


@dataclass(frozen=True)
class Distractor:
    """An object that moves and makes no sound."""

    kind: str
    size: float
    path: Path
    sway: tuple[float, float]
    """Amplitude of its swing around the path, pixels in x and y."""
    rate: float
    """Frequency of its swing and rotation, Hz."""
    colour: Colour
    accent: Colour


@dataclass(frozen=True)
class Background:
    """The picture behind the objects; it does not move."""

    style: str
    """``gradient``, ``stripes``, ``checks`` or ``clouds``."""
    near: Colour
    far: Colour
    angle: float
    """Angle of gradient and stripes, radians."""
    scale: float
    """Width of stripes and checks, pixels."""
    grain: float
    """Standard deviation of the added noise, as a share of full brightness."""
    noise_seed: int

    @property
    def bright(self) -> bool:
        """Whether outlines must be dark to be visible."""
        return float(np.mean([self.near, self.far])) > 0.5


@dataclass(frozen=True)
class Scene:
    """Everything that happens in one segment, as plain data: the ground truth."""

    seed: int
    index: int
    objects: tuple[SoundingObject, ...]
    distractors: tuple[Distractor, ...]
    background: Background
    noise_seed: int
    """Seed of the noise floor of the sound."""


def describe(seed: int, index: int) -> Scene:
    """Draw one segment of the world at random.

    Args:
        seed: Seed of the world, >= 0.
        index: Index of the segment, >= 0.

    Returns:
        The scene: always the same one for the same two numbers.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    count = 2 if rng.random() < DOUBLE_PROBABILITY else 1
    kinds = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:count]]
    sizes = rng.uniform(SMALLEST, LARGEST if count == 1 else LARGEST_OF_TWO, count)
    paths = _place(rng, sizes)
    objects = tuple(_sounding_object(rng, *it) for it in zip(kinds, sizes, paths, strict=True))
    distractors = tuple(_distractor(rng, paths) for _ in range(rng.choice(3, p=[0.35, 0.4, 0.25])))
    return Scene(seed, index, objects, distractors, _background(rng), int(rng.integers(2**31)))


def _place(rng: np.random.Generator, sizes: np.ndarray) -> list[Path]:
    """Paths on which objects of these half widths stay inside the picture and do not overlap."""
    for _ in range(100):
        paths = []
        for size in sizes:
            low, high = size + 3, SIDE - size - 3
            start = rng.uniform(low, high, 2)
            travel = rng.uniform(-16, 16, 2) if rng.random() < 0.4 else np.zeros(2)
            stop = np.clip(start + travel, low, high)
            paths.append(Path((float(start[0]), float(start[1])), (float(stop[0]), float(stop[1]))))
        if len(paths) == 1:
            return paths
        times = np.linspace(0.0, SECONDS, 9)
        (x0, y0), (x1, y1) = paths[0].at(times), paths[1].at(times)
        if np.maximum(np.abs(x0 - x1), np.abs(y0 - y1)).min() >= 0.95 * sizes.sum():
            return paths
    return [Path((24.0, 48.0), (24.0, 48.0)), Path((72.0, 48.0), (72.0, 48.0))]


def _sounding_object(rng: np.random.Generator, kind: str, size: float, path: Path) -> SoundingObject:
    traits = KINDS[kind]
    rate = float(rng.uniform(*traits.rates))
    start, stop = _activity(rng, shortest=max(1.5, 2.4 / rate))
    intervals: list[tuple[float, float]] = [(start, stop)]
    if traits.motion == "strikes":
        events, strengths = _strikes(rng, kind, rate, start, stop)
        intervals = [(start, min(stop, events[-1] + 0.1))]
    elif traits.motion == "calls":
        intervals = _calls(rng, rate, start, stop)
        events, strengths = [begin for begin, _ in intervals], list(rng.uniform(0.7, 1.0, len(intervals)))
    else:
        if stop - start > 2.4 and rng.random() < 0.35:
            pause = rng.uniform(start + 0.9, stop - 1.4)
            intervals = [(start, pause), (pause + rng.uniform(0.35, 0.6), stop)]
        events = _cycle_events(kind, rate, intervals)
        strengths = [1.0] * len(events)
    if kind in ("bell", "metronome"):
        notes = [i % 2 for i in range(len(events))]  # a pendulum strikes left and right alternately
    else:
        notes = [int(note) for note in rng.integers(traits.notes, size=len(events))]
    colour, accent = _colours(rng)
    return SoundingObject(
        kind=kind,
        size=float(size),
        rate=rate,
        path=path,
        events=tuple(round(float(event), 5) for event in events),
        strengths=tuple(float(strength) for strength in strengths),
        notes=tuple(notes),
        intervals=tuple((round(float(begin), 5), round(float(end), 5)) for begin, end in intervals),
        variant=int(rng.integers(3)),
        colour=colour,
        accent=accent,
        noise_seed=int(rng.integers(2**31)),
    )


def _activity(rng: np.random.Generator, shortest: float) -> tuple[float, float]:
    """When an object is active: half of them the whole segment; the others start late, stop early, or both."""
    start, stop = 0.05, SECONDS - 0.05
    manner = rng.random()
    if manner > 0.5:
        room = SECONDS - shortest - 0.1
        if manner < 0.85:
            start += rng.uniform(0.3, max(0.31, 0.8 * room))
        if manner > 0.7:
            stop = rng.uniform(min(start + shortest, stop - 0.01), stop)
    return float(start), float(stop)


def _strikes(
    rng: np.random.Generator, kind: str, rate: float, start: float, stop: float
) -> tuple[list[float], list[float]]:
    jitter = KINDS[kind].jitter
    events, gaps = [start + rng.uniform(0.12, 0.35)], [1.0 / rate]
    while True:
        gap = rng.uniform(1.0 - jitter, 1.0 + jitter) / rate
        if kind in ("anvil", "drip", "drum", "xylophone") and rng.random() < 0.12:
            gap *= 2.0  # skip a beat
        if events[-1] + gap > stop - 0.1:
            break
        events.append(events[-1] + gap)
        gaps.append(gap)
    if kind == "ball":  # a longer fall ends in a harder impact
        return events, [min(1.0, max(0.4, 0.8 * gap * rate)) for gap in gaps]
    if jitter == 0.0:
        return events, [1.0] * len(events)
    return events, list(rng.uniform(0.5, 1.0, len(events)))


def _calls(rng: np.random.Generator, rate: float, start: float, stop: float) -> list[tuple[float, float]]:
    """Groups of two to five calls with pauses between the groups."""
    calls, now, left = [], start, int(rng.integers(2, 6))
    while now + 0.75 / rate < stop:
        calls.append((now, now + rng.uniform(0.5, 0.72) / rate))
        left -= 1
        now += rng.uniform(0.95, 1.05) / rate
        if left == 0:
            now += rng.uniform(0.3, 0.7)
            left = int(rng.integers(2, 6))
    return calls


def _cycle_events(kind: str, rate: float, intervals: list[tuple[float, float]]) -> list[float]:
    """Onsets of a repeated movement. After a pause it continues from where it stopped."""
    if kind in ("fan", "siren"):
        return [start for start, _ in intervals]
    # Shaker and bow turn twice per cycle, the piston strikes once. A cycle starts at a turn: the bow sounds there,
    # because its stroke begins, and the shaker does not.
    step = 1.0 if kind == "engine" else 0.5
    done, events = 0.0, []
    for start, stop in intervals:
        ahead = np.arange(np.ceil(done / step - 1e-9), np.floor((done + rate * (stop - start)) / step) + 1) * step
        if kind == "shaker":
            ahead = ahead[ahead > 0]
        times = start + (ahead - done) / rate
        events += [float(time) for time in times if time < stop - 0.03]
        if kind == "violin" and (not len(times) or times[0] > start + 1e-6):
            events.append(start)
        done += rate * (stop - start)
    return sorted(events)


def _distractor(rng: np.random.Generator, paths: list[Path]) -> Distractor:
    size = float(rng.uniform(8.0, 12.0))
    starts = rng.uniform(size + 2, SIDE - size - 2, (4, 2))
    # Of four places take the one farthest from the sounding objects, so that they do not cover it all the time.
    start = max(starts, key=lambda place: min(np.abs(place - path.start).max() for path in paths))
    stop = np.clip(start + rng.uniform(-30, 30, 2), size + 2, SIDE - size - 2)
    colour, accent = _colours(rng)
    return Distractor(
        kind=DISTRACTORS[rng.integers(len(DISTRACTORS))],
        size=size,
        path=Path((float(start[0]), float(start[1])), (float(stop[0]), float(stop[1]))),
        sway=(float(rng.uniform(0, 6)), float(rng.uniform(0, 8))),
        rate=float(rng.uniform(0.3, 2.0)),
        colour=colour,
        accent=accent,
    )


def _background(rng: np.random.Generator) -> Background:
    base = rng.uniform(0.12, 0.4) if rng.random() < 0.5 else rng.uniform(0.6, 0.88)
    hue = rng.random()
    return Background(
        style=("gradient", "stripes", "checks", "clouds")[rng.integers(4)],
        near=_rgb(hue, rng.uniform(0, 0.4), base + rng.uniform(-0.1, 0.1)),
        far=_rgb(hue + rng.uniform(-0.2, 0.2), rng.uniform(0, 0.4), base + rng.uniform(-0.1, 0.1)),
        angle=float(rng.uniform(0, 2 * np.pi)),
        scale=float(rng.uniform(6, 20)),
        grain=float(rng.uniform(0, 0.03)),
        noise_seed=int(rng.integers(2**31)),
    )


def _colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """A main colour and a second, different one."""
    hue = rng.random()
    return (
        _rgb(hue, rng.uniform(0.55, 1.0), rng.uniform(0.7, 1.0)),
        _rgb(hue + rng.uniform(0.25, 0.75), rng.uniform(0.5, 1.0), rng.uniform(0.7, 1.0)),
    )


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(float(hue) % 1.0, float(saturation), float(value))
