"""From a request to what the networks need: features of each window, and what is known of the sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vab.data.media import segments as media
from vab.frozen.protocols import Codec
from vab.generation.inpainting import ROUNDING_SECONDS, parse_spans, steps_within
from vab.spec import SegmentSpec, UserError

MIN_SECONDS = 0.02
"""The shortest sound that can be asked for."""


@dataclass(frozen=True)
class Request:
    """One sound to make."""

    source: Path
    """Video or still picture."""
    name: str
    """With the seed and the variation the source of all randomness; the file's name."""
    variation: int = 0
    """0 is what a single output is."""
    audio: Path | None = None
    """Known sound; None means the source's own track where something of it is asked for."""
    keep: str | None = None
    """Seconds of the known sound that stay, such as ``0-2,5-``; all where only ``audio`` is given."""
    keep_levels: int = 0
    """Coarsest levels taken from the known sound everywhere; the finer ones are made anew."""
    seconds: float | None = None
    """Length wanted: of a still picture's sound (a segment by default), or at most of a video's."""

    @property
    def knows_sound(self) -> bool:
        """Whether something of a known sound is asked for."""
        return self.audio is not None or self.keep is not None or self.keep_levels != 0


@dataclass(frozen=True)
class Known:
    """What is known of a sound of T steps and N samples."""

    codes: Tensor
    """(K, T) int64, anything where not known."""
    mask: Tensor
    """(K, T) bool: True = known."""
    waveform: Tensor
    """(M,) float32, M <= N: the codec's round trip of the known sound."""
    spans: list[tuple[int, int]]
    """(first, one past the last) sample that stays as in ``waveform``."""


@dataclass(frozen=True)
class Prepared:
    """A request with its media read and encoded; on the CPU."""

    request: Request
    samples: int
    """N of the sound."""
    steps: int
    """T of the sound."""
    starts: list[int]
    """First step of each window."""
    features: Tensor
    """(W, V, C) float32 of each window."""
    frames: list[int]
    """Of each window, frames that are picture, 1..V."""
    known: Known | None = None
    """What is known of the sound, if anything."""
    notes: list[str] = field(default_factory=list)
    """What a user should be told about the input."""


def length_of(request: Request, spec: SegmentSpec) -> float:
    """Seconds of sound to make.

    Raises:
        MediaError: If the source has no picture or cannot be read.
        UserError: If the length wanted is none.
    """
    wanted = request.seconds
    if wanted is not None and not MIN_SECONDS <= wanted < float("inf"):
        raise UserError(f"--seconds must be at least {MIN_SECONDS}, got {wanted}")
    if media.is_picture(request.source):
        return spec.segment_seconds if wanted is None else wanted
    seconds = media.scan_packets(request.source).video_end
    if not seconds:
        raise media.MediaError("no_video", request.source, "has no picture to make sound for")
    return seconds if wanted is None else min(seconds, wanted)


def window_starts(total: int, window: int, overlap: int) -> list[int]:
    """First steps of windows that cover ``total`` steps, each overlapping the one before by ``overlap`` or more.

    Args:
        total: Steps to cover.
        window: Steps of a window.
        overlap: Steps that neighbours share; the last window is moved back to end at the end.

    Raises:
        UserError: If the overlap leaves nothing new in a window.
    """
    if not 0 <= overlap < window:
        raise UserError(f"the overlap must be at least 0 and below a window's {window} steps, got {overlap}")
    starts = list(range(0, max(1, total - overlap), window - overlap))
    starts[-1] = max(0, min(starts[-1], total - window))
    return starts


def watch_video(
    path: Path, starts: list[int], seconds: float, spec: SegmentSpec, encode: Callable[[np.ndarray], Tensor]
) -> tuple[Tensor, list[int]]:
    """Features of all windows from one pass over a video; a frame that windows share is encoded once.

    Args:
        path: The video.
        starts: First step of each window.
        seconds: Where the sound ends: frames from there on do not count as picture.
        spec: Of the model.
        encode: (n, H, W, 3) uint8 RGB to (n, C) float32.

    Returns:
        (W, V, C) float32, and of each window the frames that are picture.
    """
    offsets = (np.arange(spec.num_frames) + 0.5) / spec.video_fps
    times = np.round(np.array(starts)[:, None] / spec.code_rate + offsets, 6)  # (W, V), equal where windows share
    unique, place = np.unique(times, return_inverse=True)
    encoded: list[Tensor] = []
    running = 0
    for segment in media.stream_frames(path, unique):
        encoded.append(encode(segment.frames))
        running += segment.valid_frames
    place = place.reshape(times.shape)
    valid = (place < running) & (times < seconds)
    return torch.cat(encoded)[torch.from_numpy(place)], [max(1, int(count)) for count in valid.sum(1)]


def watch_picture(
    path: Path, starts: list[int], seconds: float, spec: SegmentSpec, encode: Callable[[np.ndarray], Tensor]
) -> tuple[Tensor, list[int], list[str]]:
    """As ``watch_video`` for a still picture, shown all the time; and what the user should be told."""
    pixels, had_alpha = media.read_picture(path)
    features = encode(pixels[None]).expand(len(starts), spec.num_frames, -1)
    times = np.array(starts)[:, None] / spec.code_rate + (np.arange(spec.num_frames) + 0.5) / spec.video_fps
    notes = ["its transparent parts are shown on white"] if had_alpha else []
    return features, [max(1, int(count)) for count in (times < seconds).sum(1)], notes


def known_sound(
    request: Request,
    samples: int,
    levels: int,
    codec: Codec,
    round_trip: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Known, list[str]]:
    """Read and encode the known sound of a request.

    Args:
        request: With something known.
        samples: N of the sound to make; the known one is cut there.
        levels: K of the sound to make.
        codec: Of the model.
        round_trip: Waveform (M,) to its codes (K of the codec, T) and what the codec makes of them, (M,).

    Returns:
        What is known, and what the user should be told.

    Raises:
        MediaError: If the sound cannot be read.
        UserError: If ``keep`` or ``keep_levels`` ask for what there is not.
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
        heard = media.read_audio(path, rate, 0.0, samples / rate + 1.0)
    except media.MediaError as error:
        if error.reason == "no_audio" and request.audio is None:
            raise media.MediaError("no_audio", path, "has no sound to keep: give it with --audio FILE") from error
        raise
    notes = []
    if request.audio is not None and heard.valid_samples / rate > samples / rate + 0.1:
        notes.append(f"{path} is longer than the {samples / rate:.2f} s of the output: the rest is left out")
    end = min(samples, heard.valid_samples)
    if samples - end <= ROUNDING_SECONDS * rate:
        end = samples  # a track that ends a little before its picture is silent to the end
    codes, waveform = round_trip(torch.from_numpy(heard.waveform[:end]))

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
        notes.append("all of its sound is kept: the output is what the codec makes of it, and nothing is generated")
    filled = torch.zeros(levels, total, dtype=torch.int64)
    filled[:, : codes.shape[1]] = codes[:levels]
    return Known(filled, mask, waveform, spans), notes
