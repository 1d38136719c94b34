"""Small data sets with something to learn: a record sounds high or low, and its features say which."""

import numpy as np
import torch

from vab.data.shards.format import make_key
from vab.data.shards.writer import ShardWriter
from vab.frozen.codec import load_codec
from vab.frozen.vision import load_vision
from vab.spec import SegmentSpec

SHORT_SECONDS, SHORT_FPS, LABELS = 0.64, 12.5, ("high", "low")  # 32 codec steps, 8 frames


def short_spec():
    """A spec of the tiny networks for segments short enough for tests."""
    codec, vision = load_codec("tiny"), load_vision("tiny")
    return SegmentSpec(
        segment_seconds=SHORT_SECONDS,
        sample_rate=codec.sample_rate,
        code_rate=codec.code_rate,
        num_codebooks=codec.num_codebooks,
        codebook_size=codec.codebook_size,
        code_dim=codec.code_dim,
        num_steps=codec.steps_for(round(SHORT_SECONDS * codec.sample_rate)),
        video_fps=SHORT_FPS,
        num_frames=round(SHORT_SECONDS * SHORT_FPS),
        feature_dim=vision.feature_dim,
        codec=codec.name,
        codec_hash=codec.weight_hash,
        vision=vision.name,
        vision_hash=vision.weight_hash,
    )


def write_shards(
    folder, spec, count, *, seed=0, ragged=False, codebooks=None, records_per_shard=16, per_source=1, sound_only=False
):
    """A data set whose codes follow from its features: a record sounds high or low, and its features say which."""
    random = np.random.default_rng(seed)
    seconds = np.arange(round(spec.segment_seconds * spec.sample_rate)) / spec.sample_rate
    codec = load_codec("tiny")
    high = np.arange(count) % 2 == 0
    pitch = np.where(high, 1500.0, 300.0) * random.uniform(0.95, 1.05, count)
    waveforms = 0.3 * np.sin(2 * np.pi * pitch[:, None] * seconds)
    codes = codec.encode(torch.from_numpy(waveforms[:, None]).float()).numpy()  # (count, K, T)
    records = []  # of one source
    with ShardWriter(folder, spec, labels=LABELS, records_per_shard=records_per_shard) as writer:
        for number in range(count):
            features = 0.1 * random.standard_normal((spec.num_frames, spec.feature_dim))
            features[:, 0] = 1.0 if high[number] else -1.0
            features = features * (not sound_only)
            source, start = f"tone{number // per_source}", number % per_source * spec.segment_seconds
            short = ragged and number % 3 == 0
            meta = {
                "id": source,
                "source": f"{source}.mp4",
                "start_seconds": start,
                "steps": spec.num_steps // 2 if short else spec.num_steps,
                "frames": 0 if sound_only else spec.num_frames // 2 if short else spec.num_frames,
                "labels": [LABELS[0] if high[number] else LABELS[1]],
            }
            records.append((make_key(source, start), codes[number] % spec.codebook_size, features, meta))
            if number % per_source == per_source - 1 or number == count - 1:
                writer.add(f"{source}.mp4", records)
                records = []
        writer.finish(codec.codebooks() if codebooks is None else codebooks)
    return folder
