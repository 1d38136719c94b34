import hashlib
import pickle

import numpy as np
import pytest
import torch

from vab.demo.world import CLASSES, describe, render_frames
from vab.frozen.tiny import shipped_weights
from vab.frozen.vision import load_vision
from vab.spec import UserError

GOLDEN_HASH = "5d4e47e8"
GOLDEN = [0.2881, 0.3462, 0.2872, 0.3369, 0.4091, 0.6349, 0.1566, -0.3933]
"""First features of `wide_frame`, from the shipped weights of that hash."""


@pytest.fixture(scope="module")
def vision():
    return load_vision("tiny")


def wide_frame():
    """A frame that is wider than high: its left half red, and a white spot near its right edge."""
    frame = np.zeros((1, 90, 160, 3), np.uint8)
    frame[:, :, :80, 0] = 200
    frame[:, 40:50, 150:158] = 255
    return frame


def test_it_names_itself(vision):
    assert (vision.name, vision.feature_dim) == ("tiny", 128)
    assert vision.weight_hash == hashlib.sha256(shipped_weights("vision").read_bytes()).hexdigest()
    assert "squashed to 64x64" in vision.preprocessing


def test_a_wide_frame_is_squashed_whole(vision):
    pixels = vision.preprocess(wide_frame())
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels.dtype == torch.float32
    red, green = pixels[0, 0], pixels[0, 1]
    torch.testing.assert_close(red[5, [0, 30, 33, 63]], torch.tensor([200, 200, 0, 0]) / 127.5 - 1, atol=0.01, rtol=0)
    # The spot is at 0.94 to 0.99 of the width and 0.44 to 0.56 of the height: a centre crop would have lost it.
    rows, columns = torch.nonzero(green > 0.5, as_tuple=True)
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (29, 34, 60, 62)


def test_shrinking_averages_and_does_not_alias(vision):
    stripes = np.zeros((1, 512, 512, 3), np.uint8)
    stripes[:, :, ::2] = 255  # finer than the small picture can hold: grey, not some of the stripes
    pixels = vision.preprocess(stripes)
    assert float(pixels[..., 2:-2].abs().max()) < 0.05


def test_a_frame_of_the_right_size_is_only_scaled(vision):
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    torch.testing.assert_close(vision.preprocess(frames), torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1)


def test_the_preprocessor_travels_without_the_network(vision):
    pickled = pickle.dumps(vision.resizer)
    assert len(pickled) < 1000
    pixels = pickle.loads(pickled)(wide_frame())
    assert pixels.dtype == np.uint8
    assert torch.equal(vision.normalise(torch.from_numpy(pixels)), vision.preprocess(wide_frame()))


def test_golden_features_of_a_wide_frame(vision):
    assert vision.weight_hash.startswith(GOLDEN_HASH), "other weights: make these numbers again"
    features = vision.encode(vision.preprocess(wide_frame()))
    torch.testing.assert_close(features[0, :8], torch.tensor(GOLDEN), atol=1e-3, rtol=0)


def test_a_frame_is_seen_alike_in_any_batch(vision):
    pixels = vision.preprocess(render_frames(describe(8, 0))[::8])
    together = vision.encode(pixels)
    assert together.shape == (8, 128)
    torch.testing.assert_close(together, torch.cat([vision.encode(p[None]) for p in pixels]), atol=1e-4, rtol=1e-4)


def test_channels_are_about_unit_variance_over_the_world(vision):
    frames = np.concatenate([render_frames(describe(8, index))[::16] for index in range(24)])
    features = vision.encode(vision.preprocess(frames))
    assert 0.7 < float(features.std(dim=0).mean()) < 1.4
    assert float(features.mean(dim=0).abs().mean()) < 0.4


def test_a_linear_map_reads_the_kinds_in_unseen_frames(vision):
    features, present = [], []
    for index in range(96):
        scene = describe(9, index)
        features.append(vision.encode(vision.preprocess(render_frames(scene)[::16])))
        row = torch.tensor([[1.0 if any(item.kind == kind for item in scene.objects) else 0.0 for kind in CLASSES]])
        present.append(row.expand(4, -1))
    x = torch.cat([torch.cat(features), torch.ones(384, 1)], dim=1).double()
    y = torch.cat(present).double()
    fitted = torch.linalg.solve(x[:288].T @ x[:288] + 3.0 * torch.eye(129), x[:288].T @ y[:288])
    scores = x[288:] @ fitted  # of scenes that the map was not fitted to
    single = y[288:].sum(dim=1) == 1
    right = scores[single].argmax(dim=1) == y[288:][single].argmax(dim=1)
    assert float(right.float().mean()) > 0.85


def test_wrong_frames_and_pixels_are_refused(vision):
    with pytest.raises(ValueError, match=r"\(V, H, W, 3\) uint8"):
        vision.preprocess(np.zeros((2, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(M, 3, h, w\)"):
        vision.encode(torch.zeros(3, 64, 64))


def test_an_unknown_name_says_what_is_expected():
    with pytest.raises(UserError, match=r"vision encoder 'eye': expected MODEL/TAG such as .*, or tiny"):
        load_vision("eye")
    with pytest.raises(UserError, match="ships with its weights"):
        load_vision("tiny", weights="some.bin")
