"""Drawing tools of the demo world: the motion of an object at every frame, and a pen that fills shapes.

A shape is a signed distance (negative inside) on a small patch of pixels around an object, so smooth edges cost one
multiplication. In a patch one unit is half the width of the object: an object fills [-1, 1] in x and y, y downwards.
Parts that do not move are drawn once for all frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vab.demo.scene import FPS, NUM_FRAMES, SECONDS, Colour, SoundingObject

MARGIN = 32
"""Width of the border around the picture, pixels; it is drawn on and then cut off."""
REACH = 1.1
"""Half the width of a patch, units."""
NEVER = 100.0
"""Time to an event that does not exist, s: far outside every segment."""
WHITE: Colour = (1.0, 1.0, 1.0)
FRAME_TIMES = ((np.arange(NUM_FRAMES) + 0.5) / FPS).astype(np.float32)
"""(F,) time of each frame, s."""

Number = float | np.ndarray
"""One value for all frames, or (F, 1) float32."""


@dataclass(frozen=True)
class Motion:
    """Where each frame lies between the events of an object: (F, 1) float32 unless stated otherwise."""

    since: np.ndarray
    """Time since the last event, s; above ``SECONDS`` before the first."""
    until: np.ndarray
    """Time until the next event, s; above ``SECONDS`` after the last."""
    last: np.ndarray
    """(F, 1) int: index of the last event, -1 before the first."""
    strength: np.ndarray
    """Strength of the next event; 0 after the last."""
    force: np.ndarray
    """Strength of the last event; 0 before the first."""
    cycles: np.ndarray
    """Number of cycles so far."""
    active: np.ndarray
    """1 while the object sounds, 0 while it rests."""

    @classmethod
    def of(cls, item: SoundingObject) -> Motion:
        """The motion of ``item`` at the times of the frames."""
        moments = np.array([-NEVER, *item.events, NEVER], np.float32)
        strengths = np.array([0.0, *item.strengths, 0.0], np.float32)
        last = np.searchsorted(moments[1:-1], FRAME_TIMES, side="right")  # into moments: 0 is before the first
        column = (slice(None), None)
        return cls(
            since=(FRAME_TIMES - moments[last])[column],
            until=(moments[last + 1] - FRAME_TIMES)[column],
            last=(last - 1)[column],
            strength=strengths[last + 1][column],
            force=strengths[last][column],
            cycles=item.cycles(FRAME_TIMES).astype(np.float32)[column],
            active=item.envelope(FRAME_TIMES, 0.02, 0.02).astype(np.float32)[column],
        )

    def lift(self) -> np.ndarray:
        """Distance of a hammer from its target, 0..1: 0 at a strike; it swings back further before a strong strike."""
        gap = self.since + self.until
        share = self.until / np.minimum(0.35, 0.7 * gap)  # of the swing that is still to come
        peak = 0.4 + 0.6 * self.strength
        fall = np.clip(share / 0.4, 0.0, 1.0)
        back = np.clip((share - 0.4) / 0.6, 0.0, 1.0)  # 1: at rest
        height = peak * (2 * fall - fall**2) * (1 - back) + 0.4 * back
        return height * np.clip(self.since / np.minimum(0.12, 0.3 * gap), 0.0, 1.0)

    def pendulum(self, notes: tuple[int, ...]) -> np.ndarray:
        """Position of a pendulum: -1 at a strike of note 0, 1 at a strike of note 1, 0 before and after all strikes."""
        sides = np.array([0.0, *(2.0 * note - 1.0 for note in notes), 0.0], np.float32)
        here, there = sides[self.last + 1], sides[self.last + 2]
        length = np.clip(self.since + self.until, 0.0, 0.4 if len(notes) < 2 else np.inf)
        between = 0.5 - 0.5 * np.cos(np.pi * np.clip(self.since / np.maximum(length, 1e-3), 0.0, 1.0))
        first = there * (1 - np.clip(self.until / 0.35, 0.0, 1.0)) ** 2
        final = here * np.cos(9.0 * np.minimum(self.since, 9.0)) * np.exp(-4.0 * self.since)
        inner = here + (there - here) * between
        place: np.ndarray = np.where(self.since > SECONDS, first, np.where(self.until > SECONDS, final, inner)).astype(
            np.float32
        )
        return place

    def glow(self) -> np.ndarray:
        """Brightness of the mark of a strike, 0..1: full at once, then fading."""
        return self.force * np.exp(-self.since / 0.09)


class Pen:
    """Draws one object, layer by layer, on a square patch of P pixels for one or all F frames.

    Args:
        size: Half the width of the object, pixels.
        colour: Main colour.
        accent: Second colour.
        outline: Colour of the lines around its parts.
    """

    def __init__(self, size: float, colour: Colour, accent: Colour, outline: Colour) -> None:
        self.size, self.colour, self.accent, self.outline = size, colour, accent, outline
        self.half = int(np.ceil(REACH * size))
        axis = ((np.arange(2 * self.half) + 0.5 - self.half) / size).astype(np.float32)
        y, x = np.meshgrid(axis, axis, indexing="ij")
        self.x, self.y = x.reshape(1, -1), y.reshape(1, -1)  # (1, P)
        self._rgb = np.zeros((1, 3, self.x.size), np.float32)  # (1 or F, 3, P), times the opacity
        self._clear = np.ones((1, 1, self.x.size), np.float32)  # (1 or F, 1, P): how much background is visible

    def circle(self, x: Number, y: Number, radius: Number) -> np.ndarray:
        """Signed distance to a disc, units."""
        dx, dy = self.x - x, self.y - y
        return np.sqrt(dx * dx + dy * dy) - radius

    def ellipse(self, x: Number, y: Number, width: float, height: float) -> np.ndarray:
        """Approximate distance to an ellipse with these half axes."""
        dx, dy = (self.x - x) / width, (self.y - y) / height
        return (np.sqrt(dx * dx + dy * dy) - 1.0) * min(width, height)

    def box(self, x: Number, y: Number, width: float, height: float, angle: Number = 0.0) -> np.ndarray:
        """Distance to a rectangle with these half sides, turned clockwise by ``angle`` radians."""
        dx, dy = self.x - x, self.y - y
        if isinstance(angle, np.ndarray) or angle:
            cos, sin = np.cos(angle), np.sin(angle)
            dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
        return np.maximum(np.abs(dx) - width, np.abs(dy) - height)

    def bar(self, x0: Number, y0: Number, x1: Number, y1: Number, radius: float) -> np.ndarray:
        """Distance to a thick line with round ends."""
        ax, ay = x1 - x0, y1 - y0
        dx, dy = self.x - x0, self.y - y0
        along = np.clip((dx * ax + dy * ay) / (ax * ax + ay * ay), 0.0, 1.0)
        dx, dy = dx - along * ax, dy - along * ay
        return np.sqrt(dx * dx + dy * dy) - radius

    def paint(self, distance: np.ndarray, colour: Colour, line: float = 1.1) -> None:
        """Fill a shape.

        Args:
            distance: (1 or F, P) to the shape, units.
            colour: Colour of the filling.
            line: Width of the outline inside the edge of the shape, pixels; 0 for none.
        """
        pixels = np.flatnonzero(distance.min(axis=0) < 0.5 / self.size)
        distance = distance[:, pixels] * np.float32(self.size)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[:, None]  # (1 or F, 1, pixels)
        rgb = cover * _plane(self.outline if line else colour)
        if line:
            rgb += np.clip(0.5 - line - distance, 0.0, 1.0)[:, None] * (_plane(colour) - _plane(self.outline))
        if len(cover) > 1:
            self._expand()
        self._rgb[:, :, pixels] = self._rgb[:, :, pixels] * (1 - cover) + rgb
        self._clear[:, :, pixels] *= 1 - cover

    def shine(self, distance: np.ndarray, colour: Colour, strength: np.ndarray) -> None:
        """Blend in a shape without outline; its opacity is ``strength`` (F, 1), in [0, 1]."""
        frames = np.flatnonzero(strength[:, 0] > 0.02)
        if not len(frames):
            return
        pixels = np.flatnonzero(distance.min(axis=0) < 0.5 / self.size)
        distance = (distance[frames] if len(distance) > 1 else distance)[:, pixels]
        cover = (np.clip(0.5 - distance * np.float32(self.size), 0.0, 1.0) * strength[frames])[:, None]
        self._expand()
        where = frames[:, None, None], np.arange(3)[:, None], pixels
        self._rgb[where] = self._rgb[where] * (1 - cover) + cover * _plane(colour)
        self._clear[frames[:, None], 0, pixels] *= 1 - cover[:, 0]

    def spark(self, x: float, y: float, strength: np.ndarray) -> None:
        """Mark a strike at (x, y) with a star that flashes."""
        dx, dy = self.x - x, self.y - y
        rays = np.cos(8 * np.arctan2(dy, dx))
        self.shine(np.sqrt(dx * dx + dy * dy) - 0.27 - 0.15 * rays, WHITE, strength)

    def paste(self, frames: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """Paste the patch onto the frames.

        Args:
            frames: (F, 3, side, side) uint8 with ``MARGIN``; changed in place.
            x: (F,) x of the middle of the patch in the picture, pixels.
            y: (F,) y of the middle.
        """
        side = 2 * self.half
        left = np.clip(np.rint(x).astype(int) + MARGIN - self.half, 0, frames.shape[3] - side)
        top = np.clip(np.rint(y).astype(int) + MARGIN - self.half, 0, frames.shape[2] - side)
        rgb = (self._rgb * 255.0 + 0.5).reshape(-1, 3, side, side)
        clear = self._clear.reshape(-1, 1, side, side)
        for k in range(len(frames)):
            part = frames[k, :, top[k] : top[k] + side, left[k] : left[k] + side]
            part[:] = part * clear[k % len(clear)] + rgb[k % len(rgb)]

    def _expand(self) -> None:
        if len(self._rgb) == 1:
            self._rgb = np.repeat(self._rgb, NUM_FRAMES, axis=0)
            self._clear = np.repeat(self._clear, NUM_FRAMES, axis=0)


def _plane(colour: Colour) -> np.ndarray:
    return np.array(colour, np.float32)[:, None]  # (3, 1), against (F, 3, P)
