"""The two frozen networks of an extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vab.data.extract.cutting import Segment
from vab.frozen.codec import Codec
from vab.frozen.vision import VisionEncoder
from vab.spec import SegmentSpec


@dataclass(frozen=True)
class Encoders:
    """The two frozen networks of an extraction."""

    codec: Codec
    """Sound to codes."""
    vision: VisionEncoder
    """Frames to features."""
    device: torch.device
    """Where both are."""

    def spec(self, segment_seconds: float, video_fps: float) -> SegmentSpec:
        """The numbers of segments of this length."""
        return SegmentSpec(
            segment_seconds=segment_seconds,
            sample_rate=self.codec.sample_rate,
            code_rate=self.codec.code_rate,
            num_codebooks=self.codec.num_codebooks,
            codebook_size=self.codec.codebook_size,
            code_dim=self.codec.code_dim,
            num_steps=self.codec.steps_for(round(segment_seconds * self.codec.sample_rate)),
            video_fps=video_fps,
            num_frames=round(segment_seconds * video_fps),
            feature_dim=self.vision.feature_dim,
            codec=self.codec.name,
            codec_hash=self.codec.weight_hash,
            vision=self.vision.name,
            vision_hash=self.vision.weight_hash,
        )

    @torch.inference_mode()
    def encode(self, segments: Sequence[Segment], num_frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Codes (K, T) uint16 and features (V, C) float16 of each segment; all waveforms have one length.

        A segment without video has features of zeros, ``num_frames`` of them.

        Frames go segment by segment and a codec's codes do not depend on the batch, so which segments come together,
        which differs after a resume, leaves no trace. Nor does the number of threads, on a CPU.
        """
        waveform = torch.from_numpy(np.stack([segment.waveform for segment in segments]))[:, None]  # (B, 1, N)
        codes = self.codec.encode(waveform.to(self.device), self.codec.sample_rate).cpu().numpy().astype(np.uint16)
        return [(own, self._features(segment, num_frames)) for own, segment in zip(codes, segments, strict=True)]

    def _features(self, segment: Segment, num_frames: int) -> np.ndarray:
        """(V, C) float16; after the video's end those of its last picture."""
        if not segment.valid_frames:
            return np.zeros((num_frames, self.vision.feature_dim), np.float16)
        seen = self.vision.encode(torch.from_numpy(segment.pixels).to(self.device)).cpu().numpy().astype(np.float16)
        return np.concatenate([seen, np.repeat(seen[-1:], num_frames - len(seen), axis=0)])
