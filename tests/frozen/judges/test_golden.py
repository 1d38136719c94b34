"""The check before a judge's first use lets good ones pass and refuses those whose numbers would mean nothing."""

import json
import os
from pathlib import Path

import pytest
import torch

from vab.frozen.judges import load_judge
from vab.frozen.judges.golden import MOVED, SHIPPED, check, golden_sounds
from vab.frozen.protocols import Judge, JudgeOutput
from vab.spec import UserError


class BandJudge(Judge):
    """Loudness in eight bands, with room for mistakes."""

    name, sample_rate, embedding_dim, classes, min_samples = "bands", 8000, 8, (), 64

    def __init__(self, spoil=lambda embedding: embedding, weight_hash="0" * 64):
        super().__init__()
        self.conventions, self.spoil, self.weight_hash = {}, spoil, weight_hash
        self.gain = torch.nn.Parameter(torch.ones(8))
        self.freeze()

    def _judge(self, waveform):
        bands = torch.fft.rfft(waveform[:, 0]).abs()[:, :4000].unflatten(1, (8, -1)).mean(2)
        return JudgeOutput(self.spoil(bands * self.gain).unsqueeze(1), waveform.new_zeros(len(waveform), 0))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vab" / "judges"


def test_the_tiny_judge_ships_with_its_numbers(cache):
    judge = load_judge("tiny")
    shipped = json.loads((SHIPPED / f"tiny-{judge.weight_hash[:16]}.json").read_text())  # by tools/tiny_networks
    assert shipped["weight_hash"] == judge.weight_hash
    assert not cache.exists()
    judge.network.embed.bias.data += 0.05 * judge.network.embed.weight.abs().max()
    with pytest.raises(UserError, match=r"judge tiny .* gives other numbers than those in .*then with .*torch"):
        check(judge)


def test_numbers_are_remembered_by_weights(cache):
    check(BandJudge())
    (path,) = cache.iterdir()
    first = path.read_text()
    check(BandJudge(lambda heard: heard * (1 + MOVED / 2)))
    assert path.read_text() == first
    with pytest.raises(UserError, match=r"then with .*torch .*now with .*torch .*delete that file"):
        check(BandJudge(lambda heard: heard * (1 + MOVED * 2)))
    check(BandJudge(lambda heard: heard * (1 + MOVED * 2), weight_hash="1" * 64))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (torch.ones_like, "equal embeddings for tone, noise, clicks"),
        (lambda heard: heard * 0, "equal embeddings for tone, noise, clicks"),
        (lambda heard: heard / 0 - heard / 0, "not finite"),
        (lambda heard: heard / heard.mean(), "another embedding in a batch than alone"),
    ],
)
def test_useless_judges_are_refused(cache, spoil, reason):
    with pytest.raises(UserError, match=reason):
        check(BandJudge(spoil))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot store the numbers of judge bands .* set XDG_CACHE_HOME"):
        check(BandJudge())


def test_a_damaged_memory_is_named(cache):
    check(BandJudge())
    (path,) = cache.iterdir()
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=r"the stored numbers of judge bands, cannot be read: delete it"):
        check(BandJudge())


def test_the_sounds_are_what_they_are_called():
    tone, noise, clicks = golden_sounds(16000)
    spectrum = torch.fft.rfft(tone).abs()
    assert int(spectrum.argmax()) == 440
    assert float(spectrum[440] / spectrum.sum()) > 0.99
    assert abs(float(noise.std()) - 0.3 / 3**0.5) < 0.005
    flat = torch.fft.rfft(noise).abs().square()[1:].reshape(10, -1).mean(1)
    assert float(flat.max() / flat.min()) < 1.3
    assert clicks.nonzero().flatten().tolist() == [2000 * number for number in range(8)]


def test_nothing_here_depends_on_the_home_folder():
    assert Path(os.environ["XDG_CACHE_HOME"]) != Path.home() / ".cache"
