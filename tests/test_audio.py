import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from vab.audio import level_db, log_mel, log_mel_distance, resample, rms_db, si_sdr, to_mono


def tone(frequency, seconds=0.5, sample_rate=16000, amplitude=1.0):
    times = torch.arange(round(seconds * sample_rate), dtype=torch.float64) / sample_rate
    return (amplitude * torch.sin(2 * math.pi * frequency * times)).float()


def slow_log_mel(waveform, sample_rate, n_fft, hop, num_bands, fmin, fmax):
    """One frame, one bin and one band at a time, by the definition."""
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / n_fft) for n in range(n_fft)]
    scale = 2.0 / sum(window)
    low, high = (2595 * math.log10(1 + f / 700) for f in (fmin, fmax))
    corners = [700 * (10 ** ((low + (high - low) * i / (num_bands + 1)) / 2595) - 1) for i in range(num_bands + 2)]
    out = np.zeros((num_bands, 1 + len(waveform) // hop))
    for frame in range(out.shape[1]):
        magnitudes = []
        for k in range(n_fft // 2 + 1):
            total = 0j
            for n in range(n_fft):
                at = frame * hop - n_fft // 2 + n
                if 0 <= at < len(waveform):
                    angle = -2 * math.pi * k * n / n_fft
                    total += waveform[at] * window[n] * scale * complex(math.cos(angle), math.sin(angle))
            magnitudes.append(abs(total))
        for band in range(num_bands):
            left, centre, right = corners[band : band + 3]
            total = 0.0
            for k, magnitude in enumerate(magnitudes):
                hz = k * sample_rate / n_fft
                total += magnitude * max(0.0, min((hz - left) / (centre - left), (right - hz) / (right - centre)))
            out[band, frame] = math.log(max(total, 1e-5))
    return out


def test_log_mel_agrees_with_the_definition():
    waveform = torch.randn(90, generator=torch.Generator().manual_seed(1)) * 0.1
    slow = slow_log_mel(waveform.tolist(), 8000, n_fft=32, hop=20, num_bands=5, fmin=100.0, fmax=3800.0)
    fast = log_mel(waveform, 8000, n_fft=32, hop=20, num_bands=5, fmin=100.0, fmax=3800.0)
    np.testing.assert_allclose(fast.numpy(), slow, atol=1e-4)


def test_log_mel_of_a_full_scale_tone_is_about_zero_in_its_band():
    mel = log_mel(tone(1000.0), 16000)
    assert mel.shape == (64, 51)
    # The Hann window spreads a tone over at most three bins, whose mel weights add up to between 1 and 2.
    assert 0.0 < float(mel[:, 10:40].max()) < math.log(2.0)


def test_log_mel_of_silence_is_the_floor_and_batches_are_rows():
    waveform = torch.stack([torch.zeros(4000), tone(440.0, 0.25)])
    mel = log_mel(waveform[:, None], 16000)
    assert mel.shape == (2, 1, 64, 26)
    assert torch.all(mel[0] == math.log(1e-5))
    torch.testing.assert_close(mel[1, 0], log_mel(waveform[1], 16000))


def test_log_mel_can_train_after_inference_mode():
    with torch.inference_mode():
        log_mel(torch.randn(600), 16000, n_fft=200)
    waveform = torch.randn(600, requires_grad=True)
    log_mel(waveform, 16000, n_fft=200).sum().backward()
    assert torch.isfinite(waveform.grad).all()


@pytest.mark.parametrize(("fmin", "fmax"), [(-1.0, None), (500.0, 400.0), (50.0, 9000.0)])
def test_log_mel_refuses_impossible_corners(fmin, fmax):
    with pytest.raises(ValueError, match="fmin < fmax"):
        log_mel(torch.zeros(2000), 16000, fmin=fmin, fmax=fmax)


def test_log_mel_distance_is_zero_for_equal_sounds_and_log_two_for_twice_as_loud():
    quiet = 0.2 * torch.randn(2, 16000)
    assert log_mel_distance(quiet, quiet, 16000).tolist() == [0.0, 0.0]
    torch.testing.assert_close(log_mel_distance(2 * quiet, quiet, 16000), torch.full((2,), math.log(2.0)))


def test_log_mel_distance_refuses_unlike_shapes():
    with pytest.raises(ValueError, match="one shape"):
        log_mel_distance(torch.zeros(1000), torch.zeros(999), 16000)


def test_to_mono_is_the_mean_of_the_channels():
    stereo = np.array([[1.0, -1.0, 0.5], [0.0, 1.0, 0.5]], dtype=np.float32)
    mono = to_mono(stereo)
    assert mono.dtype == np.float32
    assert mono.tolist() == [0.5, 0.0, 0.5]


def test_to_mono_refuses_a_bare_waveform():
    with pytest.raises(ValueError, match="channels"):
        to_mono(np.zeros(10, np.float32))


@pytest.mark.parametrize(
    ("samples", "from_rate", "to_rate"),
    [(44100, 44100, 16000), (12345, 44100, 16000), (8001, 8000, 16000), (48002, 48000, 24000), (777, 16000, 16000)],
)
def test_resample_length_is_the_ratio_rounded(samples, from_rate, to_rate):
    out = resample(np.zeros(samples, np.float32), from_rate, to_rate)
    assert (len(out), out.dtype) == (round(samples * to_rate / from_rate), np.float32)


def test_resample_keeps_a_tone_and_its_time():
    out = torch.from_numpy(resample(tone(440.0, 1.0, 44100).numpy(), 44100, 16000))
    expected = tone(440.0, 1.0, 16000)
    middle = slice(2000, 14000)  # at the ends the filter sees the silence outside
    torch.testing.assert_close(out[middle], expected[middle], atol=2e-3, rtol=0)


def test_resample_removes_what_the_new_rate_cannot_hold():
    out = resample(tone(10000.0, 0.5, 44100).numpy(), 44100, 16000)
    assert float(rms_db(torch.from_numpy(out[1000:-1000]))) < -80


def test_resample_refuses_two_channels():
    with pytest.raises(ValueError, match="to_mono"):
        resample(np.zeros((2, 100), np.float32), 16000, 8000)


def test_rms_db_of_known_waveforms():
    waveforms = torch.stack([torch.ones(8000), tone(400.0), 0.1 * torch.ones(8000), torch.zeros(8000)])
    assert rms_db(waveforms).tolist() == pytest.approx([0.0, -3.0103, -20.0, -math.inf], abs=1e-3)


def test_si_sdr_closed_form():
    reference, other = tone(200.0), tone(300.0)  # whole periods: at right angles and free of means
    # Noise a tenth as high is 20 dB down, at any level of the whole; 1e-5 of rounding remains of the sines.
    estimate = 3.0 * (reference + 0.1 * other)
    assert float(si_sdr(estimate, reference)) == pytest.approx(20.0, abs=1e-3)


def test_si_sdr_limits():
    reference = torch.tensor([1.0, -1.0, 1.0, -1.0])
    estimates = torch.stack([0.5 * reference, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])])
    assert si_sdr(estimates, reference.expand(3, 4)).tolist() == [math.inf, -math.inf, -math.inf]


def test_si_sdr_refuses_a_silent_reference():
    with pytest.raises(ValueError, match="silent"):
        si_sdr(torch.ones(10), torch.zeros(10))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
def test_the_level_of_an_array_is_that_of_a_tensor(scale):
    waveform = np.random.default_rng(0).uniform(-scale, scale, 16_000).astype(np.float32)
    assert level_db(waveform) == pytest.approx(float(rms_db(torch.from_numpy(waveform))), abs=1e-4)
    with pytest.raises(ValueError, match="no samples"):
        level_db(waveform[:0])


@pytest.mark.parametrize("module", ["vab.audio", "vab.data.media.segments", "vab.data.media.write"])
def test_a_decoding_process_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
