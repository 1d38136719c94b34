"""What is kept of a known sound: which seconds, which codes, and how kept and made sound are joined."""

from __future__ import annotations

import itertools
import math
import re

import torch
from torch import Tensor

from vab.spec import UserError

FADE_SECONDS = 0.015
"""Length of the cross-fade where kept sound meets made sound; it lies on the made side."""
ROUNDING_SECONDS = 0.1
"""A span may end this much after the sound: tracks end a little before or after the picture that they belong to."""
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SPAN = re.compile(rf"\s*{_NUMBER}?\s*-\s*{_NUMBER}?\s*")


def parse_spans(text: str, end: float) -> list[tuple[float, float]]:
    """Read spans of seconds such as ``0-2,5-``.

    Args:
        text: ``a-b``, ``a-`` (to the end) or ``-b`` (from the beginning), joined by commas; in any order.
        end: Where the sound ends, s.

    Returns:
        (first, last) in seconds, sorted, merged where they touch, none beyond ``end``.

    Raises:
        UserError: If a span is not one, is empty or reversed, or lies beyond the end.
    """
    spans = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part)
        if not match or match.groups() == (None, None):
            raise UserError(
                f"--keep takes spans of seconds, such as 0-2,5- (from 5 s to the end); {part.strip()!r} is none"
            )
        first = float(match.group(1) or 0.0)
        last = end if match.group(2) is None else float(match.group(2))
        if match.group(2) is not None and last <= first:
            raise UserError(f"--keep: the span {part.strip()} is empty: its end must be above its beginning")
        if first >= end or last > end + ROUNDING_SECONDS:
            raise UserError(f"--keep: the span {part.strip()} lies beyond the sound, which ends at {end:.2f} s")
        spans.append((first, min(last, end)))
    merged: list[tuple[float, float]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def steps_within(spans: list[tuple[int, int]], steps: int, samples: int, samples_per_step: float) -> Tensor:
    """Which codec steps lie wholly within spans of samples.

    Args:
        spans: (first, one past the last) sample.
        steps: T, of the sound.
        samples: N, of the sound: its last step ends there.
        samples_per_step: Of the codec.

    Returns:
        (T,) bool.
    """
    begin = torch.arange(steps, dtype=torch.float64) * samples_per_step
    end = (begin + samples_per_step).clamp(max=samples)
    within = torch.zeros(steps, dtype=torch.bool)
    for first, last in spans:
        within |= (begin >= first - 1e-6) & (end <= last + 1e-6)
    return within


def splice(made: Tensor, known: Tensor, spans: list[tuple[int, int]], fade: int) -> Tensor:
    """Put kept spans of a known sound into a made one.

    The kept samples stay exactly as they are, so the cross-fade is on the made side. It is of equal gain, a raised
    cosine: near a seam both sounds come from nearly the same codes and are alike, and the gains of an equal-power fade
    would add up to a bump of up to 3 dB, which could clip. Where they are not alike the dip is 3 dB for some
    milliseconds, which passes unheard.

    Args:
        made: (N,) float. Made with the codes of the kept spans as context.
        known: (M,) float, M <= N. Where it has ended, the fade is towards the made sound, moved to where the known one
            stopped, so that there is no step.
        spans: (first, one past the last) kept sample, sorted, apart, none beyond M.
        fade: Samples of a cross-fade; fewer in a gap that is too short for two.

    Returns:
        (N,) float.
    """
    if not spans:
        return made
    count, ended = len(made), len(known)
    other = made + (known[-1] - made[ended - 1])
    other[:ended] = known
    share = torch.ones(count)  # of the made sound
    edges = [(0, 0), *spans, (count, count)]
    for (_, left), (right, _) in itertools.pairwise(edges):
        sides = (left > 0) + (right < count)
        length = min(fade, (right - left) // max(1, sides))
        ramp = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(length) + 0.5) / max(1, length))
        if left > 0:
            share[left : left + length] = ramp
        if right < count:
            share[right - length : right] = ramp.flip(0)
    joined = share * made + (1 - share) * other
    for first, last in spans:
        joined[first:last] = known[first:last]
    return joined
