"""Files of weights that are not what they should be: one line that names the file and says what to do."""

import json

import pytest
import safetensors.torch
import torch
import yaml
from clip_weights import MODELS, publish
from codec_weights import AUDIOCRAFT, audiogen, dac_of_hub, sounds

from vab.frozen.codec import convolutions, load_codec
from vab.frozen.vision import load_vision
from vab.spec import UserError

CUT = safetensors.torch.save({"a": torch.zeros(9)})[:-9]
TEXT = b"<!DOCTYPE html><html>not found</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
CONTENTS = [
    ("a.bin", b"", "it is empty"),
    ("a.bin", TEXT, "it is a web page"),
    ("a.bin", POINTER, "is a pointer of Git LFS"),
    ("a.safetensors", b"", "it is empty"),
    ("a.safetensors", TEXT, "it is a web page"),
    ("a.safetensors", CUT, "[Ee]rror while deserializing"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


def refusal(load, *words, **more):
    with pytest.raises(UserError) as caught:
        load(*words, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def clip(tmp_path):
    pytest.importorskip("open_clip")
    publish(tmp_path / "clip", *MODELS["clip"])
    return tmp_path / "clip"


def reconfigured(folder, change):
    config = folder / "open_clip_config.json"
    facts = json.loads(config.read_text())
    change(facts)
    config.write_text(json.dumps(facts))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(("name", "content", "words"), CONTENTS)
def test_files_of_a_vision_encoder(name, content, words, clip):
    (clip / "open_clip_pytorch_model.bin").unlink()
    file = clip / {"a.bin": "open_clip_pytorch_model.bin", "a.safetensors": "open_clip_model.safetensors"}[name]
    file.write_bytes(content)
    said = refusal(load_vision, f"local-dir:{clip}")
    assert said.startswith(f"{file} cannot be read as a file of weights: ")
    assert said.endswith("; fetch it again")
    with pytest.raises(UserError, match=words):
        load_vision(f"local-dir:{clip}")


@pytest.mark.parametrize(("name", "content", "words"), CONTENTS)
@pytest.mark.parametrize("codec", ["audiogen_16khz", "encodec_24khz:6", "dac_16khz"])
def test_files_of_a_codec(codec, name, content, words, tmp_path):
    pytest.importorskip("transformers" if codec == "dac_16khz" else "encodec")
    file = tmp_path / name
    file.write_bytes(content)
    if codec != "dac_16khz":
        file = file.rename(tmp_path / "a.th")
        words = words if "deserializing" not in words else "cannot be read as a file of weights"
    else:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "dac"}))
        file = file.rename(tmp_path / ("model.safetensors" if "safe" in name else "pytorch_model.bin"))
    with pytest.raises(UserError, match=words) as caught:
        load_codec(codec, weights=tmp_path if codec == "dac_16khz" else file)
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).endswith("; fetch it again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts["model_cfg"]["vision_cfg"].update(patchsize=3), "unexpected keyword argument 'patchsize'"),
        (lambda facts: facts["model_cfg"]["vision_cfg"].update(width="x"), "cannot make the model"),
        (lambda facts: facts["model_cfg"]["vision_cfg"].update(timm_model_name="none"), "Unknown model"),
        (lambda facts: facts["model_cfg"].pop("text_cfg"), "its model_cfg lacks text_cfg"),
        (lambda facts: facts.update(model_cfg=[1]), "its model_cfg lacks embed_dim, vision_cfg, text_cfg"),
        (lambda facts: facts.update(preprocess_cfg=[1]), "does not say how pixels are prepared"),
    ],
)
def test_a_configuration_of_no_vision_encoder(change, words, clip):
    said = refusal(load_vision, reconfigured(clip, change))
    assert words in said
    assert str(clip / "open_clip_config.json") in said


def test_a_configuration_that_is_a_list(clip):
    (clip / "open_clip_config.json").write_text("[1, 2]")
    assert refusal(load_vision, f"local-dir:{clip}").endswith("is not a JSON object: fetch it again")


def test_a_list_of_weights_and_what_could_run_code(clip):
    file = clip / "open_clip_pytorch_model.bin"
    torch.save([1, 2], file)
    assert refusal(load_vision, f"local-dir:{clip}") == f"{file} holds a list, expected weights by name; fetch it again"
    torch.save({"state_dict": file}, file)
    assert "it holds pathlib.PosixPath, which could run code" in refusal(load_vision, f"local-dir:{clip}")
    torch.save({"state_dict": [1]}, file)
    assert "does not hold the weights of" in refusal(load_vision, f"local-dir:{clip}")


def test_files_that_are_not_there(clip, tmp_path):
    pytest.importorskip("encodec")
    absent = tmp_path / "nothing.pt"
    assert refusal(load_vision, "ViT-B-32/openai", weights=absent).startswith(f"there is no file {absent}")
    assert f"there is no file {clip}: it is a folder" in refusal(load_vision, "ViT-B-32/openai", weights=clip)
    assert f"there is no folder {absent}" in refusal(load_vision, f"local-dir:{absent}")
    assert f"there is no {absent}" in refusal(load_codec, "audiogen_16khz", weights=absent)
    assert "there is no file" in refusal(load_codec, "encodec_24khz:6", weights=tmp_path)


def test_a_misspelt_path_is_not_looked_for_on_a_hub(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    for path in ("own/dac16", "elsewhere/nothing.pth"):
        assert refusal(load_codec, "dac_16khz", weights=path).endswith(f"there is no {path}")
    assert "HF_HUB_OFFLINE forbids to fetch it from elsewhere/dac16" in refusal(
        load_codec, "dac_16khz", weights="elsewhere/dac16"
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_openais_own_file_is_refused_by_name(tmp_path):
    """It is TorchScript; what the hub has of the same model is taken, where that is there."""
    pytest.importorskip("open_clip")
    pytest.importorskip("encodec")
    place = tmp_path / "weights/ViT-B-32.pt"
    place.parent.mkdir()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(place))
    instead = "take open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai on a model hub"
    for more in ({}, {"weights": place}):
        said = refusal(load_vision, "ViT-B-32/openai", **more)
        assert said.startswith(f"{place} is TorchScript, which holds a program and is not read: ")
        assert instead in said
        assert said.endswith("as ViT-B-32/openai.safetensors in a folder named by VAB_WEIGHTS")
    (tmp_path / "weights/ViT-B-32").mkdir()
    other = tmp_path / "weights/ViT-B-32/openai.safetensors"
    other.write_bytes(CUT)
    assert refusal(load_vision, "ViT-B-32/openai").startswith(f"{other} cannot be read")
    assert "is TorchScript, which holds a program" in refusal(load_codec, "encodec_24khz:6", weights=place)
    big_vision = tmp_path / "weights/a.npz"
    assert "big_vision's form" in refusal(load_vision, "ViT-B-32/openai", weights=big_vision)


@pytest.fixture
def audiocraft(tmp_path):
    pytest.importorskip("encodec")
    return tmp_path / "compression_state_dict.bin"


def rewritten(path, text):
    torch.save(torch.load(path) | {"xp.cfg": text}, path)


def described(**seanet):
    return yaml.safe_dump(AUDIOCRAFT | {"seanet": AUDIOCRAFT["seanet"] | seanet})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (described(foo=1), "package encodec cannot make: SEANetEncoder.__init__() got an unexpected keyword"),
        (described(activation="Foo"), "package encodec cannot make: module 'torch.nn' has no attribute 'Foo'"),
        (described(ratios="x"), "package encodec cannot make"),
        (described(n_filters=-1), "package encodec cannot make"),
        ("a: [1, 2", "does not say what the network is: while parsing a flow sequence"),
        ("[1, 2]", "does not say what the network is"),
        (yaml.safe_dump(AUDIOCRAFT | {"sample_rate": "fast"}), "does not say what the network is: invalid literal"),
        (
            yaml.safe_dump(AUDIOCRAFT | {"sample_rate": 32000}),
            "is for 32000 Hz, codec audiogen_16khz for 16000 Hz: load",
        ),
    ],
)
def test_configurations_of_audiocraft(text, words, audiocraft):
    audiogen(audiocraft)
    rewritten(audiocraft, text)
    said = refusal(load_codec, "audiogen_16khz", weights=audiocraft)
    assert words in said
    assert str(audiocraft) in said
    assert said.endswith(("; fetch it again, or take another file", ": load it as codec encodec_32khz"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "is not a JSON object"),
        ('{"model_type": "dac", "downsampling_ratios": "x"}', "a network that transformers cannot make"),
        ('{"model_type": "dac", "n_codebooks": "x"}', "a network that transformers cannot make"),
        ('{"model_type": "dac", "codebook_dim": -1}', "a network that transformers cannot make"),
    ],
)
def test_configurations_of_dac(text, words, tmp_path):
    pytest.importorskip("transformers")
    dac_of_hub(tmp_path / "dac")
    (tmp_path / "dac/config.json").write_text(text)
    said = refusal(load_codec, "dac_16khz", weights=tmp_path / "dac")
    assert words in said
    assert "fetch it again" in said
    assert str(tmp_path / "dac") in said


@pytest.mark.parametrize("lstm", [0, 1])
def test_a_network_without_recurrent_layers_decodes_as_the_whole(lstm, audiocraft, monkeypatch):
    audiogen(audiocraft, AUDIOCRAFT | {"seanet": AUDIOCRAFT["seanet"] | {"lstm": lstm}})
    codec = load_codec("audiogen_16khz", weights=audiocraft)
    monkeypatch.setattr(convolutions, "PIECE_SECONDS", 1)
    waveform = sounds(1, 48000)
    codes = codec.encode(waveform)
    with torch.no_grad():
        latent = codec.encoder(waveform)
        assert torch.equal(codec.quantizer.vq.encode(latent, n_q=4).transpose(0, 1), codes)
        whole = codec.decoder(codec.quantizer.decode(codes.transpose(0, 1)))
    torch.testing.assert_close(codec.decode(codes, 48000), whole, atol=1e-5, rtol=0)
