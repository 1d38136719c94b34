"""Encode media files as a trained task needs them, and embed files and records with an alignment."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vab.console import ProgressBar
from vab.data.extract.cutting import GRACE, Cutting, Segment
from vab.data.extract.encode import encode_pictures, encode_sound
from vab.data.media.open import MediaError
from vab.data.reading.dataset import ShardDataset
from vab.frozen.loading import load_networks
from vab.frozen.protocols import Codec, VisionEncoder
from vab.spec import Batch, SegmentSpec
from vab.tasks import AlignTask

MIN_SECONDS = 1.0
"""What a file's last segment must have, as in ``vab extract``, unless it is whole; its first may be shorter."""
_AT_ONCE = 32
"""Segments that go through a network together."""


class Segments(NamedTuple):
    """Segments of a file, encoded, in the order of ``ClassifyTask.probabilities``; None for what is not asked for."""

    codes: Tensor | None
    """(W, K, T) int64."""
    features: Tensor | None
    """(W, V, C) float32."""
    steps: Tensor | None
    """(W,) int64, valid ones."""
    frames: Tensor | None
    """(W,) int64, valid ones."""


@dataclass(frozen=True)
class MediaEncoders:
    """The frozen networks that encoded a task's data, for media files that are in no shard."""

    spec: SegmentSpec
    """Of the task."""
    codec: Codec | None
    """None if sound is not needed."""
    vision: VisionEncoder | None
    """None if pictures are not needed."""
    device: torch.device
    """Of the networks."""

    def encode(self, path: Path, *, audio: bool, video: bool) -> Iterator[Segments]:
        """Cut a file into segments of the task's length and encode them, as ``vab extract`` does, 32 at a time.

        Raises:
            MediaError: If it is unreadable, or lacks what is asked for.
        """
        segments = self._segments(path, audio, video)
        while some := list(itertools.islice(segments, _AT_ONCE)):
            yield self._encode(some, audio, video)

    @torch.inference_mode()
    def _encode(self, segments: Sequence[Segment], audio: bool, video: bool) -> Segments:
        codes = features = steps = frames = None
        if audio:
            assert self.codec is not None
            codes = torch.from_numpy(encode_sound(self.codec, segments, self.device).astype(np.int64)).to(self.device)
            valid = [min(self.codec.steps_for(segment.valid_samples), self.spec.num_steps) for segment in segments]
            steps = torch.tensor(valid, device=self.device)
        if video:
            assert self.vision is not None
            encoded = encode_pictures(self.vision, segments, self.spec.num_frames, self.device)
            features = torch.from_numpy(encoded).float().to(self.device)
            frames = torch.tensor([segment.valid_frames for segment in segments], device=self.device)
        return Segments(codes, features, steps, frames)

    def _segments(self, path: Path, audio: bool, video: bool) -> Iterator[Segment]:
        spec = self.spec
        cutting = Cutting(
            segment_seconds=spec.segment_seconds,
            sample_rate=spec.sample_rate,
            video_fps=spec.video_fps,
            segments="all",
            hop_seconds=spec.segment_seconds,
            min_seconds=min(MIN_SECONDS, spec.segment_seconds - GRACE),
            silence_db=-math.inf,
            still_pictures="keep",
            preprocess=np.asarray if self.vision is None else self.vision.resizer,
            streams="both" if audio and video else "audio" if audio else "video",
            short_first=True,
        )
        for item in cutting.decode(path, None):
            if isinstance(item, Segment):
                yield item
            elif item.reason != "too_short" or not item.start:  # a later segment may be shorter than the packets say
                raise MediaError(item.reason, path, item.detail)


def load_encoders(spec: SegmentSpec, device: torch.device, *, audio: bool, video: bool) -> MediaEncoders:
    """Load the networks that a checkpoint's spec names; errors are those of ``load_networks``."""
    return MediaEncoders(spec, *load_networks(spec, device, audio=audio, video=video), device)


@torch.inference_mode()
def embed_file(task: AlignTask, encoders: MediaEncoders, path: Path, side: str) -> Tensor:
    """(E,) float32 of unit length: the mean over a file's segments of their embeddings.

    Raises:
        MediaError: If it is unreadable, or lacks sound (``side`` audio) or picture (video).
    """
    rows = []
    for part in encoders.encode(path, audio=side == "audio", video=side == "video"):
        if side == "audio":
            assert part.codes is not None
            rows.append(task.embed_audio(part.codes, part.steps))
        else:
            assert part.features is not None
            rows.append(task.embed_video(part.features, part.frames))
    return F.normalize(torch.cat(rows).mean(0), dim=0).cpu()


@torch.inference_mode()
def embed_records(
    task: AlignTask, dataset: ShardDataset, numbers: Sequence[int], batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(N, E) float32 audio and video embeddings of records, on the CPU, in order; a bar on stderr if it is a terminal.

    A record's embedding does not depend on ``batch_size``, but for the network's rounding.
    """
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    with ProgressBar("embedding", len(numbers), "records") as bar:
        for start in range(0, len(numbers), batch_size):
            batch: Batch = dataset.read(numbers[start : start + batch_size]).to(device)
            for side, rows in zip(sides, task(batch), strict=True):
                side.append(rows.cpu())
            bar.advance(len(batch))
    return torch.cat(sides[0]), torch.cat(sides[1])
