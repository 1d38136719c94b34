"""Extraction with networks that others published, of random weights: the same bytes by any number of threads."""

import json
from importlib.metadata import version

import numpy as np
import pytest
import torch

from vab.commands.extract import extract
from vab.data.media.write import write_video
from vab.data.shards.format import library_versions
from vab.spec import NOT_STATED

RATE = 24000
ALWAYS = {"vab", "torch", "numpy", "webdataset", "av", "soxr"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos of noise."""
    root, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for number in range(2):
        frames = rng.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
        write_video(root / f"{number}.mp4", frames, 4, 0.1 * rng.standard_normal(3 * RATE).astype(np.float32), RATE)
    return root


def extracted(folder, out, threads=1, **more):
    settings = {"segment_seconds": 3.0, "video_fps": 4.0, "num_workers": 0, "device": "cpu", **more}
    torch.set_num_threads(threads)
    try:
        assert extract(str(folder), str(out), **settings).records == 2
    finally:
        torch.set_num_threads(1)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".tar", ".npy", ".safetensors")}


def test_threads_leave_no_trace_and_the_manifest_names_what_computed(folder, tmp_path, monkeypatch):
    pytest.importorskip("encodec")
    pytest.importorskip("open_clip")
    from frozen.clip_weights import MODELS, publish
    from frozen.codec_weights import encodec_24khz

    publish(tmp_path / "clip", *MODELS["siglip"])
    encodec_24khz(tmp_path / "encodec_24khz-d7cc33bc.th")
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path))
    named = {"codec": "encodec_24khz:6", "vision": f"local-dir:{tmp_path / 'clip'}"}
    first = extracted(folder, tmp_path / "one", **named)
    for threads in (2, 3):
        assert extracted(folder, tmp_path / str(threads), threads, **named) == first
    versions = json.loads((tmp_path / "one/manifest.json").read_text())["versions"]
    assert set(versions) == ALWAYS | {"encodec", "open_clip_torch", "timm", "torchvision", "pillow"}
    assert versions["encodec"] == version("encodec")


def test_a_data_set_by_tiny_networks_names_no_others(folder, tmp_path):
    extracted(folder, tmp_path / "out", codec="tiny", vision="tiny")
    versions = json.loads((tmp_path / "out/manifest.json").read_text())["versions"]
    assert list(versions) == ["vab", "torch", "numpy", "webdataset", "av", "soxr"]


def test_a_package_under_another_name_does_not_cost_the_data_set():
    versions = library_versions(["encodec-of-a-fork", "numpy"])
    assert versions["encodec-of-a-fork"] == NOT_STATED
    assert versions["numpy"] == np.__version__
