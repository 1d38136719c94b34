import numpy as np
import pytest
import torch

from vab.data.shards.format import make_key
from vab.data.shards.writer import ShardWriter
from vab.spec import SegmentSpec

LABELS = ("bell", "dog", "drum")


@pytest.fixture(scope="session")
def small_spec():
    return SegmentSpec(
        segment_seconds=0.5,
        sample_rate=16000,
        code_rate=50.0,
        num_codebooks=2,
        codebook_size=300,
        code_dim=4,
        num_steps=25,
        video_fps=8.0,
        num_frames=4,
        feature_dim=6,
        codec="tiny",
        codec_hash="c0dec",
        vision="tiny",
        vision_hash="v1510n",
    )


@pytest.fixture(scope="session")
def codebooks(small_spec):
    return torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def make_record(small_spec):
    """Record number n as ``ShardWriter.add`` takes it; what it holds follows from n."""

    def make(number, **changes):
        random = np.random.default_rng(number)
        codes = random.integers(0, small_spec.codebook_size, (small_spec.num_codebooks, small_spec.num_steps))
        features = random.standard_normal((small_spec.num_frames, small_spec.feature_dim)).astype(np.float32)
        meta = {
            "id": f"video.{number}",
            "source": f"video.{number}.mp4",
            "start_seconds": 0.0,
            "steps": small_spec.num_steps - number % 2,
            "frames": small_spec.num_frames,
            "labels": list(LABELS[: number % 4]),
        }
        return make_key(f"video.{number}", 0.0), codes, features, meta | changes

    return make


@pytest.fixture(scope="session")
def make_shards(small_spec, codebooks, make_record):
    """Write records ``start`` to ``start + count - 1`` as a data set."""

    def make(folder, count, start=0, spec=small_spec, labels=LABELS, records_per_shard=4):
        with ShardWriter(folder, spec, labels, records_per_shard) as writer:
            for number in range(start, start + count):
                record = make_record(number)
                writer.add(record[3]["source"], [record])
            writer.finish(codebooks)
        return folder

    return make
