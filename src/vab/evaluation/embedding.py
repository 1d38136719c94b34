"""From media files, or from shards, to what a trained task makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vab.console import ProgressBar
from vab.data.extract.cutting import GRACE, Cutting, Segment
from vab.data.extract.encode import encode_pictures, encode_sound
from vab.data.media.open import MediaError
from vab.data.reading.dataset import ShardDataset
from vab.frozen.codec import load_codec
from vab.frozen.protocols import Codec, VisionEncoder
from vab.frozen.vision import load_vision
from vab.spec import Batch, SegmentSpec, UserError
from vab.tasks import AlignTask

MIN_SECONDS = 1.0
"""What a file's last segment must have, as in ``vab extract``, unless it is whole; its first may be shorter."""
_AT_ONCE = 32
"""Segments that go through a network together."""


@dataclass(frozen=True)
class Segments:
    """A file cut into segments, encoded; what was not asked for is None."""

    codes: Tensor | None
    """(W, K, T) int64."""
    features: Tensor | None
    """(W, V, C) float32."""
    steps: Tensor | None
    """(W,) int64, valid ones."""
    frames: Tensor | None
    """(W,) int64, valid ones."""

    def __len__(self) -> int:
        given = self.codes if self.features is None else self.features
        return 0 if given is None else len(given)

    def parts(self, size: int = _AT_ONCE) -> Iterator[Segments]:
        """A few at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            fields = (self.codes, self.features, self.steps, self.frames)
            yield Segments(*(None if field is None else field[part] for field in fields))


@dataclass(frozen=True)
class MediaEncoders:
    """The frozen networks that a task's data were made with, for files that are in no shard."""

    spec: SegmentSpec
    """Of the task."""
    codec: Codec | None
    """None where sound is not looked at."""
    vision: VisionEncoder | None
    """None where pictures are not looked at."""
    device: torch.device
    """Where they are."""

    @torch.inference_mode()
    def encode(self, path: Path, *, audio: bool, video: bool) -> Segments:
        """Cut a file into segments of the task's length and encode each, as ``vab extract`` does.

        Raises:
            MediaError: If it is unreadable, or lacks what is asked for.
        """
        segments = self._segments(path, audio, video)
        rows: tuple[list[Tensor], ...] = ([], [], [], [])
        while some := list(itertools.islice(segments, _AT_ONCE)):
            if audio:
                assert self.codec is not None
                rows[0].append(torch.from_numpy(encode_sound(self.codec, some, self.device).astype(np.int64)))
                steps = [min(self.codec.steps_for(segment.valid_samples), self.spec.num_steps) for segment in some]
                rows[2].append(torch.tensor(steps))
            if video:
                assert self.vision is not None
                features = encode_pictures(self.vision, some, self.spec.num_frames, self.device)
                rows[1].append(torch.from_numpy(features).float())
                rows[3].append(torch.tensor([segment.valid_frames for segment in some]))
        return Segments(*(torch.cat(row).to(self.device) if row else None for row in rows))

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
    """The networks by the names that a checkpoint carries.

    Raises:
        UserError: If their weights are others than those that the checkpoint's data were made with.
    """
    spec.require_stated(audio=audio, video=video)
    codec = load_codec(spec.codec, device) if audio else None
    vision = load_vision(spec.vision, device) if video else None
    for kind, network, expected in (("codec", codec, spec.codec_hash), ("vision encoder", vision, spec.vision_hash)):
        if network is not None and network.weight_hash != expected:
            raise UserError(
                f"the checkpoint was trained with {kind} {network.name} of weights {expected[:12]}, but "
                f"{network.weight_hash[:12]} is installed: install the weights it was trained with"
            )
    return MediaEncoders(spec, codec, vision, device)


@torch.inference_mode()
def embed_file(task: AlignTask, encoders: MediaEncoders, path: Path, side: str) -> Tensor:
    """(E,) float32 of unit length: the mean over a file's segments of their embeddings.

    Raises:
        MediaError: If it is unreadable, or lacks sound (``side`` audio) or picture (video).
    """
    segments = encoders.encode(path, audio=side == "audio", video=side == "video")
    rows = []
    for part in segments.parts():
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
