"""CNN14 against the package's own forward, from files in the published layout."""

import sys

import numpy as np
import pytest
import torch
from judge_weights import assert_independent_of_the_batch, settle, some_sounds

from vab.frozen.batches import judge_sounds
from vab.frozen.judges import load_judge
from vab.frozen.judges.panns import package_models, package_network
from vab.spec import UserError

try:
    package_models()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)


pytestmark = pytest.mark.slow  # the package alone takes half a minute to come in


@pytest.fixture(scope="module", params=["panns_16k", "panns_32k"], ids=lambda name: name)
def loaded(request, tmp_path_factory):
    """The package's network with random weights, and the judge loaded from its file."""
    torch.manual_seed(0)
    network = package_network(request.param)
    settle(network)
    network.bn0.running_mean.fill_(-30)
    network.bn0.running_var.fill_(400)
    path = tmp_path_factory.mktemp("panns") / "weights.pth"
    # Published files hold the sampler's arrays, too.
    torch.save({"iteration": 1, "model": network.state_dict(), "sampler": {"indexes": np.arange(5)}}, path)
    judge = load_judge(request.param, weights=path)
    path.unlink()
    return network, judge


def test_embeddings_and_logits_are_the_packages_own(loaded):
    network, judge = loaded
    sounds = some_sounds([30000, 30000, 41111])
    heard = judge_sounds(judge, sounds, judge.sample_rate)
    with torch.no_grad():
        outputs = [network(sound[None]) for sound in sounds]
    expected = torch.cat([output["embedding"] for output in outputs])
    assert heard.embedding.shape == (3, 2048)
    assert float(expected.std(0).max()) > 0.01 * float(expected.abs().max())  # the sounds are told apart
    assert float((heard.embedding - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    clipwise = torch.cat([output["clipwise_output"] for output in outputs])
    torch.testing.assert_close(heard.logits.sigmoid(), clipwise, atol=1e-5, rtol=0)


def test_sounds_do_not_depend_on_company(loaded):
    _, judge = loaded
    heard = assert_independent_of_the_batch(judge, [20000, 20000, 12345, 20000, 31234, 900])
    assert heard.rows.tolist() == [1] * 6


@pytest.mark.needs_cuda
def test_a_gpu_hears_the_same(loaded):
    _, judge = loaded
    sounds = some_sounds([20000, 20000, 12345])
    here = judge_sounds(judge, sounds, judge.sample_rate)
    there = judge_sounds(judge.to("cuda"), sounds, judge.sample_rate)
    judge.to("cpu")
    for field in ("embedding", "logits"):
        expected, got = getattr(here, field), getattr(there, field)
        assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_short_sounds_are_padded(loaded):
    _, judge = loaded
    (short,) = some_sounds([700])
    padded = torch.cat([short, torch.zeros(judge.min_samples - 700)])
    assert torch.equal(judge.prepare(short), padded)
    assert judge.min_samples / judge.sample_rate == pytest.approx(0.31)
    long = torch.zeros(500_000)
    assert judge.prepare(long).shape == long.shape


def test_it_names_itself(loaded):
    _network, judge = loaded
    assert judge.embedding_dim == 2048
    assert judge.classes[:2] == ("audioset_000", "audioset_001")
    assert len(judge.classes) == 527
    assert judge.conventions["mel_filters"] == "as stored in the file of the weights"


def test_the_filters_are_those_of_the_file(loaded):
    """The package builds others at 32 kHz, up to 16 kHz; the file's are what both compute with."""
    network, judge = loaded
    assert torch.equal(judge.mel.melW, network.logmel_extractor.melW)
    stored = {name for name in network.state_dict() if "melW" in name or "stft" in name}
    assert len(stored) == 3


def test_the_placeholder_is_gone(monkeypatch):
    monkeypatch.delitem(sys.modules, "laion_clap", raising=False)
    assert hasattr(package_models(), "Cnn14_16k")
    assert "laion_clap" not in sys.modules


def test_another_layout_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="does not hold the weights of Cnn14_16k"):
        load_judge("panns_16k", weights=path)
