import hashlib
import math

import numpy as np
import pytest
import torch

from tools.tiny_networks.train_codec import start_as_vocoder
from tools.tiny_networks.training import UNSEEN_SEED, broad_sounds, world_sounds
from tools.tiny_networks.weights import levels_to_bytes
from vab.audio import log_mel_distance
from vab.frozen.codec import load_codec
from vab.frozen.codec.tiny import CodecConfig, CodecNetwork, TinyCodec8
from vab.frozen.tiny import shipped_weights
from vab.spec import UserError


@pytest.fixture(scope="module")
def codec():
    return load_codec("tiny")


def sounds(count, samples):
    generator = torch.Generator().manual_seed(samples)
    pitch = 200 + 2000 * torch.rand(count, 1, 1, generator=generator)
    waveform = 0.3 * torch.sin(2 * torch.pi * pitch * torch.arange(samples) / 16000)
    return waveform + 0.05 * torch.randn(count, 1, samples, generator=generator)


def test_numbers_of_the_tiny_codec(codec):
    assert (codec.name, codec.sample_rate, codec.code_rate) == ("tiny", 16000, 50.0)
    assert (codec.num_codebooks, codec.codebook_size) == (4, 256)
    assert codec.codebooks().shape == (4, 256, codec.code_dim)
    assert codec.codebooks().dtype == torch.float32


def test_weight_hash_is_that_of_the_file(codec):
    assert codec.weight_hash == hashlib.sha256(shipped_weights("codec").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("samples", "steps"), [(1, 1), (319, 1), (320, 1), (321, 2), (16000, 50), (64000, 200), (0, 0)]
)
def test_steps_for_counts_every_step_begun(codec, samples, steps):
    assert codec.steps_for(samples) == steps


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 5000, 16001])
def test_round_trip_has_exactly_the_samples_and_the_steps(codec, samples):
    waveform = sounds(2, samples)
    codes = codec.encode(waveform)
    assert codes.shape == (2, 4, codec.steps_for(samples))
    assert codes.dtype == torch.int64
    assert codec.decode(codes, samples).shape == waveform.shape
    assert codec.decode(codes).shape == (2, 1, codec.steps_for(samples) * 320)


def test_codes_do_not_depend_on_the_batch_or_the_call(codec):
    waveform = sounds(8, 24000)
    together = codec.encode(waveform)
    assert torch.equal(together, codec.encode(waveform))
    assert torch.equal(together, torch.cat([codec.encode(row[None]) for row in waveform]))


def test_decoded_sound_does_not_depend_on_the_batch(codec):
    codes = torch.randint(256, (5, 4, 40))
    alone = torch.cat([codec.decode(row[None]) for row in codes])
    torch.testing.assert_close(codec.decode(codes), alone, atol=1e-5, rtol=0)


def test_decoder_reads_nothing_but_the_sum_of_the_codebook_vectors(codec):
    codes = torch.randint(256, (2, 4, 30))
    books = codec.codebooks()
    total = sum(books[level][codes[:, level]] for level in range(4))  # (B, T, code_dim)
    torch.testing.assert_close(codec.network.synthesise(total).unsqueeze(1), codec.decode(codes))


@pytest.mark.parametrize("name", ["tiny", "tiny8"])
def test_decoding_the_first_levels_is_decoding_their_sum(name):
    codec = load_codec(name)
    codes = torch.randint(256, (2, codec.num_codebooks, 30))
    books = codec.codebooks()
    total = torch.zeros(2, 30, codec.code_dim)
    for level in range(codec.num_codebooks):
        total = total + books[level][codes[:, level]]
        heard = codec.decode(codes[:, : level + 1], 9500)
        torch.testing.assert_close(heard, codec.network.synthesise(total).unsqueeze(1)[..., :9500])


@pytest.mark.parametrize(("hertz", "band"), [(440.0, 7), (1000.0, 16), (3333.0, 53)])
def test_a_partial_of_steady_frequency_is_a_pure_tone(hertz, band):
    network = CodecNetwork(CodecConfig())
    start_as_vocoder(network)
    offset = (hertz / 25 - float(network.centres[band])) / (0.7 * network.band_width)
    with torch.no_grad():
        network.past_decoder.weight.zero_()
        network.past_decoder.bias.fill_(-100.0)  # silence but for one partial
        network.past_decoder.bias[128:256] = 0.0
        network.past_decoder.bias[band] = 6.0 + math.log(0.5)
        network.past_decoder.bias[128 + band] = math.atanh(offset)
        heard = network.synthesise(torch.zeros(1, 50, 128))[0, 1600:-1600]
    seconds = torch.arange(len(heard)) / 16000
    basis = torch.stack(
        [(2 * torch.pi * hertz * seconds).sin(), (2 * torch.pi * hertz * seconds).cos()], dim=1
    ).double()
    fitted = torch.linalg.lstsq(basis, heard.double()[:, None]).solution
    assert float(fitted.norm()) == pytest.approx(0.5, rel=1e-3)
    residue = heard - (basis @ fitted)[:, 0]
    assert float(residue.norm() / heard.norm()) < 3e-3  # 50 dB down


def test_each_level_takes_the_nearest_entry_to_what_is_left(codec):
    waveform = sounds(1, 8000)
    left = codec.network.analyse(waveform[0])[0].double()  # (T, code_dim)
    for level, entries in enumerate(codec.codebooks().double()):
        nearest = torch.cdist(left, entries).argmin(dim=1)
        assert torch.equal(nearest, codec.encode(waveform)[0, level])
        left = left - entries[nearest]


def test_round_trip_sounds_like_the_original(codec):
    waveform = sounds(4, 32000)
    heard = codec.decode(codec.encode(waveform), 32000)
    other = waveform[[1, 2, 3, 0]]
    distance, mistaken = (log_mel_distance(x, waveform, 16000).mean() for x in (heard, other))
    assert float(distance) < 0.9 * float(mistaken)


def test_most_codes_are_in_use(codec):
    codes = codec.encode(torch.from_numpy(broad_sounds(5, 40) / 32767.0).unsqueeze(1))
    used = [len(codes[:, level].unique()) for level in range(4)]
    assert min(used) > 100


@pytest.mark.parametrize("waveform", [torch.zeros(1, 1, 3000), torch.ones(1, 1, 3000), 2 * torch.rand(1, 1, 3000) - 1])
def test_silence_and_full_scale_noise_stay_finite_and_below_full_scale(codec, waveform):
    heard = codec.decode(codec.encode(waveform), 3000)
    assert torch.isfinite(heard).all()
    assert float(heard.abs().max()) < 1.0


@pytest.mark.parametrize("name", ["tiny", "tiny8"])
def test_any_codes_decode_to_less_than_full_scale(name):
    codec = load_codec(name)
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 2, 150):
        codes = torch.randint(256, (4, codec.num_codebooks, steps), generator=generator)
        for levels in (1, codec.num_codebooks):
            heard = codec.decode(codes[:, :levels])
            assert torch.isfinite(heard).all()
            assert float(heard.abs().max()) <= 1.0
    assert float(heard.abs().max()) > 0.98  # codes of noise are loud: without the limit they would exceed 1


def test_the_limit_leaves_steps_away_from_peaks_as_they_are_and_never_jumps(codec):
    waveform = 0.5 * torch.randn(1, 10 * 320, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)
    assert torch.equal(codec.network._limit(waveform), waveform)
    waveform[:, 1650] = 4.0  # in step 5
    limited = codec.network._limit(waveform)
    assert float(limited.abs().max()) <= codec.network.CEILING + 1e-6
    gain = limited / waveform
    assert torch.equal(gain[:, : 3 * 320], torch.ones(1, 960))
    assert torch.equal(gain[:, 8 * 320 :], torch.ones(1, 640))
    assert float(gain.diff().abs().max()) < 1 / 320 + 1e-5


def test_silence_stays_quiet(codec):
    heard = codec.decode(codec.encode(torch.zeros(1, 1, 16000)))
    assert float(heard.abs().max()) < 1e-2


def test_another_rate_is_refused_and_its_own_is_not(codec):
    waveform = sounds(1, 640)
    with pytest.raises(UserError, match=r"takes 16000 Hz, got 24000 Hz"):
        codec.encode(waveform, sample_rate=24000)
    assert torch.equal(codec.encode(waveform, sample_rate=16000), codec.encode(waveform))


@pytest.mark.parametrize("shape", [(1, 2, 640), (640,), (1, 640), (1, 1, 0)])
def test_other_shapes_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"\(B, 1, N\)"):
        codec.encode(torch.zeros(shape))


def test_not_a_number_is_refused(codec):
    waveform = sounds(1, 640)
    waveform[0, 0, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(waveform)


def test_codes_that_cannot_be_are_refused(codec):
    codes = torch.zeros(1, 4, 3, dtype=torch.int64)
    for wrong in (codes[:, :0], torch.cat([codes, codes[:, :1]], dim=1), codes[..., :0], codes[0]):
        with pytest.raises(ValueError, match=r"first k levels, 1 <= k <= 4, got"):
            codec.decode(wrong)
    with pytest.raises(ValueError, match=r"\[0, 256\)"):
        codec.decode(codes + 256)
    with pytest.raises(ValueError, match="1000 samples are 4 steps, but the codes have 3"):
        codec.decode(codes, 1000)


def test_tiny8_is_tiny_with_four_finer_levels(codec):
    finer = load_codec("tiny8")
    assert (finer.name, finer.num_codebooks, finer.codebook_size) == ("tiny8", 8, 256)
    assert (finer.sample_rate, finer.code_rate, finer.code_dim) == (codec.sample_rate, codec.code_rate, codec.code_dim)
    assert torch.equal(finer.codebooks()[:4], codec.codebooks())
    for tensor, same in zip(codec.network.state_dict().items(), finer.network.state_dict().items(), strict=True):
        assert tensor[0] == same[0]
        assert tensor[0] == "codebooks" or torch.equal(tensor[1], same[1])
    waveform = sounds(2, 9600)
    codes = finer.encode(waveform)
    assert codes.shape == (2, 8, 30)
    assert torch.equal(codes[:, :4], codec.encode(waveform))
    assert torch.equal(finer.decode(codes[:, :4]), codec.decode(codes[:, :4]))


def test_the_hash_of_tiny8_covers_both_of_its_files(codec, tmp_path):
    shipped = load_codec("tiny8").weight_hash
    levels_hash = hashlib.sha256(shipped_weights("codec8").read_bytes()).hexdigest()
    assert shipped == hashlib.sha256((codec.weight_hash + levels_hash).encode()).hexdigest()
    path = tmp_path / "other.safetensors"
    path.write_bytes(levels_to_bytes(load_codec("tiny8").codebooks()[4:] + 0.01, codec.weight_hash, {}))
    assert TinyCodec8(levels=path).weight_hash != shipped


def test_levels_of_another_codec_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(levels_to_bytes(torch.zeros(4, 256, 128), 64 * "0", {}))
    with pytest.raises(UserError, match=r"for a codec of weights 0{12}, but [0-9a-f]{12} is installed"):
        TinyCodec8(levels=path)


def test_every_level_brings_the_sound_nearer_to_the_original():
    codec = load_codec("tiny8")
    waveform = torch.from_numpy(world_sounds(UNSEEN_SEED, 12)[1] / np.float32(32767)).unsqueeze(1)[..., :32000]
    codes = codec.encode(waveform)
    distances = [
        float(log_mel_distance(codec.decode(codes[:, :k], 32000), waveform, 16000).mean()) for k in range(1, 9)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[3] - distances[7] > 0.01


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UserError, match=r"unknown codec 'opus': there is tiny"):
        load_codec("opus")


def test_it_stays_frozen(codec):
    codec.train()
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_precision_is_full_under_autocast(codec):
    waveform = sounds(2, 8000)
    plain = codec.encode(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = codec.encode(waveform)
        heard = codec.decode(mixed)
    assert torch.equal(mixed, plain)
    assert torch.equal(heard, codec.decode(plain))
