import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tools.tiny_networks.__main__ import main
from tools.tiny_networks.broad_sounds import broad_sound
from tools.tiny_networks.codec_report import shaped_noise
from tools.tiny_networks.train_codec import QuantiserTrainer, residual_clusters, spectral_loss
from tools.tiny_networks.train_judge import blur_phase
from tools.tiny_networks.train_vision import average_precision, truth_of
from tools.tiny_networks.training import Average, Clock, broad_sounds
from vab.demo.scene import describe
from vab.frozen.codec.tiny import CodecConfig, CodecNetwork, TinyCodec, TinyCodec8
from vab.frozen.judges.tiny import TinyJudge
from vab.frozen.vision.tiny import TinyVision
from vab.spec import UserError


@pytest.mark.parametrize(("part", "loaded_by"), [("codec", TinyCodec), ("vision", TinyVision), ("judge", TinyJudge)])
def test_a_part_is_made_written_and_loaded(tmp_path, part, loaded_by):
    main(["--part", part, "--out", str(tmp_path), "--minutes", "0.004", "--segments", "3", "--threads", "1"])
    path = tmp_path / f"tiny_{part}.safetensors"
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [path]
    assert (tmp_path / "golden").is_dir() == (part == "judge")
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"config", "made"}
    assert len(loaded_by(path).weight_hash) == 64


def test_further_levels_are_made_for_the_codec_in_the_folder(tmp_path):
    main(["--part", "codec", "--out", str(tmp_path), "--minutes", "0.004", "--segments", "3", "--threads", "1"])
    base = tmp_path / "tiny_codec.safetensors"
    files = []
    for _ in range(2):
        main(["--part", "codec8", "--out", str(tmp_path), "--segments", "3", "--threads", "1"])
        files.append((tmp_path / "tiny_codec8.safetensors").read_bytes())
    assert files[0] == files[1]
    codec = TinyCodec8(base, tmp_path / "tiny_codec8.safetensors")
    assert codec.codebooks().shape == (8, 256, 128)
    assert torch.equal(codec.codebooks()[:4], TinyCodec(base).codebooks())
    with pytest.raises(UserError, match="is installed"):
        TinyCodec8(levels=tmp_path / "tiny_codec8.safetensors")  # the shipped codec is another


def test_a_refined_decoder_leaves_the_codes_and_the_further_levels_as_they_are(tmp_path):
    before, networks = TinyCodec8(), []
    for folder in (tmp_path / "a", tmp_path / "b"):
        main(["--part", "decoder", "--out", str(folder), "--steps", "2", "--segments", "4", "--threads", "1"])
        after = TinyCodec8(folder / "tiny_codec.safetensors", folder / "tiny_codec8.safetensors")
        networks.append(after.network.state_dict())
    assert after.weight_hash != before.weight_hash
    changed = set()
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(networks[0][name], networks[1][name])  # by steps, not by the clock
        if not torch.equal(tensor, networks[0][name]):
            changed.add(name.split(".")[0])
    assert changed == {"from_latent", "decoder", "decoder_norm", "to_spectrum", "past_decoder"}
    waveform = torch.from_numpy(broad_sounds(3, 2)[:, None, :9600] / np.float32(32767))
    assert torch.equal(after.encode(waveform), before.encode(waveform))


def test_steps_of_a_refined_decoder_are_counted(tmp_path, capsys):
    main(["--part", "decoder", "--out", str(tmp_path), "--steps", "1", "--segments", "4", "--threads", "1"])
    with safe_open(tmp_path / "tiny_codec.safetensors", framework="pt") as file:
        made = json.loads(file.metadata()["made"])
    assert (made["steps"], made["segments"]) == (1, 4)
    assert made["encoder_and_codebooks_of"] == TinyCodec().weight_hash


def test_clusters_of_what_is_left():
    centres = torch.tensor([[-8.0], [8.0]])
    finer = torch.tensor([[-1.0], [1.0]])
    vectors = (centres[:, None] + finer[None]).reshape(4, 1).repeat(50, 1)
    books, left = residual_clusters(vectors, levels=2, size=2, rounds=10)
    torch.testing.assert_close(books[0].sort(dim=0).values, centres)
    torch.testing.assert_close(books[1].sort(dim=0).values, finer)
    assert float(left.abs().max()) < 1e-5


def test_broad_sounds_are_deterministic_within_range_and_unlike():
    sounds = broad_sounds(3, 12)
    assert np.array_equal(sounds, broad_sounds(3, 12))
    assert sounds.shape == (12, 32000)
    assert np.abs(sounds.astype(np.int32)).max() <= 32767
    assert len({row.tobytes() for row in sounds}) == 12


@pytest.mark.parametrize("seed", range(8))
def test_a_broad_sound_is_finite_and_fits(seed):
    sound = broad_sound(np.random.default_rng(seed), 20000)
    assert (sound.shape, sound.dtype) == ((20000,), np.float32)
    assert 0 < np.abs(sound).max() <= 0.99 + 1e-6


def test_k_means_finds_the_clusters_there_are():
    config = CodecConfig(dim=8, hidden=8, num_codebooks=2, codebook_size=4, code_dim=2)
    quantiser = QuantiserTrainer(CodecNetwork(config))
    corners = torch.tensor([[5.0, 5.0], [5.0, -5.0], [-5.0, 5.0], [-5.0, -5.0]])
    latent = (corners.repeat(200, 1) + 0.1 * torch.randn(800, 2)).unsqueeze(0)
    quantiser.start(latent[0])
    for _ in range(300):
        total, commitment = quantiser(latent, torch.tensor([2]))
    assert float((total - latent).abs().mean()) < 0.2
    assert float(commitment) < 0.1


def test_fewer_levels_use_the_first_ones_and_gradients_pass():
    quantiser = QuantiserTrainer(CodecNetwork(CodecConfig(dim=8, hidden=8, codebook_size=8, code_dim=3)))
    latent = torch.randn(2, 50, 3)
    quantiser.start(latent.flatten(0, 1))
    first = quantiser.books[0].clone()
    latent.requires_grad_()
    total, _ = quantiser(latent, torch.tensor([1, 4]))
    torch.testing.assert_close(total[0].detach(), first[torch.cdist(latent[0].detach(), first).argmin(1)])
    total.sum().backward()
    torch.testing.assert_close(latent.grad, torch.ones_like(latent))


def test_spectral_loss_is_zero_for_equal_sounds_only():
    sound = torch.randn(2, 4000) * 0.1
    assert float(spectral_loss(sound, sound, 16000, 512, 128, 40)) == 0.0
    assert float(spectral_loss(0.5 * sound, sound, 16000, 512, 128, 40)) > 0.5


def test_the_clock_warms_up_and_anneals():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = [optimizer.param_groups[0]["lr"] for _ in Clock(0.002).steps(optimizer, peak_rate=1.0, report_every=10**9)]
    assert rates[0] <= 1 / 200
    assert max(rates) <= 1.0
    assert rates[-1] < 0.1 * max(rates)


def test_the_average_ends_near_a_network_that_stands_still():
    network = torch.nn.Linear(2, 2)
    average = Average(network, decay=0.9)
    torch.nn.init.constant_(network.weight, 5.0)
    for _ in range(100):
        average.update(network)
    torch.testing.assert_close(average.of(network).weight, network.weight, atol=1e-3, rtol=0)


def test_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.9], [0.1, 0.5]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_truth_of_an_object_at_its_event():
    item = next(o for i in range(50) for o in describe(4, i).objects if o.kind == "drum")
    numbers = truth_of(item, np.array([item.events[1], item.events[0] - 5.0]))
    assert numbers.shape == (2, 8)
    assert numbers[0, 3] == pytest.approx(1.0)  # an event is now
    assert numbers[1, 3] == pytest.approx(-1.0)  # there was none yet
    assert np.abs(numbers[:, :2]).max() <= 1.0


def test_blurred_phase_keeps_length_and_level():
    sound = torch.sin(torch.arange(20000) * 0.3).expand(2, -1)
    blurred = blur_phase(sound, 0.5)
    assert blurred.shape == sound.shape
    assert float((blurred - sound).abs().mean()) > 0.05
    assert float(blurred.std() / sound.std()) == pytest.approx(1.0, abs=0.25)


def test_shaped_noise_is_as_loud_as_the_sound_all_along():
    sound = torch.cat([0.5 * torch.randn(16000), 0.05 * torch.randn(16000)])
    noise = shaped_noise(sound)
    halves = [float(noise[part].std() / sound[part].std()) for part in (slice(1000, 15000), slice(17000, 31000))]
    assert halves == pytest.approx([1.0, 1.0], abs=0.1)
