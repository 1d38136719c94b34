"""VGGish against a second computation of its spectra and an independently written network."""

import hashlib
import math

import numpy as np
import pytest
import torch
from judge_weights import assert_independent_of_the_batch, some_sounds
from torch import nn

from vab.frozen.batches import judge_sounds
from vab.frozen.judges import load_judge
from vab.frozen.judges.vggish import mel_matrix
from vab.spec import UserError


def convolutions(*widths):
    layers = []
    for before, after in widths:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return [*layers, nn.MaxPool2d(2, 2)]


@pytest.fixture(scope="module")
def reference():
    """The published layout: names features.0/3/6/8/11/13 and embeddings.0/2/4."""
    torch.manual_seed(0)
    features = [
        *convolutions((1, 64)),
        *convolutions((64, 128)),
        *convolutions((128, 256), (256, 256)),
        *convolutions((256, 512), (512, 512)),
    ]
    embeddings = [nn.Linear(12288, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128), nn.ReLU()]
    return nn.ModuleDict({"features": nn.Sequential(*features), "embeddings": nn.Sequential(*embeddings)})


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("vggish") / "vggish-10086976.pth"
    torch.save(reference.state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def judge(weights):
    return load_judge("vggish", weights=weights)


def reference_log_mel(samples):
    """From the published constants, one frame and one band at a time, in float64."""
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / 400) for n in range(400)]
    edges = np.linspace(*(1127 * math.log(1 + hz / 700) for hz in (125, 7500)), 66)
    mels = [1127 * math.log(1 + k * 16000 / 512 / 700) for k in range(257)]
    rows = []
    for start in range(0, len(samples) - 400 + 1, 160):
        magnitude = np.abs(np.fft.rfft(samples[start : start + 400].astype(np.float64) * window, 512))
        row = []
        for low, mid, high in zip(edges, edges[1:], edges[2:], strict=False):
            weights = [max(0.0, min((m - low) / (mid - low), (high - m) / (high - mid))) for m in mels]
            weights[0] = 0.0
            row.append(math.log(float(magnitude @ weights) + 0.01))
        rows.append(row)
    return np.array(rows)


def test_log_mel_is_that_of_the_published_constants(judge):
    (sound,) = some_sounds([4000])
    got = judge.log_mel(sound[None])[0].numpy()
    assert got.shape == (23, 64)
    np.testing.assert_allclose(got, reference_log_mel(sound.numpy()), rtol=1e-6, atol=1e-6)


def test_each_bin_within_the_bands_counts_once():
    total = mel_matrix().sum(1)  # neighbouring triangles add up to 1 between the first and last peak
    hertz = torch.arange(257) * 31.25
    assert float(total[0]) == 0
    torch.testing.assert_close(total[(hertz > 200) & (hertz < 7200)], torch.ones(1, dtype=torch.float64).expand(224))
    assert float(total[hertz > 7500].abs().max()) == 0


def test_the_network_is_the_published_one(judge, reference):
    sound = some_sounds([15360 * 3 + 240])[0]
    mel = torch.from_numpy(reference_log_mel(sound.numpy())).float()
    examples = torch.stack([mel[start : start + 96] for start in (0, 96, 192)]).unsqueeze(1)
    with torch.no_grad():
        maps = reference["features"](examples)
        flat = torch.stack([one.permute(1, 2, 0).reshape(-1) for one in maps])
        before = reference["embeddings"][:-1](flat)
    got = judge_sounds(judge, [sound], 16000)
    torch.testing.assert_close(got.embedding, before, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_other_end_of_the_last_layer_is_another_judge(judge, weights):
    after = load_judge("vggish_relu", weights=weights)
    assert (after.name, judge.name) == ("vggish_relu", "vggish")
    assert after.conventions != judge.conventions
    sounds = some_sounds([15600])
    before = judge_sounds(judge, sounds, 16000).embedding
    torch.testing.assert_close(judge_sounds(after, sounds, 16000).embedding, before.relu())


def test_windows_do_not_depend_on_company(judge):
    heard = assert_independent_of_the_batch(judge, [15600, 20000, 46000, 46320, 46319, 3000])
    assert heard.rows.tolist() == [1, 1, 2, 3, 2, 1]  # 46,320 samples are just three examples
    assert heard.embedding.shape == (10, 128)
    assert heard.logits.shape == (6, 0)


def test_short_sounds_are_padded_and_rests_dropped(judge):
    short, long = some_sounds([3000, 40000])
    padded = torch.cat([short, torch.zeros(12600)])
    assert torch.equal(judge.prepare(short), padded)
    assert torch.equal(judge.prepare(long), long[:30960])  # 2 * 15,360 + 240
    heard = judge_sounds(judge, [short, padded], 16000).embedding
    assert torch.equal(heard[0], heard[1])


def test_it_names_itself(judge, weights):
    assert (judge.sample_rate, judge.embedding_dim, judge.classes, judge.min_samples) == (16000, 128, (), 15600)
    assert judge.weight_hash == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    with pytest.raises(UserError, match="does not hold the weights of VGGish"):
        load_judge("vggish", weights=path)
    with pytest.raises(UserError, match=r"needs vggish-10086976\.pth, published in .*there is no"):
        load_judge("vggish", weights=tmp_path / "absent.pth")
