"""EnCodec and DAC: what every codec promises, and the same codes as other implementations from the same weights.

The weights are random, in the files that their authors publish; what they would sound like is not tested here.
"""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from codec_weights import (
    AUDIOCRAFT,
    DAC,
    DAC24,
    DAC44,
    audiogen,
    dac_of_descript,
    dac_of_hub,
    encodec_24khz,
    encodec_of_hub,
    sounds,
    transformers_encodec,
)

from vab.frozen.codec import convolutions, load_codec
from vab.frozen.codec.convolutions import fold_weight_norm
from vab.frozen.weight_files import published
from vab.frozen.weight_files.catalogue import CODEC_NUMBERS, CODECS
from vab.spec import UserError

pytest.importorskip("encodec")
pytest.importorskip("transformers")


DACS = {"16khz": DAC, "24khz": DAC24, "44khz": DAC44}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    theirs = {
        "encodec_24khz": encodec_24khz(folder / "encodec_24khz-d7cc33bc.th"),
        "audiogen_16khz": transformers_encodec(audiogen(folder / "audiogen_16khz/compression_state_dict.bin")),
        "encodec_32khz": encodec_of_hub(folder / "encodec_32khz"),  # and musicgen, the same in audiocraft's layout
    }
    for rate, numbers in DACS.items():
        theirs[f"dac_{rate}"] = dac_of_hub(folder / f"dac_{rate}", numbers)
        theirs[f"descript_{rate}"] = dac_of_descript(folder / f"weights_{rate}.pth", numbers)
    return folder, theirs


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.delenv("VAB_WEIGHTS", raising=False)


NAMES = ("encodec_24khz:1.5", "encodec_24khz:6", "encodec_24khz:24", "audiogen_16khz", "encodec_32khz", "musicgen")
NAMES += tuple(f"{layout}_{rate}" for layout in ("dac", "descript") for rate in DACS)


@pytest.fixture(params=NAMES, scope="module")
def codec(request, weights):
    return loaded(request.param, weights[0])


def loaded(name, folder):
    files = {
        "encodec_24khz": folder / "encodec_24khz-d7cc33bc.th",
        **{f"descript_{rate}": folder / f"weights_{rate}.pth" for rate in DACS},
    }
    path = files.get(name.partition(":")[0], folder / name)
    name = "encodec_32khz" if name == "musicgen" else name.replace("descript", "dac")
    return load_codec(name, weights=path)


EXPECTED = {
    "encodec_24khz:1.5": (24000, 75.0, 2, 1024, 128),
    "encodec_24khz:3": (24000, 75.0, 4, 1024, 128),
    "encodec_24khz:6": (24000, 75.0, 8, 1024, 128),
    "encodec_24khz:12": (24000, 75.0, 16, 1024, 128),
    "encodec_24khz:24": (24000, 75.0, 32, 1024, 128),
    "audiogen_16khz": (16000, 50.0, 4, 64, 16),
    "encodec_32khz": (32000, 50.0, 4, 64, 16),
    "dac_16khz": (16000, 50.0, 12, 64, 64),
    "dac_24khz": (24000, 75.0, 32, 64, 64),
    "dac_44khz": (44100, 44100 / 512, 9, 64, 64),
}


@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith("tiny")])
def test_numbers(name, weights):
    codec = loaded(name, weights[0])
    assert codec.name == name
    got = (codec.sample_rate, codec.code_rate, codec.num_codebooks, codec.codebook_size, codec.code_dim)
    assert got == EXPECTED[name]
    assert CODEC_NUMBERS[name][:3] == got[:3]  # the size is that of the tests' small files
    assert codec.codebooks().shape == (codec.num_codebooks, codec.codebook_size, codec.code_dim)
    assert codec.codebooks().dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in codec.parameters())


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 512, 513, 639, 640, 641, 5000, 16001])
def test_length_in_is_length_out(codec, samples):
    codes = codec.encode(sounds(2, samples))
    assert codes.shape == (2, codec.num_codebooks, codec.steps_for(samples))
    assert codec.steps_for(samples) == -(-samples // codec.samples_per_step)
    assert codes.dtype == torch.int64
    heard = codec.decode(codes, samples)
    assert heard.shape == (2, 1, samples)
    assert bool(torch.isfinite(heard).all())


def test_another_rate_is_refused(codec):
    with pytest.raises(UserError, match=f"takes {codec.sample_rate} Hz, got 48000 Hz"):
        codec.encode(sounds(1, 640), sample_rate=48000)


def test_codes_do_not_depend_on_batch_or_order(codec):
    waveform = sounds(8, 2 * codec.sample_rate)
    alone = torch.cat([codec.encode(row[None]) for row in waveform])
    assert torch.equal(codec.encode(waveform), alone)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    assert torch.equal(codec.encode(waveform[order]), alone[order])
    assert len(alone.unique()) > codec.codebook_size // 2  # else it is no test


def test_decoded_sound_does_not_depend_on_the_batch(codec):
    codes = torch.randint(codec.codebook_size, (4, codec.num_codebooks, 60))
    alone = torch.cat([codec.decode(row[None]) for row in codes])
    torch.testing.assert_close(codec.decode(codes), alone, atol=1e-5, rtol=0)


def quantised(codec, codes):
    """(B, code_dim, T): what the network's own quantiser makes of codes."""
    if hasattr(codec, "network"):
        return codec.network.quantizer.from_codes(codes)[0]
    return codec.quantizer.decode(codes.transpose(0, 1))


def test_codebooks_are_what_the_decoder_reads(codec):
    codes = torch.randint(codec.codebook_size, (2, codec.num_codebooks, 40))
    books = codec.codebooks()
    for levels in {1, codec.num_codebooks}:
        total = sum(books[level][codes[:, level]] for level in range(levels)).transpose(1, 2)
        torch.testing.assert_close(total, quantised(codec, codes[:, :levels]), atol=1e-5, rtol=1e-5)


def test_pieces_give_what_the_whole_gives(codec, monkeypatch):
    samples = 5 * codec.sample_rate + 123
    waveform = sounds(1, samples)
    whole = codec.encode(waveform)
    heard = codec.decode(whole, samples)
    monkeypatch.setattr(convolutions, "PIECE_SECONDS", 1)
    assert torch.equal(codec.encode(waveform), whole)
    torch.testing.assert_close(codec.decode(whole, samples), heard, atol=1e-5, rtol=0)


def test_pieces_with_less_reach_would_not(weights, monkeypatch):
    """The reach that is allowed for is needed, or nearly so."""
    monkeypatch.setattr(convolutions, "PIECE_SECONDS", 1)
    codec = loaded("dac_16khz", weights[0])
    waveform = sounds(1, 5 * 16000)
    whole = codec.encode(waveform)
    monkeypatch.setattr(convolutions, "reach", lambda network: 0)
    assert not torch.equal(codec.encode(waveform), whole)


def test_the_packages_own_encodec_gives_the_same(weights):
    model, waveform = weights[1]["encodec_24khz"], sounds(2, 48000)
    for bandwidth, levels in ((1.5, 2), (6.0, 8), (24.0, 32)):
        codec = loaded(f"encodec_24khz:{bandwidth:g}", weights[0])
        model.set_target_bandwidth(bandwidth)
        with torch.no_grad():
            (codes, _), *_ = model.encode(waveform[:1])
            assert codes.shape[1] == levels
            assert torch.equal(codec.encode(waveform)[:1], codes)
            torch.testing.assert_close(codec.decode(codes, 48000), model.decode([(codes, None)])[..., :48000])


@pytest.mark.parametrize("name", ["audiogen_16khz", "encodec_32khz", "musicgen"])
def test_transformers_encodec_gives_the_same(name, weights):
    codec, model = loaded(name, weights[0]), weights[1][name.replace("musicgen", "encodec_32khz")]
    waveform = sounds(3, 32000)
    with torch.no_grad():
        for row in waveform:
            theirs = model.encode(row[None]).audio_codes[0]
            assert torch.equal(codec.encode(row[None]), theirs)
            heard = model.decode(theirs[None], [None]).audio_values
            torch.testing.assert_close(codec.decode(theirs), heard, atol=1e-5, rtol=1e-4)


LOST = {"16khz": 8, "24khz": 8, "44khz": 0}
"""Samples by which DAC's decoder ends early: an odd stride loses them."""


@pytest.mark.parametrize("rate", DACS)
def test_transformers_dac_gives_the_same(rate, weights):
    codec, model = loaded(f"dac_{rate}", weights[0]), weights[1][f"dac_{rate}"]
    samples = 100 * codec.samples_per_step
    waveform, kept = sounds(3, samples), samples - LOST[rate]
    with torch.no_grad():
        for row in waveform:
            theirs = model.encode(row[None]).audio_codes
            assert torch.equal(codec.encode(row[None]), theirs)
            heard = model.decode(audio_codes=theirs).audio_values[:, None]
            assert heard.shape[2] == kept
            torch.testing.assert_close(codec.decode(theirs, samples)[..., :kept], heard)
            assert not codec.decode(theirs, samples)[..., kept:].any()


@pytest.mark.parametrize("rate", DACS)
def test_a_second_dac_gives_the_same_from_descripts_file(rate, weights):
    codec, model = loaded(f"descript_{rate}", weights[0]), weights[1][f"descript_{rate}"]
    samples = 100 * codec.samples_per_step
    waveform = sounds(3, samples)
    with torch.no_grad():
        theirs = torch.cat([model.encode(row[None]) for row in waveform])
        assert torch.equal(codec.encode(waveform), theirs)
        heard = codec.decode(theirs, samples)[..., : samples - LOST[rate]]
        torch.testing.assert_close(heard, model.decode(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", DACS)
def test_both_layouts_of_dac_are_one_codec(rate, weights, tmp_path):
    """A folder for the hub, made of what was read from descript's file, gives the same codes."""
    descript = loaded(f"descript_{rate}", weights[0])
    descript.network.save_pretrained(tmp_path / "hub_form")
    again = load_codec(f"dac_{rate}", weights=tmp_path / "hub_form")
    waveform = sounds(2, 16000)
    assert torch.equal(again.encode(waveform), descript.encode(waveform))
    assert again.weight_hash != descript.weight_hash  # of the file


def test_all_layouts_of_encodec_32khz_are_one_codec(weights, tmp_path):
    """The hub's folder with old and with new names of weight norm, and audiocraft's file."""
    encodec_of_hub(tmp_path / "newer", older=False)
    waveform = sounds(2, 32000)
    expected = loaded("encodec_32khz", weights[0]).encode(waveform)
    for path in (tmp_path / "newer", weights[0] / "musicgen" / "compression_state_dict.bin"):
        assert torch.equal(load_codec("encodec_32khz", weights=path).encode(waveform), expected)


def test_a_folder_of_transformers_that_is_another_encodec_is_refused(weights, tmp_path):
    folder = tmp_path / "encodec_32khz"
    shutil.copytree(weights[0] / "encodec_32khz", folder)
    settings = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"audio_channels": 2}, "audio_channels is 2, only 1"),
        ({"normalize": True}, "normalize is True, only False"),
        ({"chunk_length_s": 1.0}, "chunk_length_s is 1.0, only None"),
        ({"norm_type": "time_group_norm"}, "norm_type is 'time_group_norm'"),
        ({"sampling_rate": 24000}, "is for 24000 Hz, codec encodec_32khz for 32000 Hz: load it as codec encodec_24khz"),
        ({"num_filters": 8}, "does not hold the weights of an EnCodec"),
        ({"num_filters": "x"}, "network that the package encodec cannot make"),
    ):
        (folder / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=words):
            load_codec("encodec_32khz", weights=folder)
    (folder / "config.json").write_text(json.dumps({key: settings[key] for key in settings if key != "num_filters"}))
    with pytest.raises(UserError, match="does not say what the network is: 'num_filters'"):
        load_codec("encodec_32khz", weights=folder)
    with pytest.raises(UserError, match="of a model of type 'dac', expected 'encodec'"):
        load_codec("encodec_32khz", weights=weights[0] / "dac_16khz")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
def test_folding_is_what_weight_norm_computes(norm, kind):
    layer = kind(3, 4, 5)
    expected = layer.weight.detach().clone()
    folded = fold_weight_norm(norm(layer).state_dict())
    assert set(folded) == {"weight", "bias"}
    torch.testing.assert_close(folded["weight"], expected)


def test_the_hash_is_that_of_the_file(weights):
    for name, file in (
        ("encodec_24khz:6", "encodec_24khz-d7cc33bc.th"),
        ("audiogen_16khz", "audiogen_16khz/compression_state_dict.bin"),
        ("encodec_32khz", "encodec_32khz/model.safetensors"),
        ("musicgen", "musicgen/compression_state_dict.bin"),
        ("dac_16khz", "dac_16khz/model.safetensors"),
        ("descript_44khz", "weights_44khz.pth"),
    ):
        assert loaded(name, weights[0]).weight_hash == hashlib.sha256((weights[0] / file).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["encodec_24khz:6", "audiogen_16khz", "encodec_32khz", "dac_16khz", "dac_44khz"])
def test_weights_are_found_where_they_are_put(name, weights, monkeypatch, tmp_path):
    with pytest.raises(
        UserError, match=rf"codec {name.partition(':')[0]} needs .*HF_HUB_OFFLINE.*VAB_WEIGHTS"
    ) as caught:
        load_codec(name)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("VAB_WEIGHTS", str(weights[0]))
    assert load_codec(name).name == name


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("audiogen_16khz", "facebook--audiogen-medium"),
        ("encodec_32khz", "facebook--encodec_32khz"),
        ("dac_16khz", "descript--dac_16khz"),
        ("dac_44khz", "descript--dac_44khz"),
    ],
)
def test_weights_are_found_in_the_hubs_cache(name, repository, weights, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "0" * 40
    snapshot = tmp_path / f"models--{repository}" / "snapshots" / revision
    shutil.copytree(weights[0] / name, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(revision)
    assert load_codec(name).name == name
    assert load_codec(name, weights=repository.replace("--", "/")).name == name


def test_the_licence_is_said_once(weights, capsys, monkeypatch):
    monkeypatch.setattr(published, "_printed", set())
    loaded("audiogen_16khz", weights[0])
    assert capsys.readouterr().err == "codec audiogen_16khz: weights under CC BY-NC 4.0: not for commercial use\n"
    loaded("audiogen_16khz", weights[0])
    monkeypatch.setattr(published, "_printed", set())
    monkeypatch.setenv("RANK", "1")
    loaded("audiogen_16khz", weights[0])
    assert capsys.readouterr().err == ""


def broken(change):
    config = yaml.safe_load(yaml.safe_dump(AUDIOCRAFT))
    change(config)
    return config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["encodec"].update(renormalize=True), "encodec.renormalize is True, only False"),
        (lambda c: c["seanet"].update(norm="time_group_norm"), "seanet.norm is 'time_group_norm'"),
        (lambda c: c.update(channels=2), "channels is 2, only 1"),
        (lambda c: c["seanet"].update(encoder={"n_filters": 3}), "its encoder has settings of its own"),
        (lambda c: c["seanet"].update(n_filters=8), "does not hold the weights of an EnCodec"),
    ],
)
def test_an_audiocraft_file_of_another_network_is_refused(change, words, weights, tmp_path):
    state = torch.load(weights[0] / "audiogen_16khz/compression_state_dict.bin")["best_state"]
    path = tmp_path / "compression_state_dict.bin"
    torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(broken(change))}, path)
    with pytest.raises(UserError, match=words):
        load_codec("audiogen_16khz", weights=path)


def test_a_configuration_that_does_not_say_enough_is_refused(weights, tmp_path):
    state = torch.load(weights[0] / "audiogen_16khz/compression_state_dict.bin")["best_state"]
    path = tmp_path / "compression_state_dict.bin"
    for change, words in (
        (lambda c: c.pop("rvq"), "it has no rvq"),
        (lambda c: c["seanet"].update(causal="${nowhere.causal}"), "nowhere"),
    ):
        torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(broken(change))}, path)
        with pytest.raises(UserError, match=rf"xp\.cfg does not say what the network is: .*{words}"):
            load_codec("audiogen_16khz", weights=path)


def test_a_folder_of_an_older_transformers_is_read(weights, tmp_path):
    """The folder on the hub was written by version 4, with these further entries."""
    folder = tmp_path / "dac_16khz"
    shutil.copytree(weights[0] / "dac_16khz", folder)
    settings = json.loads((folder / "config.json").read_text())
    older = {"architectures": ["DacModel"], "torch_dtype": "float32", "transformers_version": "4.45.0.dev0"}
    older |= {"hidden_size": 64, "hop_length": 320, "upsampling_ratios": [8, 5, 4, 2]}
    settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings | older))
    waveform = sounds(1, 8000)
    expected = loaded("dac_16khz", weights[0]).encode(waveform)
    assert torch.equal(load_codec("dac_16khz", weights=folder).encode(waveform), expected)


def test_other_files_are_refused(weights, tmp_path):
    path = tmp_path / "some.bin"
    torch.save({"pretrained": "facebook/encodec_32khz", "exported": True}, path)
    with pytest.raises(UserError, match=r"expected xp\.cfg and best_state, got pretrained, exported"):
        load_codec("audiogen_16khz", weights=path)
    with pytest.raises(UserError, match="does not hold the weights of an EnCodec"):
        load_codec("encodec_24khz:6", weights=path)
    with pytest.raises(UserError, match="not a DAC as descript publishes it"):
        load_codec("dac_16khz", weights=path)
    with pytest.raises(UserError, match=r"lacks config\.json and model\.safetensors"):
        load_codec("dac_16khz", weights=tmp_path)
    with pytest.raises(UserError, match="there is no"):
        load_codec("dac_16khz", weights=tmp_path / "absent")
    dac_of_descript(tmp_path / "a.pth", {**DAC, "sample_rate": 44100})
    with pytest.raises(UserError, match="is for 44100 Hz, codec dac_16khz for 16000 Hz: load it as codec dac_44khz"):
        load_codec("dac_16khz", weights=tmp_path / "a.pth")
    with pytest.raises(UserError, match="ships with its weights"):
        load_codec("tiny", weights=path)
