"""Draw the frames of a scene of the demo world: how each kind of object looks and moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vab.demo.drawing import FRAME_TIMES, MARGIN, WHITE, Motion, Pen
from vab.demo.scene import FPS, NUM_FRAMES, SECONDS, SIDE, Background, Distractor, Scene, SoundingObject

__all__ = ["FPS", "NUM_FRAMES", "render_frames"]


def render_frames(scene: Scene) -> np.ndarray:
    """Draw the frames of a scene; frame k shows the time (k + 0.5) / 16 s.

    Args:
        scene: The scene to draw.

    Returns:
        (64, 96, 96, 3) uint8 RGB.
    """
    wide = SIDE + 2 * MARGIN
    frames = np.empty((NUM_FRAMES, 3, wide, wide), np.uint8)
    frames[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN] = _background(scene.background)
    outline = (0.05, 0.05, 0.05) if scene.background.bright else (0.95, 0.95, 0.95)
    for distractor in scene.distractors:
        pen = Pen(distractor.size, distractor.colour, distractor.accent, outline)
        _DISTRACTORS[distractor.kind](pen, distractor)
        swing = np.sin(2 * np.pi * distractor.rate * FRAME_TIMES)
        x, y = distractor.path.at(FRAME_TIMES)
        pen.paste(frames, x + distractor.sway[0] * swing, y + distractor.sway[1] * swing)
    for item in scene.objects:
        pen = Pen(item.size, item.colour, item.accent, outline)
        _OBJECTS[item.kind](pen, item, Motion.of(item))
        pen.paste(frames, *item.path.at(FRAME_TIMES))
    inside = frames[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    return np.ascontiguousarray(inside.transpose(0, 2, 3, 1))


def _background(background: Background) -> np.ndarray:
    """(3, 96, 96) uint8."""
    rng = np.random.default_rng(background.noise_seed)
    y, x = np.meshgrid(np.arange(SIDE, dtype=np.float32), np.arange(SIDE, dtype=np.float32), indexing="ij")
    along = np.cos(background.angle) * (x - SIDE / 2) + np.sin(background.angle) * (y - SIDE / 2)
    if background.style == "stripes":
        share = 0.5 + 0.5 * np.sin(along * (np.pi / background.scale))
    elif background.style == "checks":
        share = (np.floor(x / background.scale) + np.floor(y / background.scale)) % 2
    elif background.style == "clouds":
        waves = rng.uniform(-0.12, 0.12, (6, 2)), rng.uniform(0, 2 * np.pi, 6)
        share = 0.5 + sum(np.sin(x * fx + y * fy + turn) for (fx, fy), turn in zip(*waves, strict=True)) / 6
    else:
        share = 0.5 + along / (1.42 * SIDE)
    near, far = np.array(background.near)[:, None, None], np.array(background.far)[:, None, None]
    grain = background.grain * rng.standard_normal((1, SIDE, SIDE))
    picture: np.ndarray = near + (far - near) * share + grain
    return np.clip(picture * 255.0 + 0.5, 0, 255).astype(np.uint8)


# --- sounding objects -------------------------------------------------------------------------------------------------


def _anvil(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    body = np.minimum(pen.box(0, 0.6, 0.28, 0.3), pen.box(0, 0.88, 0.6, 0.14))
    horn = np.maximum(np.abs(pen.y - 0.32) - 0.2 * (pen.x + 1.05), pen.x + 0.4)
    pen.paint(np.minimum(body, np.minimum(pen.box(0.1, 0.35, 0.6, 0.18), horn)), pen.colour)
    angle = 1.0 * motion.lift()  # of the hammer about its grip at (0.95, -0.02)
    x, y = 0.95 - 0.95 * np.cos(angle), -0.02 - 0.95 * np.sin(angle)
    pen.paint(pen.bar(0.95, -0.02, x, y, 0.08), pen.accent, line=0)
    pen.paint(pen.box(x, y, 0.17, 0.22, angle), pen.accent)
    pen.spark(0.0, 0.12, motion.glow())


def _ball(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    pen.paint(pen.box(0, 0.95, 1.0, 0.1), pen.accent)
    gravity = np.float32(2.8 * item.rate**2)  # a bounce of the mean gap rises by 0.7 of the way
    gap = motion.since + motion.until
    height = gravity * np.where(
        motion.since > SECONDS,
        motion.until**2,
        motion.since * np.maximum(np.where(gap > SECONDS, 0.5 / item.rate, gap) - motion.since, 0.0),
    )
    y = (0.42 - 1.05 * np.minimum(height, 1.0)).astype(np.float32)
    disc = pen.circle(0, y, 0.43)
    pen.paint(disc, pen.colour)
    pen.paint(np.maximum(np.abs(pen.y - y) - 0.1, disc + 0.05), pen.accent, line=0)
    pen.spark(0.0, 0.88, motion.glow())


def _bell(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    x = 0.5 * motion.pendulum(item.notes)
    dome = np.maximum(pen.ellipse(0, 0.15, 0.58, 0.95), pen.y - 0.3)
    pen.paint(pen.circle(0, -0.88, 0.14), pen.accent)
    pen.paint(np.minimum(dome, pen.box(0, 0.36, 0.82, 0.13)), pen.colour)
    pen.paint(pen.box(0, 0.12, 0.52, 0.05), pen.accent, line=0)
    pen.paint(np.minimum(pen.bar(0.6 * x, 0.5, x, 0.75, 0.05), pen.circle(x, 0.75, 0.19)), pen.accent)
    glow = motion.glow()
    left = np.array([note == 0 for note in (*item.notes, 0)])[motion.last]
    pen.spark(-0.72, 0.75, glow * left)
    pen.spark(0.72, 0.75, glow * ~left)


def _bird(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    gape = 0.28 * motion.active
    pen.paint(pen.bar(-0.45, 0.2, -1.0, -0.1, 0.14), pen.accent)
    pen.paint(
        np.minimum(pen.bar(-0.1, 0.5, -0.1, 0.95, 0.04), pen.bar(0.15, 0.5, 0.15, 0.95, 0.04)), pen.outline, line=0
    )
    pen.paint(np.minimum(pen.ellipse(-0.1, 0.25, 0.65, 0.42), pen.circle(0.38, -0.3, 0.36)), pen.colour)
    pen.paint(pen.circle(0.42, -0.42, 0.1), (0.05, 0.05, 0.05), line=0)
    pen.paint(pen.bar(0.68, -0.3, 1.02, -0.25 - gape, 0.08), pen.accent, line=0)
    pen.paint(pen.bar(0.68, -0.22, 1.02, -0.22 + gape, 0.08), pen.accent, line=0)
    pen.paint(pen.bar(0.1, 0.15, -0.5, 0.3 - 1.6 * gape, 0.15), pen.accent)


def _cymbals(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    x = 0.19 + 0.55 * motion.lift()
    for side in (-1, 1):
        pen.paint(pen.box(side * (x + 0.18), 0, 0.14, 0.12), pen.accent)
        pen.paint(pen.ellipse(side * x, 0, 0.2, 0.95), pen.colour)
    pen.spark(0, -0.6, motion.glow())
    pen.spark(0, 0.6, motion.glow())


def _drip(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    pen.paint(np.minimum(pen.box(-0.5, -0.75, 0.5, 0.14), pen.box(0, -0.62, 0.15, 0.27)), pen.accent)
    pen.paint(pen.bar(-0.5, -1.0, -0.5, -0.8, 0.1), pen.accent, line=0)
    pen.paint(pen.ellipse(0, 0.8, 1.0, 0.24), pen.colour)
    fallen = np.clip(1 - motion.until / 0.3, 0.0, 1.0)
    y = -0.25 + 1.0 * fallen**2
    hanging = np.clip(2 - motion.until / 0.3, 0.0, 1.0)  # it swells for as long as it falls
    drop = np.minimum(pen.circle(0, y, 0.17 * hanging), pen.bar(0, y - 0.22 * hanging, 0, y - 1e-3, 0.06))
    pen.shine(drop - 0.05, pen.outline, (hanging > 0.1).astype(np.float32))
    pen.shine(drop, pen.colour, (hanging > 0.1).astype(np.float32))
    wave = 0.2 + 2.0 * np.minimum(motion.since, 0.4)
    ring = np.abs(np.sqrt(pen.x**2 + (4 * (pen.y - 0.8)) ** 2) - wave) - 0.09
    pen.shine(ring, WHITE, motion.force * np.clip(1 - motion.since / 0.35, 0.0, 1.0))
    pen.spark(0, 0.7, motion.glow())


def _drum(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    pen.paint(np.minimum(pen.box(0, 0.52, 0.8, 0.3), pen.ellipse(0, 0.8, 0.8, 0.2)), pen.colour)
    for side in (-1, 1):
        pen.paint(pen.bar(side * 0.75, 0.35, side * 0.3, 0.9, 0.05), pen.accent, line=0)
        pen.paint(pen.bar(0, 0.4, side * 0.3, 0.9, 0.05), pen.accent, line=0)
    pen.paint(pen.ellipse(0, 0.22, 0.8, 0.22), WHITE)
    lift = motion.lift()
    pen.paint(
        np.minimum(
            pen.bar(0.95, -0.3 - 0.5 * lift, 0.05, 0.14 - 1.0 * lift, 0.07), pen.circle(0.05, 0.12 - 1.0 * lift, 0.13)
        ),
        pen.accent,
    )
    pen.spark(0.05, 0.15, motion.glow())


def _engine(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    turn = 2 * np.pi * motion.cycles
    pen.paint(pen.box(0.55, 0.0, 0.13, 0.35), pen.accent)
    pen.paint(pen.box(-0.45, -0.1, 0.34, 0.3), pen.accent)
    pen.paint(pen.box(0, 0.5, 0.95, 0.38), pen.colour)
    pen.paint(pen.circle(0.4, 0.5, 0.32), pen.accent)
    pen.paint(
        np.minimum(
            pen.box(-0.45, -0.5 + 0.22 * np.cos(turn), 0.1, 0.3), pen.box(-0.45, -0.76 + 0.22 * np.cos(turn), 0.32, 0.1)
        ),
        pen.colour,
    )
    pen.paint(pen.bar(0.4 - 0.26 * np.sin(turn), 0.5 + 0.26 * np.cos(turn), 0.4, 0.5, 0.08), pen.outline, line=0)
    rising = np.minimum(motion.since, 0.3)
    puff = pen.circle(0.55, -0.5 - 1.2 * rising, 0.14 + 0.5 * rising)
    pen.shine(puff, WHITE, motion.active * np.clip(1 - motion.since / 0.3, 0.0, 1.0))


def _fan(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    pen.paint(np.minimum(pen.box(0, 0.8, 0.1, 0.2), pen.box(0, 0.98, 0.5, 0.1)), pen.accent)
    radius = np.sqrt(pen.x**2 + (pen.y + 0.15) ** 2)
    angle = 3 * np.arctan2(pen.x, -(pen.y + 0.15))
    pen.paint(np.abs(radius - 0.85) - 0.09, pen.accent, line=0)
    turn = 2 * np.pi * motion.cycles  # a third of a full turn for each blade that passes the top
    petals = np.cos(angle) * np.cos(turn) + np.sin(angle) * np.sin(turn)
    pen.paint(0.5 * (radius - 0.14 - 0.6 * np.maximum(petals, 0.0)), pen.colour, line=0.8)
    pen.paint(pen.circle(0, -0.15, 0.14), pen.accent)


def _glass(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    cup = pen.ellipse(-0.15, -0.6, 0.5, 0.75)
    stem = np.minimum(pen.box(-0.15, 0.5, 0.06, 0.4), pen.box(-0.15, 0.92, 0.42, 0.08))
    pen.paint(np.minimum(np.maximum(cup, -0.7 - pen.y), stem), pen.colour)
    pen.paint(np.maximum(cup + 0.1, -0.35 - pen.y), pen.accent, line=0)
    x = 0.46 + 0.42 * motion.lift()
    spoon = np.minimum(pen.ellipse(x, -0.45, 0.12, 0.2), pen.bar(x, -0.3, x + 0.1, 0.6, 0.05))
    pen.paint(spoon, pen.accent, line=0.8)
    wave = 0.1 + 2.5 * np.minimum(motion.since, 0.3)
    pen.shine(
        np.abs(pen.circle(0.4, -0.5, wave)) - 0.06, WHITE, motion.force * np.clip(1 - motion.since / 0.3, 0.0, 1.0)
    )
    pen.spark(0.4, -0.5, motion.glow())


def _metronome(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    pen.paint(np.maximum(np.abs(pen.x) - 0.42 - 0.2 * pen.y, np.abs(pen.y - 0.05) - 0.93), pen.colour)
    pen.paint(pen.box(0, 0.75, 0.4, 0.14), pen.accent, line=0)
    angle = 0.75 * motion.pendulum(item.notes)
    x, y = np.sin(angle), np.cos(angle)
    pen.paint(pen.bar(0, 0.6, 1.45 * x, 0.6 - 1.45 * y, 0.07), pen.outline, line=0)
    pen.paint(pen.circle(1.0 * x, 0.6 - 1.0 * y, 0.2), pen.accent)
    pen.shine(pen.circle(1.0 * x, 0.6 - 1.0 * y, 0.25), WHITE, motion.glow())


def _robot(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    pen.paint(np.minimum(pen.bar(0, -0.6, 0, -0.9, 0.05), pen.circle(0, -0.92, 0.13)), pen.accent)
    pen.paint(np.minimum(pen.box(-0.85, 0.1, 0.13, 0.22), pen.box(0.85, 0.1, 0.13, 0.22)), pen.accent)
    pen.paint(pen.box(0, 0.15, 0.78, 0.75), pen.colour)
    for side in (-0.35, 0.35):
        pen.paint(pen.circle(side, -0.15, 0.2), WHITE)
        pen.paint(pen.circle(side, -0.15, 0.09), (0.05, 0.05, 0.05), line=0)
    # Wide and flat for i and e, round for o and u, large for a.
    width = np.array([0.42, 0.52, 0.16, 0.46, 0.26], np.float32)[np.array([*item.notes, 0])[motion.last]]
    height = np.array([0.24, 0.1, 0.14, 0.15, 0.22], np.float32)[np.array([*item.notes, 0])[motion.last]]
    dx, dy = np.abs(pen.x) - np.where(motion.active > 0.5, width, 0.4), np.abs(pen.y - 0.52)
    pen.paint(np.maximum(dx, dy - np.maximum(0.04, motion.active * height)), (0.05, 0.05, 0.05), line=0)


def _shaker(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    tilt = 0.5 * np.cos(2 * np.pi * motion.cycles)
    x, y = 1.1 * np.sin(tilt), 0.75 - 1.1 * np.cos(tilt)
    pen.paint(pen.bar(0, 0.95, x, y, 0.11), pen.accent)
    pen.paint(pen.circle(x, y, 0.46), pen.colour)
    for dx, dy in ((-0.2, -0.1), (0.18, -0.18), (0.02, 0.2)):
        pen.paint(pen.circle(x + dx, y + dy, 0.1), pen.accent, line=0)


def _siren(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    x = 0.34 * np.cos(2 * np.pi * motion.cycles)  # the light is on the right when the pitch is highest
    pen.paint(np.maximum(pen.ellipse(0, 0.45, 0.66, 1.0), pen.y - 0.5), pen.colour)
    pen.paint(pen.box(0, 0.72, 0.9, 0.24), pen.accent)
    pen.shine(pen.circle(x, 0.1, 0.27), WHITE, 0.3 + 0.7 * motion.active)
    for side in (-1, 1):
        lit = motion.active * np.clip(side * x / 0.34 - 0.2, 0.0, 1.0)
        rays = np.minimum(
            pen.bar(side * 0.72, 0.0, side * 1.02, -0.08, 0.06), pen.bar(side * 0.6, -0.4, side * 0.88, -0.62, 0.06)
        )
        pen.shine(rays, pen.outline, lit)


def _violin(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    pen.paint(np.minimum(pen.box(0, -0.65, 0.1, 0.35), pen.circle(0, -0.95, 0.13)), pen.accent)
    pen.paint(np.minimum(pen.circle(0, 0.52, 0.46), pen.circle(0, -0.08, 0.36)), pen.colour)
    pen.paint(np.minimum(pen.bar(-0.2, 0.3, -0.2, 0.6, 0.04), pen.bar(0.2, 0.3, 0.2, 0.6, 0.04)), pen.outline, line=0)
    x = 0.36 * np.cos(2 * np.pi * motion.cycles)
    pen.paint(pen.bar(x - 0.7, 0.32, x + 0.62, 0.08, 0.05), pen.accent, line=0)
    pen.paint(pen.box(x + 0.62, 0.08, 0.1, 0.13), pen.accent, line=0.8)
    pen.paint(pen.box(x - 0.68, 0.3, 0.05, 0.1), pen.accent, line=0)


def _xylophone(pen: Pen, item: SoundingObject, motion: Motion) -> None:
    places = np.array([-0.75, -0.25, 0.25, 0.75], np.float32)
    pen.paint(pen.box(0, 0.1, 1.0, 0.06), pen.accent, line=0)
    pen.paint(pen.box(0, 0.6, 1.0, 0.06), pen.accent, line=0)
    glow, notes = motion.glow(), np.array([*item.notes, 0])
    for bar, place in enumerate(places):
        shape = pen.box(float(place), 0.35, 0.19, 0.62 - 0.09 * bar)
        pen.paint(shape, pen.colour)
        pen.shine(shape, WHITE, glow * (notes[motion.last] == bar))
    stops = np.array([notes[0], *item.notes, item.notes[-1]])
    here, there = places[stops[motion.last + 1]], places[stops[motion.last + 2]]
    share = np.clip(motion.since / np.maximum(0.9 * (motion.since + motion.until), 1e-3), 0.0, 1.0)
    share = np.where(motion.since + motion.until < SECONDS, share, 0.5).astype(np.float32)
    x = here + (there - here) * share * share * (3 - 2 * share)
    y = 0.3 - 0.9 * motion.lift()
    pen.paint(np.minimum(pen.bar(x, y, x * 0.5 + 0.4, y - 0.5, 0.05), pen.circle(x, y, 0.18)), pen.accent)


# --- silent objects ---------------------------------------------------------------------------------------------------


def _balloon(pen: Pen, item: Distractor) -> None:
    pen.paint(pen.bar(0, 0.4, 0.1, 1.0, 0.06), pen.outline, line=0)
    pen.paint(pen.ellipse(0, -0.25, 0.62, 0.75), pen.colour)
    pen.paint(pen.ellipse(-0.22, -0.5, 0.12, 0.2), WHITE, line=0)


def _cloud(pen: Pen, item: Distractor) -> None:
    puffs = np.minimum(pen.circle(-0.5, 0.15, 0.42), pen.circle(0.5, 0.2, 0.38))
    pen.paint(np.minimum(puffs, np.minimum(pen.circle(0, -0.15, 0.5), pen.box(0, 0.4, 0.6, 0.18))), pen.colour)


def _crate(pen: Pen, item: Distractor) -> None:
    pen.paint(pen.box(0, 0, 0.85, 0.85), pen.colour)
    pen.paint(
        np.minimum(pen.bar(-0.65, -0.65, 0.65, 0.65, 0.1), pen.bar(-0.65, 0.65, 0.65, -0.65, 0.1)), pen.accent, line=0
    )


def _moon(pen: Pen, item: Distractor) -> None:
    pen.paint(np.maximum(pen.circle(0, 0, 0.9), -pen.circle(0.45, -0.15, 0.7)), pen.colour)


def _star(pen: Pen, item: Distractor) -> None:
    angle = 5 * np.arctan2(pen.y, pen.x)
    turn = (2 * np.pi * item.rate * FRAME_TIMES)[:, None]
    rays = np.cos(angle) * np.cos(turn) + np.sin(angle) * np.sin(turn)
    pen.paint(0.7 * (pen.circle(0, 0, 0.62) - 0.3 * rays), pen.colour)


_OBJECTS: dict[str, Callable[[Pen, SoundingObject, Motion], None]] = {
    "anvil": _anvil,
    "ball": _ball,
    "bell": _bell,
    "bird": _bird,
    "cymbals": _cymbals,
    "drip": _drip,
    "drum": _drum,
    "engine": _engine,
    "fan": _fan,
    "glass": _glass,
    "metronome": _metronome,
    "robot": _robot,
    "shaker": _shaker,
    "siren": _siren,
    "violin": _violin,
    "xylophone": _xylophone,
}
_DISTRACTORS: dict[str, Callable[[Pen, Distractor], None]] = {
    "balloon": _balloon,
    "cloud": _cloud,
    "crate": _crate,
    "moon": _moon,
    "star": _star,
}
