import hashlib

import numpy as np
import pytest
import torch

from tools.tiny_networks.train_judge import class_targets
from vab.demo.world import CLASSES, describe, render_audio
from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.frozen.tiny import shipped_weights
from vab.metrics.agreement import class_agreement
from vab.spec import UserError


@pytest.fixture(scope="module")
def judge():
    return load_judge("tiny")


@pytest.fixture(scope="module")
def unseen():
    scenes = [describe(31, index) for index in range(48)]
    return torch.from_numpy(np.stack([render_audio(scene) for scene in scenes])).unsqueeze(1), class_targets(scenes)


def test_it_names_itself(judge):
    assert (judge.name, judge.sample_rate, judge.classes) == ("tiny", 16000, CLASSES)
    assert judge.weight_hash == hashlib.sha256(shipped_weights("judge").read_bytes()).hexdigest()


def test_output_is_an_embedding_and_probabilities(judge, unseen):
    out = judge(unseen[0][:3])
    assert out.embedding.shape == (3, 1, judge.embedding_dim)
    assert out.probabilities.shape == (3, len(CLASSES))
    torch.testing.assert_close(out.probabilities, out.logits.softmax(dim=1))


def test_a_segment_is_judged_alike_in_any_batch(judge, unseen):
    together = judge(unseen[0][:6])
    alone = [judge(row[None]) for row in unseen[0][:6]]
    torch.testing.assert_close(together.embedding, torch.cat([o.embedding for o in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.probabilities, torch.cat([o.probabilities for o in alone]), atol=1e-5, rtol=0)


def test_it_knows_unseen_segments(judge, unseen):
    waveform, targets = unseen
    assert float(class_agreement(judge(waveform).probabilities, targets > 0).mean()) > 0.9


def test_level_and_noise_hardly_matter(judge, unseen):
    waveform, targets = unseen
    noisy = 0.3 * (waveform + 0.05 * waveform.std(dim=2, keepdim=True) * torch.randn(waveform.shape))
    assert float(class_agreement(judge(noisy).probabilities, targets > 0).mean()) > 0.85


def test_the_tiny_codec_keeps_what_the_judge_hears(judge, unseen):
    waveform, targets = unseen
    codec = load_codec("tiny")
    heard = codec.decode(codec.encode(waveform), waveform.shape[2])
    before, after = (class_agreement(judge(x).probabilities, targets > 0).mean() for x in (waveform, heard))
    assert float(after / before) >= 0.97


@pytest.mark.parametrize("samples", [3200, 3201, 17000, 100000])
def test_any_length_is_heard(judge, samples):
    out = judge(0.1 * torch.randn(2, 1, samples))
    assert torch.isfinite(out.embedding).all()
    torch.testing.assert_close(out.probabilities.sum(dim=1), torch.ones(2))


def test_twice_the_sound_reads_much_as_once(judge, unseen):
    waveform = unseen[0][:8]
    once, twice = judge(waveform).probabilities, judge(torch.cat([waveform, waveform], dim=2)).probabilities
    assert float((once - twice).abs().max()) < 0.25


def test_too_short_and_wrong_rate_are_refused(judge):
    with pytest.raises(UserError, match=r"at least 0\.2 s of sound, got 0\.1 s"):
        judge(torch.zeros(1, 1, 1600))
    with pytest.raises(UserError, match=r"takes 16000 Hz, got 44100 Hz"):
        judge(torch.zeros(1, 1, 44100), sample_rate=44100)
    with pytest.raises(ValueError, match=r"\(B, 1, N\)"):
        judge(torch.zeros(16000))


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UserError, match="unknown judge 'ear': there is tiny"):
        load_judge("ear")
