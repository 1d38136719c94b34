"""The numbers of segments before there are shards: of codecs and image encoders, without their weights."""

from __future__ import annotations

import math
from typing import Any

from vab.spec import NOT_STATED, SegmentSpec, UserError

_CODECS = {  # sampling rate (Hz), samples of a step, levels, entries, width of an entry
    "audiogen_16khz": (16_000, 320, 4, 2048, 128),
    "encodec_24khz": (24_000, 320, 8, 1024, 128),
    "encodec_32khz": (32_000, 640, 4, 2048, 128),
    "dac_16khz": (16_000, 320, 12, 1024, 1024),
    "dac_24khz": (24_000, 320, 32, 1024, 1024),
    "dac_44khz": (44_100, 512, 9, 1024, 1024),
}
_KBITS_PER_LEVEL = 0.75  # of encodec_24khz, whose name may end with its bit rate
_FEATURE_DIM = 768
"""Width of the recipes' image encoder, EVA02-L-14-336."""
PAPER: dict[str, Any] = {
    "codec": "audiogen_16khz",
    "vision": "EVA02-L-14-336",
    "segment_seconds": 10.0,
    "video_fps": 1.0,
}
"""What ``configs/extract/paper.yaml`` says."""


def spec_of_extraction(settings: dict[str, Any], levels: int | None = None) -> SegmentSpec:
    """The spec that ``vab extract`` would write with these settings.

    Args:
        settings: Of ``vab extract``: codec, vision, segment_seconds, video_fps. Others are ignored.
        levels: Codebooks that are read of each record; None for all.

    Raises:
        UserError: If the codec is not known.
    """
    settings = PAPER | settings
    name, _, kbits = str(settings["codec"]).partition(":")
    if name not in _CODECS:
        raise UserError(f"plan knows no codec {name!r}: give one of {', '.join(_CODECS)}, or shards that exist")
    rate, hop, codebooks, size, width = _CODECS[name]
    if kbits:
        codebooks = round(float(kbits) / _KBITS_PER_LEVEL)
    seconds, fps = float(settings["segment_seconds"]), float(settings["video_fps"])
    return SegmentSpec(
        segment_seconds=seconds,
        sample_rate=rate,
        code_rate=rate / hop,
        num_codebooks=min(levels or codebooks, codebooks),
        codebook_size=size,
        code_dim=width,
        num_steps=math.ceil(round(seconds * rate) / hop),
        video_fps=fps,
        num_frames=max(1, round(seconds * fps)),
        feature_dim=_FEATURE_DIM,
        codec=str(settings["codec"]),
        codec_hash=NOT_STATED,
        vision=str(settings["vision"]),
        vision_hash=NOT_STATED,
    )


def record_bytes(spec: SegmentSpec, levels: int | None = None) -> int:
    """Bytes of a record in a shard: codes as uint16, features as float16, each file padded as tar does.

    Args:
        spec: Of the segment.
        levels: Codebooks that are stored, if the spec counts only those that are read.
    """
    codes = 2 * (levels or spec.num_codebooks) * spec.num_steps
    features = 2 * spec.num_frames * spec.feature_dim
    npy_header, description, tar_block = 128, 400, 512
    files = (codes + npy_header, features + npy_header, description)
    return sum(tar_block + math.ceil(size / tar_block) * tar_block for size in files)
