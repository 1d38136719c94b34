"""PaSST against the package's own wrapper, where the package is installed."""

import sys

import pytest
import torch
from judge_weights import assert_independent_of_the_batch, some_sounds

from vab.frozen.batches import judge_sounds
from vab.frozen.judges import load_judge
from vab.frozen.judges.passt import package_network
from vab.spec import UserError

pytestmark = pytest.mark.timeout(300)  # the package alone takes half a minute to come in


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hear21passt.models", None)
    path = tmp_path / "weights.pt"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install .*hear21passt>=0\.0\.26"):
        load_judge("passt", weights=path)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    pytest.importorskip("hear21passt")
    torch.manual_seed(0)
    mel, network = package_network()
    path = tmp_path_factory.mktemp("passt") / "passt.pt"
    torch.save(network.state_dict(), path)
    judge = load_judge("passt", weights=path)
    path.unlink()
    return mel, network, judge


@pytest.mark.slow
def test_it_is_the_packages_own(loaded):
    from hear21passt.wrapper import PasstBasicWrapper

    mel, network, judge = loaded
    sounds = some_sounds([320_000, 400_000])
    state = torch.get_rng_state()
    heard = judge_sounds(judge, sounds, 32000)
    assert torch.equal(torch.get_rng_state(), state)
    whole = PasstBasicWrapper(mel=mel, net=network, mode="all").eval()
    with torch.no_grad():
        expected = torch.cat([whole(sound[None, :320_000]) for sound in sounds])
    torch.testing.assert_close(heard.logits, expected[:, :527], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(heard.embedding, expected[:, 527:], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_sounds_do_not_depend_on_company(loaded):
    *_, judge = loaded
    heard = assert_independent_of_the_batch(judge, [5_000, 400_000])
    assert heard.embedding.shape == (2, 768)
    assert heard.logits.shape == (2, 527)


@pytest.mark.slow
def test_sounds_are_padded_and_cut_to_ten_seconds(loaded):
    *_, judge = loaded
    short, long = some_sounds([5_000, 400_000])
    assert torch.equal(judge.prepare(short), torch.cat([short, torch.zeros(315_000)]))
    assert torch.equal(judge.prepare(long), long[:320_000])
