import itertools
import math

import numpy as np
import pytest
import torch

from vab.audio import resample
from vab.demo.scene import KINDS, describe
from vab.demo.sounds import SAMPLE_RATE, render_audio
from vab.metrics.synchrony import (
    CHANCE_PAIRS,
    Synchrony,
    best_offset,
    chance_counts,
    find_onsets,
    match_onsets,
    onset_counts,
    onset_ratios,
)
from vab.metrics.uncertainty import mean_and_error, ratio_and_error

STRUCK = {name for name, kind in KINDS.items() if kind.motion != "cycle"}
MELODY = (0.3, 0.75, 1.3, 1.52, 2.1, 2.4, 2.61)


def seconds(*times):
    return torch.tensor(times, dtype=torch.float64)


def clicks(times=MELODY, rate=16000, length=3.0, floor=1e-4):
    """Decaying tones at these times, over a noise floor."""
    generator = torch.Generator().manual_seed(0)
    waveform = floor * torch.randn(round(length * rate), generator=generator)
    for number, time in enumerate(times):
        age = torch.arange(len(waveform)) / rate - time
        tone = torch.exp(-age.clamp(min=0) / 0.08) * torch.sin(2 * math.pi * (500 + 300 * (number % 4)) * age)
        waveform += 0.5 * tone * (age >= 0)
    return waveform


@pytest.fixture(scope="module")
def scenes():
    return [(scene, torch.from_numpy(render_audio(scene))) for scene in (describe(21, index) for index in range(40))]


def events(scene):
    return seconds(*sorted(event for item in scene.objects for event in item.events))


def test_clicks_are_found_where_they_are():
    found = find_onsets(clicks(), 16000)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(MELODY, abs=0.005)


@pytest.mark.parametrize("scale", [1e-4, 0.3, 100.0])
def test_level_does_not_matter(scale):
    found = find_onsets(scale * clicks(), 16000)
    assert found.tolist() == pytest.approx(find_onsets(clicks(), 16000).tolist(), abs=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_rate_hardly_matters(rate):
    found = find_onsets(torch.from_numpy(resample(clicks().numpy(), 16000, rate)), rate)
    assert found.tolist() == pytest.approx(MELODY, abs=0.008)


def test_soft_tones_and_noisy_strikes_are_found():
    generator = torch.Generator().manual_seed(0)
    times = torch.arange(48000) / 16000
    waveform = 1e-3 * torch.randn(48000, generator=generator)
    for start in (0.4, 1.9):  # a tone that sets in over 30 ms
        age = times - start
        waveform += 0.3 * (age / 0.03).clamp(0, 1) * ((0.5 - age) / 0.2).clamp(0, 1) * torch.sin(1500 * math.tau * age)
    age = times - 1.2
    waveform += (age >= 0) * torch.exp(-age.clamp(min=0) / 0.05) * torch.randn(48000, generator=generator)
    assert find_onsets(waveform, 16000).tolist() == pytest.approx([0.4, 1.2, 1.9], abs=0.025)


def test_steady_sounds_have_no_onset():
    times = torch.arange(32000) / 16000
    for waveform in (torch.zeros(32000), torch.sin(440 * math.tau * times), torch.randn(32000), torch.ones(32000)):
        assert find_onsets(waveform, 16000).tolist() == []


def test_what_cannot_be_heard_is_refused():
    for waveform, rate, words in (
        (torch.zeros(2, 16000), 16000, r"takes \(N,\)"),
        (torch.zeros(16000), 1000, "2000 Hz"),
        (torch.full((16000,), math.nan), 16000, "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            find_onsets(waveform, rate)
    assert find_onsets(torch.randn(640), 16000).tolist() == []  # one window
    assert find_onsets(torch.randn(639), 16000).tolist() == []
    assert find_onsets(torch.zeros(0), 16000).tolist() == []


def test_error_on_the_demo_world_is_below_30_ms(scenes):
    """All kinds of objects, alone and two together, some in cycles that swell; and apart those that strike or call."""
    apart, counts = {"all": [], "struck": [], "alone": []}, {"all": [0, 0], "struck": [0, 0], "alone": [0, 0]}
    for scene, waveform in scenes:
        found = find_onsets(waveform, SAMPLE_RATE)
        struck, alone = {item.kind for item in scene.objects} <= STRUCK, len(scene.objects) == 1
        for name in ["all"] + ["struck"] * struck + ["alone"] * alone:
            true, generated = match_onsets(events(scene), found)
            apart[name] += (true - generated).abs().tolist()
            counts[name][0] += len(true)
            counts[name][1] += len(events(scene))
    assert np.mean(apart["all"]) < 0.010
    assert np.percentile(apart["all"], 95) < 0.030
    assert np.mean(apart["struck"]) < 0.006
    assert np.percentile(apart["struck"], 95) < 0.012
    assert max(apart["alone"]) < 0.030
    assert counts["alone"][0] > 0.98 * counts["alone"][1]
    assert counts["all"][0] > 0.85 * counts["all"][1]  # of two objects that strike within 50 ms one is found


def test_a_known_shift_of_the_sound_is_measured_below_30_ms(scenes):
    errors = []
    for number, (_, waveform) in enumerate(scenes):
        delay = 0.05 + 0.4 * (number / len(scenes)) + 0.0013  # no multiple of a frame
        late = torch.cat([1e-3 * torch.randn(round(delay * SAMPLE_RATE)), waveform])[: len(waveform)]
        true, generated = find_onsets(waveform, SAMPLE_RATE), find_onsets(late, SAMPLE_RATE)
        if len(true) > 2 and len(generated) > 2:
            errors.append(abs(best_offset(true, generated) + delay))
    assert len(errors) > 15
    assert np.mean(np.array(errors) < 0.030) > 0.95
    assert np.median(errors) < 0.003


def exhaustive(true, generated, tolerance):
    """Largest number of one-to-one pairs, by trying all."""
    few, many = sorted((true.tolist(), generated.tolist()), key=len)
    return max(
        sum(abs(a - b) <= tolerance + 1e-9 for a, b in zip(few, chosen, strict=True))
        for chosen in itertools.permutations(many, len(few))
    )


@pytest.mark.parametrize("seed", range(20))
def test_matching_is_the_largest(seed):
    generator = torch.Generator().manual_seed(seed)
    true, other = torch.rand(5, generator=generator).double(), torch.rand(4 + seed % 3, generator=generator).double()
    matched, theirs = match_onsets(true, other, 0.15)
    assert len(matched) == exhaustive(true, other, 0.15)
    assert bool(((matched - theirs).abs() <= 0.15 + 1e-9).all())
    assert bool((matched.diff() > 0).all() and (theirs.diff() > 0).all())


def test_each_onset_is_used_once_and_the_nearest_first():
    matched, theirs = match_onsets(seconds(1.0, 1.06), seconds(1.05))
    assert (matched.tolist(), theirs.tolist()) == ([1.06], [1.05])
    # 1.1 is nearer to 1.06, but then 0.97 would be alone.
    matched, theirs = match_onsets(seconds(1.06, 1.15), seconds(0.97, 1.1))
    assert (matched.tolist(), theirs.tolist()) == ([1.06, 1.15], [0.97, 1.1])


def test_matches_by_hand():
    true = seconds(0.5, 1.0, 2.0, 3.0)
    assert len(match_onsets(true, true)[0]) == 4
    assert len(match_onsets(true, seconds())[0]) == len(match_onsets(seconds(), true)[0]) == 0
    assert len(match_onsets(true, seconds(1.1, 2.11, 0.45))[0]) == 2  # 1.1 is just near enough, 2.11 is not
    assert len(match_onsets(true, seconds(2.1, 2.05, 1.95))[0]) == 1
    with pytest.raises(ValueError, match="finite"):
        match_onsets(true, seconds(math.nan))
    with pytest.raises(ValueError, match="above 0"):
        match_onsets(true, true, 0.0)


@pytest.mark.parametrize("late", [-0.9, -0.0137, 0.0, 0.2011, 0.98])
def test_offset_of_a_moved_train(late):
    true = seconds(*MELODY)
    assert best_offset(true, true + late) == pytest.approx(-late, abs=1e-6)
    assert best_offset(true, (true + late)[torch.tensor([0, 2, 5, 6])]) == pytest.approx(-late, abs=1e-6)


def test_offset_of_regular_beats_is_the_smallest():
    beats = torch.arange(8, dtype=torch.float64) * 0.5
    assert best_offset(beats[:1], beats + 0.2) == pytest.approx(-0.2)
    assert best_offset(beats, beats[3:5] + 0.1) == pytest.approx(-0.1)


def test_there_is_no_offset_beyond_the_limit():
    assert best_offset(seconds(0.0), seconds(1.2)) is None
    assert best_offset(seconds(0.0), seconds()) is None
    assert best_offset(seconds(0.0), seconds(1.2), max_seconds=2.0) == pytest.approx(-1.2)
    with pytest.raises(ValueError, match="above 0"):
        best_offset(seconds(0.0), seconds(0.0), max_seconds=0.0)


def test_the_metric_by_hand():
    metric = Synchrony()
    metric.update([(seconds(0.5, 1.0, 2.0), seconds(0.52, 1.02, 3.0, 3.5)), (seconds(1.0), seconds())])
    metric.update([(seconds(), seconds(1.0, 2.0))])
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(
        {
            "onset_recall": 2 / 4,
            "onset_precision": 2 / 4,
            "onset_f1": 2 / 4,
            "offset_seconds": 0.02,
            "records": 2,
            "records_aligned": 1,
            "records_without_onsets": 1,
        },
        abs=1e-9,
    )


def test_the_metric_on_batches_is_that_of_the_whole():
    pairs = [(torch.rand(1 + number % 5), torch.rand(number % 4)) for number in range(17)]
    whole, parts = Synchrony(), Synchrony()
    whole.update(pairs)
    for start in (12, 0, 6):
        parts.update(pairs[start : start + 6])
    expected = whole.compute()
    for name, value in parts.compute().items():
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-12)


def test_nothing_heard_leaves_out_what_is_not_defined():
    metric = Synchrony()
    metric.update([(seconds(1.0), seconds())])
    assert metric.compute().keys() == {
        "onset_recall", "onset_f1", "records", "records_aligned", "records_without_onsets"
    }  # fmt: skip
    silent = Synchrony()
    silent.update([(seconds(), seconds(1.0))])
    with pytest.raises(ValueError, match="no record had a true onset"):
        silent.compute()


def some_pairs(count, jitter):
    """Records with 1 to 8 true onsets; of the generated ones most are near true ones, the others anywhere."""
    pairs = []
    for _ in range(count):
        true = 4 * torch.rand(int(torch.randint(1, 9, ())))
        moved = true[torch.rand(len(true)) < 0.8] + jitter * torch.randn(())
        pairs.append((true.double(), torch.cat([moved, 4 * torch.rand(int(torch.randint(0, 3, ())))]).double()))
    return pairs


def test_the_errors_are_those_of_a_bootstrap_over_records():
    counts = onset_counts(some_pairs(150, 0.08))
    got = onset_ratios(counts)
    drawn = [onset_ratios(counts[torch.randint(150, (150,))]) for _ in range(600)]
    for name, (_, error) in got.items():
        values = torch.tensor([one[name][0] for one in drawn])
        assert error == pytest.approx(float(values.std()), rel=0.15), name
    assert got.keys() == {"onset_recall", "onset_precision", "onset_f1", "offset_seconds"}


def test_a_ratio_over_ones_is_a_mean():
    values = torch.randn(9)
    assert ratio_and_error(values, torch.ones(9)) == pytest.approx(mean_and_error(values), rel=1e-12)
    assert ratio_and_error(values[:1], torch.ones(1)) == (float(values[0]), None)


def test_ratios_are_the_metric():
    pairs = some_pairs(20, 0.02)
    metric = Synchrony()
    metric.update(pairs)
    whole = {name: float(value) for name, value in metric.compute().items()}
    for name, (value, _) in onset_ratios(onset_counts(pairs)).items():
        assert value == pytest.approx(whole[name], rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_chance_is_all_pairs_but_the_own_ones(count):
    pairs = some_pairs(count, 0.02)
    chance = chance_counts(pairs)
    for number, (_, generated) in enumerate(pairs):
        others = [(true, generated) for other, (true, _) in enumerate(pairs) if other != number]
        torch.testing.assert_close(chance[number], onset_counts(others).sum(0), rtol=1e-12, atol=1e-12)


def test_chance_of_many_records_pairs_each_equally_often_and_none_with_its_own():
    count = CHANCE_PAIRS // 2 - 100  # 2 rotations
    true = [torch.tensor([10.0 * number, 10.0 * number + 5]) for number in range(count)]
    pairs = [(one, one[: 1 + number % 2]) for number, one in enumerate(true)]
    own, chance = onset_counts(pairs).sum(0), chance_counts(pairs)
    assert float(own[0] / own[2]) == 1
    assert float(chance[:, 0].sum()) == float(chance[:, 4].sum()) == 0
    assert chance[:, 1:3].sum(0).tolist() == (2 * own[1:3]).tolist()
    assert chance.shape == (count, 5)


def test_chance_of_one_record_is_refused():
    with pytest.raises(ValueError, match="at least 2 records, got 1"):
        chance_counts(some_pairs(1, 0.0))


def test_ratios_over_nothing_are_left_out():
    silent = onset_ratios(onset_counts([(seconds(1.0), seconds()), (seconds(2.0, 3.0), seconds())]))
    assert silent == {"onset_recall": (0.0, 0.0), "onset_f1": (0.0, 0.0)}
    assert onset_ratios(onset_counts([])) == {}
