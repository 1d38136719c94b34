"""A full disk: one clear line, and nothing half-written."""

from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from tone_shards import short_spec, write_shards
from vab.callbacks import AtomicCheckpoints
from vab.data.media.write import replace_audio, write_video, write_wav
from vab.data.shards.format import is_complete
from vab.spec import UserError


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk):
    saver = AtomicCheckpoints()
    saver.save_checkpoint({"step": 1}, small_disk / "last.ckpt")
    with pytest.raises(UserError, match="no space left"):
        saver.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, small_disk / "last.ckpt")
    assert files(small_disk) == ["last.ckpt"]
    assert torch.load(small_disk / "last.ckpt", weights_only=True) == {"step": 1}


def test_a_wav_that_does_not_fit_is_not_there(small_disk):
    with pytest.raises(UserError, match="no space left"):
        write_wav(small_disk / "out.wav", np.zeros(200_000, dtype=np.float32), 16_000)
    assert files(small_disk) == []


def noise(path, count):
    """A video of about 3 MB a picture, quick to write."""
    with av.open(str(path), "w") as container:
        options = {"qmin": "1", "qmax": "1"}
        video = container.add_stream("mjpeg", 8, width=1920, height=1080, pix_fmt="yuvj420p", options=options)
        pixels = np.random.default_rng(0).integers(0, 255, (1620, 1920), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="yuvj420p")
        for number in range(count):
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(video.encode(frame))


def test_a_video_that_does_not_fit_is_not_there(small_disk, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (64, 96, 96, 3), dtype=np.uint8)
    silence = np.zeros(16_000, dtype=np.float32)
    write_video(tmp_path / "small.mp4", frames, 8, None, 16_000)
    noise(tmp_path / "large.mkv", 24)
    for attempt in (
        lambda: write_video(small_disk / "out.mp4", frames, 8, silence, 16_000),
        lambda: replace_audio(tmp_path / "small.mp4", silence, 16_000, small_disk / "out.mp4"),
        lambda: replace_audio(tmp_path / "large.mkv", silence, 16_000, small_disk / "out.mkv"),
    ):
        with pytest.raises(UserError, match=rf"no space left in {small_disk}: "):
            attempt()
        assert files(small_disk) == []


def test_a_disk_that_is_full_from_the_start_is_not_taken_for_a_wrong_codec(small_disk, tmp_path):
    noise(tmp_path / "in.mkv", 2)
    with suppress(OSError):
        (small_disk / "other").write_bytes(bytes(100_000))
    with pytest.raises(UserError, match="no space left"):
        replace_audio(tmp_path / "in.mkv", np.zeros(16_000, dtype=np.float32), 16_000, small_disk / "out.mkv")
    assert files(small_disk) == ["other"]


def test_shards_that_do_not_fit_are_no_data_set(small_disk):
    with pytest.raises(UserError, match="no space left"):
        write_shards(small_disk / "set", short_spec(), 48)
    assert not is_complete(small_disk / "set")
    assert not [name for name in files(small_disk) if name.endswith(".tar")]
