"""The audio side of a tiny CLAP against transformers' own extractor and model."""

import pytest
import torch
import torch.nn.functional as F
from judge_weights import assert_independent_of_the_batch, some_sounds

from vab.frozen.batches import judge_sounds
from vab.frozen.judges import load_judge
from vab.spec import UserError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "fused"])
def loaded(request, tmp_path_factory):
    torch.manual_seed(0)
    audio = {"patch_embeds_hidden_size": 16, "depths": [1, 1, 1, 1], "num_attention_heads": [2, 2, 2, 2]}
    audio |= {"hidden_size": 128, "projection_dim": 32, "num_classes": 5, "enable_fusion": request.param}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 50, "projection_dim": 32}
    config = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=32)
    model = transformers.ClapModel(config).eval()
    folder = tmp_path_factory.mktemp("clap")
    model.save_pretrained(folder)
    return model, load_judge("clap", weights=folder)


def test_spectra_are_those_of_the_extractor(loaded):
    _, judge = loaded
    extractor = transformers.ClapFeatureExtractor(truncation="fusion" if judge.fused else "rand_trunc")
    for sound in some_sounds([100_000, 480_000, 240_000]):
        expected = extractor(sound.numpy(), sampling_rate=48000, return_tensors="pt")["input_features"][0, 0].float()
        got = judge.log_mel(judge.prepare(sound)[None])[0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)  # dB


def test_embeddings_are_those_of_the_model(loaded):
    model, judge = loaded
    sounds = some_sounds([100_000, 480_000])
    features = torch.stack([judge.log_mel(judge.prepare(sound)[None]) for sound in sounds])
    features = features.expand(-1, 4, -1, -1) if judge.fused else features
    with torch.no_grad():
        output = model.get_audio_features(input_features=features, is_longer=torch.zeros(2, 1, dtype=torch.bool))
    expected = F.normalize(getattr(output, "pooler_output", output), dim=-1)
    heard = judge_sounds(judge, sounds, 48000)
    assert heard.embedding.shape == (2, judge.embedding_dim) == (2, 32)
    torch.testing.assert_close(heard.embedding, expected, atol=1e-5, rtol=0)


def test_nothing_is_random_and_nothing_depends_on_company(loaded):
    _, judge = loaded
    heard = assert_independent_of_the_batch(judge, [480_000, 600_000, 5_000, 100_000])
    assert heard.rows.tolist() == [1, 1, 1, 1]
    assert heard.logits.shape == (4, 0)


def test_short_sounds_are_repeated_and_long_ones_cut(loaded):
    _, judge = loaded
    short, long = some_sounds([200_000, 500_000])
    assert torch.equal(judge.prepare(short), torch.cat([short, short, torch.zeros(80_000)]))
    assert torch.equal(judge.prepare(long), long[:480_000])


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"takes a folder with config\.json and model\.safetensors"):
        load_judge("clap", weights=tmp_path)
