"""What one sound is generated from: the request, and its media as the model reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vab.data.media import segments as media
from vab.frozen.protocols import Codec
from vab.generation.windows import Windows
from vab.spec import SegmentSpec, UserError

MIN_SECONDS = 0.02
"""The shortest sound that can be requested."""
ROUNDING_SECONDS = 0.1
"""A kept span may end this much after the sound: sound tracks end a little before or after their picture."""
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SPAN = re.compile(rf"\s*{_NUMBER}?\s*-\s*{_NUMBER}?\s*")


@dataclass(frozen=True)
class Request:
    """One sound to generate.

    Raises:
        UserError: If ``keep`` is not a list of spans.
    """

    source: Path
    """Video or still picture."""
    name: str
    """The file's name; the random numbers depend on it, the variation and the seed."""
    variation: int = 0
    """0 for a single output."""
    audio: Path | None = None
    """File with the known sound; None means the source's own sound track, if any of it is kept."""
    keep: str | None = None
    """Seconds of the known sound to keep, such as ``0-2,5-``; all of it if only ``audio`` is given."""
    keep_levels: int = 0
    """Coarsest levels to keep from the known sound everywhere; the finer ones are generated."""
    seconds: float | None = None
    """Length: of the sound for a still picture (a segment by default), or the maximum for a video."""

    def __post_init__(self) -> None:
        """Check ``keep`` before any media are read."""
        if self.keep is not None:
            parse_spans(self.keep, math.inf)

    @property
    def keeps_sound(self) -> bool:
        """Whether any of a known sound is kept."""
        return self.audio is not None or self.keep is not None or self.keep_levels != 0


@dataclass(frozen=True)
class KnownSound:
    """The kept part of a sound of T steps and N samples."""

    codes: Tensor
    """(K, T) int64; arbitrary where not kept."""
    mask: Tensor
    """(K, T) bool: True = kept."""
    waveform: Tensor
    """(M,) float32, M <= N: the codec round trip of the known sound."""
    spans: list[tuple[int, int]]
    """(first, one past the last) sample of each part whose waveform is kept."""


@dataclass(frozen=True)
class Prepared(Windows):
    """A request with its media read and encoded; on the CPU."""

    request: Request
    samples: int
    """N of the sound."""
    known: KnownSound | None = None
    """What is kept of a known sound."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user about the input."""


def length_of(request: Request, spec: SegmentSpec) -> float:
    """Seconds of sound to generate.

    Raises:
        MediaError: If the source has no picture or cannot be read.
        UserError: If ``seconds`` is out of range.
    """
    wanted = request.seconds
    if wanted is not None and not MIN_SECONDS <= wanted < math.inf:
        raise UserError(f"--seconds must be at least {MIN_SECONDS}, got {wanted}")
    if media.is_picture(request.source):
        return spec.segment_seconds if wanted is None else wanted
    seconds = media.scan_packets(request.source).video_end
    if not seconds:
        raise media.MediaError("no_video", request.source, "has no picture to make sound for")
    return seconds if wanted is None else min(seconds, wanted)


def encode_video(
    path: Path, starts: list[int], seconds: float, spec: SegmentSpec, encode: Callable[[np.ndarray], Tensor]
) -> tuple[Tensor, list[int], list[str]]:
    """Features of all windows of a video or a still picture, in one pass over the file.

    A frame that several windows share is encoded once. A still picture is shown for the whole length.

    Args:
        path: The file.
        starts: First step of each window.
        seconds: Where the sound ends; later frames are padding.
        spec: Of the model.
        encode: (n, H, W, 3) uint8 RGB to (n, C) float32.

    Returns:
        (W, V, C) float32; for each window its number of frames that are not padding; and notes for the user.
    """
    offsets = (np.arange(spec.num_frames) + 0.5) / spec.video_fps
    times = np.round(np.array(starts)[:, None] / spec.code_rate + offsets, 6)  # (W, V), equal for shared frames
    valid = times < seconds
    notes = []
    if media.is_picture(path):
        pixels, had_alpha = media.read_picture(path)
        features = encode(pixels[None]).expand(*times.shape, -1)
        if had_alpha:
            notes.append("its transparent parts are shown on white")
    else:
        unique, places = np.unique(times, return_inverse=True)
        places = places.reshape(times.shape)
        encoded: list[Tensor] = []
        frames_read = 0
        for segment in media.stream_frames(path, unique):
            encoded.append(encode(segment.frames))
            frames_read += segment.valid_frames
        features = torch.cat(encoded)[torch.from_numpy(places)]
        valid &= places < frames_read
    return features, [max(1, int(count)) for count in valid.sum(1)], notes


def read_known_sound(
    request: Request,
    samples: int,
    levels: int,
    codec: Codec,
    round_trip: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[KnownSound, list[str]]:
    """Read and encode the known sound of a request.

    Args:
        request: With something to keep.
        samples: N of the sound to generate; the known sound is cut there.
        levels: K of the sound to generate.
        codec: Of the model.
        round_trip: Waveform (M,) to its codes (K of the codec, T) and their decoded waveform (M,).

    Returns:
        What is kept, and notes for the user.

    Raises:
        MediaError: If the sound cannot be read.
        UserError: If ``keep`` or ``keep_levels`` exceed what there is.
    """
    if not 0 <= request.keep_levels < levels:
        raise UserError(
            f"--keep_levels must leave a level to make of the model's {levels}: 0 to {levels - 1}, "
            f"got {request.keep_levels}"
        )
    rate = codec.sample_rate
    path = request.audio or request.source
    if request.audio is None and media.is_picture(path):
        raise UserError(f"{path} is a picture without sound: give the sound to keep with --audio FILE")
    try:
        sound = media.read_audio(path, rate, 0.0, samples / rate + 1.0)
    except media.MediaError as error:
        if error.reason == "no_audio" and request.audio is None:
            raise media.MediaError("no_audio", path, "has no sound to keep: give it with --audio FILE") from error
        raise
    notes = []
    if request.audio is not None and sound.valid_samples / rate > samples / rate + 0.1:
        notes.append(f"{path} is longer than the {samples / rate:.2f} s of the output: the rest is left out")
    end = min(samples, sound.valid_samples)
    if samples - end <= ROUNDING_SECONDS * rate:
        end = samples  # a track that ends slightly before its picture is silent up to the end
    codes, waveform = round_trip(torch.from_numpy(sound.waveform[:end]))

    keep = request.keep
    if keep is None and request.keep_levels == 0:
        keep = "0-"
    seconds = [] if keep is None else parse_spans(keep, end / rate)
    spans = [(round(first * rate), min(end, round(last * rate))) for first, last in seconds]
    spans = [(first, last) for first, last in spans if first < last]
    total, per_step = codec.steps_for(samples), codec.samples_per_step
    mask = torch.zeros(levels, total, dtype=torch.bool)
    mask[:] = steps_within(spans, total, samples, per_step)
    mask[: request.keep_levels] |= steps_within([(0, end)], total, samples, per_step)
    if mask.all():
        notes.append("all of its sound is kept: the output is its codec round trip, and nothing is generated")
    known_codes = torch.zeros(levels, total, dtype=torch.int64)
    known_codes[:, : codes.shape[1]] = codes[:levels]
    return KnownSound(known_codes, mask, waveform, spans), notes


def parse_spans(text: str, end: float) -> list[tuple[float, float]]:
    """Read spans of seconds such as ``0-2,5-``.

    Args:
        text: ``a-b``, ``a-`` (to the end) or ``-b`` (from the start), separated by commas; in any order.
        end: End of the sound in seconds.

    Returns:
        (first, last) in seconds, sorted, merged where they touch, none beyond ``end``.

    Raises:
        UserError: If a span is malformed, is empty or reversed, or lies beyond the end.
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
    """Which codec steps lie entirely within spans of samples.

    Args:
        spans: (first, one past the last) sample.
        steps: T of the sound.
        samples: N of the sound, where its last step ends.
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
