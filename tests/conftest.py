import os
import socket
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests are small; more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No test may leave this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """No test's random numbers depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """Real media beside the checkout; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real media at {SHARED_DATA}")
    return SHARED_DATA


def pytest_collection_modifyitems(items):
    for item in items:
        wants_cuda = item.get_closest_marker("needs_cuda") is not None
        if wants_cuda and not torch.cuda.is_available() and os.environ.get("FAIL_WITHOUT_CUDA") != "1":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


SHORT_SECONDS, SHORT_FPS, LABELS = 0.64, 12.5, ("high", "low")  # 32 codec steps, 8 frames


def short_spec():
    """A spec of the tiny networks for segments short enough for tests."""
    from vab.frozen.codec import load_codec
    from vab.frozen.vision import load_vision
    from vab.spec import SegmentSpec

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


def write_shards(folder, spec, count, *, seed=0, ragged=False, codebooks=None, records_per_shard=16):
    """A data set whose codes follow from its features: a record sounds high or low, and its features say which."""
    import numpy as np

    from vab.data.format import make_key
    from vab.data.shards import ShardWriter
    from vab.frozen.codec import load_codec

    random = np.random.default_rng(seed)
    seconds = np.arange(round(spec.segment_seconds * spec.sample_rate)) / spec.sample_rate
    codec = load_codec("tiny")
    high = np.arange(count) % 2 == 0
    pitch = np.where(high, 1500.0, 300.0) * random.uniform(0.95, 1.05, count)
    waveforms = 0.3 * np.sin(2 * np.pi * pitch[:, None] * seconds)
    codes = codec.encode(torch.from_numpy(waveforms[:, None]).float()).numpy()  # (count, K, T)
    with ShardWriter(folder, spec, labels=LABELS, records_per_shard=records_per_shard) as writer:
        for number in range(count):
            features = 0.1 * random.standard_normal((spec.num_frames, spec.feature_dim))
            features[:, 0] = 1.0 if high[number] else -1.0
            short = ragged and number % 3 == 0
            meta = {
                "id": f"tone{number}",
                "source": f"tone{number}.mp4",
                "start_seconds": 0.0,
                "steps": spec.num_steps // 2 if short else spec.num_steps,
                "frames": spec.num_frames // 2 if short else spec.num_frames,
                "labels": [LABELS[0] if high[number] else LABELS[1]],
            }
            writer.write(make_key(f"tone{number}", 0.0), codes[number] % spec.codebook_size, features, meta)
            writer.finish_source(f"tone{number}.mp4")
        writer.finish(codec.codebooks() if codebooks is None else codebooks)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with ``train`` (48 records) and ``val`` (20 records)."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "train", short_spec(), 48)
    write_shards(folder / "val", short_spec(), 20, seed=1)
    return folder
