"""The generated sound: join it with what is kept, measure it, and scale it down if it would clip."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vab.generation.request import Prepared
from vab.metrics.health import Health, health, warnings_for
from vab.spec import SegmentSpec

FADE_SECONDS = 0.015
"""Length of the cross-fade between kept and generated sound; it lies in the generated sound."""


@dataclass(frozen=True)
class Sound:
    """A generated sound."""

    waveform: Tensor
    """(N,) float32 at the codec's rate, on the CPU. Generated parts are within full scale; kept parts are unchanged."""
    codes: Tensor
    """(K, T) int64, on the CPU."""
    health: Health
    """Level, silence and variety, measured before it is scaled down."""
    warnings: list[str]
    """What may be wrong with it, in words."""
    gain_db: float = 0.0
    """Gain of the generated parts, at most 0: output that would clip is scaled down as a whole."""


def finished_sound(
    item: Prepared, waveform: Tensor, codes: Tensor, spec: SegmentSpec, statistics: Mapping[str, float] | None
) -> Sound:
    """Make the sound of a request from its decoded codes.

    Args:
        item: The request.
        waveform: (N,) float32, decoded from the codes.
        codes: (K, T) int64.
        spec: Of the model.
        statistics: Of the training audio, for the warnings.
    """
    known, fade = item.known, round(FADE_SECONDS * spec.sample_rate)

    def joined(generated: Tensor) -> Tensor:
        return generated if known is None else splice(generated, known.waveform, known.spans, fade)

    whole = joined(waveform)
    measured = health(whole, codes, spec.sample_rate, spec.code_rate)
    warnings = warnings_for(measured, statistics)
    is_generated = torch.ones(len(waveform), dtype=torch.bool)
    for first, last in [] if known is None else known.spans:
        is_generated[first:last] = False
    gain = 1.0
    if is_generated.any():
        gain = min(1.0, 1 / max(float(whole[is_generated].abs().max()), 1e-9))
    if not is_generated.all() and (peak := float(whole[~is_generated].abs().max())) > 1:
        warnings.append(f"the kept sound peaks at {peak:.2f}, beyond full scale: 16-bit files and video clip it")
    if gain == 1:
        return Sound(whole, codes, measured, warnings)
    # A cross-fade contains some of the kept sound, which may exceed full scale where the rest does not.
    scaled = torch.where(is_generated, joined(waveform * gain).clamp(-1, 1), whole)
    return Sound(scaled, codes, measured, warnings, 20 * math.log10(gain))


def splice(made: Tensor, known: Tensor, spans: list[tuple[int, int]], fade: int) -> Tensor:
    """Put the kept spans of a known sound into a generated sound.

    The kept samples do not change, so the cross-fade lies in the generated sound. Its gains add up to 1 (a raised
    cosine): near a seam both sounds come from nearly the same codes, and an equal-power fade would raise the level by
    up to 3 dB, which could clip. Where the sounds differ, the level drops by 3 dB for some milliseconds, inaudibly.

    Args:
        made: (N,) float. Generated with the codes of the kept spans as context.
        known: (M,) float, M <= N. After its end, the fade is towards the generated sound, shifted to the last known
            value, so that there is no step.
        spans: (first, one past the last) kept sample; sorted, not touching, none beyond M.
        fade: Samples of a cross-fade; fewer in a gap that is too short for two.

    Returns:
        (N,) float.
    """
    if not spans:
        return made
    count, ended = len(made), len(known)
    other = made + (known[-1] - made[ended - 1])
    other[:ended] = known
    share = torch.ones(count)  # of the generated sound
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
