"""Encode segments: sound to codec tokens, frames to features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vab.data.extract.cutting import Segment
from vab.frozen.protocols import Codec, VisionEncoder
from vab.spec import SegmentSpec


@dataclass(frozen=True)
class Encoders:
    """The two frozen networks of an extraction."""

    codec: Codec
    """Sound to codes."""
    vision: VisionEncoder
    """Frames to features."""
    device: torch.device
    """On which both compute."""

    def spec(self, segment_seconds: float, video_fps: float) -> SegmentSpec:
        """The spec of segments of this length."""
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

        Neither depends on which segments are in a batch, which differs after a resume, nor, on a CPU, on the number of
        threads.
        """
        codes = encode_sound(self.codec, segments, self.device)
        features = encode_pictures(self.vision, segments, num_frames, self.device)
        return list(zip(codes, features, strict=True))


def encode_sound(codec: Codec, segments: Sequence[Segment], device: torch.device) -> np.ndarray:
    """Codes (B, K, T) uint16 of segments whose waveforms have one length."""
    waveform = torch.from_numpy(np.stack([segment.waveform for segment in segments]))[:, None]  # (B, 1, N)
    return codec.encode(_moved(waveform, device), codec.sample_rate).cpu().numpy().astype(np.uint16)


def encode_pictures(
    vision: VisionEncoder, segments: Sequence[Segment], num_frames: int, device: torch.device
) -> np.ndarray:
    """Features (B, V, C) float16 of segments; the last picture's after the video's end, zeros without video."""
    features = np.zeros((len(segments), num_frames, vision.feature_dim), np.float16)
    seen = [number for number, segment in enumerate(segments) if segment.valid_frames]
    pixels = [torch.from_numpy(segments[number].pixels) for number in seen]
    # All pictures in one batch, unless features depend on the other pictures of a batch: then segment by segment.
    together = [torch.cat(pixels)] if pixels and vision.encodes_frames_alone else pixels
    encoded = [vision.encode(_moved(some, device)).cpu().numpy().astype(np.float16) for some in together]
    ends = np.cumsum([len(some) for some in pixels])[:-1]
    for number, own in zip(seen, np.split(np.concatenate(encoded), ends) if seen else [], strict=True):
        features[number, : len(own)] = own
        features[number, len(own) :] = own[-1]
    return features


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. A copy to a GPU is asynchronous."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
