import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vab.metrics.health import Health, audio_statistics, health, warnings_for

RATE, CODE_RATE = 16_000, 50.0


def tone(seconds=1.0, amplitude=0.5):
    return amplitude * torch.sin(torch.arange(round(seconds * RATE)) * (2 * torch.pi * 400 / RATE))


def all_different(steps, levels=2):
    return torch.arange(steps).repeat(levels, 1)


def test_a_tone_in_closed_form():
    got = health(tone(), all_different(50), RATE, CODE_RATE)
    assert got.peak == pytest.approx(0.5, abs=1e-3)
    assert got.rms_db == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=1e-3)
    assert got.silence == 0
    assert got.entropy == pytest.approx((math.log2(50),) * 2)
    assert got.longest_repeat_seconds == pytest.approx(1 / CODE_RATE)
    assert got.seconds == 1


@pytest.mark.parametrize(("level_db", "silent"), [(-59.9, 0.0), (-60.1, 1.0)])
def test_silence_begins_below_minus_60_db(level_db, silent):
    constant = torch.full((RATE,), 10 ** (level_db / 20))
    assert health(constant, all_different(50), RATE, CODE_RATE).silence == silent


def test_silence_is_a_share_of_the_duration():
    sound = tone()
    sound[: RATE // 4] = 0
    assert health(sound, all_different(50), RATE, CODE_RATE).silence == pytest.approx(0.25)
    cut = torch.cat([torch.zeros(800), torch.ones(400)])  # the last frame is half a frame
    assert health(cut, all_different(4), RATE, CODE_RATE).silence == pytest.approx(800 / 1200)


def test_digital_silence_has_finite_numbers():
    got = health(torch.zeros(RATE), torch.zeros(2, 50, dtype=torch.int64), RATE, CODE_RATE)
    assert got == Health(0.0, -120.0, 1.0, (0.0, 0.0), 1.0, 1.0)
    json.dumps(dataclasses.asdict(got), allow_nan=False)


def test_one_sample_and_one_step_are_a_sound():
    got = health(torch.ones(1), torch.zeros(1, 1, dtype=torch.int64), RATE, CODE_RATE)
    assert (got.peak, got.rms_db, got.silence, got.entropy) == (1.0, 0.0, 0.0, (0.0,))


def test_entropy_per_level_in_closed_form():
    codes = torch.tensor([[0, 0, 1, 1], [3, 1, 2, 0], [5, 5, 5, 5], [0, 0, 0, 9]])
    quarter = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert health(tone(), codes, RATE, CODE_RATE).entropy == pytest.approx((1, 2, 0, quarter))


@given(codes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_the_longest_repeat_is_that_of_a_loop(codes):
    longest = run = 1
    for before, after in itertools.pairwise(codes):
        run = run + 1 if before == after else 1
        longest = max(longest, run)
    got = health(tone(), torch.tensor(codes).T, RATE, CODE_RATE)
    assert got.longest_repeat_seconds == pytest.approx(longest / CODE_RATE)


@pytest.mark.parametrize(
    ("waveform", "codes"),
    [
        (torch.zeros(0), torch.zeros(2, 4)),
        (torch.zeros(9), torch.zeros(2, 0)),
        (torch.zeros(9), torch.zeros(0, 4)),
        (torch.zeros(1, 9), torch.zeros(2, 4)),
        (torch.tensor([0.0, math.nan]), torch.zeros(2, 4)),
    ],
)
def test_what_is_no_sound_is_refused(waveform, codes):
    with pytest.raises(ValueError, match="health"):
        health(waveform, codes.long(), RATE, CODE_RATE)


def usual(**changes):
    """A sound that nothing is wrong with."""
    made = Health(
        peak=0.8, rms_db=-20.0, silence=0.1, entropy=(4.0, 6.0), longest_repeat_seconds=0.1, seconds=4.0
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_statistics_in_closed_form():
    sounds = [usual(rms_db=-20.0, entropy=(4.0, 6.0)), usual(rms_db=-10.0, entropy=(2.0, 6.0), silence=0.3)]
    got = audio_statistics(sounds)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["sounds"], got["seconds_mean"]) == (2, 4)
    assert (got["rms_db_mean"], got["rms_db_std"]) == (-15, 5)
    assert (got["entropy_level_0_mean"], got["entropy_level_0_std"]) == (3, 1)
    assert (got["entropy_level_1_mean"], got["entropy_level_1_std"]) == (6, 0)
    assert got["silence_mean"] == pytest.approx(0.2)
    assert got["silence_p95"] == pytest.approx(0.29)
    assert got["peak_p95"] == pytest.approx(0.8)
    assert got["longest_repeat_seconds_p95"] == pytest.approx(0.1)


def test_silent_sounds_do_not_count_for_the_loudness():
    silent = usual(rms_db=-120.0, silence=1.0)
    assert audio_statistics([usual(), silent])["rms_db_mean"] == -20
    assert "rms_db_mean" not in audio_statistics([silent])
    assert warnings_for(usual(), audio_statistics([silent, silent])) == []


def test_statistics_of_nothing_or_of_unlike_sounds_are_refused():
    with pytest.raises(ValueError, match="0 sounds"):
        audio_statistics([])
    with pytest.raises(ValueError, match="levels"):
        audio_statistics([usual(), usual(entropy=(1.0,))])


# Mean loudness -20 +- 3 dB, silence up to 0.2 in 95 of 100, entropy 4 +- 0.5 and 6 +- 0.1 bits, repeats up to 0.2 s.
REFERENCE = {
    "sounds": 64.0,
    "seconds_mean": 4.0,
    "peak_p95": 1.2,
    "silence_mean": 0.04,
    "silence_p95": 0.2,
    "longest_repeat_seconds_p95": 0.2,
    "rms_db_mean": -20.0,
    "rms_db_std": 3.0,
    "entropy_level_0_mean": 4.0,
    "entropy_level_0_std": 0.5,
    "entropy_level_1_mean": 6.0,
    "entropy_level_1_std": 0.1,
}
NARROW = REFERENCE | {"rms_db_std": 0.1}

LIMITS = [
    # changes of a usual sound on either side of a threshold, the reference, the word that tells
    ({"peak": 1.0}, {"peak": 1.001}, None, "full scale"),
    ({"peak": 1.49}, {"peak": 1.51}, REFERENCE, "mostly up to 1.20"),
    ({"rms_db": -28.9}, {"rms_db": -29.1}, REFERENCE, "9 dB quieter"),
    ({"rms_db": -11.1}, {"rms_db": -10.9}, REFERENCE, "9 dB louder"),
    ({"rms_db": -25.9}, {"rms_db": -26.1}, NARROW, "6 dB quieter"),
    ({"silence": 0.9}, {"silence": 0.91}, None, "91% of the sound is silence:"),
    ({"silence": 0.299}, {"silence": 0.301}, REFERENCE, "30% of the sound is silence (training audio: 4% on average)"),
    ({"silence": 0.999}, {"silence": 1.0}, REFERENCE | {"silence_p95": 1.0}, "all of the sound is silence"),
    ({"longest_repeat_seconds": 1.39}, {"longest_repeat_seconds": 1.41}, None, "repeat for 1.4 s"),
    ({"longest_repeat_seconds": 1.09}, {"longest_repeat_seconds": 1.11}, REFERENCE, "repeat for 1.1 s"),
    ({"entropy": (0.9, 1.0)}, {"entropy": (0.9, 0.99)}, None, "hardly vary (at most 1.0 bits"),
    ({"entropy": (2.51, 6.0)}, {"entropy": (2.49, 6.0)}, REFERENCE, "hardly vary (level 0: 2.5 bits"),
    ({"entropy": (4.0, 5.01)}, {"entropy": (4.0, 4.99)}, REFERENCE, "hardly vary (level 1: 5.0 bits"),
    ({"entropy": (5.49, 6.0)}, {"entropy": (5.51, 6.0)}, REFERENCE, "as noise does (level 0: 5.5 bits"),
]


@pytest.mark.parametrize(("sound", "beyond", "reference", "words"), LIMITS)
def test_a_warning_begins_at_its_threshold(sound, beyond, reference, words):
    assert warnings_for(usual(**sound), reference) == []
    (warning,) = warnings_for(usual(**beyond), reference)
    assert words in warning
    assert ": try " in warning


@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_a_usual_sound_has_no_warning(reference):
    assert warnings_for(usual(), reference) == []


def test_repeats_in_silence_are_no_fault_of_their_own():
    half_silent = usual(silence=0.5, longest_repeat_seconds=2.0)
    assert warnings_for(half_silent, None) == []


@pytest.mark.parametrize(("seconds", "entropy", "count"), [(2.0, 1.0, 1), (1.9, 1.0, 0), (8.0, 7.0, 1), (8.1, 7.0, 0)])
def test_entropies_of_other_durations_are_not_compared(seconds, entropy, count):
    sound = usual(seconds=seconds, entropy=(entropy, 6.0), silence=0.0)
    assert len(warnings_for(sound, REFERENCE)) == count


def test_a_short_sound_of_one_moment_is_not_blamed():
    assert warnings_for(usual(seconds=0.3, entropy=(0.0, 0.0)), None) == []


def test_a_silent_sound_is_named_once():
    (warning,) = warnings_for(Health(0.0, -120.0, 1.0, (0.0, 0.0), 4.0, 4.0), REFERENCE)
    assert warning.startswith("all of the sound is silence (training audio: 4% on average)")


@pytest.mark.parametrize(("odd", "count"), [(1, 0), (2, 1)])
def test_half_of_the_levels_must_be_odd(odd, count):
    reference = REFERENCE | {f"entropy_level_{level}_{name}": value for level in range(4)
                             for name, value in (("mean", 5.0), ("std", 0.1))}  # fmt: skip
    for entropy in (1.0, 8.0):
        sound = usual(entropy=(entropy,) * odd + (5.0,) * (4 - odd), seconds=4.0)
        assert len(warnings_for(sound, reference)) == count


def test_levels_that_the_reference_does_not_know_are_not_compared():
    assert warnings_for(usual(entropy=(4.0, 6.0, 0.0)), REFERENCE) == []
